"""The front ends of the audio encoders: their numbers, their silence, and which files a data set reads for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import soundfile
import torch

from dataloader import build_dataset
from dataloader.audio import VGGISH, FrontEnd, LogMelCache, log_mel
from dataloader.audio_ablation import ReplacedSound
from dataloader.front_ends import AISFX, FRONT_ENDS, aisfx_log_mel, front_end
from utils.config import load_config
from utils.errors import ConfigError, DataError

Splits = Callable[..., dict[str, Any]]

each_front_end = pytest.mark.parametrize("each", list(FRONT_ENDS.values()), ids=list(FRONT_ENDS))


def chirps(seconds: float, rate: int) -> np.ndarray:
    """(n,) float64: a tone whose pitch and loudness change, over a little noise."""
    time = np.arange(round(seconds * rate)) / rate
    tone = np.sin(2 * np.pi * (200 + 300 * time) * time) * (0.3 + 0.2 * np.sin(2 * time))
    return tone + np.random.default_rng(0).normal(0, 0.01, len(time))


def librosa_aisfx(signal: np.ndarray, second: int) -> np.ndarray:
    """(41, 96): aiSFX's input for one window of a signal at 44.1 kHz, computed by librosa."""
    window = signal[second * 44_100 :][: int(0.96 * 44_100)].astype(np.float32)
    power = librosa.feature.melspectrogram(
        y=window / np.abs(window).max(), sr=44_100, n_mels=96, norm=1.0, fmin=0, fmax=22_050, htk=True,
        hop_length=1024, win_length=2048,
    )  # fmt: skip
    return np.log10(power * 10_000 + 1).T[:41] / 9.457798957824707


def test_aisfx_log_mel_equals_librosa_s() -> None:
    signal = chirps(3.0, 44_100)
    mine = aisfx_log_mel(signal, 44_100, 3)
    for second in range(3):
        expected = torch.from_numpy(librosa_aisfx(signal, second)).float()
        torch.testing.assert_close(mine[second, 0, : len(expected)], expected, rtol=0, atol=1e-5)
        assert len(expected) == 41


def test_aisfx_resamples_to_44_1_khz() -> None:
    """A tone sampled at 16 kHz and at 44.1 kHz has the same log-mel up to 7 kHz."""
    low, high = (
        aisfx_log_mel(np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate), rate, 2) for rate in (16_000, 44_100)
    )
    peak = high[1, 0, 20].argmax()
    assert low[1, 0, 20].argmax() == peak
    torch.testing.assert_close(low[1, 0, 5:36, peak], high[1, 0, 5:36, peak], rtol=0, atol=1e-2)


def test_aisfx_windows_start_at_whole_seconds() -> None:
    signal = np.zeros(5 * 44_100)
    signal[round(2.97 * 44_100) : round(2.99 * 44_100)] = 0.9  # in the 40 ms between two windows
    assert not aisfx_log_mel(signal, 44_100, 5).any()
    signal[round(3.01 * 44_100) : round(3.05 * 44_100)] = 0.9
    assert aisfx_log_mel(signal, 44_100, 5).flatten(1).any(dim=1).tolist() == [False, False, False, True, False]


def test_aisfx_marks_silent_windows_by_zeros() -> None:
    sound = chirps(1.0, 44_100)
    quiet = np.random.default_rng(0).normal(0, 0.004, 44_100)  # below an RMS of 0.005
    mel = aisfx_log_mel(np.concatenate([sound, quiet, np.zeros(44_100), 1.5 * quiet]), 44_100, 4)
    assert mel.flatten(1).any(dim=1).tolist() == [True, False, False, True]


def test_vggish_is_log_mel_itself() -> None:
    samples = np.round(chirps(5.0, 22_050)[:, None] * 20_000).astype(np.int16)
    assert torch.equal(VGGISH.patches(samples, 22_050, 5), log_mel(samples, 22_050)[:5])


