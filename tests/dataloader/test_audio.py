"""The log-mel front end against VGGish's own numbers, and sound files that cannot be trusted."""

import struct
from pathlib import Path

import librosa
import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataloader import audio
from dataloader.audio import VGGISH, LogMelCache, check_log_mel, log_mel, read_wave, samples_for_patches, wave_log_mel
from dataloader.front_ends import AISFX, aisfx_log_mel
from utils.errors import DataError

REFERENCE = np.load(Path(__file__).parents[1] / "reference" / "audio.npz")


def relative_error(mine: torch.Tensor, reference: np.ndarray) -> float:
    return float(np.linalg.norm(mine.numpy() - reference) / np.linalg.norm(reference))


def noise(seconds: float, rate: int = 16_000, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).uniform(-0.5, 0.5, (int(seconds * rate), channels))


def write(path: Path, seconds: float, rate: int = 16_000, channels: int = 1) -> Path:
    soundfile.write(path, noise(seconds, rate, channels), rate, subtype="PCM_16")
    return path


def test_log_mel_equals_vggish_at_16_khz() -> None:
    mine = log_mel(REFERENCE["wave16k"], 16_000)
    assert tuple(mine.shape) == tuple(REFERENCE["logmel16k_shape"]) and mine.dtype == torch.float32
    assert relative_error(mine[:, :, ::6, ::4], REFERENCE["logmel16k"]) < 1e-5


def test_log_mel_equals_vggish_after_resampling_two_channels() -> None:
    assert relative_error(log_mel(REFERENCE["wave44k"], 44_100)[:, :, ::6, ::4], REFERENCE["logmel44k"]) < 1e-4


def test_int16_samples_and_tensors_give_the_same_log_mel() -> None:
    samples = np.round(noise(1.2)[:, 0] * 32768).astype(np.int16)
    expected = log_mel(samples / 32768.0, 16_000)
    assert torch.equal(log_mel(samples, 16_000), expected)
    assert torch.equal(log_mel(torch.from_numpy(samples), 16_000), expected)


def test_patches_do_not_depend_on_what_follows() -> None:
    samples = noise(5.0)
    assert torch.allclose(log_mel(samples, 16_000)[:2], log_mel(samples[: samples_for_patches(2)], 16_000))


@pytest.mark.parametrize("shape", [(10, 2, 3), ()])
def test_log_mel_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(samples,\) or \(samples, channels\)"):
        log_mel(np.zeros(shape), 16_000)


@settings(max_examples=30, deadline=None)
@given(
    length=st.integers(0, 60_000),
    rate=st.sampled_from([8_000, 16_000, 22_050, 48_000]),
    channels=st.integers(0, 3),
    scale=st.sampled_from([0.0, 1e-6, 1.0]),
)
def test_log_mel_of_any_sound_is_finite_whole_patches(length: int, rate: int, channels: int, scale: float) -> None:
    shape = (length, channels) if channels else (length,)
    mel = log_mel(np.random.default_rng(length).uniform(-scale, scale, shape), rate)
    assert tuple(mel.shape[1:]) == (1, 96, 64) and bool(torch.isfinite(mel).all())
    if rate == 16_000:
        assert len(mel) == max(0, (length - 400) // 160 + 1) // 96


@pytest.mark.parametrize("patches", [0, 1, 5, 10])
def test_samples_for_patches_is_the_least_number(patches: int) -> None:
    least = samples_for_patches(patches)
    assert len(log_mel(np.zeros(least), 16_000)) == patches
    if patches:
        assert len(log_mel(np.zeros(least - 1), 16_000)) == patches - 1


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000])
def test_a_clip_gets_its_windows_at_any_rate(tmp_path: Path, rate: int) -> None:
    assert wave_log_mel(write(tmp_path / "a.wav", 5.0, rate, 2), patches=5).shape == (5, 1, 96, 64)


def test_a_sound_a_little_short_ends_in_silence(tmp_path: Path) -> None:
    mel = wave_log_mel(write(tmp_path / "a.wav", 4.2), patches=5)
    assert mel.shape == (5, 1, 96, 64)
    assert torch.allclose(mel[4, 0, -20:], torch.tensor(audio.LOG_OFFSET).log(), atol=1e-4)


