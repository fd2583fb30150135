"""Tensors that depend on sizes only."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def cached_constant(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorator: cache the tensor that a function computes from its (hashable) arguments.

    When compiling, the cache is bypassed: the compiler folds the computation into its kernels.
    """

    @lru_cache(maxsize=32)
    def cached(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.inference_mode(False):  # the cached tensor is used in training too, which cannot save inference ones
            return make(*args, **kwargs)

    @wraps(make)
    def constant(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        return make(*args, **kwargs) if torch.compiler.is_compiling() else cached(*args, **kwargs)  # type: ignore[arg-type]

    return constant
