"""Names in configs and the classes they stand for.

A new fusion module is one file with `@FUSIONS.register_module()` above its class, and one line in a config. What a
module can be told by its neighbours (`embed_dim`, a backbone's channels) is supplied by the builder, so no config
repeats it.
"""

import difflib
import inspect
from collections.abc import Mapping
from typing import Any

from mmengine.registry import Registry

from utils.errors import ConfigError

MODELS = Registry("model", scope="modat", locations=["model"])
BACKBONES = Registry("backbone", scope="modat", locations=["model"])
AUDIO_ENCODERS = Registry("audio encoder", scope="modat", locations=["model"])
HEADS = Registry("head", scope="modat", locations=["model"])
QUERY_GENERATORS = Registry("query generator", scope="modat", locations=["model"])
AV_FUSIONS = Registry("early audio-visual fusion", scope="modat", locations=["model"])
FUSIONS = Registry("fusion block", scope="modat", locations=["model"])
TRANSFORMERS = Registry("transformer", scope="modat", locations=["model"])
TRANSFORMER_LAYERS = Registry("transformer layer", scope="modat", locations=["model"])
POSITIONAL_ENCODINGS = Registry("positional encoding", scope="modat", locations=["model"])
DATASETS = Registry("data set", scope="modat", locations=["dataloader"])


def suggestion(name: str, known: list[str]) -> str:
    """What an error says after an unknown name: the closest known one, and all of them."""
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}Known: {', '.join(sorted(known)) or 'none'}."


def lookup(registry: Registry, name: Any) -> type | None:
    """The class registered under `name`, None where there is none."""
    registry.import_from_location()  # the first time, the modules that register themselves
    return registry.module_dict.get(name) if isinstance(name, str) else None


def resolve(registry: Registry, cfg: Mapping[str, Any] | None, *, where: str) -> type:
    """The class that `cfg['type']` names.

    Args:
        registry: one of this file's registries.
        cfg: a config dictionary with the key `type`.
        where: the dictionary's place in the config (`model.head`), for error messages.

    Raises:
        ConfigError: `cfg` is no dictionary, has no `type`, or names an unknown one.
    """
    if not isinstance(cfg, Mapping):
        raise ConfigError(f"{where} must be a dictionary with a 'type', got {cfg!r}.")
    if "type" not in cfg:
        raise ConfigError(f"{where} has no 'type'. {suggestion('', _names(registry))}")
    name = cfg["type"]
    found = lookup(registry, name)
    if found is None:
        raise ConfigError(f"{where}.type={name!r} is no {registry.name}: {suggestion(str(name), _names(registry))}")
    return found


def build(registry: Registry, cfg: Mapping[str, Any] | None, *, where: str, **supplied: Any) -> Any:
    """Build the object that a config dictionary describes.

    Args:
        registry: where `cfg['type']` is looked up.
        cfg: `type` and constructor arguments.
        where: the dictionary's place in the config, for error messages.
        **supplied: arguments known from elsewhere; passed where the constructor takes them. A config may state them
            too, and must then agree.

    Returns:
        The constructed object.

    Raises:
        ConfigError: an unknown type or key, a missing key, or a value that contradicts a supplied one.
    """
    target = resolve(registry, cfg, where=where)
    assert cfg is not None
    arguments = {key: value for key, value in cfg.items() if key != "type"}
    parameters = inspect.signature(target).parameters
    for key in arguments:
        if key not in parameters:
            raise ConfigError(f"{where}.{key} is no option of {cfg['type']}: {suggestion(key, list(parameters))}")
    for key, value in supplied.items():
        if key in arguments and _plain(arguments[key]) != _plain(value):
            raise ConfigError(
                f"{where}.{key}={arguments[key]!r} contradicts {value!r}, which the rest of the model has: drop it."
            )
        if key in parameters:
            arguments[key] = value
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        and name not in arguments
    ]
    if missing:
        raise ConfigError(f"{where} ({cfg['type']}) lacks: {', '.join(missing)}.")
    return target(**arguments)


def _names(registry: Registry) -> list[str]:
    registry.import_from_location()
    return list(registry.module_dict)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value
