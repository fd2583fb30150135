"""The criterion against the published losses and gradients, and in cases where the published one fails."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from model.criterion import bce_dice_loss, bce_loss, build_criterion, dice_loss
from utils.errors import ConfigError

REFERENCE = Path(__file__).parents[1] / "reference" / "losses_metrics.npz"


@pytest.fixture(scope="module")
def ref() -> dict[str, np.ndarray]:
    with np.load(REFERENCE) as file:
        return {key: file[key] for key in file}


def output(logits, mask_feature, aux_loss=0.0):
    return SimpleNamespace(
        logits=torch.as_tensor(logits).float(),
        mask_feature=torch.as_tensor(mask_feature).float(),
        aux_loss=torch.as_tensor(aux_loss),
        layer_logits=(),
        query_masks=(),
    )


def random_batch(classes=1, n=4, size=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = output(torch.randn(n, classes, size, size, generator=g), torch.randn(n, 3, size // 4, size // 4, generator=g))
    masks = torch.randint(0, max(classes, 2), (n, size, size), generator=g, dtype=torch.uint8)
    return out, masks


def parts(losses):
    return [losses[key].item() for key in ("total", "mask_loss", "mix_loss")]


@pytest.mark.parametrize("mask_loss", ["dice", "bce"])
@pytest.mark.parametrize("task", ["s4", "ms3"])
def test_binary_losses_match_published(ref, task, mask_loss):
    out = output(ref["in_logits"], ref["in_mask_feature"])
    flag = torch.ones(10) if task == "ms3" else torch.tensor([1.0, 0, 0, 0, 0] * 2)
    losses = build_criterion({"mask_loss": mask_loss}, 1)(out, torch.from_numpy(ref["in_gt"][:, 0]), flag)
    np.testing.assert_allclose(parts(losses), ref[f"loss_{task}_{mask_loss}"], atol=1e-5)


def test_gradient_matches_published(ref):
    out = output(ref["in_logits"], ref["in_mask_feature"])
    out.logits.requires_grad_()
    build_criterion({}, 1)(out, torch.from_numpy(ref["in_gt"][:, 0]))["total"].backward()
    expected = ref["loss_ms3_dice_grad"]
    found = out.logits.grad[:, :, ::12, ::12].numpy()
    assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def test_semantic_losses_match_published(ref):
    out = output(ref["in_avss_logits"], ref["in_avss_mask_feature"])
    losses = build_criterion({}, 7)(out, torch.from_numpy(ref["in_avss_label"]), torch.from_numpy(ref["in_avss_flag"]))
    np.testing.assert_allclose(parts(losses), ref["loss_avss"], atol=1e-5)


@pytest.mark.parametrize("classes", [1, 5])
def test_frames_without_label_change_nothing_and_get_no_gradient(classes):
    out, masks = random_batch(classes)
    flag = torch.tensor([1.0, 0, 1, 0])
    criterion = build_criterion({}, classes)
    before = criterion(out, masks, flag)
    out.logits[1], out.mask_feature[3], masks[1] = torch.nan, torch.inf, 1
    out.logits.requires_grad_()
    after = criterion(out, masks, flag)
    assert parts(before) == parts(after)
    after["total"].backward()
    assert out.logits.grad[flag == 0].eq(0).all() and out.logits.grad[flag == 1].abs().sum() > 0


@pytest.mark.parametrize("classes", [1, 5])
def test_batch_without_any_label_costs_only_balance_and_can_step(classes):
    out, masks = random_batch(classes)
    out.logits.requires_grad_()
    out.aux_loss = torch.tensor(0.25)
    losses = build_criterion({}, classes)(out, masks, torch.zeros(4))
    assert [v.item() for v in losses.values()] == [0.25, 0, 0, 0.25]
    losses["total"].backward()
    assert out.logits.grad.eq(0).all()


def test_total_is_the_sum_of_its_weighted_parts():
    out, masks = random_batch()
    out.aux_loss = torch.tensor(0.5)
    plain = build_criterion({"mask_weight": 1.0, "mix_weight": 1.0}, 1)(out, masks)
    losses = build_criterion({"mask_weight": 2.0, "mix_weight": 0.5}, 1)(out, masks)
    assert float(losses["mask_loss"]) == pytest.approx(2 * float(plain["mask_loss"]))
    assert float(losses["mix_loss"]) == pytest.approx(0.5 * float(plain["mix_loss"]))
    assert float(losses["balance_loss"]) == 0.5
    assert float(losses["total"]) == pytest.approx(sum(float(losses[k]) for k in losses if k != "total"))


def test_dice_is_zero_for_a_perfect_mask_and_one_for_a_disjoint_one():
    target = torch.zeros(1, 8, 8)
    target[:, :4] = 1
    logits = torch.where(target > 0, 50.0, -50.0)
    assert float(dice_loss(logits, target)) == pytest.approx(0, abs=1e-4)
    assert float(dice_loss(-logits, target)) == pytest.approx(1)


def test_half_precision_logits_are_summed_in_float32():
    out, masks = random_batch(5)
    full = build_criterion({}, 5)(out, masks)
    out.logits, out.mask_feature = out.logits.bfloat16(), out.mask_feature.bfloat16()
    losses = build_criterion({}, 5)(out, masks)
    assert losses["total"].dtype == torch.float32
    assert float(losses["total"]) == pytest.approx(float(full["total"]), rel=1e-2)


def _uneven_gradients(rank, folder):
    """One of two processes: clips with 1 and 3 labelled frames, gradients averaged as DDP does."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    out, masks = random_batch(5)
    flag = torch.tensor([1.0, 0, 1, 1])
    weight = torch.ones((), requires_grad=True)
    rows = slice(2 * rank, 2 * rank + 2)
    local = output(out.logits[rows] * weight, out.mask_feature[rows] * weight, out.aux_loss)
    build_criterion({}, 5).train()(local, masks[rows], flag[rows])["total"].backward()
    torch.distributed.all_reduce(weight.grad)
    if rank == 0:
        torch.save(weight.grad / 2, f"{folder}/gradient.pt")
        # Evaluation must not wait for the other process, which may have fewer batches.
        build_criterion({}, 5).eval()(local, masks[rows], flag[rows])
    torch.distributed.destroy_process_group()


