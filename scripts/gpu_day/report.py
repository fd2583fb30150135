"""The report, as Markdown and JSON, and the machine at its head."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ops import build
from scripts.benchmark.model import machine as cpu_and_torch
from scripts.engine.provenance import origin
from utils.files import write_atomically

SMI = "index,name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem"


def machine() -> dict[str, Any]:
    """What the numbers belong to: processor, memory, cards, driver, versions, commit."""
    found: dict[str, Any] = {"host": platform.platform(), **cpu_and_torch("cpu")}
    found["memory, GB"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    found |= {"CUDA of PyTorch": torch.version.cuda, "nvcc": _nvcc()}
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        size = f"{card.total_memory / 1e9:.1f} GB, {card.multi_processor_count} multiprocessors"
        found[f"card {index}"] = f"{card.name}, sm_{card.major}{card.minor}, {size}"
    if torch.cuda.is_available():
        found |= {
            "cuDNN": torch.backends.cudnn.version(),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "architectures of PyTorch": " ".join(torch.cuda.get_arch_list()),
        }
    if shutil.which("nvidia-smi"):
        found["nvidia-smi"] = _output("nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader")
    code = origin()
    return found | {"commit": code["commit"] or "not a repository"} | code["versions"]


def write(out: Path, report: Mapping[str, Any]) -> None:
    """Write report.md and report.json, each atomically."""
    write_atomically(out / "report.json", lambda file: file.write((json.dumps(report, indent=1) + "\n").encode()))
    write_atomically(out / "report.md", lambda file: file.write(markdown(report).encode()))


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    from scripts.gpu_day.tables import table

    kind = "A dry run: small sizes on a CPU; its numbers mean nothing" if report["dry"] else "Measured on a GPU"
    parts = report["parts"]
    lines = [
        "# GPU day",
        f"{kind}. Started {report['started']}, {report['minutes']:g} minutes given, {report['state']}.",
        table(("machine", ""), [(k, str(v).replace("\n", "; ")) for k, v in report["machine"].items()]),
        table(
            ("part", "state", "seconds", "limit"),
            [(part["name"], part["state"], _number(part["seconds"]), _number(part["limit"])) for part in parts],
        ),
    ]
    for part in parts:
        if part["state"] == "waiting":
            continue
        lines += [f"## {part['title']}", f"{part['state']}" + (f": {part['why']}" if part["why"] else "")]
        if part["commands"]:
            told = [f"{entry['command']}  # {entry['end']}, {entry['seconds']:.0f} s" for entry in part["commands"]]
            lines.append("\n".join(["```sh", *told, "```"]))
        if part["summary"]:
            lines.append(part["summary"])
    return "\n\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _nvcc() -> str:
    try:
        return _output(build.nvcc(), "--version").splitlines()[-1]
    except build.BuildError as error:
        return str(error)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip() or done.stderr.strip() or f"status {done.returncode}"
