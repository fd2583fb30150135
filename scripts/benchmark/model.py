"""Time and memory of the model, against the published formulation and against the limit set by its FLOPs.

    python -m scripts.benchmark.model                          # 5 frames of 224 pixels, float32 and bf16, everything
    python -m scripts.benchmark.model --quick                  # a few minutes
    python -m scripts.benchmark.model --frames 1 5 10 --size 224 384 --json benchmark.json
    python -m scripts.benchmark.model --device cuda --precision 32 tf32 bf16 --compile
    python -m scripts.benchmark.model --sections shared --size 128 \\
        --config config/ms3/MoDAT_pvt2_b0_ms3_stamps_scratch.py

'published' is model/reference.py: the same weights and outputs (checked first), computed with dense dispatch, expert by
expert, and so on; on a CPU in float32 only. Each measurement runs in a separate process. On a CPU both formulations run
twice: with the defaults of glibc's allocator, which returns large temporaries to the system after each use, and with
memory kept, as the launchers set it up.

'limit' is the time of matrix products and convolutions alone at the rate of large square products measured in the same
run.

Section 'shared' (not run by default) times a training step alone and beside another busy process, with 1 and 2 threads
that wait actively (spin at barriers) or passively.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.benchmark.allocator import glibc_defaults, memory_kept
from utils.errors import ConfigError, UserError
from utils.files import write_atomically

ROOT = Path(__file__).resolve().parents[2]

SECTIONS = ("model", "training", "moe", "metrics", "loading", "shared")
DEFAULT_SECTIONS = SECTIONS[:-1]
WAITING = {"active": {"OMP_WAIT_POLICY": "ACTIVE"}, "default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
"""Waiting of OpenMP threads -> environment; libgomp's default spins for milliseconds, then sleeps."""
PRECISIONS = ("32", "tf32", "bf16", "16")
OPENMP = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
TOLERANCE = 1e-4  # relative error of the outputs, as in the parity tests

Result = dict[str, Any]


