"""Mask classification: merging, matching and losses, each by hand, and in properties."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from model import ModelOutput, build_model
from model.criterion import build_criterion
from model.mask_classification import MaskClassifier, QueryMasks
from model.matching import coarse, frame_targets, match, sample, uncertain_points
from tests.support import LAYER, example, tiny
from utils.errors import ConfigError

CLASSIFIER = {"_delete_": True, "type": "MaskClassifier"}
LOSS = {"type": "MaskClassificationLoss"}


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def query_masks(frames: int = 3, queries: int = 5, foreground: int = 1, size: int = 8, seed: int = 0) -> QueryMasks:
    g = torch.Generator().manual_seed(seed)
    return QueryMasks(
        torch.randn(frames, queries, foreground + 1, generator=g).requires_grad_(),
        torch.randn(frames, queries, size, size, generator=g).requires_grad_(),
    )


def output(*layers: QueryMasks, num_classes: int = 1, scale: int = 4) -> ModelOutput:
    frames, _, height, width = layers[-1].mask_logits.shape
    logits = torch.zeros(frames, num_classes, scale * height, scale * width)
    return ModelOutput(logits, torch.zeros(frames, 2, height, width), torch.zeros(()), query_masks=layers)


def squares(num_frames: int = 3, size: int = 32, empty: tuple[int, ...] = ()) -> torch.Tensor:
    masks = torch.zeros(num_frames, size, size, dtype=torch.uint8)
    for frame in set(range(num_frames)) - set(empty):
        masks[frame, 4 * frame + 2 : 4 * frame + 13, 5:19] = 1
    return masks


def criterion(num_classes: int = 1, **options: Any) -> torch.nn.Module:
    return build_criterion({**LOSS, "mix_weight": 0.0, **options}, num_classes)


def test_the_semantic_sum_of_one_pixel_by_hand() -> None:
    probability = torch.tensor([[[0.6, 0.4], [0.3, 0.7]]])  # of two queries: sounding, no object
    masks = torch.tensor([0.9, 0.2]).logit().view(1, 2, 1, 1)
    found = QueryMasks(probability.log(), masks)
    logits = MaskClassifier(embed_dim=4, scale_factor=1).merge(found)
    assert float(logits) == pytest.approx(logit(0.6 * 0.9 + 0.3 * 0.2), abs=1e-5)


def test_the_semantic_sum_of_several_classes_by_hand() -> None:
    probability = torch.tensor([[[0.6, 0.3, 0.1], [0.2, 0.1, 0.7]]])
    masks = torch.tensor([0.9, 0.5]).logit().view(1, 2, 1, 1)
    logits = MaskClassifier(embed_dim=4, num_classes=3, scale_factor=1).merge(QueryMasks(probability.log(), masks))
    expected = torch.tensor([(1 - 0.9 * 0.9) * (1 - 0.3 * 0.5), 0.6 * 0.9 + 0.2 * 0.5, 0.3 * 0.9 + 0.1 * 0.5]).log()
    torch.testing.assert_close(logits.flatten(), expected)


@pytest.mark.parametrize("num_classes", [1, 4])
def test_queries_without_object_paint_nothing(num_classes: int) -> None:
    found = query_masks(foreground=max(1, num_classes - 1))
    found.class_logits.data[..., -1] = 12
    found.mask_logits.data[:] = 9
    logits = MaskClassifier(embed_dim=4, num_classes=num_classes).merge(found)
    painted = logits > 0 if num_classes == 1 else logits.argmax(1) > 0
    assert logits.shape == (3, num_classes, 32, 32) and not painted.any()


def test_masks_merged_in_chunks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    head, found = MaskClassifier(embed_dim=4, num_classes=3), query_masks(foreground=2)
    whole = head.merge(found)
    monkeypatch.setattr("model.mask_classification.CHUNK_VALUES", 1)
    torch.testing.assert_close(head.merge(found), whole)


def test_targets_are_the_classes_present_without_background() -> None:
    masks = torch.tensor([[[0, 3], [3, 1]], [[0, 0], [0, 0]], [[2, 2], [2, 2]]], dtype=torch.uint8)
    targets = frame_targets(masks, 3)
    assert targets.valid.tolist() == [[True, True], [False, False], [True, False]]
    assert targets.classes[targets.valid].tolist() == [0, 2, 1]
    assert targets.masks[0].tolist() == [[[0, 0], [0, 1]], [[0, 1], [1, 0]]]
    assert not targets.masks[1].any() and not targets.masks[2, 1].any()
    binary = frame_targets(masks, 1)
    assert binary.valid.tolist() == [[True], [False], [True]] and torch.equal(binary.masks[:, 0], (masks > 0).float())


def test_the_matching_is_the_cheapest_and_survives_nan() -> None:
    # The greedy choice (query 0 for target 0) costs 0 + 9, the best one 1 + 2.
    costs = torch.tensor([[[0.0, 2.0], [1.0, 9.0], [8.0, 9.0]], [[5.0, 0.0], [4.0, 0.0], [torch.nan, 0.0]]])
    (pairs,) = match([costs], torch.tensor([[True, True], [True, False]]))
    assert list(zip(*(index.tolist() for index in pairs), strict=True)) == [(0, 0, 1), (0, 1, 0), (1, 1, 0)]


def test_more_targets_than_queries_leave_the_dearest_out() -> None:
    (pairs,) = match([torch.tensor([[[3.0, 1.0, 2.0]]])], torch.ones(1, 3, dtype=torch.bool))
    assert [index.tolist() for index in pairs] == [[0], [0], [1]]


def test_losses_of_one_frame_by_hand() -> None:
    """Two queries and one target: the second query fits it better and is matched."""
    probability = torch.tensor([[[0.5, 0.5], [0.8, 0.2]]])
    values = torch.tensor([[0.5, 0.5], [0.9, 0.25]])[None, :, None]  # (1, 2, 1, 2): two pixels
    out = output(QueryMasks(probability.log(), values.logit()), scale=1)
    losses = criterion()(out, torch.tensor([[[1, 0]]]))
    class_loss = (-math.log(0.8) - 0.1 * math.log(0.5)) / 1.1
    bce = (-math.log(0.9) - math.log(0.75)) / 2
    dice = 1 - (2 * 0.9 + 1) / (0.9 + 0.25 + 1 + 1)
    assert float(losses["class_loss"]) == pytest.approx(2 * class_loss, rel=1e-5)
    assert float(losses["mask_loss"]) == pytest.approx(5 * bce + 5 * dice, rel=1e-5)
    assert float(losses["total"]) == pytest.approx(2 * class_loss + 5 * bce + 5 * dice, rel=1e-5)


@pytest.mark.parametrize("num_classes", [1, 4])
def test_the_order_of_queries_does_not_matter(num_classes: int) -> None:
    found = query_masks(foreground=max(1, num_classes - 1))
    masks = squares()
    if num_classes > 1:
        masks[:, 20:, 20:], masks[1, :4] = 2, 3
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = QueryMasks(found.class_logits[:, order], found.mask_logits[:, order])
    loss = criterion(num_classes)
    plain, other = (loss(output(x, num_classes=num_classes), masks) for x in (found, permuted))
    for name in plain:
        torch.testing.assert_close(plain[name], other[name])


@pytest.mark.parametrize("num_points", [None, 64])
def test_empty_frames_have_a_gradient_in_the_class_logits_alone(num_points: int | None) -> None:
    found = query_masks()
    criterion(num_points=num_points)(output(found), squares(empty=(0, 2)))["total"].backward()
    touched = found.mask_logits.grad.flatten(1).abs().sum(1)
    assert touched[1] > 0 and not touched[[0, 2]].any()
    no_object = found.class_logits.grad[[0, 2], :, -1]
    assert (no_object < 0).all()

    found = query_masks()
    losses = criterion(num_points=num_points)(output(found), squares(empty=(0, 1, 2)))
    losses["total"].backward()
    assert losses["mask_loss"] == 0 and losses["class_loss"] > 0
    # Zero, not None: processes that wait for each other's gradients need one of every parameter.
    assert found.mask_logits.grad is not None and not found.mask_logits.grad.any()


@pytest.mark.parametrize("num_points", [None, 16])
@pytest.mark.parametrize("num_classes", [1, 4])
def test_unlabelled_frames_change_nothing(num_classes: int, num_points: int | None) -> None:
    found, masks = query_masks(foreground=max(1, num_classes - 1)), squares()
    flag = torch.tensor([1.0, 0, 1])
    loss = criterion(num_classes, num_points=num_points)
    losses = []
    for value in (1, torch.nan):
        found.mask_logits.data[1] = value
        torch.manual_seed(0)
        losses.append(loss(output(found, num_classes=num_classes), masks, flag))
    assert losses[0] == losses[1]
    without = loss(output(found, num_classes=num_classes), masks, torch.zeros(3))
    without["total"].backward()
    assert without["total"] == 0 and not found.class_logits.grad.any()


def test_every_layer_is_matched_and_weighted() -> None:
    early, late = query_masks(seed=1), query_masks(seed=2)
    masks = squares(empty=(1,))
    alone = [criterion()(output(layer), masks) for layer in (early, late)]
    both = criterion(layer_weight=0.5)(output(early, late), masks)
    for name in ("class_loss", "mask_loss"):
        torch.testing.assert_close(both[name], 0.5 * alone[0][name] + alone[1][name])


@pytest.mark.parametrize("num_classes", [1, 4])
def test_two_processes_with_uneven_targets_average_to_one_processs_loss(
    num_classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, masks = query_masks(4, foreground=max(1, num_classes - 1)), squares(4, empty=(0, 1, 3))
    masks[3, 20:, 20:] = max(1, num_classes - 1)
    loss, flag = criterion(num_classes, mix_weight=1.0), torch.tensor([1.0, 0, 1, 1])
    counts: list[torch.Tensor] = []

    def noted(count: torch.Tensor, training: bool) -> torch.Tensor:
        counts.append(count)
        return count

    def parts() -> list[torch.Tensor]:
        halves = (slice(0, 2), slice(2, 4))
        return [
            loss(output(QueryMasks(*(x[rows] for x in found)), num_classes=num_classes), masks[rows], flag[rows])[
                "total"
            ]
            for rows in halves
        ]

    monkeypatch.setattr("model.set_criterion.mean_over_processes", noted)
    whole = loss(output(found, num_classes=num_classes), masks, flag)["total"]
    parts()
    torch.testing.assert_close(counts[0], counts[1] + counts[2])
    monkeypatch.setattr("model.set_criterion.mean_over_processes", lambda *_: counts[0] / 2)
    torch.testing.assert_close(sum(parts()) / 2, whole)


def test_sampled_losses_are_close_to_those_of_all_pixels() -> None:
    """Smooth masks at many uniform points; with uncertainty, points lie where logits are near 0."""
    torch.manual_seed(0)
    smooth = F.interpolate(torch.randn(1, 3, 4, 4), size=(16, 16), mode="bicubic")
    found = QueryMasks(torch.zeros(1, 3, 2), smooth)
    masks = squares(1, 64)
    full = criterion()(output(found), masks)["mask_loss"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.matching.UNCERTAIN_SHARE", 0.0)
        sampled = criterion(num_points=4096)(output(found), masks)["mask_loss"]
    torch.testing.assert_close(sampled, full, rtol=0.03, atol=0)
    at = uncertain_points(smooth[0], 400)
    assert at.shape == (3, 400, 2) and at.min() >= 0 and at.max() <= 1
    values = sample(smooth[0][:, None], at)[:, 0].abs()
    assert values[:, :300].mean() < 0.6 * values[:, 300:].mean()


def test_coarse_targets_hold_the_covered_share() -> None:
    masks = torch.zeros(1, 1, 4, 4)
    masks[0, 0, :3, :2] = 1
    assert coarse(masks, torch.zeros(1, 2, 2)).tolist() == [[[[1.0, 0.0], [0.5, 0.0]]]]


def test_low_precision_predictions_are_summed_in_float32() -> None:
    found, masks = QueryMasks(*(x.detach() for x in query_masks())), squares()
    full = criterion()(output(found), masks)
    rounded = QueryMasks(found.class_logits.bfloat16(), found.mask_logits.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        losses = criterion()(output(rounded), masks)
    assert losses["total"].dtype == torch.float32
    assert float(losses["total"]) == pytest.approx(float(full["total"]), rel=1e-2)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_a_few_steps_fit_one_frame_and_its_silence(num_classes: int) -> None:
    torch.manual_seed(0)
    change = {"mask_head": CLASSIFIER, "deep_supervision": True, "query_generator": {"query_init": "learned"}}
    network = build_model(tiny(change, num_classes=num_classes)).train()
    log_mel, frames = example(2, 64, 64)
    log_mel[1], frames[1] = -4, frames[0]
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    masks[0, 10:40, 20:50] = num_classes if num_classes == 1 else 2
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    loss = criterion(num_classes).train()
    for _ in range(60):
        optimizer.zero_grad()
        loss(network(log_mel, frames), masks)["total"].backward()
        optimizer.step()
    with torch.no_grad():
        logits = network.eval()(log_mel, frames).logits
    classes = (logits[:, 0] > 0).to(masks.dtype) if num_classes == 1 else logits.argmax(1)
    hit = (classes[0] == masks[0]) & (masks[0] > 0)
    assert hit.sum() / ((classes[0] > 0) | (masks[0] > 0)).sum() > 0.9
    assert (classes[1] > 0).float().mean() < 0.02


def test_deep_supervision_leaves_the_published_path_as_it_is() -> None:
    two_layers = {"transformer": {"decoder": {"num_layers": 2, "layer": LAYER}}}
    inputs, found = example(2), []
    for deep in (False, True):
        torch.manual_seed(0)
        network = build_model(tiny({**two_layers, "deep_supervision": deep}))
        torch.manual_seed(1)
        found.append((network.train()(*inputs), network.eval()(*inputs)))
    (plain, plain_eval), (deep_out, deep_eval) = found
    assert torch.equal(plain.logits, deep_out.logits) and torch.equal(plain_eval.logits, deep_eval.logits)
    assert plain.layer_logits == plain_eval.layer_logits == deep_eval.layer_logits == ()
    assert len(deep_out.layer_logits) == 1 and deep_out.layer_logits[0].shape == deep_out.logits.shape


def test_earlier_layers_add_their_mask_loss() -> None:
    masks = squares()
    logits = [torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    feature, zero = torch.zeros(3, 2, 8, 8), torch.zeros(())
    alone = [build_criterion({}, 1)(ModelOutput(x, feature, zero), masks)["mask_loss"] for x in logits]
    out = ModelOutput(logits[2], feature, zero, layer_logits=(logits[0], logits[1]))
    found = build_criterion({"layer_weight": 0.5}, 1)(out, masks)["mask_loss"]
    torch.testing.assert_close(found, 0.5 * (alone[0] + alone[1]) + alone[2])


@pytest.mark.parametrize("change", [{}, {"mask_head": CLASSIFIER}])
def test_every_layer_of_padded_and_chosen_frames(change: dict[str, Any]) -> None:
    two_layers = {"transformer": {"decoder": {"num_layers": 2, "layer": LAYER}}}
    network = build_model(tiny({**two_layers, **change, "deep_supervision": True})).train()
    log_mel, frames = example(3)
    out = network(log_mel, frames, torch.tensor([1, 1, 0.0]), torch.tensor([0, 2]))
    early = [out.layer_logits[0]] if not change else list(out.query_masks[0])
    assert all(len(x) == 2 and x[0].any() and not x[1].any() for x in early)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weight": -1}, "class_weight=-1 is not a weight"),
        ({"layer_weight": float("inf")}, "layer_weight=inf is not a weight"),
        ({"num_points": 2}, "num_points=2 is too few"),
        ({"num_points": 0.5}, "num_points=0.5 is not a number of points"),
        ({"mask_los": 1}, "loss.mask_los is not an option of MaskClassificationLoss"),
    ],
)
def test_errors_of_the_loss_name_key_and_value(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        criterion(**options)


def test_errors_of_the_mask_head_name_key_and_value() -> None:
    with pytest.raises(ConfigError, match=r"mask_head \(MaskClassifier\): hidden_dim=0 must be at least 1"):
        build_model(tiny({"mask_head": {**CLASSIFIER, "hidden_dim": 0}}))


def test_mask_head_and_loss_that_do_not_fit_name_the_way_out() -> None:
    found, masks = query_masks(), squares()
    with pytest.raises(ConfigError, match="type='MaskClassificationLoss'"):
        build_criterion({}, 1)(output(found), masks)
    with pytest.raises(ConfigError, match="type='MaskClassifier'"):
        criterion()(output(found)._replace(query_masks=()), masks)
    with pytest.raises(ValueError, match="queries have 1 classes and 'no object', the criterion was built for 70"):
        criterion(71)(output(found), masks)
    with pytest.raises(ValueError, match=r"masks of shape \(3, 16, 16\)"):
        criterion()(output(found), masks[:, ::2, ::2])
