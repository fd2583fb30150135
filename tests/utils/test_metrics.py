"""Metrics against the published numbers, their literal definitions, and one process against several."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts.benchmark.literal_metrics import literal_f_score, literal_mask_iou, literal_semantic_sums
from utils.metrics import (
    DatasetScores,
    FScore,
    MaskIoU,
    PaintedShare,
    SemanticScores,
    balanced_score,
    frame_f_curves,
    pr_thresholds,
)

REFERENCE = Path(__file__).parents[1] / "reference" / "losses_metrics.npz"


@pytest.fixture(scope="module")
def ref() -> dict[str, torch.Tensor]:
    with np.load(REFERENCE) as file:
        return {key: torch.from_numpy(file[key]) for key in file}


def frames(n=6, size=16, classes=1, seed=0, empty=()):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, classes, size, size, generator=g)
    target = torch.randint(0, max(2, classes), (n, size, size), generator=g, dtype=torch.uint8)
    for frame in empty:
        target[frame] = 0
    return logits, target


def scored(metric, *args, **kwargs):
    metric.update(*args, **kwargs)
    return metric.compute()


def test_iou_matches_published(ref):
    logits, target = ref["in_logits"], ref["in_gt"][:, 0]
    empty = torch.full_like(logits, -5)
    assert float(scored(MaskIoU(), logits, target)) == pytest.approx(float(ref["metric_iou"]), abs=1e-6)
    assert float(scored(MaskIoU(), logits, target * 0)) == pytest.approx(float(ref["metric_iou_empty_gt"]), abs=1e-6)
    assert float(scored(MaskIoU(), empty, target)) == pytest.approx(float(ref["metric_iou_empty_pred"]), abs=1e-6)


def test_f_score_matches_published_both_ways(ref):
    logits, target = ref["in_logits"], ref["in_gt"][:, 0]
    metric = FScore()
    metric.update(logits[:5], target[:5])
    metric.update(logits[5:], target[5:])
    result = metric.compute()
    assert float(result["f_score"]) == pytest.approx(float(ref["metric_fscore"]), abs=1e-6)
    assert float(result["f_score_per_batch"]) == pytest.approx(float(ref["metric_fscore_batches"].mean()), abs=1e-6)


def test_semantic_scores_match_published(ref):
    metric = SemanticScores(7)
    result = scored(metric, ref["in_avss_logits"], ref["in_avss_label"])
    torch.testing.assert_close(metric.iou_sum.float(), ref["metric_avss_iou_sum"], atol=1e-6, rtol=0)
    torch.testing.assert_close(metric.f_sum.float(), ref["metric_avss_f_sum"], atol=1e-6, rtol=0)
    torch.testing.assert_close(metric.frames.float(), ref["metric_avss_count"], atol=0, rtol=0)
    keys = ("miou", "miou_published_no_background", "f_score", "f_score_published_no_background")
    torch.testing.assert_close(
        torch.stack([result[key] for key in keys]), ref["metric_avss_summary"], atol=1e-6, rtol=0
    )


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 5), size=st.integers(1, 12), seed=st.integers(0, 1000), empty=st.booleans())
def test_binary_metrics_equal_their_literal_definitions(n, size, seed, empty):
    logits, target = frames(n, size, seed=seed, empty=[0] if empty else [])
    logits[:, :, 0] = torch.where(target[:, None, 0] > 0, 40.0, -40.0)  # probabilities 1 and 0 to the last digit
    assert float(scored(FScore(), logits, target)["f_score"]) == pytest.approx(
        float(literal_f_score(logits, target)), abs=1e-7
    )
    assert float(scored(MaskIoU(), logits, target)) == pytest.approx(float(literal_mask_iou(logits, target)), abs=1e-7)


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 4), size=st.integers(1, 8), classes=st.integers(2, 9), seed=st.integers(0, 1000))
def test_semantic_scores_equal_their_literal_definition(n, size, classes, seed):
    logits, target = frames(n, size, classes, seed)
    metric = SemanticScores(classes)
    metric.update(logits, target)
    iou_sum, f_sum, count = literal_semantic_sums(logits, target)
    torch.testing.assert_close(metric.iou_sum, iou_sum)
    torch.testing.assert_close(metric.f_sum, f_sum)
    assert metric.frames.tolist() == count.tolist()


def test_f_curves_are_exact_on_and_beside_every_threshold_and_nan_is_background():
    thresholds = pr_thresholds()
    inf = torch.tensor(torch.inf)
    values = torch.cat([thresholds, thresholds.nextafter(inf), thresholds.nextafter(-inf)]).clamp(0, 1)
    probability = torch.cat([values, torch.full((255,), torch.nan)])
    target = torch.arange(len(probability)) % 3 > 0
    predicted = probability >= thresholds[:, None]  # (255, pixels)
    hits = (predicted & target).sum(1).double()
    precision, recall = (hits / predicted.sum(1)).nan_to_num(0.0), hits / target.sum()
    expected = (1.3 * precision * recall / (0.3 * precision + recall)).nan_to_num(0.0)
    curve = frame_f_curves(probability.view(1, 4, 255), target.view(1, 4, 255))
    torch.testing.assert_close(curve[0], expected, rtol=0, atol=1e-12)


def test_an_empty_frame_scores_its_empty_share_and_is_left_out_of_f():
    logits, target = frames(4, empty=[1])
    logits[1], logits[1, :, :4] = -5, 5
    assert float(scored(MaskIoU(), logits[1:2], target[1:2])) == pytest.approx(0.75)
    others = [0, 2, 3]
    result, expected = scored(FScore(), logits, target), scored(FScore(), logits[others], target[others])
    assert float(result["f_score"]) == pytest.approx(float(expected["f_score"]), abs=1e-7)


def test_a_perfect_prediction_scores_one():
    _, target = frames(3)
    logits = torch.where(target[:, None] > 0, 20.0, -20.0)
    assert float(scored(MaskIoU(), logits, target)) == 1
    assert float(scored(FScore(), logits, target)["f_score"]) == pytest.approx(1)
    result = scored(SemanticScores(2), torch.cat([-logits, logits], 1), target)
    assert float(result["miou"]) == 1 and float(result["f_score"]) == pytest.approx(1)


def test_maximum_is_taken_per_batch_or_once():
    target = torch.ones(2, 4, 4, dtype=torch.uint8)
    target[:, :2] = 0
    sharp = torch.where(target[:1, None] > 0, 0.1, -0.1)  # best threshold near 0.5
    faint = torch.where(target[1:, None] > 0, -3.0, -3.2)  # best threshold near 0.045: the two cannot both be best
    metric = FScore()
    metric.update(sharp, target[:1])
    metric.update(faint, target[1:])
    result = metric.compute()
    assert float(result["f_score_per_batch"]) == pytest.approx(1)
    assert float(result["f_score"]) < 0.95


def test_published_no_background_drops_the_last_class_and_foreground_the_first():
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 0] = 1
    result = scored(SemanticScores(3), logits, torch.zeros(1, 4, 4, dtype=torch.uint8))
    assert float(result["miou"]) == pytest.approx(1 / 3)
    assert float(result["miou_published_no_background"]) == pytest.approx(1 / 2)
    assert float(result["miou_foreground"]) == 0
    assert result["frames_per_class"].tolist() == [1, 0, 0]


METRICS = {"iou": (MaskIoU, 1), "f": (FScore, 1), "semantic": (lambda: SemanticScores(5), 5)}


def values(metric):
    result = metric.compute()
    return {"": result} if isinstance(result, torch.Tensor) else result


@pytest.mark.parametrize("name", METRICS)
def test_flagged_frames_count_nowhere(name):
    make, classes = METRICS[name]
    logits, target = frames(6, classes=classes)
    flag = torch.tensor([1, 0, 1, 1, 0, 1.0])
    flagged, kept = make(), make()
    flagged.update(logits, target, flag)
    flagged.update(logits, target, torch.zeros(6))  # a batch of repeated clips only: no batch at all
    kept.update(logits[flag > 0], target[flag > 0])
    for key, value in values(kept).items():
        torch.testing.assert_close(values(flagged)[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", METRICS)
def test_half_precision_channels_last_and_4d_targets_are_taken(name):
    make, classes = METRICS[name]
    logits, target = frames(4, classes=classes)
    logits = logits.bfloat16()
    expected, found = make(), make()
    expected.update(logits.float(), target)
    found.update(logits.to(memory_format=torch.channels_last), target.long()[:, None])
    for key, value in values(expected).items():
        torch.testing.assert_close(values(found)[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["iou", "f"])
def test_nothing_counted_is_not_a_score(name):
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert all(value.isnan() for value in values(METRICS[name][0]()).values())


@pytest.mark.parametrize("name", METRICS)
def test_reset_forgets(name):
    make, classes = METRICS[name]
    metric = make()
    metric.update(*frames(3, classes=classes, seed=1))
    metric.reset()
    metric.update(*frames(3, classes=classes, seed=2))
    fresh = make()
    fresh.update(*frames(3, classes=classes, seed=2))
    for key, value in values(fresh).items():
        torch.testing.assert_close(values(metric)[key], value, rtol=0, atol=0)


CLIPS, FRAMES_PER_CLIP = 7, 3  # an odd number of clips: with 2 processes the sampler repeats the first


def _clip(index, classes):
    return frames(FRAMES_PER_CLIP, classes=classes, seed=index, empty=[index % 3])


def _share(rank, folder):
    """One of two processes: the clips that DistributedSampler deals out, two at a time, with clip 0 twice over all."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    dealt = ([*range(CLIPS), 0])[rank::2]
    for name, (make, classes) in METRICS.items():
        metric = make()
        for at in range(0, len(dealt), 2):
            clips = dealt[at : at + 2]
            logits, target = (torch.cat(x) for x in zip(*(_clip(c, classes) for c in clips), strict=True))
            repeated = torch.tensor([rank == 1 and at + i == len(dealt) - 1 for i in range(len(clips))])
            flag = (~repeated).repeat_interleave(FRAMES_PER_CLIP)
            batch = {"batch_index": torch.tensor(clips).repeat_interleave(FRAMES_PER_CLIP) // 2} if name == "f" else {}
            metric.update(logits, target, flag, **batch)
        results[name] = values(metric)
    empty = FScore()  # a process without a single batch takes part all the same
    if rank == 0:
        empty.update(*_clip(0, 1))
    results["one process empty"] = empty.compute()
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_count_what_one_counts(tmp_path):
    mp.start_processes(_share, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, (make, classes) in METRICS.items():
        metric = make()
        for at in range(0, CLIPS, 2):
            clips = [_clip(c, classes) for c in range(at, min(at + 2, CLIPS))]
            metric.update(*(torch.cat(x) for x in zip(*clips, strict=True)))
        for key, value in values(metric).items():
            for rank in range(2):
                torch.testing.assert_close(found[rank][name][key], value, rtol=0, atol=1e-7)
    alone = FScore()
    alone.update(*_clip(0, 1))
    assert found[1]["one process empty"] == alone.compute()


def test_misfitting_input_is_refused():
    logits, target = frames(2, classes=3)
    with pytest.raises(ValueError, match=r"expected \(N, 4, H, W\)"):
        SemanticScores(4).update(logits, target)
    with pytest.raises(ValueError, match=r"expected \(N, 1, H, W\)"):
        MaskIoU().update(logits, target)
    with pytest.raises(ValueError, match=r"target of shape \(1, 16, 16\) does not fit"):
        SemanticScores(3).update(logits, target[:1])
    with pytest.raises(ValueError, match=r"frame_flag of shape \(3,\) does not fit 2 frames"):
        SemanticScores(3).update(logits, target, torch.ones(3))
    with pytest.raises(ValueError, match=r"batch_index of shape \(3,\) does not fit 2 frames"):
        FScore().update(logits[:, :1], target, batch_index=torch.ones(3))
    with pytest.raises(ValueError, match="labels are from 0 to 200, but classes are from 0 to 2"):
        SemanticScores(3).update(logits, target.clamp(max=0).index_fill(0, torch.tensor([1]), 200))


def logits_of(rows: list[list[int]]) -> torch.Tensor:
    """One frame of one row per list: 1 is predicted as object."""
    return torch.where(torch.tensor(rows)[:, None, None] > 0, 5.0, -5.0)


def test_painted_share_is_a_mean_over_frames_without_regard_to_the_truth():
    logits = logits_of([[1, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    target = torch.zeros(3, 1, 4)
    assert scored(PaintedShare(), logits, target) == pytest.approx((0.75 + 0 + 1) / 3)
    assert scored(PaintedShare(), logits, 1 - target, torch.tensor([1, 1, 0])) == pytest.approx(0.375)
    assert scored(PaintedShare(), torch.zeros(1, 1, 2, 2), torch.zeros(1, 2, 2)) == 0  # 0.5 is not above 0.5
    classes = torch.tensor([[0, 2, 2, 1]])[:, None]
    semantic = torch.nn.functional.one_hot(classes, 3).movedim(-1, 1).float()
    assert scored(PaintedShare(), semantic, torch.zeros(1, 1, 4)) == pytest.approx(0.75)


def test_dataset_scores_sum_pixels_over_the_set_where_avsbench_averages_frames():
    logits = logits_of([[1, 1, 1, 1], [1, 0, 0, 0]])
    target = torch.tensor([[[1, 1, 1, 0]], [[0, 0, 1, 1]]])
    found = scored(DatasetScores(1), logits, target)
    # Object: 3 pixels hit, 5 predicted, 5 true. Background: 1 hit, 3 predicted, 3 true.
    assert found["miou_dataset"] == pytest.approx((3 / 7 + 1 / 5) / 2)
    assert found["f_dataset"] == pytest.approx((3 / 5 + 1 / 3) / 2)
    assert found["jf_dataset"] == pytest.approx((found["miou_dataset"] + found["f_dataset"]) / 2)
    assert scored(MaskIoU(), logits, target) == pytest.approx((3 / 4 + 0) / 2)
    first = scored(DatasetScores(1), logits, target, torch.tensor([1, 0]))
    assert first["miou_dataset"] == pytest.approx((3 / 4 + 0) / 2)


def test_dataset_scores_leave_out_classes_that_do_not_occur():
    classes = torch.tensor([[[0, 0, 2, 2]], [[0, 2, 2, 2]]])
    logits = torch.nn.functional.one_hot(classes, 4).movedim(-1, 1).float()
    target = torch.tensor([[[0, 2, 2, 2]], [[0, 2, 2, 2]]])
    metric = DatasetScores(4)
    for frame in range(2):
        metric.update(logits[frame : frame + 1], target[frame : frame + 1])
    assert metric.compute()["miou_dataset"] == pytest.approx((2 / 3 + 5 / 6) / 2)  # background, class 2


@pytest.mark.parametrize(
    ("positive", "negative", "expected"),
    [(0.862, 0.862, 0.2379), (1.0, 0.0, 1.0), (0.5, 0.0, 2 / 3), (0.8, 1.0, 0.0), (0.0, 1.0, 0.0)],
)
def test_a_balanced_score_rewards_seeing_with_sound_and_not_without(positive, negative, expected):
    assert balanced_score(positive, negative) == pytest.approx(expected, abs=5e-5)
