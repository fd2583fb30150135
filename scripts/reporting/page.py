"""The HTML page: plain tags and inline style, no script, no request to elsewhere."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from dataloader.palette import palette
from scripts.engine.clip_pictures import Strip
from scripts.engine.plots import COLOURS, MARKERS
from scripts.reporting.compare import (
    class_differences,
    clip_table,
    config_differences,
    other_data,
    score_lines,
)
from scripts.reporting.drawings import class_bars, classes_in, curves, png, strip
from scripts.reporting.runs import RunFolder

MAX_RUNS = len(COLOURS)
OPEN_DIFFERENCES = 30
CLASSES_SHOWN = 20
_SHAPES = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
_BEST_FILES = {"s4": "S4_best.pth", "ms3": "MS3_best.pth", "avss": "AVSS_miou_best.pth"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1280px; margin: 24px auto;
  padding: 0 20px; }
h1 { font-size: 24px; margin: 0 0 12px; } h2 { font-size: 19px; margin: 36px 0 10px; border-bottom: 1px solid #ccc; }
h3 { font-size: 15px; margin: 0 0 6px; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e4e4e4;
  overflow-wrap: break-word; }
td.l { white-space: nowrap; } td.n, th.n { text-align: right; max-width: 230px; }
td.best { font-weight: 700; background: #eef5fb; }
th.group { padding-top: 14px; color: #444; } code { font-size: 13px; }
.key { white-space: nowrap; margin-right: 4px; } .note { color: #555; } img { max-width: 100%; }
.legend { margin: 8px 0; } .legend > span { margin-right: 22px; display: inline-block; }
.clips { display: grid; grid-template-columns: repeat(auto-fill, minmax(590px, 1fr)); gap: 22px 28px; }
.clip { border: 1px solid #d8d8d8; border-radius: 4px; padding: 10px; }
.row { display: grid; grid-template-columns: 104px 1fr; gap: 8px; align-items: center; margin-top: 3px; }
.row img { width: 100%; display: block; } .row div { font-size: 12px; line-height: 1.25; overflow-wrap: anywhere; }
.swatch { display: inline-block; width: 12px; height: 12px; margin: 0 4px 0 10px; border: 1px solid #888; }
details { margin: 8px 0; } summary { cursor: pointer; color: #0b5394; }
"""


