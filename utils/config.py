"""Config files: Python with `_base_` inheritance, `key=value` overrides, and every key checked.

Published config files load unchanged (utils/published.py). What a file leaves out of `process` comes from the table
below; the options of a model, data set, loss or optimizer are checked against its constructor where it is built.
"""

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from utils import published, schedules
from utils.errors import ConfigError
from utils.registry import DATASETS, MODELS, lookup, suggestion
from utils.runtime import shipped_configs

TASKS = ("s4", "ms3", "avss")
SPLITS = ("train", "val", "test")
SECTIONS = ("model", "dataset", "optimizer", "loss", "process")


@dataclass
class ProcessConfig:
    """`process`: schedule, devices and output of a run.

    Attributes:
        num_workers: worker processes that read data.
        train_epochs: epochs.
        freeze_epochs: first epochs, in which the backbone is frozen.
        start_eval_epoch: first epoch (from 0) after which the validation split is scored.
        eval_interval: epochs between two validations.
        lr_schedule: None, dict(type='StepLR', step_size, gamma) in epochs, or dict(type='cosine', warmup_steps, min_lr)
            in steps.
        work_dir: where runs are written, in a folder of the config's name.
        seed: of weights, data order and all draws.
        precision: '32', 'bf16' or '16' (the latter two mixed), or 'auto': what this device computes fastest of the
            first two.
        devices: processes per machine, 'auto' for one per GPU and one on a CPU; or a dictionary with the keys 'cpu' and
            'gpu'.
        num_nodes: machines.
        strategy: 'auto', 'ddp', 'fsdp', or another strategy of Lightning Fabric.
        accumulate: batches per optimizer step, all of equal weight.
        clip_grad_norm: upper limit of the gradient's norm, None for no limit.
        checkpoint_interval: optimizer steps between checkpoints within an epoch; 0 saves at the end of each epoch only.
        sync_batchnorm: share BatchNorm statistics between GPUs.
        matmul_precision: of float32 products: 'highest', 'high' (TF32) or 'medium'.
        compile: compile the model: True, or a mode of torch.compile: 'reduce-overhead' replays CUDA graphs where shapes
            are fixed, 'max-autotune' also measures kernels (both for accumulate=1 only); False for not.
        activation_checkpointing: recompute activations in the backward pass.
        detect_anomaly: name the operation behind a NaN in the backward pass; slow.
        deterministic: use deterministic algorithms only; on GPUs, where PyTorch has them.
        log_interval: optimizer steps between rows of the log.
        logger: where a run is shown while it trains: 'tensorboard', or 'wandb' or 'trackio', which have to be
            installed; metrics.csv is written with each.
        check_data: check every file of the data set before the first epoch.
        cache_features: compute the embeddings of a frozen audio encoder once and keep them on disk.
        cache_backbone: the same for the feature maps of the backbone while it is frozen: 1.6 MB per frame of 224 pixels
            with PVTv2-B5. The backbone then runs in evaluation mode, without stochastic depth.
        drop_last: in training, leave out an incomplete last batch.
        lr_scaling: None, or 'linear': the learning rate is given for one device and multiplied by their number.
    """

    num_workers: int = 8
    train_epochs: int = 30
    freeze_epochs: int = 0
    start_eval_epoch: int = 0
    eval_interval: int = 1
    lr_schedule: dict[str, Any] | None = None
    work_dir: str = "work_dir"
    seed: int = 0
    precision: str = "32"
    devices: int | str | dict[str, Any] = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    accumulate: int = 1
    clip_grad_norm: float | None = None
    checkpoint_interval: int = 0
    sync_batchnorm: bool = True
    matmul_precision: str = "highest"
    compile: bool | str = False
    activation_checkpointing: bool = False
    detect_anomaly: bool = False
    deterministic: bool = True
    log_interval: int = 10
    logger: str = "tensorboard"
    check_data: bool = True
    cache_features: bool = True
    cache_backbone: bool = False
    drop_last: bool = False
    lr_scaling: str | None = None


