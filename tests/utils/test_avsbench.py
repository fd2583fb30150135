"""The message of a run without AVSBench's data."""

from pathlib import Path

import pytest

from utils.config import load_config
from utils.errors import DataError
from utils.runtime import ensure_data

KEYS = {"s4": "anno_csv", "ms3": "anno_csv", "avss": "meta_csv_path"}


@pytest.mark.parametrize("task", KEYS)
def test_missing_data_names_source_tree_and_way_out(task: str, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    config = Path(f"config/{task}/MoDAT_pvt2_{task}.py")
    overrides = [f"dataset.{split}.{KEYS[task]}={table}" for split in ("train", "val", "test")]
    cfg = load_config(config, overrides, task)
    with pytest.raises(DataError) as raised:
        ensure_data(cfg, config)
    message = str(raised.value)
    assert f"{table} is missing" in message
    assert "https://github.com/OpenNLPLab/AVSBench" in message
    assert "<" not in message  # every key of the tree is one of the config's
    tree = [line.split() for line in message.splitlines() if line.startswith("  ")]
    assert tree[0][0] == str(table)
    assert any(line[0].endswith(("_{1..5}.png", "{0..}.jpg")) for line in tree)
    alternative = message.rsplit("Without AVSBench: ", 1)[1].split()[0]
    assert Path(alternative).is_file()


def test_data_that_exists_passes(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.touch()
    config = Path("config/ms3/MoDAT_pvt2_ms3.py")
    cfg = load_config(config, [f"dataset.{split}.anno_csv={table}" for split in ("train", "val", "test")], "ms3")
    ensure_data(cfg, config)
