"""What happens inside a model on some frames: which pixels go to which expert, and what the queries attend to.

Hooks read it in a forward pass as test.sh makes it; the model is unchanged, and nothing of this runs in training.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import default_collate

from dataloader import AudioVisualDataset
from model.layers.attention import MultiheadAttention
from scripts.engine.expert_load import routers
from scripts.engine.plots import save_figure
from scripts.engine.testing import ModelPredictor, evenly
from scripts.engine.visualize import image_of, overlaid, predicted_classes

CLIPS = 4
QUERIES = 5
MAP = "cividis"


@dataclass
class Seen:
    """What a forward pass of N frames did.

    Attributes:
        routing: branch -> weight of each expert for each pixel of the mask feature, (N, h * w, E).
        attention: of the queries over the pixels of all levels in the last decoder layer, mean over heads, (N, Q, L).
        shapes: (height, width) of the levels, finest first.
    """

    routing: dict[str, Tensor] = field(default_factory=dict)
    attention: Tensor | None = None
    shapes: Sequence[tuple[int, int]] = ()


class Watch:
    """Records the forward passes of a model while the block lasts; `seen` is the last one.

    Args:
        model: from `model.build_model`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen = Seen()
        self._hooks: list[Any] = []

    def __enter__(self) -> "Watch":
        """Attach the hooks."""
        for branch, router in routers(self.model).items():
            self._hooks.append(router.register_forward_hook(self._keep_routing(branch)))
        transformer: Any = self.model.get_submodule("head.transformer")
        self._hooks.append(transformer.encoder.register_forward_pre_hook(self._keep_shapes))
        if len(transformer.decoder.layers):
            self._hooks.append(
                transformer.decoder.layers[-1].cross_attn.register_forward_pre_hook(self._keep_attention)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _keep_routing(self, branch: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            self.seen.routing[branch] = output.weight.float().cpu()

        return keep

    def _keep_shapes(self, module: nn.Module, inputs: Any) -> None:
        self.seen.shapes = inputs[2]

    def _keep_attention(self, module: nn.Module, inputs: Any) -> None:
        self.seen.attention = attention_weights(module, *inputs[:2]).cpu()  # type: ignore[arg-type]


def attention_weights(attention: MultiheadAttention, query: Tensor, memory: Tensor) -> Tensor:
    """Weights of a cross-attention, (N, Q, C) and (N, L, C) -> (N, Q, L) float32, mean over heads, without dropout."""
    channels, heads = query.shape[-1], attention.num_heads
    weight, bias = attention.in_proj_weight.float(), attention.in_proj_bias
    parts = (None, None) if bias is None else (bias.float()[:channels], bias.float()[channels : 2 * channels])
    q = F.linear(query.float(), weight[:channels], parts[0]).unflatten(-1, (heads, -1))
    k = F.linear(memory.float(), weight[channels : 2 * channels], parts[1]).unflatten(-1, (heads, -1))
    scores = torch.einsum("nqhd,nlhd->nhql", q, k) * (channels // heads) ** -0.5
    return scores.softmax(-1).mean(1)


def explain(predictor: ModelPredictor, dataset: AudioVisualDataset, folder: Path, title: str) -> list[Path]:
    """Draw, for one frame of some clips, the pixels of each expert and the attention of the queries.

    Args:
        predictor: a model.
        dataset: the split; its clips are taken evenly.
        folder: of the run; the pictures are `images/{title}_experts.png` and `images/{title}_attention.png`.
        title: of the pictures.

    Returns:
        The files written; none of experts where the model has none.
    """
    frames = []
    with Watch(predictor.model) as watch:
        for index in evenly(len(dataset), CLIPS):
            item = dataset[index]
            logits = predictor.logits(default_collate([item]), index)
            labelled = item["masks"].flatten(1).any(1) * item["vid_temporal_mask_flag"]
            second = int(labelled.argmax())  # real frames come first, so that it is also the row of what was seen
            prediction = predicted_classes(logits[second : second + 1])[0].cpu()
            frames.append(_Frame(item, second, prediction, dataset.num_classes > 1, _row(watch.seen, second)))
    written = []
    if frames and frames[0].seen.routing:
        written.append(folder / "images" / f"{title}_experts.png")
        save_expert_maps(written[-1], frames, title=f"{title}: weight of each expert, pixel by pixel")
    if frames and frames[0].seen.attention is not None:
        written.append(folder / "images" / f"{title}_attention.png")
        save_attention_maps(written[-1], frames, title=f"{title}: attention of the queries, last decoder layer")
    return written


@dataclass(frozen=True)
class _Frame:
    item: dict[str, Any]
    second: int
    prediction: Tensor
    semantic: bool
    seen: Seen

    def pictures(self) -> list[Any]:
        """The frame, and the prediction over it."""
        image = image_of(self.item["frames"][self.second])
        return [image, overlaid(image, self.prediction, self.semantic)]

    def on_grid(self, pixels: int) -> tuple[int, int]:
        """Height and width of a map with this number of pixels, in the frame's proportions."""
        height, width = self.item["frames"].shape[-2:]
        rows = max(1, round((pixels * height / width) ** 0.5))
        while pixels % rows:
            rows -= 1
        return rows, pixels // rows


def save_expert_maps(path: Path, frames: Sequence[_Frame], *, title: str) -> None:
    """A row per frame and branch: the frame or the prediction, then the weight of each expert at every pixel."""
    branches = list(frames[0].seen.routing)
    experts = frames[0].seen.routing[branches[0]].shape[-1]
    rows = len(frames) * len(branches)
    side = 1.35 if experts <= 8 else 1.0
    width, height = side * (experts + 1) + 1.6, (side + 0.2) * rows + 1.0
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.subplots(rows, experts + 1, squeeze=False)
    figure.subplots_adjust(
        left=0.75 / width, right=1 - 0.8 / width, top=1 - 0.8 / height, bottom=0.15 / height, wspace=0.05, hspace=0.2
    )
    for number, cells in enumerate(axes):
        frame, branch = frames[number // len(branches)], branches[number % len(branches)]
        cells[0].imshow(frame.pictures()[number % len(branches) and 1])
        cells[0].set_ylabel(f"{_short(frame.item['name'])}\n{branch}", fontsize=7)
        weight = frame.seen.routing[branch]
        grid = frame.on_grid(len(weight))
        for expert, cell in enumerate(cells[1:]):
            cell.imshow(weight[:, expert].view(grid), cmap=MAP, vmin=0, vmax=1, interpolation="nearest")
            share = 100 * float((weight[:, expert] > 0).float().mean())
            cell.set_title(f"{share:.0f} %", fontsize=7, pad=2)
            if number == 0:
                cell.annotate(f"expert {expert + 1}", (0.5, 1.17), xycoords="axes fraction", ha="center", fontsize=8)
    _bare(axes)
    bar = figure.add_axes((1 - 0.6 / width, 0.25, 0.14 / width, 0.5))
    figure.colorbar(ScalarMappable(Normalize(0, 1), MAP), cax=bar).ax.tick_params(labelsize=7)
    figure.suptitle(f"{title}; in percent: pixels that it processes", fontsize=10, y=1 - 0.15 / height)
    save_figure(figure, path)


def save_attention_maps(path: Path, frames: Sequence[_Frame], *, title: str) -> None:
    """A row per frame: frame, prediction, mean attention of all queries, and the queries that differ most."""
    columns = 3 + min(QUERIES, _attention(frames[0]).shape[0])
    width, height = 1.5 * columns + 0.8, 1.7 * len(frames) + 0.75
    figure = Figure(figsize=(width, height), dpi=110)
    axes = figure.subplots(len(frames), columns, squeeze=False)
    figure.subplots_adjust(
        left=0.65 / width, right=1 - 0.05 / width, top=1 - 0.75 / height, bottom=0.1 / height, wspace=0.05, hspace=0.16
    )
    for frame, cells in zip(frames, axes, strict=True):
        attention = _attention(frame)
        for cell, picture in zip(cells, frame.pictures(), strict=False):
            cell.imshow(picture)
        cells[0].set_ylabel("\n".join([_short(frame.item["name"]), f"second {frame.second + 1}"]), fontsize=7)
        cells[2].imshow(level_sum(attention.mean(0), frame.seen.shapes), cmap=MAP)
        cells[2].set_title(f"mean of {len(attention)} (±{100 * spread(attention):.1f} %)", fontsize=8, pad=3)
        for cell, query in zip(cells[3:], most_different(attention, columns - 3), strict=True):
            cell.imshow(level_sum(attention[query], frame.seen.shapes), cmap=MAP)
            cell.set_title(f"query {query + 1}", fontsize=8, pad=3)
    for cell, name in zip(axes[0], ("frame", "prediction"), strict=False):
        cell.set_title(name, fontsize=8, pad=3)
    _bare(axes)
    text = (
        f"{title}\neach map is scaled to its own maximum; ±: share of a query's attention that lies elsewhere than the "
        "mean's, averaged"
    )
    figure.suptitle(text, fontsize=10, y=1 - 0.1 / height)
    save_figure(figure, path)


def level_sum(attention: Tensor, shapes: Sequence[tuple[int, int]]) -> np.ndarray:
    """Attention over the pixels of all levels (L,) as one map of the finest level's size, with the same sum."""
    total = torch.zeros(*shapes[0])
    for part, (height, width) in zip(attention.split([h * w for h, w in shapes]), shapes, strict=True):
        share = height * width / (shapes[0][0] * shapes[0][1])
        total += share * F.interpolate(part.view(1, 1, height, width), size=tuple(shapes[0]), mode="nearest")[0, 0]
    return total.numpy()


def spread(attention: Tensor) -> float:
    """Mean over queries of the total variation distance from the mean attention, in [0, 1]; (Q, L) weights."""
    return float((attention - attention.mean(0)).abs().sum(1).mean() / 2)


def most_different(attention: Tensor, count: int) -> list[int]:
    """Queries chosen one by one as far as possible from the mean and from those chosen before; (Q, L) weights."""
    distance = (attention - attention.mean(0)).abs().sum(1)
    chosen: list[int] = []
    for _ in range(min(count, len(attention))):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (attention - attention[chosen[-1]]).abs().sum(1))
        distance[chosen] = -1.0
    return chosen


def _attention(frame: _Frame) -> Tensor:
    assert frame.seen.attention is not None
    return frame.seen.attention


def _row(seen: Seen, row: int) -> Seen:
    """What was seen of one frame."""
    attention = None if seen.attention is None else seen.attention[row]
    return Seen({branch: weight[row] for branch, weight in seen.routing.items()}, attention, seen.shapes)


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:8]}..{name[-8:]}"


def _bare(axes: Any) -> None:
    for cell in axes.flatten():
        cell.set_xticks([])
        cell.set_yticks([])
