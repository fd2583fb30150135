"""Model cards: the README.md of a model folder, for people and for the Hugging Face hub."""

from collections.abc import Mapping, Sequence
from typing import Any

from model.pretrained import CATALOGUE, Weights, resolve_weights

TASKS = {
    "s4": "one sounding object per clip (AVSBench's single-source layout)",
    "ms3": "several sounding objects per clip (AVSBench's multi-source layout)",
    "avss": "sounding objects with their classes (AVSBench's semantic layout)",
}
NOT_SHOWN = "Its decisions follow its training data: on other kinds of objects, sounds and scenes it is untested."


def model_card(
    cfg: Any,
    *,
    name: str,
    scores: Mapping[str, Any],
    left_out: Sequence[str] = (),
    licence: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> str:
    """The card of a model, Markdown under the front matter that the hub reads.

    Args:
        cfg: the whole config.
        name: title.
        scores: numbers by split; a split without numbers has no row.
        left_out: parts that are not in the weights file.
        licence: of the weights inside, an SPDX name; None if it is not stated.
        record: of the weights' origin, from `model.checkpoint.read_record`; None leaves the section out.
    """
    tags = "\n".join(f"- {tag}" for tag in ("audio-visual-segmentation", "image-segmentation", str(cfg["task"])))
    front = f"---\ntags:\n{tags}\npipeline_tag: image-segmentation\n"
    front += f"license: {licence}\n---\n" if licence else "---\n"
    model, data = cfg["model"], cfg["dataset"].get("train", {}) if "dataset" in cfg else {}
    table = next((str(data[key]) for key in ("anno_csv", "meta_csv_path") if data.get(key)), "not stated")
    return "\n".join(
        [
            front,
            f"# {name}",
            "",
            f"{model['type']} segments what is seen and heard in a video: {TASKS.get(str(cfg['task']), cfg['task'])}.",
            f"It reads frames and the second of sound around each. {NOT_SHOWN}",
            "",
            "## Scores",
            "",
            *_score_table(scores),
            "",
            "## Data",
            "",
            f"Trained on {data.get('type', 'data that the config does not name')}, table of clips: `{table}`.",
            "",
            "## Parts and licences",
            "",
            *_parts_table(model, left_out, licence),
            "",
            *_origin_of(record),
            "## Use",
            "",
            "From the folder of the project, with this folder or its name on the hub:",
            "",
            "```python",
            "from scripts.prediction import from_pretrained, predict",
            "",
            f'model = from_pretrained("{name}")',
            'predict(model, "video.mp4")',
            "```",
            "",
            f'`model, cfg = model.hub.from_pretrained("{name}")` gives the PyTorch module and its config.',
            "",
        ]
    )


def _origin_of(record: Mapping[str, Any] | None) -> list[str]:
    """The section on how the weights were made."""
    if record is None:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    splits = [
        f"{name}: {split['clips']} clips, digest {split['digest']}"
        for name, split in record.get("splits", {}).items()
        if split
    ]
    lines = [
        f"Seed {record.get('seed')}, commit {record.get('commit') or 'not known'}, epoch {record.get('epoch')}.",
        f"Versions: {versions}.",
        f"Data: {'; '.join(splits)}.",
    ]
    return ["## Origin", "", *lines, ""]


def _score_table(scores: Mapping[str, Any]) -> list[str]:
    rows = [
        f"| {split} | {name} | {value:.4g} |"
        for split, values in scores.items()
        for name, value in (values.items() if isinstance(values, Mapping) else [("", values)])
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    return ["| split | score | value |", "|---|---|---|", *rows] if rows else ["None are recorded."]


def _parts_table(model: Mapping[str, Any], left_out: Sequence[str], licence: str | None) -> list[str]:
    rows = []
    for part, label in (("backbone", "image backbone"), ("audio_encoder", "audio encoder")):
        cfg = model.get(part) or {}
        inside = "no: read from its own weights" if part in left_out else "yes"
        origin, terms = _origin(cfg, licence)
        rows.append(f"| {label} {cfg.get('type', 'VGGish')} | {origin} | {inside} | {terms} |")
    rows.append(f"| head | trained | yes | {licence or 'not stated'} |")
    return ["| part | weights | in the file | licence |", "|---|---|---|---|", *rows]


def _origin(cfg: Mapping[str, Any], licence: str | None) -> tuple[str, str]:
    """Where a part's weights come from, and their licence."""
    value = cfg.get("weights")
    if value is None:
        return "trained from random ones", licence or "not stated"
    if value in ("timm", "transformers"):
        name = cfg.get("name", cfg.get("type"))
        return f"{value}'s own of {name}", f"see {name} on the hub"
    entry = _entry(str(value))
    if entry is None:
        return f"a file, `{resolve_weights(value).name}`", "not stated"
    return f"{entry.fits}, `{entry.path}`", entry.licence


def _entry(value: str) -> Weights | None:
    stem = resolve_weights(value).stem
    return next((entry for entry in CATALOGUE.values() if entry.path.stem == stem), None)
