"""The data maker: labels say what is heard, runs are repeatable and resumable, and the command line behaves."""

import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from dataloader import build_dataset
from dataloader.audio import SAMPLE_RATE, log_mel, samples_for_patches
from dataloader.palette import decode
from scripts.data.make_stamps import Settings, main, make_stamps, parse_arguments
from scripts.data.stamps import layouts, library
from scripts.data.stamps.library import (
    KINDS,
    SECOND,
    TEXTURES,
    Kind,
    Library,
    class_names,
    drawn_library,
    load_stamps,
    unseen_kinds,
)
from scripts.data.stamps.scene import Recipe, Scene, compose, runs
from tests.runs import command, dataset_cfg, environment, write_config
from utils import stamps_note
from utils.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
CROWD = Recipe(frames=5, objects=(0.0, 0.5, 0.3, 0.2), sounding=(0.5, 0.3, 0.2), steady=False)


@pytest.fixture(scope="module")
def shapes() -> Library:
    return drawn_library(5, seed=0)


def scenes(shapes: Library, recipe: Recipe = CROWD, count: int = 12) -> Iterator[Scene]:
    for number in range(count):
        yield compose(shapes, recipe, size=64, held_out=False, rng=np.random.default_rng(number))


def loudness(sound: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(sound, dtype=np.float64))))


@pytest.mark.parametrize("frames", [5, 10])
def test_a_frame_has_a_mask_just_when_its_window_is_audible(shapes: Library, frames: int) -> None:
    recipe = Recipe(frames=frames, objects=CROWD.objects, sounding=CROWD.sounding, steady=False)
    silent, audible = 0, 0
    for scene in scenes(shapes, recipe):
        for frame in range(frames):
            heard = bool(scene.heard[frame].any())
            assert bool(scene.sounding_objects()[frame].any()) == heard
            windows = (
                (frame, frame + 1.0),  # the second of the frame
                (0.96 * frame, 0.96 * frame + samples_for_patches(1) / SAMPLE_RATE),  # what VGGish sees of it
            )
            for start, end in windows:
                level = loudness(scene.sound[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)])
                assert level > 0.02 if heard else level < 0.004, (frame, level)
            silent, audible = silent + (not heard), audible + heard
    assert silent and audible


def test_vggish_hears_the_right_thing_in_each_frame() -> None:
    """Two pure tones: the loudest mel band of a frame's window is that of the object its mask shows."""
    time_axis = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    image = Image.new("RGBA", (40, 40), (200, 30, 30, 255))
    tones = [np.sqrt(2) * np.sin(2 * np.pi * pitch * time_axis).astype(np.float32) for pitch in (300.0, 3000.0)]
    pair = Library([Kind(f"tone-{n}", image, tone) for n, tone in enumerate(tones)], [Image.new("RGB", (64, 64))] * 4)
    seen = set()
    for scene in scenes(pair, Recipe(frames=5, objects=(0.0, 1.0), sounding=(1.0,), steady=False)):
        mel = log_mel(scene.sound, SAMPLE_RATE)[:, 0].mean(1)
        for frame, classes in enumerate(scene.sounding_objects()):
            (*_, kind) = np.unique(classes)
            if kind:
                assert (int(mel[frame].argmax()) > 30) == (kind == 2)
                seen.add(int(kind))
    assert seen == {1, 2}


def test_beside_what_sounds_stands_something_silent(shapes: Library) -> None:
    for scene in scenes(shapes):
        assert len(set(scene.kinds.tolist())) == len(scene.kinds) >= 2
        ever = scene.heard.any(axis=0)
        assert ever.any() and not ever.all()


def test_the_true_mask_is_a_part_of_the_mask_of_all_objects(shapes: Library) -> None:
    for scene in scenes(shapes):
        sounding, everything = scene.sounding_objects(), scene.all_objects()
        assert np.array_equal(sounding[sounding > 0], everything[sounding > 0])
        assert set(np.unique(everything)) == {0, *scene.kinds.tolist()}


