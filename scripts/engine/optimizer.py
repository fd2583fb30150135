"""Optimizers of torch.optim by name, with parameter groups."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from utils.errors import ConfigError
from utils.registry import suggestion

PARAMWISE = {"lr_factor": {}, "decay_norm_and_bias": True}
"""Options of `optimizer.paramwise` and their defaults."""
NORMS = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)


def build_optimizer(cfg: Mapping[str, Any], model: nn.Module, *, lr_factor: float = 1.0, **extra: Any) -> Optimizer:
    """The optimizer of `cfg.optimizer` over all parameters of a model that are ever trained.

    Args:
        cfg: `type`, a class of torch.optim; its options; and `paramwise`, None or a dictionary with `lr_factor` (module
            prefix -> factor of the learning rate; the longest prefix counts) and `decay_norm_and_bias` (False: no
            decay for biases and the parameters of norms).
        model: with `requires_grad` set as it will be once everything trains.
        lr_factor: factor of all learning rates.
        extra: further options of the class, passed where it takes them.

    Raises:
        ConfigError: unknown names or values out of range.
    """
    options = dict(cfg)
    name, paramwise = options.pop("type"), _paramwise(options.pop("paramwise", None), model)
    cls = _optimizer_class(name)
    known = list(inspect.signature(cls).parameters)[1:]
    for key in options:
        if key not in known:
            raise ConfigError(f"optimizer.{key} is not an option of {name}: {suggestion(key, ['paramwise', *known])}")
    options |= {key: value for key, value in extra.items() if key in known}
    try:
        options["lr"] = options["lr"] * lr_factor
        return cls(_groups(model, paramwise, options), **options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"optimizer.{key}={value!r}" for key, value in cfg.items() if key != "paramwise")
        raise ConfigError(f"The optimizer cannot be built of {given}: {error}.") from error


def check_gradient_limit(clip_grad_norm: Any) -> None:
    """Check `process.clip_grad_norm`.

    Raises:
        ConfigError: it is neither None nor a positive number.
    """
    number = isinstance(clip_grad_norm, int | float) and not isinstance(clip_grad_norm, bool)
    if clip_grad_norm is not None and not (number and clip_grad_norm > 0):
        raise ConfigError(f"process.clip_grad_norm={clip_grad_norm!r}: give None or a number above 0.")


def _optimizer_class(name: Any) -> Any:
    known = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer) and value is not Optimizer
    }
    # LBFGS evaluates the loss several times per step; the loop does not.
    known.pop("LBFGS", None)
    if name not in known:
        raise ConfigError(
            f"optimizer.type={name!r} is not an optimizer of torch.optim: {suggestion(str(name), list(known))}"
        )
    return known[name]


def _paramwise(cfg: Any, model: nn.Module) -> dict[str, Any]:
    if cfg is None:
        return dict(PARAMWISE)
    if not isinstance(cfg, Mapping):
        raise ConfigError(f"optimizer.paramwise={cfg!r}: give None or a dictionary with {', '.join(PARAMWISE)}.")
    for key in cfg:
        if key not in PARAMWISE:
            raise ConfigError(f"optimizer.paramwise.{key} is not an option: {suggestion(key, list(PARAMWISE))}")
    names = [name for name, _ in model.named_parameters()]
    for prefix, factor in (cfg.get("lr_factor") or {}).items():
        if not any(_within(name, prefix) for name in names):
            children = [name for name, _ in model.named_children()]
            raise ConfigError(
                f"optimizer.paramwise.lr_factor: no parameter's name starts with {prefix!r}: "
                f"{suggestion(prefix, children)}"
            )
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < float("inf"):
            raise ConfigError(f"optimizer.paramwise.lr_factor.{prefix}={factor!r}: give a number from 0 up.")
    return {**PARAMWISE, **cfg}


def _groups(model: nn.Module, paramwise: Mapping[str, Any], options: Mapping[str, Any]) -> Iterable[Any]:
    """Parameters in groups of equal rate and decay; one group in the model's order where nothing differs."""
    factors = dict(paramwise["lr_factor"] or {})
    exempt = set() if paramwise["decay_norm_and_bias"] else _norms_and_biases(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            prefixes = [prefix for prefix in factors if _within(name, prefix)]
            factor = factors[max(prefixes, key=len)] if prefixes else 1.0
            groups.setdefault((float(factor), name in exempt), []).append(parameter)
    return [
        {"params": parameters, "lr": options["lr"] * factor, **({"weight_decay": 0.0} if no_decay else {})}
        for (factor, no_decay), parameters in groups.items()
    ]


def _norms_and_biases(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if isinstance(module, NORMS) or name.endswith("bias")
    }


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
