"""Initialisation of the layers behind the backbones."""

from torch import Tensor, nn

from ops import MSDeformAttn


def initialise(module: nn.Module) -> None:
    """Initialise matrices Xavier-uniform (Glorot & Bengio, 2010), deformable attention as in Deformable DETR.

    A convolution counts as one matrix with its receptive field in the fans, a stack of expert matrices (E, out, in) as
    E matrices. Vectors keep their layer's default.
    """
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            if parameter.dim() == 3:
                _initialise_stack(parameter)
            elif parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
    for child in module.modules():
        if isinstance(child, MSDeformAttn):
            child.reset_parameters()


def _initialise_stack(stack: Tensor) -> None:
    for matrix in stack:
        nn.init.xavier_uniform_(matrix)
