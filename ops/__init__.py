"""Multi-scale deformable attention: the function, its fused form, and the layer.

>>> import ops
>>> layer = ops.MSDeformAttn(embed_dim=256, num_levels=3)

`python -m ops` lists the backends available on this machine, and why others are not.
"""

from ops.functional import ms_deform_attn, ms_deform_attn_fused
from ops.module import MSDeformAttn

__all__ = ["MSDeformAttn", "ms_deform_attn", "ms_deform_attn_fused"]
