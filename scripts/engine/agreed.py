"""The signal to stop, the same on all processes of a run."""

import torch
from lightning.fabric import Fabric

from scripts.engine.fabric import OnHost, all_reduce
from scripts.engine.resume import StopSignals


class AgreedSignal:
    """Asks whether any process of a run has received a signal.

    Every process asks at the same steps. On GPUs, waiting for the answer would be waiting for all work that was queued
    before; there `ask` answers what was asked a step earlier.

    Args:
        signals: of this process.
        fabric: for the processes.
        late: answered a step later; None: on GPUs.
    """

    def __init__(self, signals: StopSignals, fabric: Fabric, *, late: bool | None = None) -> None:
        self.signals = signals
        self.fabric = fabric
        self.late = fabric.device.type == "cuda" if late is None else late
        self._waiting: OnHost | None = None

    def ask(self) -> int:
        """The signal's number, 0 for none; where it is late, 0 at the first call."""
        if self.fabric.world_size == 1:
            return self.signals.received
        asked = self._ask()
        earlier, self._waiting = (self._waiting, asked) if self.late else (asked, None)
        return 0 if earlier is None else int(earlier.read())

    def now(self) -> int:
        """The signal's number, 0 for none, as of this moment."""
        self._waiting = None  # the signal that it may know of is still known
        return self.signals.received if self.fabric.world_size == 1 else int(self._ask().read())

    def _ask(self) -> OnHost:
        # Filled on the device: a copy to it would wait.
        received = torch.full((), self.signals.received, device=self.fabric.device)
        return OnHost(all_reduce(received, "MAX", self.fabric))
