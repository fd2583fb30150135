"""Config files: Python with `_base_` inheritance, `key=value` overrides, and every key checked.

The published config files load unchanged. What a file leaves out comes from the tables below, so after `load_config`
every key of `process`, `optimizer` and `loss` is there.
"""

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from mmengine.config import Config, ConfigDict

from dataloader.base import AudioVisualDataset
from utils import schedules
from utils.errors import ConfigError
from utils.registry import DATASETS, lookup, suggestion
from utils.runtime import shipped_configs

TASKS = ("s4", "ms3", "avss")
SPLITS = ("train", "val", "test")
SECTIONS = ("model", "dataset", "optimizer", "loss", "process")


@dataclass
class OptimizerConfig:
    """`optimizer`: AdamW (Loshchilov & Hutter, 2019).

    Attributes:
        type: 'AdamW'.
        lr: learning rate.
        weight_decay: decoupled weight decay.
        betas: decay of the two moments.
        eps: term for numerical stability.
    """

    type: str = "AdamW"
    lr: float = 2e-5
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


@dataclass
class LossConfig:
    """`loss`: see model.criterion.

    Attributes:
        weight_dict: weights of `iou_loss` and `mix_loss`.
        loss_type: 'dice' or 'bce' for one class; cross entropy is used for several.
    """

    weight_dict: dict[str, float] = field(default_factory=lambda: {"iou_loss": 1.0, "mix_loss": 0.1})
    loss_type: str = "dice"


@dataclass
class ProcessConfig:
    """`process`: how a run goes.

    Attributes:
        num_works: worker processes that read data.
        train_epochs: epochs.
        freeze_epochs: first epochs in which the picture backbone does not train.
        start_eval_epoch: first epoch (from 0) after which the validation split is scored.
        eval_interval: epochs between two validations.
        lr_schedule: None, dict(type='StepLR', step_size, gamma) in epochs, or dict(type='cosine', warmup_steps, min_lr)
            in steps.
        work_dir: where runs are written, in a folder of the config's name.
        seed: of weights, data order and all draws.
        precision: '32', 'bf16' or '16', mixed in the latter two.
        devices: number of devices, 'auto' for all.
        num_nodes: machines.
        strategy: Lightning's, 'auto', 'ddp', 'fsdp'.
        accumulate: batches a step; each weighs alike, however many of its frames have a label.
        clip_grad_norm: largest norm of the gradient, None for no limit.
        checkpoint_interval: steps between two checkpoints within an epoch; 0 for the end of each epoch alone.
        sync_batchnorm: share BatchNorm statistics between devices.
        matmul_precision: of float32 products: 'highest', 'high' (TF32) or 'medium'.
        compile: compile the model.
        activation_checkpointing: recompute activations in the backward pass.
        detect_anomaly: name the operation behind a NaN in the backward pass; slow.
        deterministic: deterministic algorithms alone; on GPUs, where PyTorch has them.
        log_interval: steps between two lines of the log.
        check_data: look at every file of the data set before the first epoch.
        cache_features: keep the embeddings of a frozen VGGish, on disk.
        cache_backbone: keep the maps of the backbone while it is frozen, on disk: 1.6 MB a frame of 224 pixels with
            PVTv2. It then runs in evaluation mode, without stochastic depth.
        drop_last: leave out a last batch that is not full, in training.
        lr_scaling: None, or 'linear': the learning rate holds for one device and grows with their number.
    """

    num_works: int = 8
    train_epochs: int = 30
    freeze_epochs: int = 0
    start_eval_epoch: int = 0
    eval_interval: int = 1
    lr_schedule: dict[str, Any] | None = None
    work_dir: str = "work_dir"
    seed: int = 0
    precision: str = "32"
    devices: int | str = "auto"
    num_nodes: int = 1
    strategy: str = "auto"
    accumulate: int = 1
    clip_grad_norm: float | None = None
    checkpoint_interval: int = 0
    sync_batchnorm: bool = True
    matmul_precision: str = "highest"
    compile: bool = False
    activation_checkpointing: bool = False
    detect_anomaly: bool = False
    deterministic: bool = True
    log_interval: int = 10
    check_data: bool = True
    cache_features: bool = True
    cache_backbone: bool = False
    drop_last: bool = False
    lr_scaling: str | None = None