def test_steady_clips_sound_from_first_to_last_with_the_kind_asked_for(shapes: Library) -> None:
    recipe = Recipe(frames=5, objects=(0.5, 0.5), sounding=(1.0,), steady=True)
    for kind in range(5):
        rng = np.random.default_rng(kind)
        scene = compose(shapes, recipe, size=48, held_out=False, rng=rng, first_kind=kind)
        assert scene.heard[:, 0].all() and not scene.heard[:, 1:].any()
        assert all(set(np.unique(frame)) == {0, kind + 1} for frame in scene.sounding_objects())


def test_training_and_evaluation_use_different_backgrounds() -> None:
    colours = [Image.new("RGB", (64, 64), (0, 0, 255) if number % 4 == 3 else (0, 255, 0)) for number in range(8)]
    drawn = drawn_library(2, seed=0)
    for held_out, other in ((True, 1), (False, 2)):
        scene = compose(Library(drawn.kinds, colours), CROWD, size=64, held_out=held_out, rng=np.random.default_rng(0))
        ground = scene.frames[scene.owners == 0]
        assert ground[:, 3 - other].mean() > 20 + ground[:, other].mean()


def test_runs_finds_stretches() -> None:
    assert runs(np.array([1, 1, 0, 1, 0, 0, 1], bool)) == [(0, 2), (3, 4), (6, 7)]
    assert runs(np.zeros(3, bool)) == []


IMAGES_AND_SOUNDS = (".png", ".jpg", ".wav")
SMALL = Settings(clips=(3, 3, 3), size=40, kinds=3, seed=0, drawn=True)


