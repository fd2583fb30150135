"""Models of the page: those that it offers, and the one that is loaded."""

import threading
from dataclasses import dataclass
from pathlib import Path

from model.hub import WEIGHTS as FOLDER_WEIGHTS
from model.hub import find_weights
from scripts.prediction.model import PACKED, PredictionModel, load_for_prediction
from utils.errors import ConfigError
from utils.runtime import ROOT, find_file, shipped_configs

WEIGHTS = (".pth", ".safetensors")


@dataclass(frozen=True)
class Choice:
    """A model by name: one that carries its config, or weights with theirs."""

    name: str
    checkpoint: Path
    config: Path | None = None


def find_choices(
    name: str | None, checkpoint: str | None, config: str | None, root: Path = ROOT, work_dir: Path | None = None
) -> list[Choice]:
    """The models to choose from: the one that is asked for first, then packed ones, then trained ones.

    Args:
        name: a packed model by name or file, a model folder, or a repository of the hub: see `find_weights`.
        checkpoint: weights of `config`, or as `name`.
        config: a config file.
        root: of the project.
        work_dir: of trainings; their best weights are offered where the folder has the name of a shipped config.

    Raises:
        ConfigError: no such file, a config without weights, or there is no model.
        CheckpointError: a folder is no model folder.
        DownloadError: the hub cannot be reached or has no such repository.
    """
    if name is not None and (checkpoint is not None or config is not None):
        raise ConfigError(
            "--model names a model with its config, --config and --checkpoint other weights: give one of the two."
        )
    if config is not None and checkpoint is None:
        raise ConfigError(f"--config {config} needs its weights: --checkpoint W.")
    found: list[Choice] = []
    if name is not None or checkpoint is not None:
        given = str(name or checkpoint)
        weights = find_weights(given)
        file = find_file(config, "the config") if config is not None else None
        found.append(Choice(file.stem if file is not None else _label(given, weights), weights, file))
    for path in sorted((root / PACKED).glob("*.safetensors")):
        found.append(Choice(path.stem, path))
    for config_name in shipped_configs():
        folder = (work_dir or root / "work_dir") / Path(config_name).stem
        for path in sorted(folder.glob("*_best.*")):
            if path.suffix in WEIGHTS:
                found.append(Choice(f"{folder.name} (trained here)", path, ROOT / config_name))
    if not found:
        raise ConfigError(
            "there is no model to show: train one (bash train.sh), or give --model NAME or --config C --checkpoint W."
        )
    unique: dict[str, Choice] = {}
    for choice in found:
        if choice.checkpoint not in [other.checkpoint for other in unique.values()]:
            unique.setdefault(choice.name, choice)
    return list(unique.values())


def _label(given: str, weights: Path) -> str:
    """A name to choose: of a model folder, its own; of the hub, the repository's; else the file's."""
    if weights.name != FOLDER_WEIGHTS:
        return weights.stem
    here = Path(given).exists() or (ROOT / given).exists()
    return weights.absolute().parent.name if here else given


class Models:
    """Loads the models of the page, one at a time.

    Args:
        choices: from `find_choices`.
        precision: see `load_for_prediction`.
    """

    def __init__(self, choices: list[Choice], precision: str = "auto") -> None:
        self.choices = {choice.name: choice for choice in choices}
        self.precision = precision
        self._lock = threading.Lock()
        self._loaded: tuple[str, PredictionModel] | None = None

    @property
    def names(self) -> list[str]:
        """Names to choose from."""
        return list(self.choices)

    def get(self, name: str) -> PredictionModel:
        """The model of a name.

        Raises:
            ConfigError: an unknown name; else see `load_for_prediction`.
        """
        if name not in self.choices:
            raise ConfigError(f"There is no model {name!r}.")
        with self._lock:
            if self._loaded is None or self._loaded[0] != name:
                self._loaded = None
                choice = self.choices[name]
                self._loaded = name, load_for_prediction(choice.checkpoint, choice.config, precision=self.precision)
            return self._loaded[1]
