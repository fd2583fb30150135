"""Masks of any video: sizes, times, turns, sounds, faults, resuming, and memory."""

import errno
import io
import json
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from dataloader.audio import VGGISH
from dataloader.front_ends import AISFX
from scripts import predict as command
from scripts.prediction import Options, Prediction, PredictionModel, load_for_prediction, predict, results, run
from scripts.prediction.meter import Meter
from scripts.prediction.overlay import strip_height
from scripts.prediction.run import predict_masks
from scripts.prediction.sound import Envelope, SoundWindows
from scripts.prediction.source import Damage, Frame, Orientation, Sound, SoundFile
from scripts.prediction.store import MaskStore
from scripts.prediction.timing import End, Timeline, at_times
from scripts.prediction.video import open_video
from tests.videos import bright_model, corner, flash, impulse, make_video, read_audio, read_video, tone
from utils.errors import ConfigError, DataError
from utils.runtime import ROOT

UNEVEN = [0, 40, 90, 250, 300, 420, 700, 760, 900, 1000, 1200, 1230, 1400, 1600, 1900]  # ms


def report_of(done: Prediction) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(done.result.read_text())
    return report


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {"rate": 44_100, "layout": "stereo"}),
        ("uneven.mp4", {"times": UNEVEN, "rate": 48_000}),
        ("surround.mkv", {"sound_codec": "pcm_s16le", "layout": "5.1", "rate": 48_000}),
        ("telephone.mov", {"sound_codec": "pcm_s16le", "rate": 8000}),
        ("fine.mov", {"sound_codec": "pcm_s16le", "rate": 96_000, "layout": "stereo"}),
        ("late.mp4", {"rate": 32_000, "late": 0.5}),
        ("odd.avi", {"size": (65, 47), "codec": "png", "pixels": "rgb24", "sound_codec": "pcm_s16le"}),
        ("stream.ts", {"sound_codec": "mp2", "rate": 32_000}),
    ],
)
def test_the_overlay_keeps_length_size_times_and_sound(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    width, height = options.get("size", (64, 48))
    times = options.pop("times", range(0, 2000, 100))
    shown, rate, late = list(times).index(1000), options.get("rate", 16_000), options.get("late", 0.0)
    video = make_video(
        tmp_path / name,
        times=times,
        picture=flash(width, height, shown),
        sound=impulse(2 - late, rate, 1.0 - late),
        **{"rate": rate, **options},
    )
    done = predict(bright_model(), video, tmp_path / "out")
    assert done.damage == "" and done.seconds == pytest.approx(2.0, abs=0.11)

    at, pictures = read_video(done.overlay)
    assert np.allclose(at, np.array(times) / 1000, atol=2e-3)
    rows, columns = (height + 1) // 2 * 2, (width + 1) // 2 * 2
    assert {picture.shape for picture in pictures} == {(rows + strip_height(height), columns, 3)}
    with av.open(str(done.overlay)) as container:
        assert float(container.streams.video[0].duration * container.streams.video[0].time_base) == pytest.approx(
            2.0, abs=0.11
        )
    start, samples, rate = read_audio(done.overlay)
    peak = start + float(np.abs(samples).argmax()) / rate
    flashed = at[int(np.argmax([picture[:height].mean() for picture in pictures]))]
    assert flashed == pytest.approx(1.0, abs=2e-3) and abs(peak - flashed) < 0.04
    with Image.open(done.folder / "masks/000480.png") as mask:
        assert mask.size == (width, height) and mask.mode == "L"


def test_4k_keeps_its_size_and_the_place_of_its_masks(tmp_path: Path) -> None:
    width, height, quarter = 3840, 2160, corner(3840, 2160)
    video = make_video(
        tmp_path / "clip.mp4",
        size=(width, height),
        times=range(0, 1000, 250),
        picture=lambda index: quarter(index) if index != 2 else np.full((height, width, 3), 255, np.uint8),
        sound=impulse(1.0, 48_000, 0.5),
        rate=48_000,
    )
    done = predict(bright_model(), video, tmp_path / "out")
    assert done.count == 1 and done.seconds == pytest.approx(0.85) and done.damage == ""
    mask = np.asarray(Image.open(done.folder / "masks/000480.png")) > 127
    pixel = width // 32  # of the model's frames
    row = mask[height // 4]
    assert mask.shape == (height, width) and mask.mean() == pytest.approx(0.25, abs=0.01)
    assert row[: width // 2 - pixel].all() and not row[width // 2 + pixel :].any()
    at, pictures = read_video(done.overlay)
    assert {picture.shape for picture in pictures} == {(height + strip_height(height), width, 3)}
    flashed = at[int(np.argmax([picture[height - 20 : height, -20:].mean() for picture in pictures]))]
    start, samples, rate = read_audio(done.overlay)
    peak = start + float(np.abs(samples).argmax()) / rate
    assert flashed == pytest.approx(0.5, abs=2e-3) and abs(peak - flashed) < 0.04


@pytest.mark.parametrize(
    ("matrix", "place"),
    [
        ((1, 0, 0, 1), "top left"),
        ((0, 1, -1, 0), "top right"),  # a quarter turn clockwise, as of a telephone held upright
        ((-1, 0, 0, -1), "bottom right"),
        ((0, -1, 1, 0), "bottom left"),
        ((-1, 0, 0, 1), "top right"),  # mirrored
        ((0, 1, 1, 0), "top left"),  # mirrored on the diagonal
    ],
)
def test_masks_are_upright(matrix: tuple[int, ...], place: str, tmp_path: Path) -> None:
    """The white corner is at the top left as stored."""
    video = make_video(tmp_path / "turned.mp4", size=(64, 48), matrix=matrix, times=range(0, 500, 100))
    done = predict(bright_model(), video, tmp_path / "out", silent=True)
    size = (48, 64) if matrix[0] == 0 else (64, 48)
    mask = np.asarray(Image.open(done.folder / "masks/000480.png"))
    assert mask.shape == size[::-1]
    rows, columns = np.nonzero(mask > 127)
    found = f"{'top' if rows.mean() < size[1] / 2 else 'bottom'} {'left' if columns.mean() < size[0] / 2 else 'right'}"
    assert found == place and (mask > 127).mean() == pytest.approx(0.25, abs=0.02)
    # The overlay paints the same place: orange where it was white, black elsewhere.
    _, pictures = read_video(done.overlay)
    picture = pictures[2][: size[1]].astype(int)
    inside, outside = mask > 250, mask < 5
    assert np.abs(picture[inside].mean(axis=0) - (255, 186, 102)).max() < 12
    assert picture[outside].max() < 40


def test_the_display_matrix_of_newer_files_is_read(tmp_path: Path) -> None:
    video = make_video(tmp_path / "turned.mp4", matrix=(0, 1, -1, 0), times=(0, 100))
    source = open_video(video, silent=True, sound=None)
    assert source.orientation == Orientation(True, True, False) and (source.width, source.height) == (48, 64)
    with pytest.raises(DataError, match="no sound track: --silent"):
        open_video(video, silent=False, sound=None)


@pytest.mark.parametrize("front_end", [AISFX, VGGISH])
def test_one_mask_per_second_hears_what_training_hears(front_end: Any, tmp_path: Path) -> None:
    rate = 44_100 if front_end is AISFX else 16_000
    sound = tone(3.2, rate)
    video = make_video(
        tmp_path / "tone.mov", times=range(0, 3200, 100), sound=sound, sound_codec="pcm_s16le", rate=rate
    )
    model = bright_model()
    model.front_end = front_end
    predict(model, video, tmp_path / "out", masks="none")
    heard = torch.stack(model.predictor.log_mels)  # type: ignore[attr-defined]
    stored = np.round(sound * 32768).astype(np.int16)
    if front_end is AISFX:
        expected = front_end.patches(stored, rate, 3)
    else:  # VGGish's windows lie every 0.96 s in training, and every second here
        expected = torch.cat([VGGISH.patches(stored[k * rate : k * rate + 15_700], rate, 1) for k in range(3)])
    assert heard.shape == expected.shape and torch.allclose(heard, expected, atol=2e-3)
    assert model.predictor.real == [3]  # type: ignore[attr-defined]


def test_windows_of_a_stream_are_cuts_of_the_whole() -> None:
    sound = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    envelope = Envelope(1000, bins=8)
    windows = SoundWindows(np.split(sound, [3, 700, 701, 2000, 4100]), 1000, envelope)
    padded = np.pad(sound, 1000)
    for start in (-0.48, -0.2, 0.0, 0.0, 0.013, 1.9, 4.5, 5.5):
        begin = 1000 + round(start * 1000)
        expected = padded[begin : begin + 960]
        assert np.array_equal(windows.window(start, 960), np.pad(expected, (0, 960 - len(expected))))
    windows.finish()
    assert envelope.seconds == 5 and len(envelope.peaks) == 8
    columns = envelope.columns(10, 5.0)
    assert columns.max() == np.abs(sound).max() and (columns > 0).all()
    assert (envelope.columns(10, 10.0)[6:] == 0).all()


def test_pixels_that_are_not_square_and_a_sound_that_starts_before_the_pictures(tmp_path: Path) -> None:
    video = make_video(
        tmp_path / "clip.mkv",
        times=range(500, 1500, 100),
        picture=flash(64, 48, 4),
        sound=impulse(1.5, 16_000, 0.9),
        aspect=Fraction(4, 3),
    )
    done = predict(bright_model(), video, tmp_path / "out")
    at, pictures = read_video(done.overlay)
    start, samples, rate = read_audio(done.overlay)
    assert at[int(np.argmax([picture.mean() for picture in pictures]))] == pytest.approx(0.4, abs=2e-3)
    assert start + np.abs(samples).argmax() / rate == pytest.approx(0.4, abs=0.04)
    with av.open(str(done.overlay)) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


def test_two_recordings_in_one_file_follow_each_other(tmp_path: Path) -> None:
    parts = [
        make_video(tmp_path / f"{width}.ts", size=(width, 48), sound=tone(2, 32_000), rate=32_000, sound_codec="mp2")
        for width in (64, 80)
    ]
    both = tmp_path / "both.ts"
    both.write_bytes(b"".join(part.read_bytes() for part in parts))
    done = predict(bright_model(), both, tmp_path / "out")
    start, samples, rate = read_audio(done.overlay)
    _, pictures = read_video(done.overlay)
    assert done.count == 4 and len(pictures) == 40 and {picture.shape[1] for picture in pictures} == {64}
    assert start + len(samples) / rate == pytest.approx(4, abs=0.15)
    assert [mask["painted"] for mask in report_of(done)["masks"]] == pytest.approx([0.25] * 4, abs=0.03)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_how_much_is_done_and_left(terminal: bool, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("scripts.prediction.meter.SECONDS_BETWEEN_LINES", 0.0)
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    video = make_video(tmp_path / "clip.mp4")
    predict(bright_model(), video, tmp_path / "out", silent=True, console=console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "clip: masks" in text and "clip: overlay" in text and "2 of 2 s" in text
    assert terminal or "clip: overlay, 1 of 2 s, 0:00:0" in text


def test_masks_per_second_are_dense_up_to_the_rate_of_the_video(tmp_path: Path) -> None:
    video = make_video(tmp_path / "clip.mp4", sound=tone(2, 16_000))
    done = predict(bright_model(), video, tmp_path / "out", fps=50, masks="none")
    report = report_of(done)
    assert report["masks_per_second"] == pytest.approx(10) and done.count == 20 and done.masks is None
    assert [mask["time"] for mask in report["masks"]] == pytest.approx([(k + 0.48) / 10 for k in range(20)])
    assert all(mask["painted"] == pytest.approx(0.25, abs=0.02) for mask in report["masks"])


def test_a_mask_belongs_to_the_picture_shown_at_its_time() -> None:
    frames = [Frame(time, 0.3, f"picture {time}") for time in (0.0, 0.2, 0.5, 1.4)]  # type: ignore[arg-type]
    end = End()
    found = [(index, frame.time) for index, _, frame in at_times(iter(frames), 2.0, end, lambda done: None)]
    assert found == [(0, 0.2), (1, 0.5), (2, 0.5)]  # at 0.24, 0.74, 1.24; 1.74 is after the end
    assert end.seconds == pytest.approx(1.7)
    assert [index for index, *_ in at_times(iter(frames[:1]), 1.0, end, lambda done: None)] == [0]


def test_between_two_predictions_masks_are_held_or_blended() -> None:
    masks = [np.full((1, 2, 2), value, np.uint8) for value in (0, 100, 200)]
    held, mixed = (Timeline(iter(masks), 1.0, blend=blend) for blend in (False, True))
    times = (0.0, 0.48, 0.98, 1.0, 1.23, 2.48, 2.9)
    assert [int(held.at(time)[1].max()) for time in times] == [0, 0, 0, 100, 100, 200, 200]
    assert [int(mixed.at(time)[1].max()) for time in times] == [0, 0, 50, 52, 75, 200, 200]


def test_masks_as_a_video_with_alpha(tmp_path: Path) -> None:
    video = make_video(tmp_path / "clip.mp4", times=range(0, 400, 100))
    done = predict(bright_model(), video, tmp_path / "out", masks="video", silent=True, between="blend")
    assert done.masks is not None and not (done.folder / "masks").exists()
    with av.open(str(done.masks)) as container:
        pictures = [frame.to_ndarray(format="rgba") for frame in container.decode(video=0)]
    assert len(pictures) == 4 and pictures[0].shape == (48, 64, 4)
    assert pictures[0][5:15, 5:20, 3].min() > 240 and pictures[0][35:, 40:, 3].max() < 10
    assert (pictures[0][5:15, 5:20, :3] == (255, 140, 0)).all()


class Classes:
    """Class 3 where it is bright, class 1 almost as likely, background elsewhere."""

    def logits(self, batch: Mapping[str, Any], first_clip: int) -> Tensor:
        bright = batch["frames"].flatten(0, 1).mean(dim=1)
        return torch.stack([-bright, bright - 0.1, bright - 9, bright, bright - 9], dim=1) * 10


def test_masks_of_classes_have_names_and_colours(tmp_path: Path) -> None:
    model = PredictionModel(
        Classes(),
        AISFX,
        size=(32, 32),
        num_frames=2,
        classes=["background", "dog", "cat", "tuba", "car"],
        description={},
    )
    video = make_video(tmp_path / "clip.mp4", times=range(0, 1000, 100))
    done = predict(model, video, tmp_path / "out", silent=True)
    mask = report_of(done)["masks"][0]
    assert mask["classes"] == {"tuba": mask["painted"]} and mask["painted"] == pytest.approx(0.25, abs=0.02)
    with Image.open(done.folder / mask["file"]) as image:
        assert image.mode == "P" and image.getpixel((5, 5)) == 3 and image.getpixel((60, 40)) == 0
        assert image.convert("RGB").getpixel((5, 5)) == (128, 128, 0)
    _, pictures = read_video(done.overlay)
    assert np.abs(pictures[0][5:15, 5:20].mean(axis=(0, 1)) - (179, 179, 102)).max() < 14
    # The strip names it, behind a square of its colour.
    assert np.abs(pictures[0][48:].reshape(-1, 3).astype(int) - (128, 128, 0)).max(axis=1).min() < 20


def test_a_folder_of_pictures_with_a_sound(tmp_path: Path) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for second in (2, 10, 1):  # ordered by number
        Image.fromarray(corner(40, 30)(0) if second == 2 else np.zeros((30, 40, 3), np.uint8)).save(
            folder / f"{second}.png"
        )
    soundfile.write(folder / "sound.wav", tone(3, 22_050), 22_050)
    done = predict(bright_model(), folder, tmp_path / "out")
    assert [mask["painted"] > 0 for mask in report_of(done)["masks"]] == [False, True, False]
    at, pictures = read_video(done.overlay)
    assert len(at) == 30 and at[-1] == pytest.approx(2.9) and done.seconds == pytest.approx(3)
    assert [picture[5, 5, 0] > 100 for picture in pictures] == [False] * 10 + [True] * 10 + [False] * 10

    soundfile.write(folder / "other.wav", tone(3, 22_050), 22_050)
    with pytest.raises(DataError, match="2 sounds: name one of them with --sound"):
        predict(bright_model(), folder, tmp_path / "other")
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    done = predict(bright_model(), folder, tmp_path / "cut", sound=folder / "other.wav")
    assert "2.png cannot be read" in done.damage and done.count == 1


def test_a_picture_with_a_sound_stays_for_its_length(tmp_path: Path) -> None:
    Image.fromarray(corner(41, 31)(0)).save(tmp_path / "dog.jpg")
    with pytest.raises(DataError, match="no sound: name one with --sound FILE"):
        predict(bright_model(), tmp_path / "dog.jpg", tmp_path / "out")
    soundfile.write(tmp_path / "bark.wav", tone(2.5, 44_100), 44_100)
    done = predict(bright_model(), tmp_path / "dog.jpg", tmp_path / "out", sound=tmp_path / "bark.wav")
    assert done.seconds == pytest.approx(2.5) and done.count == 3
    start, samples, rate = read_audio(done.overlay)
    assert start + len(samples) / rate == pytest.approx(2.5, abs=0.1)


def test_another_sound_replaces_the_videos_and_ends_with_it(tmp_path: Path) -> None:
    video = make_video(tmp_path / "clip.mp4", sound=tone(2, 16_000), times=range(0, 1000, 100))
    soundfile.write(tmp_path / "click.wav", impulse(4, 44_100, 0.3), 44_100)
    done = predict(bright_model(), video, tmp_path / "out", sound=tmp_path / "click.wav")
    start, samples, rate = read_audio(done.overlay)
    assert start + len(samples) / rate == pytest.approx(1.0, abs=0.06)
    assert start + np.abs(samples).argmax() / rate == pytest.approx(0.3, abs=0.02)


def test_what_is_not_a_video_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n")
    (tmp_path / "concat.mp4").write_text("ffconcat version 1.0\nfile clip.mp4\n")
    (tmp_path / "folder").mkdir()
    soundfile.write(tmp_path / "sound.wav", tone(1, 8000), 8000)
    make_video(tmp_path / "clip.mp4", times=(0, 100))
    wide = make_video(
        tmp_path / "wide.mkv",
        size=(50_000, 2),
        codec="ffv1",
        pixels="yuv420p",
        times=(0,),
        picture=lambda index: np.zeros((2, 50_000, 3), np.uint8),
    )
    Image.new("L", (50_000, 1000)).save(tmp_path / "wide.png")
    (tmp_path / "huge.gif").write_bytes(b"GIF89a" + struct.pack("<HH", 50_000, 50_000) + b"\0\0\0;")
    huge = make_video(tmp_path / "huge.mkv", size=(1234, 566), codec="ffv1", times=(0,))
    stated = b"\xb0\x82" + struct.pack(">H", 1234) + b"\xba\x82" + struct.pack(">H", 566)  # PixelWidth, PixelHeight
    assert stated in huge.read_bytes()
    larger = b"\xb0\x82" + struct.pack(">H", 50_000) + b"\xba\x82" + struct.pack(">H", 50_000)
    huge.write_bytes(huge.read_bytes().replace(stated, larger))
    for name, message in {
        "missing.mp4": "does not exist",
        "empty.mp4": "is empty",
        "text.mp4": "is not a video or sound that FFmpeg reads",
        "list.mp4": "is not a video or sound that FFmpeg reads",
        "concat.mp4": "is not a video or sound that FFmpeg reads",
        "sound.wav": "no picture track",
        "clip.mp4": "no sound track: --silent goes on with silence",
        "folder": "holds no pictures",
        wide.name: "pictures of 50000 x 2 pixels; the limits are 16,384 per side",
        "huge.gif": "pictures of 50000 x 50000 pixels; the limits are 16,384 per side",
        huge.name: "no size, or one far above the limits, which are 16,384 pixels per side and 36,000,000 together",
        "wide.png": "more than 36,000,000 pixels|no sound",
    }.items():
        with pytest.raises(DataError, match=message):
            predict(bright_model(), tmp_path / name, tmp_path / "out")
    with pytest.raises(DataError, match=r"nothing.wav does not exist"):
        predict(bright_model(), tmp_path / "clip.mp4", tmp_path / "out", sound=tmp_path / "nothing.wav")
    assert not (tmp_path / "out").exists()


def test_options_out_of_range_are_refused() -> None:
    for changes, message in (
        ({"fps": 0.0}, "--fps 0 is not between"),
        ({"fps": float("nan")}, "--fps nan is not between"),
        ({"fps_in": -1.0}, "--fps-in -1 is not between"),
        ({"threshold": 1.0}, "--threshold 1 is not between 0 and 1"),
        ({"between": "jump"}, "--between jump is not one of hold, blend"),
        ({"masks": "gif"}, "--masks gif is not one of png, video, none"),
    ):
        with pytest.raises(ConfigError, match=message):
            Options(**changes)  # type: ignore[arg-type]


def test_too_little_disk_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_video(tmp_path / "clip.mp4", times=(0, 100))
    monkeypatch.setattr(results.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 5_000_000}))
    with pytest.raises(DataError, match=r"has 5 MB free, and .* needs about 6\d MB: make room"):
        predict(bright_model(), video, tmp_path / "out", silent=True)


def truncated(tmp_path: Path) -> Path:
    """Four seconds of noise, cut in the middle; its header is at the beginning."""
    draw = np.random.default_rng(0)
    video = make_video(
        tmp_path / "cut.mp4",
        times=range(0, 4000, 100),
        picture=lambda index: draw.integers(0, 255, (48, 64, 3), np.uint8),
        sound=tone(4, 16_000),
        options={"movflags": "faststart"},
    )
    data = video.read_bytes()
    video.write_bytes(data[: len(data) // 2])
    return video


def command_line(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    import scripts.prediction

    monkeypatch.setattr(scripts.prediction, "load_for_prediction", lambda *_, **__: bright_model())
    monkeypatch.setattr(sys, "argv", ["predict.sh", *map(str, words)])
    return command.main()


def test_a_truncated_file_gives_what_was_before_the_break(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    video = truncated(tmp_path)
    for _ in range(2):  # the second time it is only reported
        assert command_line(monkeypatch, video, "--out", tmp_path / "out") == command.INCOMPLETE
        said = capsys.readouterr().err
        assert "cut.mp4" in said and ("of 4.0" in said or " at " in said or "breaks off" in said)
    report = json.loads((tmp_path / "out/cut/result.json").read_text())
    assert 0.5 < report["seconds"] < 3.5 and report["damage"] and report["masks"]
    at, _ = read_video(tmp_path / "out/cut/overlay.mp4")
    assert at[-1] == pytest.approx(report["seconds"] - 0.1, abs=0.11)


def test_of_several_videos_the_good_ones_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = make_video(tmp_path / "good.mp4", times=(0, 100), sound=tone(0.2, 16_000))
    mute = make_video(tmp_path / "mute.mp4", times=(0, 100))
    assert command_line(monkeypatch, mute, good, tmp_path / "gone.mp4", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert (
        "mute.mp4 has no sound track" in said and "gone.mp4 does not exist" in said and "2 of 3 videos failed" in said
    )
    assert (tmp_path / "out/good/overlay.mp4").is_file()
    assert command_line(monkeypatch, good, "--out", tmp_path / "out") == 0
    with pytest.raises(ConfigError, match="would both write"):
        command_line(monkeypatch, good, tmp_path / "good.mkv", "--out", tmp_path / "out")


@pytest.mark.process
def test_the_launcher_lists_its_options_and_refuses_in_a_sentence(tmp_path: Path) -> None:
    script = str(ROOT / "scripts/predict.sh")
    usage = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert usage.returncode == 0 and "--masks {png,video,none}" in usage.stdout
    refused = subprocess.run(["bash", script, "gone.mp4"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.splitlines()[-1] == "error: gone.mp4 does not exist."


class Interrupted:
    """Stops at a clip, as Ctrl-C would."""

    def __init__(self, model: PredictionModel, clips: int) -> None:
        self.inner, self.clips = model.predictor, clips

    def logits(self, batch: Mapping[str, Any], first_clip: int) -> Tensor:
        if self.clips == 0:
            raise KeyboardInterrupt
        self.clips -= 1
        return self.inner.logits(batch, first_clip)


def test_an_interrupted_prediction_goes_on_where_it_was(tmp_path: Path) -> None:
    video = make_video(tmp_path / "clip.mp4", sound=tone(2, 16_000))
    whole = predict(bright_model(), video, tmp_path / "whole", fps=5)
    model = bright_model()
    model.predictor = Interrupted(model, 2)
    with pytest.raises(KeyboardInterrupt):
        predict(model, video, tmp_path / "out", fps=5)
    lines = tmp_path / "out/clip/predictions.jsonl"
    assert len(lines.read_text().splitlines()) == 1 + 6
    with lines.open("a") as file:
        file.write('{"index": 6, "ti')  # cut off in the middle of a line
    with pytest.raises(ConfigError, match=r"was made with fps=5, and now fps=2: --overwrite makes it anew"):
        predict(bright_model(), video, tmp_path / "out", fps=2)
    model = bright_model()
    done = predict(model, video, tmp_path / "out", fps=5)
    assert model.predictor.real == [3, 1] and not lines.exists()  # type: ignore[attr-defined]
    assert report_of(done) == report_of(whole) and done.count == 10
    for mask in sorted((whole.folder / "masks").iterdir()):
        assert mask.read_bytes() == (done.folder / "masks" / mask.name).read_bytes()

    model = bright_model()
    predict(model, video, tmp_path / "out", fps=5)
    assert model.predictor.real == []  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"was made with threshold=0\.5"):
        predict(model, video, tmp_path / "out", fps=5, threshold=0.4)
    (done.folder / "masks" / "mine.png").touch()
    (done.folder / ".overlay.mp4.abc.part").touch()  # of a process that was killed
    again = predict(model, video, tmp_path / "out", fps=1, overwrite=True)
    assert {path.name for path in (again.folder / "masks").iterdir()} == {"000480.png", "001480.png", "mine.png"}
    assert {path.name for path in again.folder.iterdir()} == {"masks", "overlay.mp4", "result.json", run.LOCK}


def test_a_full_disk_is_said_and_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_video(tmp_path / "clip.mp4", sound=tone(2, 16_000))
    with monkeypatch.context() as patched:
        patched.setattr(run, "write_result", fail)
        with pytest.raises(
            DataError, match=r"cannot be written \(No space left on device\); make room and run the same"
        ):
            predict(bright_model(), video, tmp_path / "out")
    model = bright_model()
    assert predict(model, video, tmp_path / "out").count == 2
    assert model.predictor.real == []  # type: ignore[attr-defined]


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_an_ffmpeg_without_x264_writes_mpeg4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video = make_video(tmp_path / "clip.mp4", times=UNEVEN)
    monkeypatch.setattr("scripts.prediction.overlay.av.codecs_available", {"mpeg4"})
    done = predict(bright_model(), video, tmp_path / "out", silent=True)
    with av.open(str(done.overlay)) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4"
    at, pictures = read_video(done.overlay)
    assert np.allclose(at, np.array(UNEVEN) / 1000, atol=2e-3)
    assert np.abs(pictures[3][5:15, 5:20].mean(axis=(0, 1)) - (255, 186, 102)).max() < 12


class Endless:
    """A synthetic source of any length."""

    path, width, height, rate, aspect = Path("endless"), 16, 16, 5.0, 1.0
    orientation, damage = Orientation(), Damage()
    sound_file = SoundFile(Path("endless"), 0, 0.0, 8000, True)

    def __init__(self, duration: float) -> None:
        self.duration = duration

    def frames(self) -> Iterator[Frame]:
        for index in range(round(self.duration * self.rate)):
            yield Frame(index / self.rate, 1 / self.rate, av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8)))

    def sound(self) -> Iterator[Sound]:
        for _ in range(round(self.duration)):
            yield np.full(8000, 0.5, np.float32)

    def check_end(self, pictures_end: float, sound_end: float) -> None:
        assert pictures_end == pytest.approx(self.duration) and sound_end == pytest.approx(self.duration)


class Nothing:
    """Keeps nothing."""

    def logits(self, batch: Mapping[str, Any], first_clip: int) -> Tensor:
        return torch.zeros(batch["frames"].shape[1], 1, 16, 16)


def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    model = bright_model(size=(16, 16))
    model.predictor = Nothing()

    def peak(seconds: float) -> int:
        folder = tmp_path / str(seconds)
        store = MaskStore(folder, {}, (1, 16, 16))
        tracemalloc.start()
        predict_masks(model, Endless(seconds), store, folder, Options(masks="none"), 1.0, Meter("", None))
        timeline = Timeline(store.masks(), 1.0, blend=False)
        for frame in Endless(seconds).frames():
            timeline.at(frame.time)
        run.shares(store, 64, 1.0, seconds)
        run.write_result(folder / "result.json", {"a": 1}, store)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert store.count == seconds and len(json.loads((folder / "result.json").read_text())["masks"]) == seconds
        store.close()
        return most

    peak(3)  # imports and caches
    assert peak(600) < 1.1 * peak(30) + 20_000


CONFIG = """
task = "ms3"
model = {model!r}
dataset = {{
    split: dict(type="MS3Dataset", split=split, img_size=(64, 96), num_frames=3) for split in ("train", "val", "test")
}}
"""


def test_a_model_by_config_and_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from model import build_model
    from tests.support import tiny

    config, weights = tmp_path / "tiny.py", tmp_path / "tiny.pth"
    config.write_text(CONFIG.format(model=tiny({})))
    torch.save(build_model(tiny({})).state_dict(), weights)
    model = load_for_prediction(weights, config, precision="32")
    assert model.size == (64, 96) and model.num_frames == 3 and not model.semantic and model.front_end is VGGISH
    video = make_video(tmp_path / "clip.mp4", sound=tone(2, 16_000))
    done = predict(model, video, tmp_path / "out", fps=2)
    report = report_of(done)
    assert done.count == 4 and report["options"]["model"]["checkpoint"] == "tiny.pth"

    with pytest.raises(ConfigError, match="carries no config: name it with --config"):
        load_for_prediction(weights)


def test_a_packed_model_brings_its_config_and_the_first_is_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model import build_model
    from model.packed import FORMAT
    from tests.support import tiny
    from utils.config import load_config

    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.format(model=tiny({})))
    header = {"config": load_config(config).to_dict(), "left_out": {}, "scores": {}}
    monkeypatch.setattr("scripts.prediction.model.PACKED", tmp_path / "packed")
    with pytest.raises(ConfigError, match=r"no model is named and .* holds none"):
        load_for_prediction()
    (tmp_path / "packed").mkdir()
    for name in ("b", "a"):
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in build_model(tiny({})).state_dict().items()},
            tmp_path / f"packed/{name}.safetensors",
            metadata={"format": FORMAT, "task": "ms3", **{key: json.dumps(value) for key, value in header.items()}},
        )
    model = load_for_prediction(precision="32")
    assert model.description["checkpoint"] == "a.safetensors" and model.size == (64, 96) and model.precision == "32"
    masks = model.masks(np.zeros((2, 64, 96, 3), np.uint8), torch.zeros(2, 1, 96, 64))
    assert masks.shape == (2, 1, 64, 96) and masks.dtype == np.uint8
    with pytest.raises(ConfigError, match="overrides change a config file"):
        load_for_prediction(overrides=["process.seed=1"])
