"""The table of a study: Markdown, CSV, LaTeX, and rich on the terminal."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table

from scripts.ablation.compare import Comparison, compare
from scripts.ablation.size import measured
from scripts.ablation.study import CLIPS, SCORES, Run, Study, is_scored, read_state
from scripts.engine.clip_scores import read_clip_scores
from scripts.engine.run import CONFIG_FILE
from utils.errors import ConfigError, DataError
from utils.files import atomic_path
from utils.runtime import file_lock

F_SCORE = {"s4": "f_score_per_batch", "ms3": "f_score_per_batch", "avss": "f_score"}
"""Task -> the F that is published for it."""
SIZES = "sizes.json"


@dataclass
class Row:
    """A config's line.

    Attributes:
        config: its name.
        seeds: the seeds that are scored.
        wanted: seeds in all.
        miou: per scored seed, 0 to 1.
        f_score: likewise, the published F of the task.
        minutes: of training, per scored seed.
        clips: per scored seed, name of the clip -> mIoU.
        size: parameters and flops, see `scripts.ablation.size`.
        against_first: None for the first row, and where no seed is scored in both.
        notes: failures and what is missing.
    """

    config: str
    seeds: list[int]
    wanted: int
    miou: list[float] = field(default_factory=list)
    f_score: list[float] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)
    clips: dict[int, pd.Series] = field(default_factory=dict)
    size: Mapping[str, float] = field(default_factory=dict)
    against_first: Comparison | None = None
    notes: list[str] = field(default_factory=list)


def rows(study: Study) -> list[Row]:
    """The study's lines, from what its runs have left."""
    found = []
    for config in study.configs:
        row = Row(config.stem, [], study.seeds)
        for run in study.of(config):
            _add(row, run, F_SCORE[study.task])
        if row.seeds:
            row.size = _size(study, next(run for run in study.of(config) if run.seed == row.seeds[0]))
            if not row.size:
                row.notes.append(f"{config.stem}: parameters and GFLOP could not be counted")
        found.append(row)
    first = found[0]
    for row in found[1:]:
        common = [seed for seed in first.seeds if seed in row.seeds]
        if common:
            try:
                row.against_first = compare([first.clips[s] for s in common], [row.clips[s] for s in common])
            except ValueError as error:
                row.notes.append(f"{row.config} is not compared: {error}")
    return found


def _add(row: Row, run: Run, f_score: str) -> None:
    try:
        state = read_state(run)
        if is_scored(run) and state is not None:
            scores = json.loads((run.folder / SCORES).read_text())
            row.clips[run.seed] = read_clip_scores(run.folder / CLIPS)
            row.miou.append(float(scores["miou"]))
            row.f_score.append(float(scores[f_score]))
            row.minutes.append(state.minutes)
            row.seeds.append(run.seed)
        elif state is None:
            row.notes.append(f"{run.name}: not begun")
        else:
            row.notes.append(f"{run.name}: {state.error or 'not finished'}")
    except (ConfigError, DataError, OSError, ValueError, KeyError) as error:
        row.clips.pop(run.seed, None)
        row.notes.append(f"{run.name}: its scores cannot be read ({error})")


def _size(study: Study, run: Run) -> Mapping[str, float]:
    """Parameters and FLOPs of a run's model, counted once per config."""
    path = study.folder / SIZES
    try:
        known: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    if not known.get(run.digest):
        known[run.digest] = measured(run.folder / CONFIG_FILE)
        with atomic_path(path) as part:
            part.write_text(json.dumps(known, indent=1) + "\n")
    found: Mapping[str, float] = known[run.digest]
    return found


