"""The check command: its table, its lines, its exit codes, its clean tables."""

import shutil
from pathlib import Path

import pytest

from scripts.data.check_data import main
from scripts.data.stamps import layouts
from scripts.data.stamps.library import drawn_library
from tests.runs import write_config


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    shapes = drawn_library(3, seed=0)
    names = [kind.name for kind in shapes.kinds]
    orders = layouts.orders("ms3", (2, 2, 1), names, seed=0)
    for order in orders:
        layouts.make(root, order, shapes, size=48, seed=0)
    layouts.write_tables(root, "ms3", orders, names)
    return root


@pytest.fixture
def own(drawn: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drawn, tmp_path / "data"))


@pytest.fixture
def config(own: Path, tmp_path: Path) -> str:
    return str(write_config(tmp_path / "ms3.py", own, "ms3"))


def test_good_data_gives_a_table_and_exit_code_0(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ms3", config]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("data of ms3" in line for line in lines)
    assert [line.split()[1:5:2] for line in lines if "train" in line] == [["train", "2"]]


def test_each_fault_is_one_line_and_the_exit_code_is_1(
    own: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    next(own.rglob("stamps_val_00001.mp4_3.png")).unlink()
    next(own.rglob("stamps_test_00000.wav")).write_bytes(b"")
    assert main(["ms3", config, "--workers", "1"]) == 1
    faults = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("val/", "test/"))]
    assert len(faults) == 2
    assert "stamps_val_00001.mp4_3.png is missing" in faults[0] and "ms3_meta_data.csv line 5" in faults[0]
    assert "stamps_test_00000.wav cannot be read" in faults[1]


def test_a_clean_table_can_stand_in(own: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    next(own.rglob("stamps_val_00001.mp4_3.png")).unlink()
    assert main(["ms3", config, "--write-clean-csv"]) == 1
    clean = own / "Multi-sources/ms3_meta_data.clean.csv"
    assert f"wrote {clean}; lines left out: 5" in capsys.readouterr().out
    overrides = [f"dataset.{split}.anno_csv={clean}" for split in ("train", "val", "test")]
    assert main(["ms3", config, *overrides]) == 0


def test_what_was_found_good_is_checked_again_on_request(
    own: Path, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ms3", config]) == main(["ms3", config]) == main(["ms3", config, "--all"]) == 0
    assert (own / "Multi-sources/ms3_data/log_mel_cache/checked_clips.txt").read_text().count("\n") == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["s4", "CONFIG"], "ms3"),
        (["ms3", "no_such_config.py"], "no_such_config.py"),
        (["ms3", "CONFIG", "dataset.val.img_sise=3"], "img_sise"),
    ],
)
def test_a_command_that_cannot_be_used_ends_with_one_sentence(
    config: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([config if part == "CONFIG" else part for part in arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0]
