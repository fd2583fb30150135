"""Names in configs and the classes they stand for.

A new module is one file in `model/` with `@MODELS.register_module()` above its class, and one line in a config. What
its neighbours determine (`embed_dim`, the backbone's channels) is supplied by the builder, so configs do not repeat it.
"""

import difflib
import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.registry import Registry

from utils.errors import ConfigError

MODELS = Registry("model", scope="modat", locations=["model"])
"""Every `nn.Module` that a config can name: models, backbones, heads, fusion blocks, the criterion, ..."""
DATASETS = Registry("data set", scope="modat", locations=["dataloader"])


def suggestion(name: str, known: list[str]) -> str:
    """The hint after an unknown name: the closest known name, and all known names."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(sorted(known)) or 'none'}."


def lookup(registry: Registry, name: Any) -> type | None:
    """The class registered under `name`, or None."""
    registry.import_from_location()  # imports the modules that register themselves, once
    return registry.module_dict.get(name) if isinstance(name, str) else None


def resolve(registry: Registry, cfg: Mapping[str, Any] | None, *, where: str) -> type:
    """The class that `cfg['type']` names.

    Args:
        registry: MODELS or DATASETS.
        cfg: a config dictionary with the key `type`.
        where: the dictionary's path in the config (`model.head`), for error messages.

    Raises:
        ConfigError: `cfg` is not a dictionary, has no `type`, or its type is unknown.
    """
    if not isinstance(cfg, Mapping):
        raise ConfigError(f"{where} must be a dictionary with a 'type', got {cfg!r}.")
    if "type" not in cfg:
        raise ConfigError(f"{where} has no 'type'. {suggestion('', _names(registry))}")
    name = cfg["type"]
    found = lookup(registry, name)
    if found is None:
        raise ConfigError(
            f"{where}.type={name!r} is not a registered {registry.name}: {suggestion(str(name), _names(registry))}"
        )
    return found


def build(registry: Registry, cfg: Mapping[str, Any] | None, *, where: str, **supplied: Any) -> Any:
    """Build the object that a config dictionary describes.

    Args:
        registry: where `cfg['type']` is looked up.
        cfg: `type` and constructor arguments.
        where: the dictionary's path in the config, for error messages.
        **supplied: arguments known from elsewhere, passed if the constructor takes them. If the config states one too,
            the two must agree.

    Returns:
        The constructed object.

    Raises:
        ConfigError: an unknown type or key, a missing key, a value that contradicts a supplied one, or a constructor
            that raised ValueError or TypeError (kept as the cause).
    """
    target = resolve(registry, cfg, where=where)
    assert cfg is not None
    name = cfg["type"]
    arguments = {key: value for key, value in cfg.items() if key != "type"}
    parameters = inspect.signature(target).parameters
    for key in arguments:
        if key not in parameters:
            raise ConfigError(
                f"{where}.{key} is not an option of {name}: {suggestion(key, list(parameters))} If {key!r} comes from "
                f"a base config, add _delete_=True to {where}: its dictionary is then replaced as a whole."
            )
    for key, value in supplied.items():
        if key in arguments and _plain(arguments[key]) != _plain(value):
            raise ConfigError(
                f"{where}.{key}={arguments[key]!r} contradicts {value!r}, the value of the rest of the model: drop it."
            )
        if key in parameters:
            arguments[key] = value
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and key not in arguments
    ]
    if missing:
        raise ConfigError(f"{where} ({name}) lacks: {', '.join(missing)}.")
    try:
        return target(**arguments)
    except ValueError as error:
        raise ConfigError(f"{where} ({name}): {error}.") from error
    except TypeError as error:
        raise ConfigError(f"{where} ({name}) cannot be built: TypeError at {_origin(error)}: {error}.") from error


def _names(registry: Registry) -> list[str]:
    registry.import_from_location()
    return list(registry.module_dict)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value


def _origin(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
