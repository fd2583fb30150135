"""The order of clips is a function of seed and epoch, for any number of processes, and can be taken up midway."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataloader.data_module import ClipBatchSampler, DataModule
from utils.errors import ConfigError

Splits = Callable[..., dict[str, Any]]


def module(
    drawn: Path, splits: Splits, task: str = "ms3", *, workers: int = 0, seed: int = 0, **more: Any
) -> DataModule:
    return DataModule(
        {"dataset": splits(drawn, task, batch_size=2, **more), "process": {"num_workers": workers, "seed": seed}}
    )


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


def names(loader: Any, epoch: int = 0) -> list[list[str]]:
    loader.batch_sampler.set_epoch(epoch)
    return [batch["name"] for batch in loader]


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_batches_have_a_leading_axis_of_clips(drawn: Path, splits: Splits, task: str) -> None:
    batch = next(iter(module(drawn, splits, task).loader("train", shuffle=True)))
    frames = 10 if task == "avss" else 5
    assert batch["frames"].shape == (2, frames, 3, 48, 48) and batch["masks"].shape == (2, frames, 48, 48)
    assert len(batch["name"]) == 2


def test_the_order_depends_on_seed_and_epoch_alone(drawn: Path, splits: Splits) -> None:
    first = [names(module(drawn, splits).loader("train", shuffle=True), epoch) for epoch in range(5)]
    torch.manual_seed(99)
    assert [names(module(drawn, splits).loader("train", shuffle=True), epoch) for epoch in range(5)] == first
    assert len({str(epoch) for epoch in first}) > 1
    assert [names(module(drawn, splits, seed=1).loader("train", shuffle=True), epoch) for epoch in range(5)] != first


def test_validation_and_test_keep_the_table_s_order(drawn: Path, splits: Splits) -> None:
    data = module(drawn, splits)
    for split, loader in (("val", data.loader("val")), ("test", data.loader("test"))):
        assert flat(names(loader, epoch=3)) == [clip.name for clip in data.dataset(split).clips]


def test_workers_give_the_same_batches(drawn: Path, splits: Splits) -> None:
    alone, helped = (module(drawn, splits, workers=count, flip=True).loader("train", shuffle=True) for count in (0, 1))
    for epoch in range(2):
        for loader in (alone, helped):
            loader.batch_sampler.set_epoch(epoch)
        for one, other in zip(alone, helped, strict=True):
            assert one["name"] == other["name"]
            assert torch.equal(one["frames"], other["frames"]) and torch.equal(one["log_mel"], other["log_mel"])


@given(
    clips=st.integers(1, 40),
    batch=st.integers(1, 5),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    drop_last=st.booleans(),
)
def test_processes_share_what_one_would_see(clips: int, batch: int, world: int, epoch: int, drop_last: bool) -> None:
    def batches(size: int, rank: int = 0, of: int = 1) -> list[list[int]]:
        sampler = ClipBatchSampler(clips, size, shuffle=True, seed=5, drop_last=drop_last, rank=rank, world_size=of)
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler))
        return list(sampler)

    ranks = [batches(batch, rank, world) for rank in range(world)]
    assert len({len(each) for each in ranks}) == 1
    together = [sorted(flat(step)) for step in zip(*ranks, strict=True)]
    alone = [sorted(step) for step in batches(batch * world)]
    assert together[:-1] == alone[:-1]
    if clips % world == 0:
        assert together == alone
    else:
        assert not alone or set(alone[-1]) <= set(together[-1]) or drop_last


@given(clips=st.integers(0, 40), batch=st.integers(1, 5), world=st.integers(1, 4))
def test_evaluation_sees_every_clip_once_in_the_batches_of_one_process(clips: int, batch: int, world: int) -> None:
    alone = list(ClipBatchSampler(clips, batch, shuffle=False))
    ranks = [list(ClipBatchSampler(clips, batch, shuffle=False, rank=rank, world_size=world)) for rank in range(world)]
    assert sorted(flat(ranks)) == alone
    assert flat(alone) == list(range(clips))


@given(skip=st.integers(0, 12))
def test_skipping_takes_up_an_epoch_in_the_middle_once(skip: int) -> None:
    sampler = ClipBatchSampler(20, 2, shuffle=True, seed=3)
    whole = list(sampler)
    sampler.skip(skip)
    assert len(sampler) == 10
    assert list(sampler) == whole[skip:]
    assert list(sampler) == whole


def test_overrides_reach_all_splits(drawn: Path, splits: Splits) -> None:
    data = DataModule(
        {"dataset": splits(drawn, "ms3", audio="auto"), "process": {}}, overrides={"audio": "wav", "img_size": (16, 16)}
    )
    assert data.dataset("train").audio == data.dataset("test").audio == "wav"
    assert data.dataset("val")[0]["frames"].shape == (5, 3, 16, 16)


def test_a_split_that_the_config_lacks_is_named(drawn: Path, splits: Splits) -> None:
    configs = {key: value for key, value in splits(drawn, "ms3").items() if key != "test"}
    data = DataModule({"dataset": configs, "process": {}})
    with pytest.raises(ConfigError, match=r"dataset\.test"):
        data.dataset("test")


def test_single_frames_are_items_of_their_own(drawn: Path, splits: Splits) -> None:
    whole = module(drawn, splits)
    single = module(drawn, splits, single_frames=True, flip=True)
    loader = single.loader("train", shuffle=True)
    batches = list(loader)
    clips = {item["name"]: item for item in (whole.dataset("train")[i] for i in range(4))}
    assert sum(len(batch["name"]) for batch in batches) == 4 * 5 and batches[0]["frames"].shape[:2] == (2, 1)
    seen = set()
    for batch in batches:
        for name, frames, masks, log_mel in zip(
            batch["name"], batch["frames"], batch["masks"], batch["log_mel"], strict=True
        ):
            clip = clips[name]
            found = [t for t in range(5) if torch.equal(clip["log_mel"][t], log_mel[0])]
            plain = [t for t in found if torch.equal(clip["frames"][t], frames[0])]
            mirrored = [t for t in found if torch.equal(clip["frames"][t].flip(-1), frames[0])]
            assert plain or mirrored
            at = (plain or mirrored)[0]
            assert torch.equal(masks[0], clip["masks"][at] if plain else clip["masks"][at].flip(-1))
            seen.add((name, at))
    assert len(seen) > 10, "frames of all clips appear"
    assert single.loader("val").dataset is single.dataset("val"), "evaluation sees whole clips"