def spread(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """Mean ± sample deviation, 'x' of one value, '' of none."""
    if not values:
        return ""
    mean = f"{scale * sum(values) / len(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {scale * float(pd.Series(values).std()):.{digits}f}"


def label(config: str, first: str) -> str:
    """A row's name in the table: of a config named after the first one, what it adds."""
    return config.removeprefix(f"{first}_").replace("_", " ") if config.startswith(f"{first}_") else config


def shown(found: Sequence[Row]) -> pd.DataFrame:
    """The table as text."""
    lines = []
    for row in found:
        c = row.against_first
        interval = "" if c is None or math.isnan(c.low) else f"{100 * c.low:+.1f} to {100 * c.high:+.1f}"
        lines.append(
            {
                "config": label(row.config, found[0].config),
                "seeds": f"{len(row.seeds)}" if len(row.seeds) == row.wanted else f"{len(row.seeds)} of {row.wanted}",
                "mIoU": spread(row.miou) or "none",
                "F": spread(row.f_score),
                "difference": "" if c is None else f"{100 * c.difference:+.1f}",
                "95 % interval": interval,
                "p": "" if c is None else ("< 0.001" if c.p < 0.001 else f"{c.p:.3f}"),
                "M param.": f"{row.size['parameters'] / 1e6:.2f}" if row.size else "",
                "GFLOP": f"{row.size['flops'] / 1e9:.1f}" if row.size else "",
                "minutes": spread(row.minutes, scale=1),
            }
        )
    return pd.DataFrame(lines)


def numbers(found: Sequence[Row]) -> pd.DataFrame:
    """The table as numbers: scores from 0 to 1."""
    lines = []
    for row in found:
        series = {"miou": row.miou, "f_score": row.f_score, "minutes": row.minutes}
        values = {name: pd.Series(x, dtype=float) for name, x in series.items()}
        spreads = {f"{name}_{kind}": getattr(x, kind)() for name, x in values.items() for kind in ("mean", "std")}
        compared = asdict(row.against_first) if row.against_first else dict.fromkeys(Comparison.__dataclass_fields__)
        lines.append(
            {
                "config": row.config,
                "seeds": len(row.seeds),
                **spreads,
                **compared,
                "parameters": row.size.get("parameters"),
                "flops": row.size.get("flops"),
            }
        )
    return pd.DataFrame(lines)


def per_run(found: Sequence[Row]) -> pd.DataFrame:
    """One line per scored run: scores from 0 to 1."""
    columns = ("config", "seed", "miou", "f_score", "minutes")
    lines = [
        (row.config, *values)
        for row in found
        for values in zip(row.seeds, row.miou, row.f_score, row.minutes, strict=True)
    ]
    return pd.DataFrame(lines, columns=list(columns))


def legend(found: Sequence[Row], task: str) -> list[str]:
    """What the columns mean, and what is missing; one sentence per line."""
    clips = {row.against_first.clips for row in found if row.against_first}
    published = "AVSBench's, per batch of 2 clips" if task != "avss" else "per class"
    lines = [f"Test split, in per cent; ±: sample deviation over seeds. F: {published}. Minutes of training."]
    if clips:
        of = "mIoU per clip" if task != "avss" else "mIoU per clip over the classes that occur in it"
        lines.append(
            f"Difference from the first row in the mean {of}, over {max(clips)} clips and the seeds that both rows "
            "have; interval: paired bootstrap over clips (BCa, 9999 resamples); p: paired randomisation test, "
            "two-sided, not corrected for the number of rows. Both take the trained weights as given."
        )
    lines.append("Parameters with frozen ones; GFLOP: evaluation of one clip, a multiply-add as two.")
    return lines + [note for row in found for note in row.notes]


def markdown(table: pd.DataFrame, notes: Sequence[str]) -> str:
    """The table and its legend in Markdown."""
    head = [list(table.columns), ["---", *["---:"] * (len(table.columns) - 1)]]
    lines = [f"| {' | '.join(cells)} |" for cells in (*head, *table.values.tolist())]
    return "\n".join([*lines, "", *notes]) + "\n"


def latex(table: pd.DataFrame, notes: Sequence[str]) -> str:
    """The table in LaTeX (package booktabs), its legend as comments."""
    plain = table.map(lambda cell: str(cell).replace("±", "PLUSMINUS"))
    text = plain.to_latex(index=False, escape=True, column_format="l" + "r" * (len(table.columns) - 1))
    return "".join(f"% {note}\n" for note in notes) + text.replace("PLUSMINUS", r"$\pm$").replace(" < ", " $<$ ")


def write_table(study: Study) -> tuple[pd.DataFrame, list[str]]:
    """Write all forms of the table; commands that end at the same time do so in turn.

    Returns:
        The table as text, and the lines below it.
    """
    with file_lock(study.folder / ".table.lock"):
        found = rows(study)
        table, notes = shown(found), legend(found, study.task)
        forms = {
            "table.md": markdown(table, notes),
            "table.tex": latex(table, notes),
            "table.csv": numbers(found).to_csv(index=False),
            "runs.csv": per_run(found).to_csv(index=False),
        }
        for name, text in forms.items():
            with atomic_path(study.folder / name) as part:
                Path(part).write_text(text)
    return table, notes


def terminal(table: pd.DataFrame, title: str) -> Table:
    """The table for the terminal."""
    drawn = Table(title=title, title_justify="left")
    for column in table.columns:
        left = column == "config"
        drawn.add_column(column, justify="left" if left else "right", no_wrap=not left, overflow="fold")
    for cells in table.values.tolist():
        drawn.add_row(*cells)
    return drawn
