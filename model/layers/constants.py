"""Tensors that follow from sizes alone."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def made_once(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorator: keep what a function makes of its arguments, for the next call with the same ones.

    A compiler folds the few lines into its kernels; in eager mode a table lookup is cheaper.
    """

    @lru_cache(maxsize=32)
    def kept(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.inference_mode(False):  # training meets this tensor too, and may not save an inference tensor
            return make(*args, **kwargs)

    @wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return make(*args, **kwargs) if torch.compiler.is_compiling() else kept(*args, **kwargs)  # type: ignore[arg-type]

    return made