def fingerprint(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made")
    make_stamps(out, ["s4", "ms3", "avss"], SMALL, workers=1, quiet=True)
    return out


def test_an_interrupted_run_goes_on_to_the_same_files_bit_for_bit(made: Path, tmp_path: Path) -> None:
    whole = fingerprint(made / "Multi-sources")
    shapes = drawn_library(SMALL.kinds, SMALL.seed)
    orders = layouts.orders("ms3", SMALL.clips, [kind.name for kind in shapes.kinds], SMALL.seed)
    for order in orders[:4]:
        layouts.make(tmp_path, order, shapes, size=SMALL.size, seed=SMALL.seed)
    sound = next(tmp_path.rglob("*_train_00000.wav"))
    kept = next(tmp_path.rglob("*_train_00001.wav")).stat().st_mtime_ns
    sound.unlink()  # a clip whose frames were written and whose sound was not
    make_stamps(tmp_path, ["ms3"], SMALL, workers=1, quiet=True)
    assert fingerprint(tmp_path / "Multi-sources") == whole
    assert next(tmp_path.rglob("*_train_00001.wav")).stat().st_mtime_ns == kept


def test_finished_data_is_left_alone_without_reading_the_material(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(made)
    monkeypatch.setattr("scripts.data.make_stamps.drawn_library", lambda *_: pytest.fail("was read"))
    make_stamps(made, ["s4", "ms3", "avss"], SMALL, quiet=True)
    assert fingerprint(made) == before


def test_the_other_splits_are_those_of_a_library_without_second_instances(made: Path, tmp_path: Path) -> None:
    shapes = drawn_library(SMALL.kinds, SMALL.seed)
    alone = Library(shapes.kinds, shapes.textures)
    names = [kind.name for kind in shapes.kinds]
    for task in layouts.FOLDERS:
        for order in layouts.orders(task, SMALL.clips, names, SMALL.seed):
            assert order.split != "unseen"
            layouts.make(tmp_path, order, alone, size=SMALL.size, seed=SMALL.seed)
    with_unseen = {name: value for name, value in fingerprint(made).items() if Path(name).suffix in IMAGES_AND_SOUNDS}
    assert fingerprint(tmp_path) == {name: value for name, value in with_unseen.items() if "unseen" not in name}


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_every_layout_has_as_many_unseen_clips_as_test_clips(made: Path, task: str) -> None:
    with layouts.table(made, task).open() as file:
        splits = [row["split"] for row in csv.DictReader(file)]
    assert [splits.count(split) for split in layouts.SPLITS] == [3, 3, 3, 3]
    folder = made / layouts.FOLDERS[task]
    dataset = build_dataset(split_of(made, task, "unseen"))
    assert len(dataset) == 3
    for clip in dataset.clips:
        assert all(path.is_file() for path in (*clip.frames, *clip.masks, clip.wav))
        assert len(clip.masks) == len(clip.frames)
    everything = "all_objects_rgb" if task == "avss" else "all_objects"
    assert any("unseen" in str(path) for path in folder.rglob(f"{everything}/**/*.png"))


def split_of(made: Path, task: str, split: str) -> dict[str, Any]:
    return {**dataset_cfg(made, task, img_size=(40, 40))["test"], "split": split}


def test_unseen_clips_are_made_of_second_instances_alone() -> None:
    """Red and loud at 300 Hz are the first instances, blue and 3 kHz the second."""
    time_axis = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    first, second = (
        [
            Kind(
                f"kind-{number}",
                Image.new("RGBA", (40, 40), colour),
                np.sqrt(2) * np.sin(2 * np.pi * pitch * (1 + number / 9) * time_axis).astype(np.float32),
            )
            for number in range(4)
        ]
        for colour, pitch in (((255, 0, 0, 255), 300.0), ((0, 0, 255, 255), 3000.0))
    )
    material = Library(first, [Image.new("RGB", (64, 64), (0, 255, 0))] * 4, {1: second[1], 3: second[3]})
    for number in range(8):
        for unseen in (False, True):
            rng = np.random.default_rng(number)
            scene = compose(material, CROWD, size=64, held_out=True, rng=rng, unseen=unseen)
            inside = np.stack([scene.owners > 0] * 3, -1) & (scene.frames.max(-1, keepdims=True) > 60)
            red, blue = (np.where(inside, scene.frames, 0)[..., channel].sum(dtype=np.int64) for channel in (0, 2))
            assert (blue > 2 * red) if unseen else (red > 2 * blue)
            assert not unseen or set(scene.kinds.tolist()) == {2, 4}  # the class numbers are those of the kinds
            mel = log_mel(scene.sound, SAMPLE_RATE)[:, 0].mean(1)
            loud = mel.argmax(1)[mel.max(1).values > mel.max() - 3]
            assert bool(((loud > 30) == unseen).all())


def test_no_photograph_or_recording_of_unseen_is_one_of_another_split() -> None:
    assert set(SECOND) <= set(KINDS) and len(SECOND) >= 5
    stems = [*KINDS.values(), *SECOND.values(), *TEXTURES]
    assert len(set(stems)) == len(stems)
    assert [list(KINDS)[number] for number in unseen_kinds(12, drawn=False)] == ["sheep", "pig", "drum"]
    assert unseen_kinds(8, drawn=False) == [] and unseen_kinds(3, drawn=True) == [0, 1, 2]
    drawn = drawn_library(4, 0)
    for number, kind in enumerate(drawn.kinds):
        other = drawn.unseen[number]
        assert not np.array_equal(kind.sound, other.sound)
        assert kind.photograph.tobytes() != other.photograph.tobytes()


def test_data_of_the_version_before_is_extended_by_unseen(made: Path, tmp_path: Path) -> None:
    whole = fingerprint(made / "Multi-sources")
    old = Path(shutil.copytree(made / "Multi-sources", tmp_path / "Multi-sources"))
    note, table = old / "stamps.json", layouts.table(tmp_path, "ms3")
    note.write_text(json.dumps({**json.loads(note.read_text()), "version": 1}))
    table.write_text("".join(line for line in table.read_text().splitlines(True) if "unseen" not in line))
    for path in [path for path in old.rglob("*unseen*") if path.is_dir() or path.suffix == ".wav"]:
        shutil.rmtree(path, ignore_errors=True)
    make_stamps(tmp_path, ["ms3"], SMALL, workers=1, quiet=True)
    assert fingerprint(old) == whole


def test_stamps_of_the_version_before_with_the_silent_kind_are_refused(tmp_path: Path) -> None:
    wanted = {"clips": [1, 1, 1], "size": 40, "seed": 0, "drawn": False, "version": stamps_note.VERSION}
    for kinds, expected in ((34, None), (35, ("version", 1, stamps_note.VERSION))):
        made = {**wanted, "kinds": kinds, "version": 1}
        assert stamps_note.difference(made, {**wanted, "kinds": kinds}) == expected


def test_unseen_is_scored_with_the_config_of_the_test_split(made: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.py", made, "ms3")
    arguments = command("ms3", config, "--oracle", "--split", "unseen", script="test.py")
    done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "work_dir/config/unseen_oracle_metrics.json").read_text())
    assert written["split"] == "unseen" and written["clips"] == 3

    layouts.write_atomically(tmp_path / "table.csv", b"name,split\nstamps_test_00000,test\n")
    lacking = [*arguments, f"dataset.test.anno_csv={tmp_path / 'table.csv'}"]
    done = subprocess.run(lacking, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "unseen" in done.stderr.splitlines()[-1]


def test_a_folder_never_mixes_two_settings(made: Path) -> None:
    with pytest.raises(DataError, match=r"Multi-sources was made with other settings .*\"size\": 40"):
        make_stamps(made, ["ms3"], Settings((3, 3, 3), 48, 3, 0, True), quiet=True)


def test_data_of_someone_else_is_not_touched(tmp_path: Path) -> None:
    table = layouts.table(tmp_path, "ms3")
    table.parent.mkdir()
    table.write_text("name,split\nmine,train\n")
    with pytest.raises(DataError, match="was not made by this script"):
        make_stamps(tmp_path, ["ms3"], SMALL, workers=1, quiet=True)
    assert table.read_text() == "name,split\nmine,train\n"


def test_another_seed_gives_other_clips(shapes: Library, tmp_path: Path) -> None:
    (order,) = layouts.orders("ms3", (1, 0, 0), ["a"], 0)
    prints = []
    for seed in (0, 0, 1):
        folder = tmp_path / str(len(prints))
        layouts.make(folder, order, shapes, size=40, seed=seed)
        prints.append(fingerprint(folder))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_the_masks_of_all_objects_are_read_by_the_data_sets(made: Path, task: str) -> None:
    folder = made / layouts.FOLDERS[task]
    if task == "avss":
        for path in folder.glob("v2/*/labels_rgb/*.png"):
            everything = decode(np.asarray(Image.open(path.parents[1] / "all_objects_rgb" / path.name)))
            true = decode(np.asarray(Image.open(path)))
            assert np.array_equal(true[true > 0], everything[true > 0])
        return
    common = {
        "type": "S4Dataset" if task == "s4" else "MS3Dataset",
        "split": "test",
        "anno_csv": str(layouts.table(made, task)),
        "dir_img": str(folder / f"{task}_data/visual_frames"),
        "dir_audio_log_mel": str(folder / f"{task}_data/audio_log_mel"),
        "img_size": (40, 40),
    }
    true, everything = (
        build_dataset({**common, "dir_mask": str(folder / f"{task}_data" / masks)})
        for masks in ("gt_masks", "all_objects")
    )
    for one, other in zip(true, everything, strict=True):
        assert bool((one["masks"] <= other["masks"]).all())
        assert bool((other["masks"].flatten(1).sum(1) > 0).all())


def test_sounds_are_16_khz_pcm_of_the_clip_s_length(made: Path) -> None:
    for path in made.rglob("*.wav"):
        information = soundfile.info(path)
        assert (information.samplerate, information.channels, information.subtype) == (16_000, 1, "PCM_16")
        assert information.frames == (10 if "/v2/" in str(path) else 5) * 16_000


def test_the_class_list_has_71_names_and_starts_with_the_kinds() -> None:
    names = class_names(tuple(KINDS))
    assert list(names.values()) == list(range(71)) and list(names)[: 1 + len(KINDS)] == ["background", *KINDS]
    assert len(class_names(("a", "b"))) == 71


def stamps_folder(root: Path) -> Path:
    """A stand-in for the package: every stamp is a small image with a sound."""
    rng = np.random.default_rng(0)
    for stem in [*KINDS.values(), *library.SECOND.values(), *library.TEXTURES]:
        (root / stem).parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (24, 30, 4)).astype(np.uint8)
        pixels[..., 3] = 0
        pixels[4:20, 5:25, 3] = 255
        Image.fromarray(pixels).save(root / f"{stem}.png")
    for stem in [*KINDS.values(), *library.SECOND.values()]:
        sound = np.concatenate(
            [np.zeros(8_000), rng.normal(0, 0.1, 8_000), np.zeros(16_000), rng.normal(0, 0.1, 4_000)]
        )
        soundfile.write(root / f"{stem}.ogg", sound, 22_050)
    return root


def test_stamps_are_cut_out_and_their_pauses_removed(tmp_path: Path) -> None:
    loaded = load_stamps(stamps_folder(tmp_path / "usr/share/tuxpaint/stamps").parents[3], 3)
    assert [kind.name for kind in loaded.kinds] == list(KINDS)[:3]
    for kind in loaded.kinds:
        assert kind.photograph.size == (20, 16) and kind.photograph.mode == "RGBA"
        assert 0.5 < len(kind.sound) / SAMPLE_RATE < 0.9  # of 1.63 s, 0.54 s are sound
        assert loudness(kind.sound) == pytest.approx(1, abs=0.01)
    assert all(texture.size[0] == texture.size[1] >= 14 for texture in loaded.textures)


def test_a_missing_stamp_and_too_many_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"dog\.png is missing: --stamps must name"):
        load_stamps(tmp_path, 3)
    with pytest.raises(DataError, match="--kinds 99"):
        load_stamps(tmp_path, 99)
    with pytest.raises(DataError, match="--kinds 99"):
        drawn_library(99, 0)


