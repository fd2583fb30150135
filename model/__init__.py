"""The model: one file per box of the README's figure, assembled by `build_model`.

All modules of this package are imported here, so that a config can name any class registered in them.
"""

import importlib
import pkgutil

from model.avs_model import AVSModel
from model.builder import build_model
from model.head import ModelOutput
from model.pretrained import load_pretrained

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["AVSModel", "ModelOutput", "build_model", "load_pretrained"]
