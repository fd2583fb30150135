"""The benchmark: its command line, its checks, and one run on a small model, whose numbers are looked at for sense."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import benchmark, benchmark_tasks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(f'_base_ = ["{ROOT}/config/ms3/MoDAT_pvt2_b0_ms3_stamps.py"]\n')
    return str(path)


def request(config, **changes):
    common = dict(
        config=config, weights=None, device="cpu", threads=1, repeats=1, frames=1, size=64, precision="32",
        formulation="ours",
    )  # fmt: skip
    return common | changes


def test_one_command_measures_everything(config, tmp_path):
    command = [sys.executable, "scripts/benchmark.py", "--config", config, "--frames", "2", "--size", "64", "--quick"]
    command += ["--threads", "1", "--precision", "32", "bf16", "--json", str(tmp_path / "out" / "benchmark.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for words in ("same outputs", "evaluation: 2 frames", "boxes: 2 frames", "fusion box", "F-score", "clips/s"):
        assert words in done.stdout, words
    report = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert max(report["check"].values()) < benchmark.TOLERANCE
    for section in ("evaluation 2 x 64", "training 2 x 64"):
        results = report[section]["results"]
        assert set(results) == {
            "published, float32",
            "published, float32, memory kept",
            "ours, float32, default allocator",
            "ours, float32",
            "ours, bf16",
        }
        assert all(min(result["seconds"]) > 0 and result["peak_mb"] > 50 for result in results.values())
    boxes = report["evaluation 2 x 64"]["results"]["ours, float32"]["boxes"]
    assert sum(seconds for name, seconds in boxes.items() if name != "all") <= boxes["all"]
    assert all(row["equal"] for row in report["metrics"].values())
    assert report["matrix_rates"]["32"] > 1e8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.py"], "--config nowhere.py: there is no such file"),
        (["--size", "100"], "multiples of 32 pixels"),
        (["--frames", "0"], "whole numbers from 1 up"),
        (["--precision", "tf32"], "leave it out on a CPU"),
        pytest.param(
            ["--device", "cuda"],
            "finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_mistakes_get_a_sentence_and_status_2(arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_failed_measurement_names_its_request(config):
    options = benchmark.parse(["--config", config, "--size", "64"])
    run = benchmark.Benchmark(options, benchmark.Console(quiet=True))
    with pytest.raises(benchmark.UserError, match=r"benchmark task 'evaluate' failed .*no_such_precision"):
        run.ask("evaluate", device="no_such_precision")


def test_different_outputs_stop_the_benchmark(config, monkeypatch):
    options = benchmark.parse(["--config", config, "--size", "64"])
    run = benchmark.Benchmark(options, benchmark.Console(quiet=True))
    monkeypatch.setattr(run, "ask", lambda *_, **__: {"logits": 0.5})
    with pytest.raises(benchmark.UserError, match=r"disagree \(\{'logits': 0.5\}"):
        run.check()
    monkeypatch.setattr(run, "ask", lambda *_, **__: {"logits": float("nan")})
    with pytest.raises(benchmark.UserError, match="disagree"):
        run.check()


def test_memory_is_kept_only_where_it_is_asked_for(config, monkeypatch):
    options = benchmark.parse(["--config", config])
    run = benchmark.Benchmark(options, benchmark.Console(quiet=True))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    seen = []

    def fake(command, **options):
        seen.append({name for name in options["env"] if name.startswith("MALLOC_")})
        return subprocess.CompletedProcess(command, 0, stdout="noise\n{}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", fake)
    run.ask("evaluate", keep=False)
    run.ask("evaluate", keep=True)
    assert seen == [set(), set(benchmark.KEEP_MEMORY)]


def test_arithmetic_of_a_grouped_convolution_and_its_gradients_is_counted_right():
    mapping = {torch.ops.aten.convolution_backward: benchmark_tasks.convolution_backward_flops}
    layer = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    with benchmark_tasks.FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 9 * 8 * 25)


def test_training_takes_about_three_times_the_arithmetic_of_evaluation(config):
    counted = benchmark_tasks.TASKS["flops"](request(config))
    assert counted["evaluation"] > 1e8
    assert 2 < counted["training"] / counted["evaluation"] < 3.3
    boxes = dict(counted["boxes"])
    assert boxes.pop("all") == counted["evaluation"] >= sum(boxes.values()) > 0.9 * counted["evaluation"]


def test_peak_memory_sees_what_is_there_only_for_a_moment():
    with benchmark_tasks.peak_memory(torch.device("cpu")) as memory:
        torch.ones(50_000_000).sum()
    assert 180 < memory["extra_mb"] < 260
    assert memory["peak_mb"] > memory["extra_mb"]


def test_a_box_that_runs_twice_is_timed_twice():
    calls = iter(range(100))

    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.query_generator = self.fusion_block = self.mask_predictor = self.pixel_decoder = torch.nn.Identity()
            self.transformer = torch.nn.Module()
            self.transformer.encoder_layers = [torch.nn.Identity(), torch.nn.Identity()]
            self.transformer.decoder_layers = []
            self.in_proj = []

    model = torch.nn.Module()
    model.backbone = model.vggish = torch.nn.Identity()
    model.head = Head()
    readings = {}
    with benchmark_tasks.watch(model, lambda: float(next(calls)), readings):
        for layer in model.head.transformer.encoder_layers:
            layer(torch.ones(1))
    assert readings["encoder"] == 2 and readings["decoder"] == 0
    model.head.transformer.encoder_layers[0](torch.ones(1))
    assert readings["encoder"] == 2, "hooks must be gone"