def page(runs: Sequence[RunFolder], *, split: str, clips: int) -> str:
    """The page.

    Args:
        runs: at most MAX_RUNS.
        split: title of the test whose clips are shown, such as 'test'.
        clips: number of clips shown.
    """
    title = "Comparison of runs" if len(runs) > 1 else f"Run {runs[0].name}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _legend(runs),
        _section("Runs", _origins(runs)),
        _section("What differs in the configs", _differences(runs)) if len(runs) > 1 else "",
        _section("Scores, percent", _scores(runs)),
        _section("Curves", _curves(runs)),
        _classes(runs, split),
        _experts(runs),
        _section(f"Clips of the {split} split", _clips(runs, split, clips)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>"


def _name(run: RunFolder) -> str:
    """The run's name, which may break after underscores and slashes."""
    return escape(run.name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _key(number: int) -> str:
    """Colour and marker of a run."""
    return f'<span class="key" style="color:{COLOURS[number]}">{_SHAPES[MARKERS[number]]}</span>'


def _legend(runs: Sequence[RunFolder]) -> str:
    names = "".join(f"<span>{_key(number)}{escape(run.name)}</span>" for number, run in enumerate(runs))
    return f'<div class="legend">{names}</div>'


def _heads(runs: Sequence[RunFolder], numeric: bool = False) -> str:
    kind = ' class="n"' if numeric else ""
    return "".join(f"<th{kind}>{_key(number)}{_name(run)}</th>" for number, run in enumerate(runs))


def _origins(runs: Sequence[RunFolder]) -> str:
    rows = []
    for number, run in enumerate(runs):
        test = next((test for test in run.tests.values() if test.get("origin")), {})
        origin: dict[str, Any] = test.get("origin") or {}
        weights, data = origin.get("weights") or {}, origin.get("data") or {}
        cells = [
            f"{_key(number)}{_name(run)}",
            escape(run.task),
            escape(str(weights.get("seed", run.config.get("process.seed", "-")))),
            _commit(weights.get("commit")),
            escape(f"{len({int(row['epoch']) for row in run.rows})} of {run.config.get('process.train_epochs', '?')}"),
            ", ".join(escape(title) for title in [*run.tests, *(f"{name} (four sounds)" for name in run.robust)])
            or "no test yet",
            escape(f"{data['clips']} clips, {data['digest']}" if data else "not recorded"),
        ]
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = ("run", "task", "seed", "commit", "epochs", "tests", "test data (digest)")
    return _table("".join(f"<th>{name}</th>" for name in head), rows)


def _commit(commit: str | None) -> str:
    if not commit:
        return "not recorded"
    return f"<code>{escape(commit[:10])}</code>{' (dirty)' if commit.endswith('(dirty)') else ''}"


def _differences(runs: Sequence[RunFolder]) -> str:
    lacking = [run.name for run in runs if not run.config]
    note = f'<p class="note">Without a config.py: {escape(", ".join(lacking))}.</p>' if lacking else ""
    found = config_differences([run for run in runs if run.config])
    shown = [run for run in runs if run.config]
    if not found:
        return note + "<p>Nothing but the folder.</p>"
    rows = [
        f"<tr><td><code>{escape(key).replace('.', '.<wbr>').replace('_', '_<wbr>')}</code></td>"
        + "".join(f"<td><code>{escape(value)}</code></td>" for value in values)
        + "</tr>"
        for key, values in found
    ]
    heads = "".join(f"<th>{_key(runs.index(run))}{_name(run)}</th>" for run in shown)
    table = _table(f"<th>key</th>{heads}", rows)
    if len(found) > OPEN_DIFFERENCES:
        return f"{note}<details><summary>{len(found)} keys</summary>{table}</details>"
    return note + table


def _scores(runs: Sequence[RunFolder]) -> str:
    rows, group = [], ""
    for line in score_lines(runs):
        if line.group != group:
            group = line.group
            warning = " (scored on different data: not comparable)" if other_data(runs, group) else ""
            rows.append(f'<tr><th class="group" colspan="{len(runs) + 1}">{escape(group + warning)}</th></tr>')
        cells = [
            f'<td class="n{" best" if number in line.best else ""}">{"-" if value is None else f"{value:.1f}"}</td>'
            for number, value in enumerate(line.values)
        ]
        rows.append(f'<tr><td class="l">{escape(line.label)}</td>{"".join(cells)}</tr>')
    if not rows:
        return "<p>No run has a score yet.</p>"
    best = '<p class="note">Marked: the best of a row.</p>' if len(runs) > 1 else ""
    return _table(f"<th></th>{_heads(runs, numeric=True)}", rows) + best


def _curves(runs: Sequence[RunFolder]) -> str:
    lacking = [run.name for run in runs if not run.rows]
    note = f'<p class="note">Without a log: {escape(", ".join(lacking))}.</p>' if lacking else ""
    drawn = curves(runs)
    if drawn is None:
        return note
    words = "Means over the rows of an epoch. Losses of different criteria cannot be compared by their height."
    return f'{note}{_legend(runs)}<img src="{drawn}" alt="curves of the runs"><p class="note">{words}</p>'


def _classes(runs: Sequence[RunFolder], split: str) -> str:
    rows = class_differences(runs, split, CLASSES_SHOWN)
    if not rows:
        return ""
    order = "largest differences first" if len(runs) > 1 else "best first"
    picture = f'<img src="{class_bars(rows)}" alt="IoU per class">'
    return _section(f"IoU per class, {split}: {len(rows)} classes, {order}", _legend(runs) + picture)


def _experts(runs: Sequence[RunFolder]) -> str:
    drawn = [
        f'<h3>{_key(number)}{escape(run.name)}</h3><img src="{png(run.experts)}" alt="load of the experts">'
        for number, run in enumerate(runs)
        if run.experts is not None
    ]
    return _section("The experts' load over training", "\n".join(drawn)) if drawn else ""


def _clips(runs: Sequence[RunFolder], split: str, count: int) -> str:
    table = clip_table(runs, split)
    notes = [_missing(run, split) for run in runs if split not in run.clips]
    if table.empty:
        return "".join(notes)
    drawn = [
        index for index in table.columns if split in runs[index].pictures and len(runs[index].pictures[split].names)
    ]
    order = "those on which the runs differ most first" if len(table.columns) > 1 else "the worst first"
    cards = []
    for name in table.index[:count]:
        strips = {
            index: runs[index].pictures[split].read(name)
            for index in drawn
            if name in runs[index].pictures[split].names
        }
        if strips:
            classes = runs[drawn[0]].pictures[split].classes
            cards.append(_clip(name, table.loc[name], strips, classes))
    heads = "".join(f'<th class="n">{_key(index)}{_name(runs[index])}</th>' for index in table.columns)
    rows = (
        f"<tr><td>{escape(str(name))}</td>{''.join(f'<td class=n>{100 * value:.1f}</td>' for value in values)}</tr>"
        for name, values in zip(table.index, table.to_numpy(), strict=True)
    )
    return (
        "".join(notes)
        + f'<p class="note">{len(cards)} of {len(table)} clips, {order}; mIoU of the clip. Seconds without a label are '
        "dark.</p>" + _legend(runs) + f'<div class="clips">{"".join(cards)}</div>'
        f"<details><summary>mIoU of all {len(table)} clips, percent</summary>"
        f"{_table(f'<th>clip</th>{heads}', rows)}</details>"
    )


def _missing(run: RunFolder, split: str) -> str:
    here = Path.cwd()  # whole paths are nobody's business but this machine's
    folder = run.folder.relative_to(here) if run.folder.is_relative_to(here) else Path(run.name)
    weights = folder / _BEST_FILES.get(run.task, "WEIGHTS")
    command = f"bash test.sh {run.task or 'TASK'} CONFIG {weights}"
    return (
        f'<p class="note">{escape(run.name)} has no scores per clip of the {escape(split)} split; this writes them: '
        f"<code>{escape(command)}</code></p>"
    )


def _clip(name: str, scores: "pd.Series[float]", strips: dict[int, Strip], classes: Sequence[str]) -> str:
    semantic = len(classes) > 2
    first = next(iter(strips.values()))
    seconds = "frames of seconds " + ", ".join(map(str, first.seconds))
    rows = [_row(escape(seconds), strip(first, "frames", semantic=semantic), "frames")]
    rows.append(_row("label", strip(first, "truth", semantic=semantic), "label"))
    for index, stored in strips.items():
        words = f"{_key(index)}mIoU {100 * float(scores[index]):.1f}"
        rows.append(_row(words, strip(stored, "prediction", semantic=semantic), f"prediction of run {index + 1}"))
    legend = ""
    if semantic:
        legend = "".join(_swatch(number, classes) for number in classes_in(strips))
    return f'<div class="clip"><h3>{escape(name)}</h3>{"".join(rows)}<div>{legend}</div></div>'


def _swatch(number: int, classes: Sequence[str]) -> str:
    red, green, blue = (int(value) for value in palette()[number])
    name = classes[number] if number < len(classes) else f"class {number}"
    return f'<span class="swatch" style="background:rgb({red},{green},{blue})"></span>{escape(name)}'


def _row(words: str, source: str, alternative: str) -> str:
    return f'<div class="row"><div>{words}</div><img src="{source}" alt="{escape(alternative)}"></div>'


def _table(head: str, rows: Iterable[str]) -> str:
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
