"""The web page: what its controls do without a browser, hostile uploads, and the page itself in headless Chromium."""

import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
import torch
from PIL import Image
from torch import Tensor

from dataloader.front_ends import AISFX
from model.checkpoint import save_weights
from scripts.demo_page.answer import Look, answer, draw_overlay
from scripts.demo_page.clip import Limits, read_clip, read_other_sound
from scripts.demo_page.desk import MUTED, Desk, Shown
from scripts.demo_page.examples import make_examples
from scripts.demo_page.models import Choice, Models, find_choices
from scripts.demo_page.pictures import mask_strip, moment_picture
from scripts.demo_page.sentences import public
from scripts.demo_page.server import free_port, neutral_name, serve
from scripts.prediction import PredictionModel, predict
from tests.videos import corner, make_video, read_audio, read_video, tone
from utils.errors import CheckpointError, ConfigError, DataError
from utils.runtime import ROOT

GREEN, MAGENTA = (0, 190, 90), (230, 40, 200)


class Loud:
    """Paints what is bright while something sounds, and counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def logits(self, batch: Mapping[str, Any], first_clip: int) -> Tensor:
        self.calls += 1
        sounds = batch["log_mel"].flatten(0, 1).flatten(1).amax(dim=1) > 0.01  # (T,)
        bright = batch["frames"].flatten(0, 1).mean(dim=1, keepdim=True) * 3  # (T, 1, H, W)
        return torch.where(sounds[:, None, None, None], bright, torch.full_like(bright, -9))


class LoudModels(Models):
    """Offers one model, which needs no weights."""

    def __init__(self) -> None:
        super().__init__([Choice("loud", Path("loud"))])
        self.loud = Loud()

    def get(self, name: str) -> PredictionModel:
        classes = ["background", "sounding object"]
        description = {"checkpoint": "loud"}
        return PredictionModel(self.loud, AISFX, size=(32, 32), num_frames=3, classes=classes, description=description)


def ramp(width: int, height: int) -> Callable[[int], npt.NDArray[np.uint8]]:
    """Black at the left, white at the right."""
    row = np.linspace(0, 255, width).astype(np.uint8)
    picture = np.repeat(np.repeat(row[None, :, None], height, axis=0), 3, axis=2)
    return lambda index: picture


def short(path: Path, seconds: float = 2.0, **more: Any) -> Path:
    """A video whose sound is a tone in its first second."""
    sound = tone(seconds, 16_000)
    sound[16_000:] = 0
    times = range(0, round(1000 * seconds), 100)
    return make_video(path, **{"times": times, "picture": ramp(64, 48), "sound": sound, **more})


def wave(path: Path, seconds: float, start: float) -> Path:
    """Silence, and a tone from `start` seconds on."""
    sound = tone(seconds, 16_000)
    sound[: round(16_000 * start)] = 0
    soundfile.write(path, sound, 16_000)
    return path


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(LoudModels(), tmp_path / "files")


def calls(desk: Desk) -> int:
    assert isinstance(desk.models, LoudModels)
    return desk.models.loud.calls


def percentages(shown: Shown) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+)%", shown.message)]


@pytest.mark.parametrize(
    ("size", "options", "expected"),
    [
        ((64, 48), {}, (64, 48)),
        ((65, 47), {"codec": "png", "pixels": "rgb24", "suffix": ".avi", "sound_codec": "pcm_s16le"}, (66, 48)),
        ((64, 48), {"matrix": (0, 1, -1, 0)}, (48, 64)),
        ((1280, 720), {"times": range(0, 300, 100)}, (640, 360)),
    ],
)
def test_a_clip_is_small_upright_and_as_long(
    size: tuple[int, int], options: dict[str, Any], expected: tuple[int, int], tmp_path: Path
) -> None:
    suffix = options.pop("suffix", ".mp4")
    upload = short(tmp_path / f"clip{suffix}", **{"size": size, "picture": corner(*size), **options})
    times, _ = read_video(upload)
    clip = read_clip(upload, tmp_path, Limits()) if suffix != ".mp4" else read_clip(_moved(upload), tmp_path, Limits())
    at, pictures = read_video(clip.pictures)
    assert (clip.width, clip.height) == expected and pictures[0].shape == (expected[1], expected[0], 3)
    assert np.allclose(at, times, atol=0.01) and clip.seconds == pytest.approx(times[-1] + 0.05, abs=0.06)
    assert clip.sound is not None
    assert soundfile.info(clip.sound).duration == pytest.approx(min(2.0, clip.seconds), abs=0.1)
    turned = "matrix" in options
    corner_of = pictures[0][: expected[1] // 4, -expected[0] // 4 :] if turned else pictures[0][:10, :10]
    assert corner_of.mean() > 200  # a white quarter: at the top left, turned to the top right


def _moved(path: Path) -> Path:
    return path.rename(path.with_name("upload.mp4"))


def test_the_page_paints_what_the_command_paints(tmp_path: Path) -> None:
    upload, model = short(tmp_path / "video.mp4"), LoudModels().get("loud")
    done = predict(model, upload, tmp_path / "out")
    clip = read_clip(upload, tmp_path, Limits())
    answered = answer(model, clip, clip.sound, 1.0)
    pngs = [np.asarray(Image.open(path)).astype(int) for path in sorted((tmp_path / "out/video/masks").iterdir())]
    assert done.count == len(answered.masks) == 2
    small = [np.asarray(Image.fromarray(png.astype(np.uint8)).resize((32, 32))).astype(int) for png in pngs]
    assert np.abs(np.stack(small) - answered.masks[:, 0]).max() <= 6
    assert answered.shares(0.5)[0] > 0.3 and answered.shares(0.5)[1] == 0


def gif(path: Path, width: int, height: int) -> Path:
    """A GIF that announces a size and holds a pixel."""
    header = b"GIF89a" + struct.pack("<HH", width, height) + bytes([0x80, 0, 0, 0, 0, 0, 255, 255, 255])
    image = b"\x2c" + struct.pack("<HHHH", 0, 0, width, height) + b"\x00\x02\x02\x4c\x01\x00\x3b"
    path.write_bytes(header + image)
    return path


HOSTILE: list[tuple[str, Callable[[Path], object], Limits, str]] = [
    ("text.mp4", lambda path: path.write_text("this is not a video\n" * 100), Limits(), "is not a video or sound"),
    ("empty.mp4", lambda path: path.write_bytes(b""), Limits(), "is empty"),
    ("wide.mp4", lambda path: gif(path, 50_000, 2), Limits(), "50,000 x 2 pixels; this page takes up to 4,096"),
    ("square.mp4", lambda path: gif(path, 16_000, 16_000), Limits(), "16,000 x 16,000 pixels; this page takes up to"),
    (
        "huge.gif",
        lambda path: gif(path, 50_000, 50_000),
        Limits(),
        "50,000 x 50,000 pixels; this page takes up to 4,096",
    ),
    (
        "large.mp4",
        lambda path: path.write_bytes(b"0" * 2**21),
        Limits(megabytes=1),
        "2 MB; this page takes up to 1",
    ),
    ("long.mp4", short, Limits(seconds=1), "is longer than 1 seconds"),
    ("no header.ts", lambda path: short(path, sound=None), Limits(seconds=1), "is longer than 1 seconds"),
    (
        "list.mp4",
        lambda path: path.write_text("#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"),
        Limits(),
        "is not a video or sound",
    ),
    ("<b>bold</b>.mp4".replace("/", "_"), lambda path: path.write_text("no"), Limits(), "&lt;b&gt;"),
]


@pytest.mark.parametrize(("name", "make", "limits", "sentence"), HOSTILE, ids=[case[0] for case in HOSTILE])
def test_a_hostile_upload_is_refused_in_one_sentence_and_removed(
    name: str, make: Callable[[Path], object], limits: Limits, sentence: str, tmp_path: Path
) -> None:
    desk = Desk(LoudModels(), tmp_path / "files", limits=limits)
    upload = tmp_path / "files" / "0123" / name
    upload.parent.mkdir(parents=True)
    make(upload)
    shown = desk.show_clip("tab", upload, "loud", Look())
    assert shown.refused and sentence in shown.message and shown.own is None and shown.seconds == 0
    assert str(tmp_path) not in shown.message and "/" not in shown.message.replace("scripts/predict.sh", "").replace(
        "</b>", ""
    )
    assert files(desk.folder) == [] and calls(desk) == 0
    assert desk.change_look("tab", Look()).refused  # there is no clip to draw


def test_a_sound_without_pictures_and_pictures_without_sound(desk: Desk, tmp_path: Path) -> None:
    shown = desk.show_clip("tab", wave(tmp_path / "only.wav", 1, 0), "loud", Look())
    assert shown.refused and shown.message == "only.wav has no picture track."
    shown = desk.show_clip("tab", short(tmp_path / "mute.mp4", sound=None), "loud", Look())
    assert not shown.refused and "without a sound track" in shown.message and percentages(shown) == [0, 0]
    refused = desk.change_sound("tab", tmp_path / "mute.mp4", "a sound of yours")
    assert refused.refused and refused.message == "mute.mp4 has no sound track."
    assert not [name for name in files(desk.folder) if name.endswith(".wav")]


def test_threshold_and_colour_need_no_model(desk: Desk, tmp_path: Path) -> None:
    first = desk.show_clip("tab", short(tmp_path / "a.mp4"), "loud", Look())
    assert not first.refused and calls(desk) == 2  # with its sound, and muted
    own, muted = percentages(first)
    assert own > 10 and muted == 0
    less = desk.change_look("tab", Look(0.9, GREEN))
    assert calls(desk) == 2 and 0 < percentages(less)[0] < own
    more = desk.change_look("tab", Look(0.2, MAGENTA))
    assert calls(desk) == 2 and percentages(more)[0] > own
    for shown, colour in ((less, GREEN), (more, MAGENTA)):
        assert shown.own is not None and shown.own.video is not None
        picture = read_video(shown.own.video)[1][0][:48]
        where = picture[10:38, -6:-2].reshape(-1, 3).mean(axis=0)  # white, beneath the colour
        expected = 0.4 * 255 + 0.6 * np.array(colour)
        assert np.abs(where - expected).max() < 25
    moved = desk.change_moment("tab", 1.7)
    assert calls(desk) == 2 and moved.moment == 1.7 and moved.own is not None and moved.own.video is None


def test_another_sound_is_answered_and_heard(desk: Desk, tmp_path: Path) -> None:
    first = desk.show_clip("tab", short(tmp_path / "a.mp4"), "loud", Look())
    shown = desk.change_sound("tab", wave(tmp_path / "late.wav", 3, 1.0), "example 1: late")
    assert calls(desk) == 3 and shown.other_name == "example 1: late"
    assert percentages(shown)[1] == pytest.approx(
        percentages(first)[0], abs=0.5
    )  # the other second of the same pictures
    assert shown.own is not None and shown.own.video is None  # as before
    assert shown.other is not None and shown.other.video is not None
    _, sound, rate = read_audio(shown.other.video)
    assert len(sound) / rate == pytest.approx(2.0, abs=0.1)  # as long as the pictures
    assert np.abs(sound[: rate // 2]).max() < 0.01 < np.abs(sound[-rate // 2 :]).max()
    assert percentages(desk.change_model("tab", "loud")) == percentages(shown)  # keeps the other sound
    assert percentages(desk.change_sound("tab", None, MUTED))[1] == 0
    assert desk.change_sound("tab", tmp_path / "gone.wav", "a sound of yours").refused


def test_files_go_when_they_are_not_needed(desk: Desk, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (desk.folder / name).mkdir(parents=True)
    first, second = (short(desk.folder / name / f"{name}.mp4", 1.0) for name in ("first", "second"))
    desk.show_clip("tab", first, "loud", Look())
    desk.change_sound("tab", wave(tmp_path / "a.wav", 2, 0), "a")
    for threshold in (0.2, 0.3):
        desk.change_look("tab", Look(threshold))
    before = {name for name in files(desk.folder) if "_" in name}
    kinds = [name.split("_", 1)[1] for name in before]
    assert max(kinds.count(kind) for kind in kinds) == 2  # what is shown, and what was before
    desk.show_clip("tab", second, "loud", Look())
    assert not first.exists() and second.exists() and not before.intersection(files(desk.folder))
    desk.show_clip("other tab", second, "loud", Look())
    desk.close("tab")
    assert second.exists()  # the other tab plays it
    desk.close("other tab")
    assert files(desk.folder) == []
    desk.close("a tab that never was")


def test_idle_sessions_are_closed(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = short(tmp_path / "a.mp4", seconds=1.0)
    desk.show_clip("old", upload, "loud", Look())
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3601)
    desk.show_clip("new", upload, "loud", Look())
    assert desk.change_look("old", Look()).message.startswith("There is no clip yet")
    assert not desk.change_look("new", Look()).refused
    assert upload.exists()  # outside the page's own folder


def test_a_fault_of_the_page_shows_no_path(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object) -> Tensor:
        raise RuntimeError(f"{tmp_path}/secret.pth")

    upload = short(tmp_path / "a.mp4")
    assert isinstance(desk.models, LoudModels)
    desk.models.loud.logits = broken  # type: ignore[method-assign]
    shown = desk.show_clip("tab", upload, "loud", Look())
    assert shown.refused and "secret" not in shown.message and "/" not in shown.message
    assert "secret.pth" in capsys.readouterr().err  # on the console of the server
    assert files(desk.folder) == []


@pytest.mark.parametrize(
    ("message", "named", "expected"),
    [
        ("/tmp/a/b c.mp4 is empty.", "/tmp/a/b c.mp4", "b c.mp4 is empty."),
        ("weights /root/x/last.pth: no", None, "weights last.pth: no"),
        ("see (/root/x/y.py), 3/4 of it", None, "see (y.py), 3/4 of it"),
        ("<script>", None, "&lt;script&gt;"),
    ],
)
def test_messages_hold_names_and_not_paths(message: str, named: str | None, expected: str) -> None:
    assert public(message, Path(named) if named else None) == expected


def test_strip_and_moment(tmp_path: Path) -> None:
    clip = read_clip(short(tmp_path / "video.mp4"), tmp_path, Limits())
    answered = answer(LoudModels().get("loud"), clip, clip.sound, 5.0)
    assert len(answered.masks) == 10
    strips = [mask_strip(answered, clip, Look(), moment) for moment in (0.1, 1.9)]
    assert strips[0].shape == strips[1].shape and (strips[0] != strips[1]).any()  # another tile is framed
    pictures = [moment_picture(answered, clip, Look(), moment) for moment in (0.1, 0.15, 1.9)]
    assert (pictures[0] != pictures[1]).any() and (pictures[0] != pictures[2]).any()
    with pytest.raises(DataError, match=r"clip.mp4 is not here any more|video.mp4 is not here any more"):
        clip.remove()
        draw_overlay(answered, clip, Look(), tmp_path / "overlay.mp4")


def test_another_sound_is_cut_at_the_end_of_the_clip(tmp_path: Path) -> None:
    read_other_sound(wave(tmp_path / "long.wav", 5, 0), tmp_path / "cut.wav", 1.5, Limits())
    assert soundfile.info(tmp_path / "cut.wav").duration == pytest.approx(1.5)


def test_examples_are_drawn_where_there_are_no_stamps(drawn: Path, tmp_path: Path) -> None:
    for stamps, side in ((tmp_path / "nothing", 256), (drawn, 256)):  # `drawn` has no sound labels
        examples = make_examples(tmp_path / "examples", stamps, count=2)
        assert len(examples) == 2 and examples[0].sounds != examples[1].sounds
        for example in examples:
            assert example.label.startswith(example.sounds)
            times, pictures = read_video(example.video)
            assert len(times) == 50 and pictures[0].shape == (side, side, 3)
            assert soundfile.info(example.wave).duration == pytest.approx(5, abs=0.1)
            assert read_clip(example.video, tmp_path, Limits()).seconds == pytest.approx(5)


def test_models_to_choose_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model" / "packed").mkdir(parents=True)
    for name in ("b", "a"):
        (tmp_path / "model" / "packed" / f"{name}.safetensors").touch()
    trained = tmp_path / "runs" / "MoDAT_pvt2_ms3"
    trained.mkdir(parents=True)
    (trained / "MS3_best.pth").touch()
    found = find_choices(None, None, None, tmp_path, tmp_path / "runs")
    assert [choice.name for choice in found] == ["a", "b", "MoDAT_pvt2_ms3 (trained here)"]
    assert found[2].config == ROOT / "config/ms3/MoDAT_pvt2_ms3.py" and found[0].config is None
    weights = str(trained / "MS3_best.pth")
    folder = tmp_path / "owl"
    folder.mkdir()
    save_weights({"a": torch.zeros(1)}, folder / "model.safetensors")
    monkeypatch.setattr("model.hub._download", lambda repo, revision: folder)
    for given, label in ((str(folder), "owl"), (str(folder / "model.safetensors"), "owl"), ("lab/barn", "lab/barn")):
        choice = find_choices(given, None, None, tmp_path, tmp_path / "runs")[0]
        assert (choice.name, choice.checkpoint.resolve()) == (label, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"is no model folder: it lacks model\.safetensors"):
        find_choices(str(trained), None, None, tmp_path, tmp_path / "runs")
    first = find_choices(None, weights, "config/s4/MoDAT_pvt2_s4.py", tmp_path, tmp_path / "runs")
    assert [choice.name for choice in first] == ["MoDAT_pvt2_s4", "a", "b"]
    for arguments, message in (
        (("a", weights, None), "give one of the two"),
        ((None, None, "config/s4/MoDAT_pvt2_s4.py"), "needs its weights"),
        ((None, "nowhere.pth", None), "does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            find_choices(*arguments, tmp_path, tmp_path / "runs")
    with pytest.raises(ConfigError, match="there is no model to show"):
        find_choices(None, None, None, tmp_path / "runs", tmp_path / "none")
    with pytest.raises(ConfigError, match="There is no model 'c'"):
        Models(found).get("c")


def test_the_folder_of_the_files_has_a_name_that_says_nothing(tmp_path: Path) -> None:
    link = neutral_name(tmp_path)
    assert link is not None and re.fullmatch(r"/tmp/modat-demo-\w+/page", str(link)) and link.resolve() == tmp_path
    shutil.rmtree(link.parent)
    assert tmp_path.is_dir() and neutral_name(Path("/tmp/modat-demo-x")) is None


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1, port {port} "):
            free_port("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"cannot listen on 203.0.113.1, port 7860 to 7959"):
        free_port("203.0.113.1", None)  # of the documentation, RFC 5737
    with pytest.raises(ConfigError, match="--port 99999 is not between"):
        free_port("127.0.0.1", 99_999)


@pytest.mark.skipif(importlib.util.find_spec("gradio") is not None, reason="Gradio is installed in this environment")
def test_without_gradio_the_page_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ConfigError, match=r"scripts/demo.sh installs it.*pip install gradio"):
        serve(LoudModels(), host="127.0.0.1", port=None, fps=1.0, stamps=tmp_path)
    assert list(tmp_path.iterdir()) == []


DEMO_PYTHON = Path(sys.prefix) / "demo" / "bin" / "python"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The page, served by a process of its own; when it is ended, all its files must be gone."""
    if not DEMO_PYTHON.is_file():
        pytest.skip("Gradio is not installed: bash scripts/demo.sh --install")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    port = free_port("127.0.0.1", None)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "log").open("w")
    command = [str(DEMO_PYTHON), __file__, str(port)]
    server = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        for _ in range(600):
            if "page: " in (tmp_path / "log").read_text() or server.poll() is not None:
                break
            time.sleep(0.1)
        assert server.poll() is None, (tmp_path / "log").read_text()
        yield f"http://127.0.0.1:{port}"
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0, (tmp_path / "log").read_text()
        assert "Traceback" not in (tmp_path / "log").read_text()
        assert list(temporary.glob("modat-demo-*")) == []
    finally:
        server.kill()
        server.wait()
        log.close()