class Benchmark:
    """Runs measurements in separate processes and collects the results.

    Args:
        options: of the command line.
        console: where progress and tables go.
    """

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options = options
        self.console = console
        self.rates: dict[str, float] = {}
        self.records: list[Result] = []

    def ask(
        self, task: str, *, keep: bool = True, environment: Mapping[str, str] | None = None, **request: Any
    ) -> Result:
        """Run one measurement in a child process.

        Args:
            task: a function of scripts/benchmark/tasks.py.
            keep: keep freed memory instead of glibc's defaults.
            environment: variables set for the process; the OpenMP settings of this process are then dropped.
            request: further arguments of the task.

        Raises:
            UserError: the process failed; the message holds the end of its output.
        """
        o = self.options
        common = {
            "config": o.config,
            "weights": o.weights,
            "device": o.device,
            "threads": o.threads,
            "repeats": 1 if o.quick else o.repeats,
            "seconds": 0.3 if o.quick else 3.0,
            "frames": o.frames[0],
            "size": o.size[0],
            "precision": "32",
            "formulation": "ours",
        }
        request = {"task": task, **common, **request}
        request.setdefault("labelled", request["frames"])
        variables = memory_kept() if keep else glibc_defaults()
        if environment is not None:
            variables = {name: value for name, value in variables.items() if name not in OPENMP} | dict(environment)
        words = [request["formulation"], f"{request['frames']} x {request['size']}", request["precision"]]
        with self.console.status(f"{task}: {', '.join(words)}{'' if keep else ', default allocator'}"):
            done = subprocess.run(
                [sys.executable, "-m", "scripts.benchmark.tasks", json.dumps(request)],
                capture_output=True,
                text=True,
                env=variables,
                cwd=ROOT,
                check=False,
            )
        if done.returncode:
            words = done.stderr.strip().splitlines()[-3:] or [f"status {done.returncode}"]
            reason = "killed, most likely for want of memory" if done.returncode == -9 else " | ".join(words)
            raise UserError(f"benchmark task '{task}' failed ({reason}); request: {json.dumps(request)}")
        result: Result = json.loads(done.stdout.strip().splitlines()[-1])
        self.records.append({"request": {**request, "keep_memory": keep, "environment": environment}, "result": result})
        return result

    def matrix_rate(self, precision: str) -> float:
        """FLOP/s of large square products, measured once per precision."""
        if precision not in self.rates:
            small, large = ([2048, 4096], [4096, 8192]) if not self.options.quick else ([2048], [4096])
            sizes = large if self.options.device == "cuda" else small
            self.rates[precision] = self.ask("rate", precision=precision, sizes=sizes)["flops_per_second"]
        return self.rates[precision]

    def variants(self, task: str, precisions: Sequence[str]) -> list[tuple[str, Result]]:
        """Titles and requests of the compared variants, the published formulation first."""
        cpu = self.options.device == "cpu"
        chosen: list[tuple[str, Result]] = []
        for precision in ["32"] if cpu else precisions:
            title = f"published, {name_of(precision)}"
            request = {"formulation": "published", "precision": precision}
            chosen.append((title, {**request, "keep": not cpu}))
            if cpu:
                chosen.append((f"{title}, memory kept", {**request, "keep": True}))
        for precision in precisions:
            request = {"formulation": "ours", "precision": precision}
            if cpu and precision == "32":
                chosen.append((f"ours, {name_of(precision)}, default allocator", {**request, "keep": False}))
            chosen.append((f"ours, {name_of(precision)}", {**request, "keep": True}))
            if task == "train" and self.options.checkpointing:
                title = f"ours, {name_of(precision)}, activation checkpointing"
                chosen.append((title, {**request, "keep": True, "checkpointing": True}))
            if self.options.compile:
                chosen.append((f"ours, {name_of(precision)}, compiled", {**request, "keep": True, "compile": True}))
        return chosen

    def check(self) -> Result:
        """Compare the two formulations' outputs before anything is timed.

        Raises:
            UserError: they differ.
        """
        errors = self.ask("check", frames=min(self.options.frames))
        if not all(error <= TOLERANCE for error in errors.values()):
            raise UserError(
                f"the model and the dense published formulation disagree ({errors}, at most {TOLERANCE} is right): "
                "their times mean nothing"
            )
        self.console.print(f"same outputs as the published formulation: relative errors {listed(errors, '.1e')}")
        return errors

    def model(self, frames: int, size: int) -> Result:
        """Evaluation of a clip: in total and per box."""
        return self._compared("evaluate", f"evaluation: {frames} frames of {size} x {size}", frames=frames, size=size)

    def training(self, frames: int, size: int, labelled: int) -> Result:
        """A training step on a clip whose first frames are labelled: all in ms3, one in s4."""
        title = f"training: {frames} frames of {size} x {size}, {labelled} with a label"
        return self._compared("train", title, frames=frames, size=size, labelled=labelled)

    def _compared(self, task: str, title: str, *, frames: int, **clip: Any) -> Result:
        work = self.ask("flops", frames=frames, training=task == "train", **clip)
        results: Result = {}
        for name, request in self.variants(task, self.options.precision):
            try:
                results[name] = {
                    **self.ask(task, frames=frames, **clip, **request),
                    "precision": request["precision"],
                }
            except UserError as error:
                self.console.print(f"[yellow]{name}: {error}[/yellow]")
        total = work["total"]
        self._print_compared(f"{title}, {total / 1e9:.0f} GFLOP", total, frames, results)
        if task == "evaluate":
            self._print_boxes(f"boxes of the {title}, ms", work["boxes"], results)
        return {"flops": total, "results": results}

    def _print_compared(self, title: str, total: float, frames: int, results: Mapping[str, Result]) -> None:
        table = Table(
            "", "time", "frames/s", "x published", "x published, memory kept", "x limit", "peak MB", "peak / published",
            title=title,
        )  # fmt: skip
        cpu = self.options.device == "cpu"
        for name, result in results.items():
            seconds = statistics.median(result["seconds"])
            plain = f"published, {name_of('32' if cpu else result['precision'])}"
            plain_result, kept = results.get(plain), results.get(f"{plain}, memory kept")
            table.add_row(
                name,
                duration(seconds),
                f"{frames / seconds:.1f}",
                ratio(plain_result, seconds),
                ratio(kept, seconds),
                f"{seconds * self.matrix_rate(result['precision']) / total:.2f}",
                f"{result['peak_mb']:.0f}",
                f"{result['peak_mb'] / plain_result['peak_mb']:.2f}" if plain_result else "",
            )
        self.console.print(table)

    def _print_boxes(self, title: str, work: Mapping[str, float], results: Mapping[str, Result]) -> None:
        timed = {name: result for name, result in results.items() if "boxes" in result}
        if not timed:
            return
        table = Table("box", "GFLOP", f"limit ({name_of(self.options.precision[0])})", *timed, title=title)
        rate = self.matrix_rate(self.options.precision[0])
        names = [name for name in work if name != "all"]
        for box in names:
            flops = work[box]
            cells = [f"{1e3 * result['boxes'][box]:.1f}" for result in timed.values()]
            table.add_row(box, f"{flops / 1e9:.1f}", f"{1e3 * flops / rate:.1f}", *cells)
        rest = [1e3 * (r["boxes"]["all"] - sum(r["boxes"][name] for name in names)) for r in timed.values()]
        table.add_row("between the boxes", "", "", *(f"{value:.1f}" for value in rest))
        self.console.print(table)

    def agreement(self) -> Result:
        """Masks of the low precisions against float32."""
        o = self.options
        found = {
            precision: self.ask("agreement", precision=precision)
            for precision in o.precision
            if precision in ("bf16", "16")
        }
        for precision, result in found.items():
            self.console.print(
                f"{name_of(precision)} masks against float32: {result['agreement']:.4f} agree "
                f"(objects fill {result['object_share']:.0%}; {'seeded random' if not o.weights else 'given'} weights)"
            )
        return found

    def moe(self, size: int) -> Result:
        """The fusion box at one and at twice the image size."""
        results: Result = {}
        table = Table(
            "", "image", "tokens", "forward", "x time per token", "extra MB", "forward + backward", "x time per token",
            "extra MB", title="fusion box, one frame",
        )  # fmt: skip
        for formulation in ("published", "ours"):
            first: Result = {}
            for side in (size, 2 * size):
                request: Result = {
                    "frames": 1,
                    "size": side,
                    "formulation": formulation,
                    # Dense tensors at twice the size, stored for the backward pass, take tens of gigabytes.
                    "forward_only": formulation == "published" and side > size,
                }
                try:
                    result = memory = self.ask("fusion", **request)
                    if self.options.device == "cpu":  # kept memory hides what a call allocates
                        memory = self.ask("fusion", keep=False, **request)
                except UserError as error:
                    self.console.print(f"[yellow]fusion, {formulation}, {side}: {error}[/yellow]")
                    continue
                if not result:
                    self.console.print("the config's model has no fusion block")
                    return {}
                results[f"{formulation}, {side}"] = {"kept": result, "default": memory}
                first = first or result
                cells: list[str] = []
                for direction in ("forward", "forward_backward"):
                    if direction not in result:
                        cells += ["", "", ""]
                        continue
                    seconds = statistics.median(result[direction]["seconds"])
                    base = statistics.median(first[direction]["seconds"])
                    growth = seconds / base * first["tokens"] / result["tokens"]
                    cells += [duration(seconds), f"{growth:.2f}", f"{memory[direction]['extra_mb']:.0f}"]
                table.add_row(formulation, str(side), str(result["tokens"]), *cells)
        self.console.print(table)
        return results

    def metrics(self, size: int) -> Result:
        """Metrics and label decoding against their literal definitions."""
        result = self.ask("metrics", size=size)
        table = Table("", "frames/s", "literal", "ratio", "same result", title=f"metrics and labels, {size} x {size}")
        for name, row in result.items():
            ours, literal = row["ours_frames_per_second"], row["literal_frames_per_second"]
            table.add_row(
                name, f"{ours:.0f}", f"{literal:.1f}", f"{ours / literal:.0f}", "yes" if row["equal"] else "NO"
            )
        self.console.print(table)
        if not all(row["equal"] for row in result.values()):
            raise UserError("a metric or label differs from its literal definition; see the table")
        return result

    def shared(self, size: int) -> Result:
        """A training step alone and beside a busy process, by number of threads and waiting of OpenMP threads."""
        busy = len(os.sched_getaffinity(0)) - 1  # processes that keep all other CPUs busy
        results: Result = {}
        table = Table(
            "threads", "waiting", "alone", f"beside {busy} busy", "x 1 thread alone", "x 1 thread beside",
            title=f"training step, {self.options.frames[0]} frames of {size} x {size}, on {busy + 1} CPUs",
        )  # fmt: skip
        variants = [(1, "passive"), *((busy + 1, waiting) for waiting in WAITING)]
        for threads, waiting in variants:
            variables = {"OMP_NUM_THREADS": str(threads), **WAITING[waiting]}
            request: Result = {"size": size, "threads": threads, "environment": variables}
            alone = self.ask("train", **request)
            with busy_processes(busy):
                beside = self.ask("train", **request)
            results[f"{threads}, {waiting}"] = {"alone": alone, "beside": beside}
        first, *_ = results.values()
        for (threads, waiting), result in zip(variants, results.values(), strict=True):
            seconds = {name: min(result[name]["seconds"]) for name in ("alone", "beside")}
            ratios = (f"{seconds[name] / min(first[name]['seconds']):.2f}" for name in ("alone", "beside"))
            table.add_row(str(threads), waiting, duration(seconds["alone"]), duration(seconds["beside"]), *ratios)
        self.console.print(table)
        return results

    def loading(self, size: int) -> Result:
        """Reading of clips from disk."""
        result = self.ask("loading", size=size)
        self.console.print(
            f"data loading, one process, 5 frames of {size} x {size}: {result['later_passes']:.1f} clips/s "
            f"({result['first_pass']:.1f} in the first pass, which computes the log-mels)"
        )
        return result


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Run processes that each keep one CPU busy, in sessions of their own, as another user's."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def ratio(reference: Result | None, seconds: float) -> str:
    """The reference's time over this one."""
    return f"{statistics.median(reference['seconds']) / seconds:.2f}" if reference else ""


