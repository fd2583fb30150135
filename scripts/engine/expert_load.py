"""How the pixels are shared out among the experts, read from what the routers compute anyway."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model.moe import Routing, Top2Router

DROPPED = "dropped"


def routers(model: nn.Module) -> dict[str, Top2Router]:
    """The routers of a model by the name of their branch, 'channel' and 'spatial'."""
    return {
        name.split(".")[-2] if "." in name else name: module
        for name, module in model.named_modules()
        if isinstance(module, Top2Router)
    }


class ExpertLoad:
    """The experts' load in single training steps.

    Between `watch` and `read`, a hook keeps a reference to each router's output; at other times there is none, and a
    step costs nothing more. Of several processes, each sees its own frames.

    Args:
        model: with any number of routers, none too; not handed to a strategy yet.

    Attributes:
        columns: names of the numbers: per branch one for each expert, and `dropped`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = routers(model)
        # Named now: a sharded strategy flattens the routers' weights.
        self.columns = [
            f"{branch}_{item}"
            for branch, router in self._routers.items()
            for item in (*range(router.weight.shape[1]), DROPPED)
        ]
        self._kept: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def watch(self) -> None:
        """Keep the routing of the forward passes that come."""
        if not self._hooks:
            for branch, router in self._routers.items():
                self._hooks.append(router.register_forward_hook(self._keeper(branch)))

    def read(self) -> dict[str, float]:
        """The last routing since `watch`, which ends here.

        Returns:
            `{branch}_{expert}`: share of all frames' pixels that the expert processes; an even load with every second
            choice kept is 2 / E. `{branch}_dropped`: share of pixels that no expert processes. Empty where nothing was
            watched.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        found: dict[str, float] = {}
        for branch, kept in self._kept.items():
            shares = torch.cat([kept.float().mean(dim=(0, 1)), 1 - kept.any(-1).float().mean()[None]])
            names = (*range(kept.shape[-1]), DROPPED)
            found |= {f"{branch}_{name}": value for name, value in zip(names, shares.tolist(), strict=True)}
        self._kept.clear()
        return found

    def _keeper(self, branch: str) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Routing) -> None:
            self._kept[branch] = output.kept.detach()

        return keep
