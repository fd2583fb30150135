"""Weights of another run as a start: those that fit by name and shape, and a report of those that do not."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from model.checkpoint import is_published, read_state_dict, to_ours
from utils.errors import CheckpointError

NAMES_SHOWN = 4


@dataclass(frozen=True)
class Transfer:
    """What `initialise_from` took from a file.

    Attributes:
        path: of the file.
        loaded: names that fit.
        reshaped: names of another shape, with both shapes; they keep their initialisation.
        missing: the model's names that the file lacks; they keep their initialisation.
        left_over: the file's names, translated to ours, that the model lacks.
        share: share of the model's numbers that were loaded, in [0, 1].
    """

    path: Path
    loaded: list[str]
    reshaped: list[str]
    missing: list[str]
    left_over: list[str]
    share: float

    def describe(self, *, names: int | None = NAMES_SHOWN) -> str:
        """A line per kind of tensor, with the first `names` of each; None writes all."""
        total = len(self.loaded) + len(self.reshaped) + len(self.missing)
        lines = [
            f"initialised from {self.path}: {len(self.loaded)} of {total} tensors, {self.share:.1%} of the weights"
        ]
        for kind, listed in (
            ("of another shape, left as they were", self.reshaped),
            ("not in the file, left as they were", self.missing),
            ("in the file only", self.left_over),
        ):
            if listed:
                shown = listed if names is None else listed[:names]
                more = f", and {len(listed) - len(shown)} more" if len(listed) > len(shown) else ""
                lines.append(f"  {len(listed)} {kind}: {', '.join(shown)}{more}")
        return "\n".join(lines)


def initialise_from(model: nn.Module, path: str | Path) -> Transfer:
    """Load every tensor of a file that fits a model by name and shape; the others keep what they hold.

    Unlike `model.checkpoint.load_weights`, which loads all or none, this starts a model from that of another task,
    number of classes or head.

    Args:
        model: from `model.build_model`.
        path: weights under published or our names, `.pth` or `.safetensors`, or a run's `last.ckpt`.

    Returns:
        What was loaded and what was not.

    Raises:
        CheckpointError: the file cannot be read, or no weight of it fits.
    """
    weights = read_state_dict(path)
    if is_published(weights):
        weights = to_ours(weights)
    expected = model.state_dict()
    fitting = {name: tensor for name, tensor in weights.items() if name in expected and _fits(tensor, expected[name])}
    if not any(tensor.is_floating_point() for tensor in fitting.values()):
        example = next(iter(weights), "nothing")
        raise CheckpointError(
            f"{path}: none of its {len(weights)} tensors fits the model by name and shape ({example} is the first): "
            "--init-from takes a whole model's weights; those of a backbone go to model.backbone.weights."
        )
    model.load_state_dict({name: tensor.view(expected[name].shape) for name, tensor in fitting.items()}, strict=False)
    return Transfer(
        path=Path(path),
        loaded=list(fitting),
        reshaped=[
            f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in weights and name not in fitting
        ],
        missing=[name for name in expected if name not in weights],
        left_over=[name for name in weights if name not in expected],
        share=sum(expected[name].numel() for name in fitting) / max(1, sum(x.numel() for x in expected.values())),
    )


def _fits(tensor: Tensor, expected: Tensor) -> bool:
    """The same shape; a scalar may come as a vector of one, as PyTorch before 0.4 wrote it."""
    return tensor.shape == expected.shape or (tensor.shape == (1,) and expected.dim() == 0)
