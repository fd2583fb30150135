"""The model: one file a box of the README's figure, put together by `build_model`.

Every module of this package is imported here, so that a new file with a registered class can be named by a config.
"""

import importlib
import pkgutil

from model.avs_model import AVSModel, ModelOutput
from model.builder import build_model

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["AVSModel", "ModelOutput", "build_model"]
