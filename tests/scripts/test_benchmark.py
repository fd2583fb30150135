"""The benchmark: its command line, its checks, and one run on a small model, whose numbers are looked at for sense."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmark import model as benchmark
from scripts.benchmark import tasks as benchmark_tasks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(f'_base_ = ["{ROOT}/config/ms3/MoDAT_pvt2_b0_ms3_stamps_scratch.py"]\n')
    return str(path)


def request(config, **changes):
    common = dict(
        config=config, weights=None, device="cpu", threads=1, repeats=1, seconds=0.0, frames=2, size=64, precision="32",
        formulation="ours", labelled=2, training=False,
    )  # fmt: skip
    return common | changes


def run(config, tmp_path, *arguments):
    """The command's report and what it printed."""
    report = tmp_path / "out" / "benchmark.json"
    command = [
        sys.executable,
        "-m",
        "scripts.benchmark.model",
        "--config",
        config,
        "--frames",
        "2",
        "--size",
        "64",
        "--quick",
    ]
    command += ["--threads", "1", "--json", str(report), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(report.read_text()), done.stdout


def test_the_command_checks_measures_and_reports(config, tmp_path):
    report, printed = run(config, tmp_path, "--sections", "metrics")
    assert max(report["check"].values()) < benchmark.TOLERANCE and "same outputs" in printed
    assert report["matrix_rates"]["32"] > 1e8
    assert all(row["equal"] for row in report["metrics"].values()) and "F-score" in printed
    assert report["machine"]["torch"] == torch.__version__
    assert {record["request"]["task"] for record in report["records"]} == {"check", "rate", "metrics"}


@pytest.mark.slow
@pytest.mark.skipif("MODAT_SLOW" not in os.environ, reason="some twenty processes: set MODAT_SLOW=1")
def test_one_command_measures_everything(config, tmp_path):
    report, printed = run(config, tmp_path)
    for words in ("evaluation: 2 frames", "boxes of the evaluation", "2 with a label", "fusion box", "clips/s"):
        assert words in printed, words
    for section in ("evaluation 2 x 64", "training 2 x 64, 2 labelled", "training 2 x 64, 1 labelled"):
        assert set(report[section]["results"]) == {
            "published, float32",
            "published, float32, memory kept",
            "ours, float32, default allocator",
            "ours, float32",
            "ours, bf16",
        }


@pytest.mark.parametrize("formulation", ["ours", "published"])
@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_evaluation_and_training_are_timed(config, formulation, precision):
    asked = request(config, formulation=formulation, precision=precision)
    evaluated, trained = benchmark_tasks.evaluate(asked), benchmark_tasks.train(asked)
    one_label = benchmark_tasks.train(asked | {"labelled": 1})
    for result in (evaluated, trained, one_label):
        assert min(result["seconds"]) > 0 and result["peak_mb"] > 50
    boxes = evaluated["boxes"]
    assert len(boxes) == 9 and min(boxes.values()) > 0
    assert sum(seconds for name, seconds in boxes.items() if name != "all") <= boxes["all"]


def test_the_fusion_box_is_measured_by_size(config):
    small, large = (benchmark_tasks.fusion(request(config, size=size, forward_only=False)) for size in (64, 128))
    assert (small["tokens"], large["tokens"]) == (256, 1024)
    assert set(large) == {"tokens", "forward", "forward_backward"}
    dense = benchmark_tasks.fusion(request(config, formulation="published", forward_only=True))
    assert set(dense) == {"tokens", "forward"}


def test_low_precision_masks_agree_with_float32(config):
    result = benchmark_tasks.agreement(request(config, precision="bf16"))
    assert 0.5 < result["agreement"] <= 1 and 0 < result["object_share"] < 1
    assert benchmark_tasks.agreement(request(config))["agreement"] == 1


def test_loading_reads_drawn_clips(config):
    result = benchmark_tasks.loading(request(config))
    assert result["first_pass"] > 0 and result["later_passes"] > 0


@pytest.fixture(autouse=True)
def own_settings():
    """Measurements set threads and precisions for their own process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    with benchmark_tasks.precision("32", torch.device("cpu")):
        pass


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
    bench = benchmark.Benchmark(options, benchmark.Console(quiet=True))
    with pytest.raises(benchmark.UserError, match=r"benchmark task 'evaluate' failed .*no_such_precision"):
        bench.ask("evaluate", device="no_such_precision")


def test_different_outputs_stop_the_benchmark(config, monkeypatch):
    options = benchmark.parse(["--config", config, "--size", "64"])
    bench = benchmark.Benchmark(options, benchmark.Console(quiet=True))
    monkeypatch.setattr(bench, "ask", lambda *_, **__: {"logits": 0.5})
    with pytest.raises(benchmark.UserError, match=r"disagree \(\{'logits': 0.5\}"):
        bench.check()
    monkeypatch.setattr(bench, "ask", lambda *_, **__: {"logits": float("nan")})
    with pytest.raises(benchmark.UserError, match="disagree"):
        bench.check()


def test_memory_is_kept_only_where_it_is_asked_for(config, monkeypatch):
    options = benchmark.parse(["--config", config])
    bench = benchmark.Benchmark(options, benchmark.Console(quiet=True))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1")
    seen = []

    real = subprocess.run

    def fake(command, **options):
        if command[0] == "bash":
            return real(command, **options)
        seen.append({name for name in options["env"] if "MALLOC_" in name})
        return subprocess.CompletedProcess(command, 0, stdout="noise\n{}\n", stderr="")

    monkeypatch.setattr(subprocess, "run", fake)
    bench.ask("evaluate", keep=False)
    bench.ask("evaluate", keep=True)
    assert seen[0] == set() and seen[1]


def test_arithmetic_of_a_grouped_convolution_and_its_gradients_is_counted_right():
    mapping = {torch.ops.aten.convolution_backward: benchmark_tasks.convolution_backward_flops}
    layer = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)
    x = torch.randn(1, 8, 5, 5, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        layer(x).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 9 * 8 * 25)


def test_training_takes_about_three_times_the_arithmetic_of_evaluation(config):
    flops = benchmark_tasks.TASKS["flops"]
    evaluation, training = (flops(request(config, training=training)) for training in (False, True))
    assert evaluation["total"] > 1e8
    assert 2 < training["total"] / evaluation["total"] < 3.3
    boxes = dict(evaluation["boxes"])
    assert boxes.pop("all") == evaluation["total"] >= sum(boxes.values()) > 0.9 * evaluation["total"]
    assert flops(request(config, training=True, labelled=1))["total"] < 0.9 * training["total"]


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
            self.query_generator = self.fusion_block = self.mask_head = self.pixel_decoder = torch.nn.Identity()
            self.transformer = torch.nn.Module()
            self.transformer.encoder, self.transformer.decoder = torch.nn.Identity(), torch.nn.Identity()
            self.in_proj = []

    model = torch.nn.Module()
    model.backbone = model.audio_encoder = torch.nn.Identity()
    model.head = Head()
    readings = {}
    with benchmark_tasks.watch(model, lambda: float(next(calls)), readings):
        for _ in range(2):
            model.head.transformer.encoder(torch.ones(1))
    assert readings["encoder"] == 2 and readings["decoder"] == 0
    model.head.transformer.encoder(torch.ones(1))
    assert readings["encoder"] == 2, "hooks must be gone"