def test_no_apt_is_said_with_the_two_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["--out", str(tmp_path / "data"), "--tasks", "ms3"]) == 2


def test_a_failed_download_is_an_error_with_apt_s_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, body in (("apt-get", "echo 'E: no such host' >&2; exit 100"), ("dpkg-deb", "exit 0")):
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert main(["--out", str(tmp_path / "data"), "--tasks", "ms3"]) == 2
    assert "cannot download tuxpaint-stamps-default (E: no such host)" in capsys.readouterr().err
    assert not (tmp_path / "data/stamps_source/stamps").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--size", "8"], ["--kinds", "1"], ["--clips", "0", "1", "1"], ["--tasks", "s5"], ["--drawn", "--stamps", "x"]],
)
def test_a_wrong_option_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    assert caught.value.code == 2


def test_ctrl_c_keeps_what_is_done_and_the_same_command_finishes(tmp_path: Path) -> None:
    command: list[Any] = [
        sys.executable,
        ROOT / "scripts/data/make_stamps.py",
        "--drawn",
        "--out",
        tmp_path,
        "--tasks",
        "ms3",
    ]
    command += ["--clips", "300", "2", "2", "--size", "40", "--kinds", "3", "--workers", "1"]
    run = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
        # A shell starts its background jobs deaf to Ctrl-C, and a test run may be one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and run.poll() is None and len(list(tmp_path.rglob("*.wav"))) < 2:
        time.sleep(0.02)
    os.killpg(run.pid, signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 130 and "the same command continues from them" in errors, errors
    there = len(list(tmp_path.rglob("*.wav")))
    assert 2 <= there < 306
    assert not layouts.table(tmp_path, "ms3").exists()
    assert main(list(map(str, command[2:]))) == 0
    assert len(list(tmp_path.rglob("*.wav"))) == 306 and layouts.table(tmp_path, "ms3").exists()
    assert json.loads((tmp_path / "Multi-sources/stamps.json").read_text())["clips"] == [300, 2, 2]


def test_finished_data_without_sound_labels_receives_them_and_nothing_else(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(made, tmp_path / "data"))
    for task in layouts.FOLDERS:
        layouts.sound_labels(copy, task).unlink()
    monkeypatch.setattr("scripts.data.make_stamps.drawn_library", lambda *_: pytest.fail("was read"))
    make_stamps(copy, ["s4", "ms3", "avss"], SMALL, quiet=True)
    assert fingerprint(copy) == fingerprint(made)


def test_stamps_are_grouped_by_their_sound(made: Path, tmp_path: Path) -> None:
    names = ["dog", "violin", "firetruck", "kettle", "camera"]
    layouts.write_sound_labels(tmp_path, "ms3", [], names, unseen=[], seed=0)
    groups = json.loads(layouts.sound_labels(tmp_path, "ms3").read_text())["groups"]
    assert list(groups.values()) == ["animal", "music", "device", "device", "device"]
    assert json.loads(layouts.sound_labels(made, "ms3").read_text())["groups"]["shape-2"] == "modulated"