WORDS = {"true": "True", "false": "False", "null": "None"}
"""Spellings of other languages that an override may use -> Python's."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "optimizer": {"type": "AdamW", "lr": 2e-5},
    "loss": {"type": "SegmentationLoss"},
}
_CHOICES = {
    "process.precision": ("32", "bf16", "16", "auto"),
    "process.matmul_precision": ("highest", "high", "medium"),
    "process.logger": ("tensorboard", "wandb", "trackio"),
    "process.lr_scaling": (None, "linear"),
    "process.compile": (False, True, "reduce-overhead", "max-autotune"),
}
_AT_LEAST = {
    "process.train_epochs": 1,
    "process.eval_interval": 1,
    "process.accumulate": 1,
    "process.num_nodes": 1,
    "process.log_interval": 1,
    "process.num_workers": 0,
    "process.freeze_epochs": 0,
    "process.start_eval_epoch": 0,
    "process.checkpoint_interval": 0,
    "process.seed": 0,
}


def load_config(path: str | Path, overrides: Sequence[str] = (), task: str | None = None) -> Config:
    """Read a config file and check it.

    Args:
        path: a Python file with `model`, `dataset`, `optimizer`, `loss` and `process`, its own or by `_base_`.
        overrides: `key=value` for any key, dots between levels; values are Python literals (`true`, `false` and `null`
            are understood), or plain words.
        task: 's4', 'ms3' or 'avss', which the config must fit; None takes the config's.

    Returns:
        The config with all defaults filled in; `cfg.task` and `cfg.filename` are set.

    Raises:
        ConfigError: no such file, not a config, an unknown key, a value out of range, a task that does not fit.
    """
    cfg = _read(Path(path))
    published.translate(cfg)
    for override in overrides:
        _override(cfg, override)
    published.translate(cfg)  # overrides may hold published names as well
    unknown = [key for key in cfg if key not in (*SECTIONS, "task", "stamps")]
    if unknown:
        hint = suggestion(unknown[0], [*SECTIONS, "task", "stamps"])
        raise ConfigError(f"{path}: {unknown[0]!r} is not a section of a config: {hint}")
    for section in ("model", "dataset"):
        if not isinstance(cfg.get(section), Mapping):
            raise ConfigError(f"{path} has no section '{section}'.")
    for section, defaults in _DEFAULTS.items():
        cfg[section] = ConfigDict({**defaults, **_mapping(cfg, section)})
    if cfg.optimizer.type == "AdamW":
        cfg.optimizer.setdefault("weight_decay", 0.01)
    cfg["process"] = _process(_mapping(cfg, "process"))
    for key, choices in _CHOICES.items():
        _check_choice(cfg, key, choices)
    for key, least in _AT_LEAST.items():
        _check_least(cfg, key, least)
    if isinstance(cfg.process.compile, str) and cfg.process.accumulate > 1:
        # torch.compile keeps gradients in the memory of its graphs, which the next backward pass writes anew
        # (pytorch/pytorch issue 169545).
        raise ConfigError(
            f"process.compile={cfg.process.compile!r} replays CUDA graphs, which cannot add up the gradients of "
            f"process.accumulate={cfg.process.accumulate} batches: take process.compile=True or process.accumulate=1."
        )
    if cfg.process.lr_schedule is not None:
        schedules.validated(cfg.process.lr_schedule)
    cfg["task"] = _task(cfg, Path(path), task)
    _set_front_end(cfg)
    return cfg


def check_classes(cfg: Any) -> None:
    """Check number of classes and frames of the model against the data sets.

    Raises:
        ConfigError: they differ.
    """
    classes = cfg.model.get("head", {}).get("num_classes", 1)
    for name, split in cfg.dataset.items():
        expected = split.get("num_classes", 71) if cfg.task == "avss" else 1
        if classes != expected:
            raise ConfigError(f"model.head.num_classes={classes}, but dataset.{name} has {expected} classes.")
        frames = split.get("num_frames", 10 if cfg.task == "avss" else 5)
        given = cfg.model.get("num_frames", 5)
        if given != frames:
            raise ConfigError(f"model.num_frames={given}, but clips of dataset.{name} have {frames} frames.")


def _read(path: Path) -> Config:
    if not path.is_file():
        names = ", ".join(shipped_configs())
        raise ConfigError(f"There is no config file {path}. Shipped: {names}.")
    try:
        return Config.fromfile(path, lazy_import=False)
    except Exception as error:  # a config is a program, and may fail in any way
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}: {error}.") from error


def _override(cfg: Config, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r} is not an override: write key=value, for example process.train_epochs=3.")
    key = published.translate_key(key, cfg)
    try:
        value = ast.literal_eval(WORDS.get(text, text))
    except (ValueError, SyntaxError):
        value = text
    *parents, leaf = key.split(".")
    if parents and parents[0] in ("process", *_DEFAULTS):
        cfg.setdefault(parents[0], ConfigDict())
    node: Any = cfg
    for depth, parent in enumerate(parents):
        if not isinstance(node, Mapping | Config) or parent not in node:
            where = ".".join(parents[:depth]) or "the config"
            known = list(node) if isinstance(node, Mapping | Config) else []
            whole = ".".join(parents[: depth + 1])
            raise ConfigError(
                f"{override}: {where} has no {parent!r}: {suggestion(parent, known)} A new dictionary is given as a "
                f"whole: \"{whole}={{'key': value}}\"."
            )
        node = node[parent]
    if not isinstance(node, Mapping | Config):
        raise ConfigError(f"{override}: {'.'.join(parents)} is a value and has no keys.")
    if isinstance(node.get(leaf), Mapping) and not isinstance(value, Mapping | None):
        raise ConfigError(f"{override}: {key} has the keys {', '.join(node[leaf])}: set one of them.")
    # mmengine's dictionaries turn nested ones into their kind on assignment
    node[leaf] = ConfigDict(value) if isinstance(value, dict) else value  # type: ignore[index]


def _mapping(cfg: Config, section: str) -> Mapping[str, Any]:
    given = cfg.get(section, {})
    if not isinstance(given, Mapping):
        raise ConfigError(f"{section} must be a dictionary, got {given!r}.")
    return given


def _process(given: Mapping[str, Any]) -> ConfigDict:
    """`process` with the defaults of its table."""
    defaults = {item.name: item.default for item in dataclasses.fields(ProcessConfig)}
    for key in given:
        if key not in defaults:
            raise ConfigError(f"process.{key} is not an option: {suggestion(key, list(defaults))}")
        truth = isinstance(defaults[key], bool) and f"process.{key}" not in _CHOICES
        if truth and not isinstance(given[key], bool):
            raise ConfigError(f"process.{key}={given[key]!r}: give True or False.")
    values = dataclasses.asdict(ProcessConfig(**given))
    return ConfigDict(values | {key: str(values[key]) for key in ("precision", "work_dir")})


def _value(cfg: Config, key: str) -> Any:
    section, name = key.split(".")
    return cfg[section][name]


def _check_choice(cfg: Config, key: str, choices: Sequence[Any]) -> None:
    value = _value(cfg, key)
    if value not in choices:
        raise ConfigError(f"{key}={value!r} is not one of {', '.join(repr(choice) for choice in choices)}.")


def _check_least(cfg: Config, key: str, least: int) -> None:
    value = _value(cfg, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}={value!r} must be a whole number, {least} or more.")


def _set_front_end(cfg: Config) -> None:
    """Tell the data sets which front end the audio encoder needs, where it is not VGGish's."""
    options = cfg.model.get("audio_encoder") or {}
    encoder: Any = lookup(MODELS, options.get("type", "VGGish"))
    of_options = getattr(encoder, "front_end_of", None)
    front_end = of_options(options) if of_options is not None else getattr(encoder, "front_end", "vggish")
    if front_end != "vggish":
        for name in SPLITS:
            cfg.dataset[name].setdefault("front_end", front_end)