@pytest.mark.process
def test_the_server_gives_no_other_files_and_names_no_folder(address: str) -> None:
    with urllib.request.urlopen(f"{address}/") as answer:
        page, headers = answer.read().decode(), answer.headers
    assert str(ROOT) not in page and "/tmp/" not in page and str(Path.home()) + "/" not in page
    assert "default-src 'self'" in headers["content-security-policy"]
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=.?https?://", page)
    config = json.loads(urllib.request.urlopen(f"{address}/config").read())
    assert config["stylesheets"] == [] and not config.get("analytics_enabled")
    for path in (ROOT / "README.md", Path("/etc/passwd"), Path(__file__)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)


@pytest.mark.process
def test_the_page_in_a_browser(address: str, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    good, text, wide, large = (tmp_path / f"{name}.mp4" for name in ("good", "text", "wide", "large"))
    short(good)
    text.write_text("no video" * 100)
    gif(wide, 50_000, 2)
    with large.open("wb") as file:
        file.truncate(200_000_000)
    faults: list[str] = []
    elsewhere: list[str] = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1500, "height": 1200})

        def pass_on(route: Any) -> None:
            if route.request.url.startswith((address, "data:", "blob:")):
                route.continue_()
            else:
                elsewhere.append(route.request.url)
                route.abort()

        def said(words: str) -> str:
            wanted = f"document.querySelector('#message p')?.innerText.includes({words!r})"
            page.wait_for_function(wanted, timeout=60_000)
            return str(page.inner_text("#message"))

        def painted(message: str) -> list[float]:
            return [float(number) for number in re.findall(r"([\d.]+)%", message)]

        def changed(before: str) -> str:
            page.wait_for_function(f"document.querySelector('#message p').innerText != {before!r}", timeout=60_000)
            return str(page.inner_text("#message"))

        def videos() -> list[str]:
            return [str(page.get_attribute(f"#video-{name} video", "src")) for name in ("own", "other")]

        page.route("**/*", pass_on)
        page.on(
            "console", lambda entry: faults.append(f"{entry.text} {entry.location}") if entry.type == "error" else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.goto(address)
        said("Drop a video")
        page.set_input_files("#clip input[type=file]", good)
        first = said("painted")
        assert painted(first)[0] > 10 and painted(first)[1] == 0 and "good.mp4, 2.0 s" in first
        page.wait_for_selector("#video-other video")
        shown = videos()

        page.get_by_label("a sound of yours").click()
        said("Drop a sound")
        page.set_input_files("#other-sound input[type=file]", wave(tmp_path / "whole.wav", 2, 0))
        swapped = said("with the other sound")
        assert painted(swapped)[0] == painted(first)[0] and painted(swapped)[1] > 1.5 * painted(swapped)[0]
        page.wait_for_function(f"document.querySelector('#video-other video').src != {shown[1]!r}")
        assert "your sound" in page.inner_text("#title-other")
        swapped_videos = videos()

        number = page.locator("#threshold input[type=number]")
        number.fill("0.9")
        number.press("Enter")
        less = changed(swapped)
        assert all(0 < now < then for now, then in zip(painted(less), painted(swapped), strict=True))
        for name, then in zip(("own", "other"), swapped_videos, strict=True):
            page.wait_for_function(f"document.querySelector('#video-{name} video').src != {then!r}")
        assert all("file=/tmp/modat-demo-" in source for source in videos())
        assert str(tmp_path) not in page.content() and str(ROOT) not in page.content()  # addresses included
        assert page.evaluate("document.querySelector('#video-own video').error") is None

        for upload, words in ((text, "text.mp4 is not a video"), (wide, "50,000 x 2 pixels")):
            if page.locator("#clip button[aria-label=Clear]").count():
                page.locator("#clip button[aria-label=Clear]").click()
            page.set_input_files("#clip input[type=file]", upload)
            refusal = said(words)
            assert page.locator("#message .refused").count() == 1 and "/" not in refusal
            page.wait_for_selector("#video-own video", state="detached")
        assert str(tmp_path) not in page.inner_text("body")
        assert faults == [] and elsewhere == []

        page.set_input_files("#clip input[type=file]", large)
        page.get_by_text("exceed the maximum allowed size of 100").wait_for()
        assert elsewhere == []  # Gradio's client logs an error of its own when it refuses a size
        browser.close()
    uploads = tmp_path / "temporary"
    for _ in range(100):
        left = [name for name in files(uploads) if not name.startswith(("example_", "stamps_")) and "own" in name]
        if not left:
            break
        time.sleep(0.1)
    assert left == []


if __name__ == "__main__":
    serve(LoudModels(), host="127.0.0.1", port=int(sys.argv[1]), fps=1.0, stamps=Path("nowhere"))
