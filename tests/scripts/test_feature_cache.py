"""A frozen network is asked once for each clip."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dataloader import build_dataset
from dataloader.negatives import NOISES
from model.checkpoint import weights_hash
from model.vggish import VGGish
from scripts.engine.feature_cache import FrozenFeatures, KnownFeatures
from tests.runs import finish, make_data, write_config


def features(network: nn.Module, folder: Path) -> Callable[[Tensor], Tensor]:
    cache = FrozenFeatures(network, folder, in_memory=True)
    return lambda clips: cache(clips)[0]


class Counting(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.vggish = VGGish(channels=(4, 4, 8, 8), hidden_dim=16, audio_dim=8)
        self.calls = 0

    def forward(self, log_mel: Tensor) -> Tensor:
        self.calls += 1
        return self.vggish(log_mel)


def sounds() -> Tensor:
    return torch.randn(3, 5, 1, 96, 64, generator=torch.Generator().manual_seed(0))


def test_embeddings_are_vggishs_and_computed_once(tmp_path: Path) -> None:
    vggish = Counting(0)
    embeddings = features(vggish, tmp_path)
    first = embeddings(sounds())
    torch.testing.assert_close(first, vggish.vggish(sounds().flatten(0, 1)), rtol=1e-5, atol=1e-6)
    assert first.std() > 0 and vggish.calls == 3
    assert torch.equal(embeddings(sounds().flip(0)), first.view(3, 5, -1).flip(0).flatten(0, 1)) and vggish.calls == 3

    again = features(vggish, tmp_path)
    assert torch.equal(again(sounds()), first) and vggish.calls == 3


def test_a_clips_embedding_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    vggish = Counting(0)
    together = features(vggish, tmp_path / "a")(sounds())
    alone = [features(vggish, tmp_path / "b")(clip[None]) for clip in sounds()]
    assert torch.equal(torch.cat(alone), together)


def test_a_full_disk_costs_time_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("scripts.engine.feature_cache.save_file", fail)
    vggish = Counting(0)
    first = features(vggish, tmp_path)(sounds())
    assert torch.equal(features(vggish, tmp_path)(sounds()), first) and vggish.calls == 6
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    vggish = Counting(0)
    first = features(vggish, tmp_path)(sounds())
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-6])
    assert torch.equal(features(vggish, tmp_path)(sounds()), first) and vggish.calls == 6


def test_other_weights_never_share_embeddings(tmp_path: Path) -> None:
    one, other = Counting(0), Counting(1)
    assert weights_hash(one) != weights_hash(other) and weights_hash(one) == weights_hash(Counting(0))
    assert not torch.equal(features(one, tmp_path)(sounds()), features(other, tmp_path)(sounds()))
    assert other.calls == 3


class TwoMaps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm2d(3), nn.Dropout(0.5)

    def forward(self, frames: Tensor) -> list[Tensor]:
        fine = self.dropout(self.norm(frames))
        return [fine, fine[:, :1, ::2, ::2]]


def test_maps_of_a_training_network_are_those_of_its_evaluation(tmp_path: Path) -> None:
    network, clips = TwoMaps().train(), torch.randn(2, 5, 3, 8, 8)
    first = FrozenFeatures(network, tmp_path, in_memory=False)(clips)
    assert network.norm.training and int(network.norm.num_batches_tracked) == 0
    for found, expected in zip(first, network.eval()(clips.flatten(0, 1)), strict=True):
        torch.testing.assert_close(found, expected)
    again = FrozenFeatures(network, tmp_path, in_memory=False)(clips)
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_a_run_reads_the_maps_of_a_frozen_backbone(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", clips=(2, 1, 1), tasks=("ms3",))
    losses = []
    for name, process in (("kept", "cache_backbone=True"), ("plain", "cache_features=False")):
        config = write_config(tmp_path / name / "tiny.py", data, batch_size=1, freeze_epochs=2, process=process)
        finish("ms3", config)
        losses.append(pd.read_csv(config.parent / "work_dir/tiny/metrics.csv")["train_total"].dropna().to_numpy())
    cache = tmp_path / "kept/work_dir/.backbone_cache"
    assert len(list(cache.rglob("*.safetensors"))) == 3  # two clips to train with, one to validate, in two epochs
    assert not (tmp_path / "plain/work_dir/.backbone_cache").exists()
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)  # this backbone has no stochastic depth


def test_features_of_augmented_inputs_are_computed_and_not_kept(tmp_path: Path) -> None:
    vggish = Counting(0)
    cache = FrozenFeatures(vggish, tmp_path, in_memory=True, per_frame=True)
    changed = torch.zeros(3, 5, dtype=torch.bool)
    changed[1, 2:4] = True
    first = cache(sounds(), changed)[0]
    torch.testing.assert_close(first, vggish.vggish(sounds().flatten(0, 1)), rtol=1e-5, atol=1e-6)
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(cache._memory) == 13 and vggish.calls == 15
    assert torch.equal(cache(sounds(), changed)[0], first) and vggish.calls == 17  # the two changed windows again

    maps = FrozenFeatures(TwoMaps(), tmp_path / "maps", in_memory=False)
    known = KnownFeatures(cache, maps)
    batch = {"log_mel": sounds(), "frames": torch.randn(3, 5, 3, 8, 8)}
    known({**batch, "changed_sound": changed, "changed_frames": torch.tensor([True, False, True])})
    assert len(list((tmp_path / "maps").rglob("*.safetensors"))) == 1
    known(batch)
    assert len(list((tmp_path / "maps").rglob("*.safetensors"))) == 3


def test_negatives_come_again_from_the_cache(own: Path, splits: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    data = build_dataset({**splits(own, "ms3")["train"], "negatives": {"rate": 1.0}})
    vggish = Counting(0)
    known = KnownFeatures(FrozenFeatures(vggish, tmp_path, in_memory=True, per_frame=True), None)
    calls = []
    for epoch in range(90):
        data.set_epoch(epoch)
        known({"log_mel": torch.stack([item["log_mel"] for item in data])})
        calls.append(vggish.calls)
    # The clips' own windows, one of silence, and NOISES noises of five.
    assert calls[-1] <= 4 * 5 + 1 + NOISES * 5
    assert calls[-1] - calls[-30] < 30