@each_front_end
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_length_is_enough_for_all_patches(each: FrontEnd, rate: int) -> None:
    for patches in (1, 5):
        samples = chirps(6.0, rate)
        exact = each.patches(samples[: each.length(patches, rate)], rate, patches)
        assert exact.shape == (patches, *each.shape) and exact.dtype == torch.float32
        torch.testing.assert_close(exact[:, :, :-2], each.patches(samples, rate, patches)[:, :, :-2], rtol=0, atol=1e-2)


def test_an_unknown_front_end_is_named_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'aisfy' is not an audio front end: did you mean 'aisfx'"):
        front_end("aisfy")


def test_cached_log_mels_of_two_front_ends_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    soundfile.write(path, chirps(5.0, 16_000), 16_000)
    for _ in range(2):
        for each in (VGGISH, AISFX):
            assert LogMelCache(tmp_path / "cache", each).get(path, patches=5).shape == (5, *each.shape)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
@each_front_end
def test_items_have_the_front_end_s_log_mel(
    drawn: Path, tmp_path: Path, splits: Splits, task: str, each: FrontEnd
) -> None:
    dataset = build_dataset(splits(drawn, task, front_end=each.name, cache_dir=str(tmp_path))["val"])
    item = dataset[0]
    real = int(item["vid_temporal_mask_flag"].sum())
    assert item["log_mel"].shape == (dataset.num_frames, *each.shape) and item["log_mel"].dtype == torch.float32
    assert item["log_mel"][:real].any() and not item["log_mel"][real:].any()


def test_stored_log_mels_are_vggish_s(own: Path, tmp_path: Path, splits: Splits) -> None:
    clip = build_dataset(splits(own, "ms3", cache_dir=str(tmp_path))["val"]).clips[0]
    clip.log_mel.parent.mkdir(parents=True, exist_ok=True)
    clip.log_mel.write_bytes(b"no pickle")
    aisfx = build_dataset(splits(own, "ms3", cache_dir=str(tmp_path), front_end="aisfx")["val"])
    assert aisfx.read_log_mel(aisfx.clips[0]).shape == (5, 1, 41, 96)
    assert not aisfx.uses_log_mel_file(clip)
    clip.wav.unlink()
    with pytest.raises(
        DataError, match=r"\.wav is missing; .*\.pkl is VGGish's log-mel, and front_end='aisfx' needs the wave"
    ):
        aisfx.read_log_mel(aisfx.clips[0])
    with pytest.raises(ConfigError, match=r"audio='log_mel' reads VGGish's log-mels.*front_end='aisfx'.*audio='wav'"):
        build_dataset(splits(own, "ms3", audio="log_mel", front_end="aisfx")["val"])


@each_front_end
def test_audio_ablations_use_the_data_set_s_front_end(
    drawn: Path, tmp_path: Path, splits: Splits, each: FrontEnd
) -> None:
    dataset = build_dataset(splits(drawn, "ms3", front_end=each.name, cache_dir=str(tmp_path))["val"])
    silence, noise, shuffled = (
        ReplacedSound(dataset, sound, 0)[0]["log_mel"] for sound in ("silence", "noise", "shuffled")
    )
    own = dataset[0]["log_mel"]
    assert silence.shape == noise.shape == shuffled.shape == own.shape
    assert torch.equal(silence, each.patches(np.zeros(100_000), 16_000, 5))
    assert not torch.equal(noise, own) and not torch.equal(shuffled, own) and bool(noise.any())


def test_a_config_s_data_sets_follow_its_audio_encoder() -> None:
    path, encoder = "config/ms3/MoDAT_pvt2_ms3.py", ["model.audio_encoder.type=AiSFX"]
    assert all("front_end" not in load_config(path).dataset[split] for split in ("train", "val", "test"))
    assert [load_config(path, encoder).dataset[split].front_end for split in ("train", "val", "test")] == ["aisfx"] * 3
    stated = load_config(path, [*encoder, "dataset.val.front_end=vggish"]).dataset
    assert (stated.train.front_end, stated.val.front_end) == ("aisfx", "vggish")
