"""Mask classification (MaskFormer, Cheng et al., 2021): a class and a mask per query, merged into logits per pixel."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.layers.recompute import recompute
from utils.registry import MODELS

EPS = 1e-2
"""Distance of p from 1, and in binary logits from 0: near 1 the float32 logarithm of 1 - p amplifies rounding."""
FLOOR = 1e-6
"""Least probability of a class before its logarithm."""
CHUNK_VALUES = 2**22
"""Values of upsampled masks, about, that are held at a time."""


class QueryMasks(NamedTuple):
    """Predictions of the queries of A frames, before they are merged.

    Attributes:
        class_logits: (A, Q, F + 1), F foreground classes, the last entry for 'no object'.
        mask_logits: (A, Q, H / 4, W / 4).
    """

    class_logits: Tensor
    mask_logits: Tensor


@MODELS.register_module()
class MaskClassifier(nn.Module):
    """Mask head that gives each query a class and a mask (MaskFormer, Mask2Former), for `MaskClassificationLoss`.

    The class is a linear function of the query; the mask is the dot product of an MLP of the query with the mask
    feature of each pixel.

    The classes are those of foreground alone: F = 1 ('sounding') if num_classes = 1, else F = num_classes - 1 without
    class 0, the background. What sounds is a set of objects, and background is where no object is: on silence all
    queries say 'no object', in binary and semantic data alike, whereas a background class would make silence one more
    segment to find, the largest of all.

    Merging (`merge`): p_k of a pixel is the sum over queries of P(class = k) * sigmoid(mask), the semantic inference of
    MaskFormer. The masks are upsampled first, as logits.

    Args:
        embed_dim: C.
        num_classes: K; 1 for binary segmentation, else with background as class 0.
        hidden_dim: width of the MLP, C if None.
        scale_factor: upsampling factor from mask feature to logits.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        embed_dim: int = 256,
        num_classes: int = 1,
        hidden_dim: int | None = None,
        scale_factor: int = 4,
    ) -> None:
        super().__init__()
        hidden_dim = embed_dim if hidden_dim is None else hidden_dim
        for name, size in (("num_classes", num_classes), ("hidden_dim", hidden_dim), ("scale_factor", scale_factor)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.num_classes = num_classes
        self.scale_factor = scale_factor
        self.classify = nn.Linear(embed_dim, num_foreground(num_classes) + 1)
        self.embed = nn.Sequential(
            nn.Linear(embed_dim, hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_dim, embed_dim),
        )

    def forward(self, queries: Tensor, mask_feature: Tensor) -> QueryMasks:
        """Queries (A, Q, C) and mask feature (A, C, h, w) -> a class and a mask per query."""
        tokens = mask_feature.flatten(2)  # (A, C, h * w)
        masks = (self.embed(queries) @ tokens).unflatten(2, mask_feature.shape[-2:])  # (A, Q, h, w)
        return QueryMasks(self.classify(queries), masks)

    def merge(self, found: QueryMasks) -> Tensor:
        """Logits per pixel, (A, K, scale * h, scale * w), float32.

        With K = 1 they are the logit of p, clamped to [EPS, 1 - EPS]: its sigmoid exceeds 0.5 where p does. With more
        classes they are log p_k, whose argmax is the class; the background's p_0 is the product over queries of
        1 - P(any class) * sigmoid(mask): the probability that no query claims the pixel, if the queries are
        independent.
        """
        if torch.compiler.is_compiling():  # a compiler would unroll the loop
            return self._merged(*found)
        _, queries, height, width = found.mask_logits.shape
        values_per_frame = max(queries, self.num_classes) * height * width
        frames = max(1, CHUNK_VALUES // (values_per_frame * self.scale_factor**2))
        chunks = zip(found.class_logits.split(frames), found.mask_logits.split(frames), strict=True)
        return torch.cat([recompute(self._merged, *chunk) for chunk in chunks])

    def _merged(self, class_logits: Tensor, mask_logits: Tensor) -> Tensor:
        with torch.autocast(mask_logits.device.type, enabled=False):
            probability = class_logits.float().softmax(-1)[..., :-1]  # (A, Q, F)
            scale = float(self.scale_factor)
            masks = F.interpolate(mask_logits.float(), scale_factor=scale, mode="bilinear").sigmoid()  # (A, Q, H, W)
            foreground = (probability.transpose(1, 2) @ masks.flatten(2)).unflatten(2, masks.shape[-2:])  # (A, F, H, W)
            if self.num_classes == 1:
                return foreground.clamp(EPS, 1 - EPS).logit()
            claimed = probability.sum(-1)[..., None, None] * masks  # (A, Q, H, W)
            background = torch.log1p(-claimed.clamp(max=1 - EPS)).sum(1, keepdim=True)
            return torch.cat([background, foreground.clamp(min=FLOOR).log()], dim=1)


def num_foreground(num_classes: int) -> int:
    """F, the classes that a query can have: 1 for binary segmentation, else all but the background."""
    return 1 if num_classes == 1 else num_classes - 1