def test_two_processes_with_uneven_labels_give_one_processs_gradient(tmp_path):
    mp.start_processes(_uneven_gradients, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    out, masks = random_batch(5)
    weight = torch.ones((), requires_grad=True)
    whole = output(out.logits * weight, out.mask_feature * weight, out.aux_loss)
    build_criterion({}, 5)(whole, masks, torch.tensor([1.0, 0, 1, 1]))["total"].backward()
    assert float(torch.load(tmp_path / "gradient.pt")) == pytest.approx(float(weight.grad), rel=1e-6)


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"mask_loss": "dicee"}, "mask_loss='dicee' is not a loss; did you mean 'dice'?"),
        ({"weights": {}}, "loss.weights is not an option of SegmentationLoss"),
        ({"type": "DiceLoss"}, "loss.type='DiceLoss' is not a registered model"),
        ({"mask_weight": -1}, "mask_weight=-1 is not a weight"),
        ({"mix_weight": float("nan")}, "mix_weight=nan is not a weight"),
    ],
)
def test_config_errors_name_key_and_value(cfg, message):
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        build_criterion(cfg, 1)


def test_shapes_that_do_not_fit_are_refused():
    out, masks = random_batch(5)
    with pytest.raises(ValueError, match="5 classes, the criterion was built for 1"):
        build_criterion({}, 1)(out, masks)
    with pytest.raises(ValueError, match=r"masks of shape \(4, 6, 6\)"):
        build_criterion({}, 5)(out, masks[:, ::2, ::2])
    with pytest.raises(ValueError, match=r"label_mask of shape \(2,\)"):
        build_criterion({}, 5)(out, masks, torch.ones(2))


def test_bce_with_dice_has_a_gradient_in_a_frame_without_object() -> None:
    logits = torch.zeros(2, 4, 4, requires_grad=True)
    target = torch.zeros(2, 4, 4)
    target[1, :2] = 1
    loss = bce_dice_loss(logits, target)
    torch.testing.assert_close(loss, 2 * bce_loss(logits, target) + dice_loss(logits, target, smooth=0.5))
    (only_dice,) = torch.autograd.grad(dice_loss(logits, target)[0], logits)
    (both,) = torch.autograd.grad(loss[0], logits)
    assert only_dice[0].abs().max() < 1e-3 < both[0].min()
