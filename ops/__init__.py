"""Multi-scale deformable attention: one function, its fused form, and the layer over them.

>>> import ops
>>> layer = ops.MSDeformAttn(embed_dim=256, num_levels=3)

`python -m ops` says which backends this machine has, and why not the others.
"""

from ops.functional import ms_deform_attn, ms_deform_attn_fused
from ops.module import MSDeformAttn

__all__ = ["MSDeformAttn", "ms_deform_attn", "ms_deform_attn_fused"]
