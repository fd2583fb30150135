"""Results of the parts as Markdown."""

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

FAILURES_SHOWN = 10


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def together(*texts: str | None) -> str | None:
    """Those that there are, one below the other."""
    return "\n\n".join(text for text in texts if text) or None


def end_of(log: Path, lines: int) -> str | None:
    """The last lines of a log, as they are."""
    if not log.is_file():
        return None
    text = log.read_text(errors="replace").replace("```", "'''").rstrip().splitlines()[-lines:]
    return "\n".join(["```text", *text, "```"])


def tests(report: Path) -> str | None:
    """Numbers of tests, failures and reasons to skip, from pytest's JUnit file."""
    if not report.is_file():
        return None
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.find("skipped") for case in cases]
    reasons = sorted({str(entry.get("message")) for entry in skipped if entry is not None})
    left_out = sum(entry is not None for entry in skipped)
    lines = [f"{len(cases) - len(bad) - left_out} passed, {len(bad)} failed, {left_out} skipped."]
    lines += [f"- skipped: {reason}" for reason in reasons]
    for case in bad[:FAILURES_SHOWN]:
        found = case.find("failure")
        message = (found if found is not None else case.find("error")).get("message") or ""  # type: ignore[union-attr]
        lines.append(f"- **failed**: {case.get('classname')}.{case.get('name')}: {message.splitlines()[0][:200]}")
    if len(bad) > FAILURES_SHOWN:
        lines.append(f"- and {len(bad) - FAILURES_SHOWN} more, see the log")
    return "\n".join(lines)


def op(rows: Sequence[Mapping[str, Any]] | None) -> str | None:
    """Rows of scripts/benchmark/ops.py."""
    if not rows:
        return None
    cells = []
    for row in rows:
        share, memory = row.get("share_of_memory_limit"), (row.get("forward_mb"), row.get("both_mb"))
        cells.append(
            [
                f"{row['levels']}, {row['frames']} frames, {row['dtype']}",
                row["name"],
                f"{row['forward_ms']:.3f}",
                f"{row['both_ms']:.3f}",
                "" if share is None else f"{share[0]:.0%} / {share[1]:.0%}",
                "" if None in memory else f"{memory[0]:.0f} / {memory[1]:.0f}",
            ]
        )
    head = ("input", "", "forward, ms", "with backward, ms", "of the memory limit", "extra MB")
    return table(head, cells)


def model(report: Mapping[str, Any] | None) -> str | None:
    """Comparisons of scripts/benchmark/model.py: evaluation, training, the fusion box."""
    if not report:
        return None
    parts: list[str | None] = []
    if "check" in report:
        errors = ", ".join(f"{name} {value:.1e}" for name, value in report["check"].items())
        parts.append(f"Relative errors against the dense formulation: {errors}.")
    rates = report.get("matrix_rates", {})
    if rates:
        listed = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in rates.items())
        parts.append(f"Large matrix products, TFLOP/s: {listed}.")
    for precision, found in report.get("agreement", {}).items():
        parts.append(f"{precision} masks: {found['agreement']:.4f} agree with float32's.")
    for title, entry in report.items():
        if title.startswith(("evaluation ", "training ")):
            parts.append(_compared(title, entry, rates))
    if report.get("moe"):
        parts.append(_fusion(report["moe"]))
    return together(*parts)


def _compared(title: str, entry: Mapping[str, Any], rates: Mapping[str, float]) -> str:
    results = entry["results"]
    base = next((value for name, value in results.items() if name.startswith("published")), None)
    rows = []
    for name, result in results.items():
        seconds = statistics.median(result["seconds"])
        rate = rates.get(result["precision"])
        rows.append(
            [
                name,
                f"{1e3 * seconds:.1f}",
                f"{statistics.median(base['seconds']) / seconds:.2f}" if base else "",
                f"{seconds * rate / entry['flops']:.2f}" if rate else "",
                f"{result['peak_mb']:.0f}",
            ]
        )
    return f"{title}:\n\n" + table(("", "ms", "x published", "x limit of the products", "peak MB"), rows)


def _fusion(found: Mapping[str, Any]) -> str:
    rows = []
    for name, pair in found.items():
        row: list[object] = [name]
        for direction in ("forward", "forward_backward"):
            result, memory = pair["kept"].get(direction), pair["default"].get(direction)
            row += (
                [f"{1e3 * statistics.median(result['seconds']):.2f}", f"{memory['extra_mb']:.0f}"]
                if result
                else ["", ""]
            )
        rows.append(row)
    return "Fusion box, one frame:\n\n" + table(("", "forward, ms", "extra MB", "with backward, ms", "extra MB"), rows)


def classic(report: Mapping[str, Any] | None) -> str | None:
    """Results of scripts/gpu_day/classic.py."""
    if not report:
        return None
    rows = []
    for precision, found in report.items():
        for what in ("evaluation", "training step"):
            ours, other = found[f"{what}, ours"], found[f"{what}, classic op"]
            rows.append(
                [
                    f"{what}, {precision}",
                    f"{1e3 * ours['seconds']:.1f}",
                    f"{1e3 * other['seconds']:.1f}",
                    f"{other['seconds'] / ours['seconds']:.2f}",
                    f"{ours['peak_mb']:.0f} / {other['peak_mb']:.0f}",
                    f"{found['relative error of the logits']:.1e}",
                ]
            )
    head = ("", "ours, ms", "classic op, ms", "times faster", "peak MB", "relative error of the logits")
    return table(head, rows)


def values(report: Mapping[str, Any] | None) -> str | None:
    """Names and values."""
    if not report:
        return None
    return table(("", ""), [(k, f"{v:.4g}" if isinstance(v, float) else v) for k, v in report.items()])


def run(folder: Path) -> str | None:
    """A training run's validations and, where it was tested, the scores of the tests."""
    log = folder / "metrics.csv"
    if not log.is_file():
        return None
    with log.open() as file:
        rows = [row for row in csv.DictReader(file) if any(k.startswith("val_") and v for k, v in row.items())]
    names = [name for name in (rows[0] if rows else {}) if name.startswith("val_")]
    found = [
        table(
            ("epoch", "step", *names), [[row["epoch"], row["step"], *(_short(row[n]) for n in names)] for row in rows]
        )
    ]
    for path in sorted(folder.rglob("*.json")):
        found.append(f"{path.relative_to(folder)}:\n\n{_scores(json.loads(path.read_text()))}")
    return together(*found)


def _scores(report: Mapping[str, Any]) -> str:
    """What test.py has written: scores, or with --robust a row of them per sound."""
    conditions = report.get("conditions")
    if not conditions:
        return table(("", ""), [(k, _short(v)) for k, v in report.items() if isinstance(v, int | float)])
    names = list(next(iter(conditions.values())))
    rows = [[sound, *(_short(scores.get(name, "")) for name in names)] for sound, scores in conditions.items()]
    return table(("sound", *names), rows)


def _short(value: Any) -> str:
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return str(value)