def duration(seconds: float) -> str:
    """Seconds or milliseconds as text."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def name_of(precision: str) -> str:
    """Display name of a precision."""
    return {"32": "float32", "tf32": "TF32", "16": "float16"}.get(precision, precision)


def listed(values: Mapping[str, float], form: str) -> str:
    """Names and values on one line."""
    return ", ".join(f"{name} {value:{form}}" for name, value in values.items())


def machine(device: str) -> Result:
    """The machine of the measurements."""
    import torch

    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "unknown",
    )
    found: Result = {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_1_min": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked.

    Raises:
        ConfigError: a device, file or size is unusable.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="config/ms3/MoDAT_pvt2_ms3.py", help="of the model")
    parser.add_argument("--weights", help="a checkpoint; default: seeded random weights")
    parser.add_argument("--frames", type=int, nargs="+", default=[5], help="frames per batch")
    parser.add_argument("--size", type=int, nargs="+", default=[224], help="image sizes, multiples of 32 pixels")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["32", "bf16"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="of the CPU; 0 = all cores")
    parser.add_argument("--compile", action="store_true", help="also torch.compile")
    parser.add_argument("--checkpointing", action="store_true", help="also training with activation checkpointing")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=DEFAULT_SECTIONS)
    parser.add_argument("--repeats", type=int, default=5, help="minimum number of runs per measurement")
    parser.add_argument("--quick", action="store_true", help="one run per measurement")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    options = parser.parse_args(arguments)
    if any(n < 1 for n in (*options.frames, options.repeats)):
        raise ConfigError("--frames and --repeats: give whole numbers from 1 up.")
    if any(size < 32 or size % 32 for size in options.size):
        raise ConfigError(f"--size {options.size}: give multiples of 32 pixels, the coarsest map's stride.")
    if options.device == "cpu" and "tf32" in options.precision:
        raise ConfigError("--precision tf32 is a mode of CUDA devices: leave it out on a CPU.")
    for name in ("config", "weights"):
        path = getattr(options, name)
        if path is not None:
            found = [candidate for candidate in (Path(path), ROOT / path) if candidate.is_file()]
            if not found:
                raise ConfigError(f"--{name} {path}: there is no such file.")
            setattr(options, name, str(found[0].resolve()))
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: PyTorch finds no CUDA device here; omit it to measure the CPU.")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write the numbers; returns 2 for a user error or a failed measurement."""
    try:
        options = parse(arguments)
        console = Console(width=None if sys.stdout.isatty() else 150)
        benchmark = Benchmark(options, console)
        report: Result = {"machine": machine(options.device), "options": vars(options) | {"json": None}}
        console.print(listed_machine(report["machine"]))
        if set(options.sections) != {"shared"}:
            report["check"] = benchmark.check()
            report["matrix_rates"] = {p: benchmark.matrix_rate(p) for p in options.precision}
            rates = {name_of(p): rate / 1e9 for p, rate in benchmark.rates.items()}
            console.print(f"square matrix products, GFLOP/s: {listed(rates, '.0f')}")
        if "model" in options.sections:
            report["agreement"] = benchmark.agreement()
        for size in options.size:
            for frames in options.frames:
                if "model" in options.sections:
                    report[f"evaluation {frames} x {size}"] = benchmark.model(frames, size)
                    save(options.json, report, benchmark)
                if "training" in options.sections:
                    for labelled in sorted({frames, 1}, reverse=True):
                        report[f"training {frames} x {size}, {labelled} labelled"] = benchmark.training(
                            frames, size, labelled
                        )
                        save(options.json, report, benchmark)
        for section in ("moe", "metrics", "loading", "shared"):
            if section in options.sections:
                report[section] = getattr(benchmark, section)(options.size[0])
                save(options.json, report, benchmark)
        if options.json:
            console.print(f"every number: {options.json}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def save(path: Path | None, report: Result, benchmark: Benchmark) -> None:
    """Write all numbers so far, where a file is given; a run that is cut leaves those of the sections before."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**report, "records": benchmark.records}, indent=1) + "\n"
        write_atomically(path, lambda file: file.write(text.encode()))


def listed_machine(found: Mapping[str, Any]) -> str:
    """The machine on one line, with a warning if it is busy."""
    line = ", ".join(f"{name} {value}" for name, value in found.items())
    return line + ("  [busy: times will be off]" if found["load_1_min"] > 0.5 * (found["cores"] or 1) else "")


if __name__ == "__main__":
    sys.exit(main())