WORDS = {"true": "True", "false": "False", "null": "None"}
"""Other languages' words in an override, and Python's."""
_TABLES: dict[str, type] = {"optimizer": OptimizerConfig, "loss": LossConfig, "process": ProcessConfig}
_CHOICES = {
    "optimizer.type": ("AdamW",),
    "loss.loss_type": ("dice", "bce"),
    "process.precision": ("32", "bf16", "16"),
    "process.matmul_precision": ("highest", "high", "medium"),
    "process.lr_scaling": (None, "linear"),
}
_AT_LEAST = {
    "process.train_epochs": 1,
    "process.eval_interval": 1,
    "process.accumulate": 1,
    "process.num_nodes": 1,
    "process.log_interval": 1,
    "process.num_works": 0,
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
    for override in overrides:
        _override(cfg, override)
    unknown = [key for key in cfg if key not in (*SECTIONS, "task", "stamps")]
    if unknown:
        raise ConfigError(
            f"{path}: {unknown[0]!r} is no section of a config: {suggestion(unknown[0], [*SECTIONS, 'task', 'stamps'])}"
        )
    for section in ("model", "dataset"):
        if not isinstance(cfg.get(section), Mapping):
            raise ConfigError(f"{path} has no section '{section}'.")
    for section, table in _TABLES.items():
        cfg[section] = _filled(table, cfg.get(section, {}), section)
    for key, choices in _CHOICES.items():
        _check_choice(cfg, key, choices)
    for key, least in _AT_LEAST.items():
        _check_least(cfg, key, least)
    _check_loss(cfg.loss)
    if cfg.process.lr_schedule is not None:
        schedules.validated(cfg.process.lr_schedule)
    cfg["task"] = _task(cfg, Path(path), task)
    if cfg.model.get("vggish", {}).get("preprocess_audio_to_log_mel", False):
        for split in cfg.dataset.values():
            split.setdefault("audio", "wav")
    return cfg


def check_classes(cfg: Any) -> None:
    """See that the model answers in the classes that the data has, for clips of its length.

    Raises:
        ConfigError: it does not.
    """
    classes = cfg.model.get("head", {}).get("num_classes", 1)
    for name, split in cfg.dataset.items():
        expected = split.get("num_class", 71) if cfg.task == "avss" else 1
        if classes != expected:
            raise ConfigError(f"model.head.num_classes={classes}, but dataset.{name} has {expected} classes.")
        frames = split.get("mask_num", 10) if cfg.task == "avss" else split.get("frames_per_clip", 5)
        if cfg.model.get("T", 5) != frames:
            raise ConfigError(f"model.T={cfg.model.get('T', 5)}, but clips of dataset.{name} have {frames} frames.")


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
        raise ConfigError(f"{override!r} is no override: write key=value, process.train_epochs=3 for one.")
    try:
        value = ast.literal_eval(WORDS.get(text, text))
    except (ValueError, SyntaxError):
        value = text
    *parents, leaf = key.split(".")
    if parents and parents[0] in _TABLES:
        cfg.setdefault(parents[0], ConfigDict())
    node: Any = cfg
    for depth, parent in enumerate(parents):
        if not isinstance(node, Mapping | Config) or parent not in node:
            where = ".".join(parents[:depth]) or "the config"
            known = list(node) if isinstance(node, Mapping | Config) else []
            raise ConfigError(f"{override}: {where} has no {parent!r}: {suggestion(parent, known)}")
        node = node[parent]
    if not isinstance(node, Mapping | Config):
        raise ConfigError(f"{override}: {'.'.join(parents)} is a value, and has no keys.")
    if isinstance(node.get(leaf), Mapping) and not isinstance(value, Mapping | None):
        raise ConfigError(f"{override}: {key} has the keys {', '.join(node[leaf])}: set one of them.")
    # mmengine's dictionaries turn nested ones into their kind on assignment
    node[leaf] = ConfigDict(value) if isinstance(value, dict) else value  # type: ignore[index]


def _filled(table: type, given: Mapping[str, Any], section: str) -> ConfigDict:
    defaults = {item.name: item.default for item in dataclasses.fields(table)}
    known = list(defaults)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{section} must be a dictionary, got {given!r}.")
    for key in given:
        if key not in known:
            raise ConfigError(f"{section}.{key} is no option: {suggestion(key, known)}")
        if isinstance(defaults[key], bool) and not isinstance(given[key], bool):
            raise ConfigError(f"{section}.{key}={given[key]!r}: give True or False.")
    values = dataclasses.asdict(table(**given))
    if section == "process":
        values |= {key: str(values[key]) for key in ("precision", "work_dir")}
    return ConfigDict(values)


def _value(cfg: Config, key: str) -> Any:
    section, name = key.split(".")
    return cfg[section][name]


def _check_choice(cfg: Config, key: str, choices: Sequence[Any]) -> None:
    value = _value(cfg, key)
    if value not in choices:
        raise ConfigError(f"{key}={value!r} is none of {', '.join(repr(choice) for choice in choices)}.")


def _check_least(cfg: Config, key: str, least: int) -> None:
    value = _value(cfg, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}={value!r} must be a whole number, {least} or more.")


def _check_loss(loss: Mapping[str, Any]) -> None:
    known = ["iou_loss", "mix_loss"]
    weights = dict(loss["weight_dict"])
    if "mask_loss" in weights and "mix_loss" not in weights:
        raise ConfigError("loss.weight_dict.mask_loss belongs to an early AVSegFormer: its name is mix_loss since.")
    for key in weights:
        if key not in known:
            raise ConfigError(f"loss.weight_dict.{key} is no loss: {suggestion(key, known)}")


def _task(cfg: Config, path: Path, wanted: str | None) -> str:
    """The task that all splits' data sets belong to."""
    if wanted is not None and wanted not in TASKS:
        raise ConfigError(f"{wanted!r} is no task: s4, ms3 or avss.")
    tasks = {}
    for name in SPLITS:
        split = cfg.dataset.get(name)
        if not isinstance(split, Mapping):
            raise ConfigError(f"{path}: dataset.{name} is missing.")
        found = lookup(DATASETS, split.get("type"))
        if found is None:
            raise ConfigError(
                f"dataset.{name}.type={split.get('type')!r} is no data set: "
                f"{suggestion(str(split.get('type')), list(DATASETS.module_dict))}"
            )
        tasks[name] = cast(type[AudioVisualDataset], found).task
    if len(set(tasks.values())) > 1:
        raise ConfigError(f"{path}: its splits belong to different tasks: {tasks}.")
    task = tasks["train"]
    if cfg.get("task", task) != task:
        raise ConfigError(f"{path}: task={cfg.task!r}, and its data sets are of {task}.")
    if wanted is not None and wanted != task:
        raise ConfigError(f"{path} is a config for {task}, not for {wanted}: run it with {task}.")
    return task
