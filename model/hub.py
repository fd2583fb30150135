"""Model folders: a model with its config and card in one folder, on disk or on the Hugging Face hub.

from model.hub import from_pretrained, save_pretrained

save_pretrained(model, cfg, "my-model", scores={"test": {"miou": 0.85}})
model, cfg = from_pretrained("my-model")  # or "owner/my-model" after `hf upload owner/my-model my-model`

A folder holds `model.safetensors`, a packed model (see model/packed.py), which carries its config; `config.json`, the
same config for other readers; and `README.md`, the model card. Loading reads tensors and JSON alone: no code comes from
a folder.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import ConfigDict

from model.avs_model import AVSModel
from model.builder import build_model
from model.model_card import model_card
from model.packed import frozen_parts, load_checkpoint, metadata, pack, published_config
from utils.download import DownloadError
from utils.errors import CheckpointError, ConfigError
from utils.files import atomic_path
from utils.optional import import_optional
from utils.runtime import ROOT, find_checkpoint

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")


class Pretrained(NamedTuple):
    """What `from_pretrained` returns.

    Attributes:
        model: in evaluation mode, on the CPU.
        cfg: the whole config that it was trained with.
    """

    model: AVSModel
    cfg: Any


def save_pretrained(
    model: AVSModel,
    cfg: Any,
    folder: str | Path,
    *,
    scores: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    licence: str | None = None,
    whole: bool = False,
    record: Mapping[str, Any] | None = None,
) -> list[str]:
    """Write a model folder; files of an earlier model in it are replaced.

    Args:
        model: `build_model(cfg.model)` with its weights.
        cfg: its config, from utils.config.load_config.
        folder: made where it is missing.
        scores: numbers by split, for readers: {'test': {'miou': 0.85}}.
        classes: names by class index, background first; None leaves them out.
        licence: under which you give the weights in the folder, an SPDX name such as 'cc-by-4.0'; None leaves the card
            without one.
        whole: keep frozen pretrained parts inside. Without it they are left out and read from their own weights in
            loading; a model without such parts is always whole.
        record: of the weights' origin, from `model.checkpoint.read_record`.

    Returns:
        The parts left out: 'backbone', 'audio_encoder'.

    Raises:
        ConfigError: the number of class names does not fit the config.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    scores = dict(scores or {})
    whole = whole or not frozen_parts(model, cfg)
    left_out = pack(model, cfg, folder / WEIGHTS, scores, classes=classes, whole=whole, record=record)
    published = published_config(cfg, left_out)
    config = json.dumps(published, indent=2) + "\n"
    name = folder.resolve().name
    card = model_card(published, name=name, scores=scores, left_out=left_out, licence=licence, record=record)
    for file, text in ((CONFIG, config), (CARD, card)):
        with atomic_path(folder / file) as part:
            part.write_text(text, encoding="utf-8")
    return left_out


def from_pretrained(name: str | Path) -> Pretrained:
    """Load a model with its config.

    Args:
        name: a model folder; a packed model by file or by its name in model/packed/; or a repository of the hub,
            'owner/name' or 'owner/name@revision', whose three files are kept in the hub's cache.

    Returns:
        (model, cfg), the model in evaluation mode on the CPU.

    Raises:
        ConfigError: there is no such model, or its file carries no config.
        CheckpointError: a file is damaged, or the weights do not fit.
        DownloadError: the hub or the weights of a part left out cannot be reached.
    """
    path = find_weights(name)
    packed = metadata(path)
    if packed is None:
        raise ConfigError(
            f"{path} carries no config: build_model and model.packed.load_checkpoint load plain weights, and "
            "save_pretrained or scripts/pack_weights.py gives them a config."
        )
    config = packed["config"]
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(f"{path} is damaged: its metadata holds no config of a model.")
    cfg = ConfigDict({**config, "task": packed.get("task")})
    model = build_model(cfg["model"])
    load_checkpoint(model, cfg["model"], path)
    return Pretrained(model.eval(), cfg)


def find_weights(name: str | Path) -> Path:
    """The weights file of a model folder, of a repository of the hub, of a packed model, or any file.

    Args:
        name: see `from_pretrained`; a path is relative to the working directory or else to the project.

    Raises:
        ConfigError: there is no such model.
        CheckpointError: the folder lacks its weights, or its config.json is another config than theirs.
        DownloadError: the hub cannot be reached or has no such repository.
    """
    for candidate in (Path(name), ROOT / name):
        if candidate.is_dir():
            return _weights_of(candidate.resolve())
    try:
        return find_checkpoint(str(name))
    except ConfigError:
        found = _HUB_NAME.fullmatch(str(name))
        if found is None or Path(name).suffix in (".pth", ".pt", ".safetensors", ".ckpt"):
            raise
    return _weights_of(_download(found["repo"], found["revision"]))


def _weights_of(folder: Path) -> Path:
    path, config = folder / WEIGHTS, folder / CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder} is no model folder: it lacks {WEIGHTS} (model.hub.save_pretrained makes one).")
    packed = metadata(path)
    if packed is None or not config.is_file():
        return path
    try:
        written = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{config} is not readable JSON ({error}).") from error
    if written != packed["config"]:
        raise CheckpointError(
            f"{config} differs from the config inside {WEIGHTS}, which is the one that counts: write the folder again "
            "with save_pretrained, or remove config.json."
        )
    return path


def _download(repo: str, revision: str | None) -> Path:
    hub = import_optional("huggingface_hub", f"a model of the hub ({repo})")
    try:
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=[WEIGHTS, CONFIG, CARD]))
    except (OSError, ValueError) as error:  # of the hub's own errors, each is one of the two
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DownloadError(
            f"{repo} is no file or folder here, and as a repository of huggingface.co it cannot be had ({reason}). "
            "On a machine with network: hf download OWNER/NAME --local-dir FOLDER; then name FOLDER."
        ) from error