def test_a_sound_too_short_is_an_error_with_both_durations(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.wav lasts 2\.00 s, but 5 frames need 4\.8"):
        wave_log_mel(write(tmp_path / "a.wav", 2.0), patches=5)


def test_a_header_that_claims_a_year_is_refused_unread(tmp_path: Path) -> None:
    path = write(tmp_path / "year.wav", 1.0)
    data = bytearray(path.read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", 0xFFFFFFF0)  # 4 GB; at 68 Hz and one byte a sample that is two years
    data[24:28] = struct.pack("<I", 68)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"year\.wav announces .* days, more than max_seconds=60"):
        read_wave(path)


def test_the_word_data_in_a_comment_is_no_announcement(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", 1.0)
    plain = path.read_bytes()
    at = plain.index(b"data")
    comment = b"metadata of two minutes"
    chunk = b"LIST" + struct.pack("<I", len(comment)) + comment + b"\0"  # an odd length is padded
    path.write_bytes(plain[:4] + struct.pack("<I", len(plain) - 8 + len(chunk)) + plain[8:at] + chunk + plain[at:])
    samples, rate = read_wave(path)
    assert (len(samples), rate) == (16_000, 16_000)


def test_a_long_sound_is_refused_and_the_limit_can_be_raised(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", 3.0, 8_000)
    with pytest.raises(DataError, match="announces 3 s, more than max_seconds=2"):
        read_wave(path, max_seconds=2)
    assert read_wave(path, max_seconds=4)[0].shape == (24_000, 1)


def test_a_truncated_sound_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", 5.0)
    path.write_bytes(path.read_bytes()[:60_000])
    with pytest.raises(DataError, match=r"a\.wav"):
        wave_log_mel(path, patches=5)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 79), value=st.integers(0, 255))
def test_a_damaged_header_gives_samples_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = write(tmp_path_factory.mktemp("wav") / "a.wav", 0.05)
    data = bytearray(path.read_bytes())
    data[position] = value
    path.write_bytes(data)
    try:
        samples, rate = read_wave(path)
    except DataError as error:
        assert "a.wav" in str(error)
    else:
        assert samples.dtype == np.int16 and samples.ndim == 2 and rate > 0


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_as_a_sound_give_a_data_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("wav") / "a.wav"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.wav"):
        read_wave(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(5, 1, 64, 96), r"shape \(5, 1, 64, 96\), expected \(5, 1, 96, 64\)"),
        (torch.zeros(4, 1, 96, 64), r"shape \(4, 1, 96, 64\)"),
        (torch.zeros(96, 64), r"shape \(96, 64\)"),
        (torch.zeros(5, 1, 96, 64, dtype=torch.int64), "holds torch.int64"),
        (torch.full((5, 1, 96, 64), float("nan")), "not finite"),
    ],
)
def test_a_stored_log_mel_must_fit(value: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_log_mel(value, "a.pkl", patches=5)


def test_the_cache_answers_without_computing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.wav", 5.0)
    first = LogMelCache(tmp_path / "cache").get(path, patches=5)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(audio, "wave_log_mel", fail)
    assert torch.equal(LogMelCache(tmp_path / "cache").get(path, patches=5), first)


def test_the_cache_follows_a_changed_file(tmp_path: Path) -> None:
    cache = LogMelCache(tmp_path / "cache")
    first = cache.get(write(tmp_path / "a.wav", 5.0), patches=5)
    soundfile.write(tmp_path / "a.wav", np.zeros(90_000), 16_000)
    assert not torch.equal(cache.get(tmp_path / "a.wav", patches=5), first)


def test_a_damaged_cache_file_is_computed_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", 5.0)
    cache = LogMelCache(tmp_path / "cache")
    first = cache.get(path, patches=5)
    (stored,) = (tmp_path / "cache").glob("*.npy")
    for damage in (b"", stored.read_bytes()[:500], b"\x80\x04N."):
        stored.write_bytes(damage)
        assert torch.equal(cache.get(path, patches=5), first)


def test_a_cache_folder_that_cannot_be_written_keeps_results_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.wav", 5.0)
    (tmp_path / "file").write_text("no folder")
    cache = LogMelCache(tmp_path / "file" / "cache")
    first = cache.get(path, patches=5)
    monkeypatch.setattr(audio, "wave_log_mel", lambda *_, **__: pytest.fail("computed again"))
    first_again = cache.get(path, patches=5)
    assert torch.equal(first_again, first)
    first_again.zero_()
    assert torch.equal(cache.get(path, patches=5), first)


def test_a_full_disk_leaves_no_partial_cache_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    mel = LogMelCache(tmp_path / "cache").get(write(tmp_path / "a.wav", 5.0), patches=5)
    assert mel.shape == (5, 1, 96, 64)
    assert list((tmp_path / "cache").iterdir()) == []


def test_aisfx_hears_as_its_weights_were_trained() -> None:
    samples = noise(3.0, 44_100)[:, 0] * np.linspace(0.1, 1, 3 * 44_100)
    found = aisfx_log_mel(samples, 44_100, 2)
    assert found.shape == (2, *AISFX.shape) and found.dtype == torch.float32
    for index in range(2):
        window = samples[index * 44_100 :][:42_336]
        power = librosa.feature.melspectrogram(
            y=window / np.abs(window).max(), sr=44_100, n_mels=96, norm=1.0, fmin=0, fmax=22_050, htk=True,
            hop_length=1024, win_length=2048,
        )  # fmt: skip
        expected = torch.from_numpy(np.log10(power * 10_000 + 1) / 9.457798957824707).T[:41]
        torch.testing.assert_close(found[index, 0], expected.float(), rtol=0, atol=1e-5)


def test_silence_is_zero_for_aisfx_whatever_comes_before_it() -> None:
    samples = np.concatenate([noise(1.0, 16_000)[:, 0], np.full(16_000, 1e-3), noise(1.0, 16_000)[:, 0]])
    found = aisfx_log_mel(samples, 16_000, 3)
    assert float(found[1].abs().max()) == 0 and float(found[0].max()) > 0.1 and float(found[2].max()) > 0.1


def test_each_front_end_caches_its_own(tmp_path: Path) -> None:
    write(tmp_path / "a.wav", 3.0)
    for front_end in (VGGISH, AISFX):
        cache = LogMelCache(tmp_path / "cache", front_end)
        first = cache.get(tmp_path / "a.wav", patches=2)
        assert first.shape == (2, *front_end.shape) and torch.equal(cache.get(tmp_path / "a.wav", patches=2), first)
    assert len(list((tmp_path / "cache").iterdir())) == 2