def _task(cfg: Config, path: Path, wanted: str | None) -> str:
    """The task that all splits' data sets belong to."""
    if wanted is not None and wanted not in TASKS:
        raise ConfigError(f"{wanted!r} is not a task: s4, ms3 or avss.")
    tasks = {}
    for name in SPLITS:
        split = cfg.dataset.get(name)
        if not isinstance(split, Mapping):
            raise ConfigError(f"{path}: dataset.{name} is missing.")
        found = lookup(DATASETS, split.get("type"))
        if found is None:
            raise ConfigError(
                f"dataset.{name}.type={split.get('type')!r} is not a data set: "
                f"{suggestion(str(split.get('type')), list(DATASETS.module_dict))}"
            )
        tasks[name] = getattr(found, "task", None) or split.get("task")
        if tasks[name] not in TASKS:
            raise ConfigError(f"dataset.{name}.task={tasks[name]!r} is not a task: s4, ms3 or avss.")
    if len(set(tasks.values())) > 1:
        raise ConfigError(f"{path}: its splits belong to different tasks: {tasks}.")
    task = tasks["train"]
    if cfg.get("task", task) != task:
        raise ConfigError(f"{path}: task={cfg.task!r}, and its data sets are of {task}.")
    if wanted is not None and wanted != task:
        raise ConfigError(f"{path} is a config for {task}, not for {wanted}: run it with {task}.")
    return task
