"""How often the host waits for a device in a step of training and of evaluation."""

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from model import build_model
from model.criterion import SegmentationLoss
from model.set_criterion import MaskClassificationLoss
from scripts.engine.agreed import AgreedSignal
from scripts.engine.fabric import ends_with_this_process
from scripts.engine.feature_cache import FrozenFeatures, KnownFeatures
from scripts.engine.loop import evaluate, predictor, train_one_epoch
from scripts.engine.nonfinite import FiniteCheck, NonFiniteLossError
from scripts.engine.resume import Position, StopSignals
from scripts.engine.task_metrics import TaskMetrics
from tests.pretend_device import DEVICE, OnDevice, PretendDevice, move
from tests.support import VARIANTS, example, tiny

CLIPS, FRAMES = 2, 3


@contextlib.contextmanager
def no_grad(mode: bool = True) -> Iterator[None]:
    with torch.set_grad_enabled(torch.is_grad_enabled() and not mode):
        yield


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast knows no such device, inference mode no such tensor."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "inference_mode", no_grad)


def batch(num_classes: int, padded: bool = False) -> dict[str, Any]:
    log_mel, frames = example(CLIPS * FRAMES)
    draw = torch.Generator().manual_seed(0)
    masks = torch.randint(0, max(2, num_classes), (CLIPS, FRAMES, *frames.shape[2:]), generator=draw)
    real = torch.tensor([[1.0, 1, 1], [1, 1, 0]]) if padded else torch.ones(CLIPS, FRAMES)
    return {
        "log_mel": log_mel.unflatten(0, (CLIPS, FRAMES)),
        "frames": frames.unflatten(0, (CLIPS, FRAMES)),
        "masks": masks.to(torch.uint8),
        "gt_temporal_mask_flag": torch.tensor([[1.0, 0, 0], [1, 0, 0]]) if padded else torch.ones(CLIPS, FRAMES),
        "vid_temporal_mask_flag": real,
        "name": ["a", "b"],
    }


class Loader(list[dict[str, Any]]):
    batch_sampler = SimpleNamespace(batch_size=CLIPS)


class StubFabric:
    """What the loop asks of Fabric, without moving anything."""

    device = DEVICE
    global_rank = 0

    def no_backward_sync(self, *_: Any, **__: Any) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_gradients(self, model: Any, optimizer: Any, max_norm: float, error_if_nonfinite: bool) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm, error_if_nonfinite=error_if_nonfinite)


def train(name: str, num_classes: int, padded: bool, cache: Path | None = None) -> PretendDevice:
    """Two training steps; `cache`: the embeddings of the sounds are in it."""
    torch.manual_seed(0)
    model: Any = build_model(tiny(VARIANTS[name], num_classes=num_classes))
    known = None
    if cache is not None:
        known = KnownFeatures(FrozenFeatures(model.audio_encoder, cache, in_memory=False, per_frame=True), None)
        known(batch(num_classes, padded))
    kind = MaskClassificationLoss if "classification" in name else SegmentationLoss
    with PretendDevice() as device:
        move(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        train_one_epoch(
            model,
            move(kind(num_classes)),
            Loader([batch(num_classes, padded)] * 2),  # type: ignore[arg-type]
            optimizer,
            fabric=StubFabric(),  # type: ignore[arg-type]
            position=Position(),
            process={"seed": 0, "accumulate": 1, "clip_grad_norm": 1.0},
            known=known,
            on_loss=lambda *_: None,
            on_batch=lambda *_: None,
        )
    assert all(parameter.grad is None for parameter in model.parameters())
    if cache is not None:
        assert list(cache.rglob("*.safetensors"))
    return device


def test_the_device_counts_what_a_gpu_would_wait_for() -> None:
    x = OnDevice(torch.tensor([1.0, 0, 2]))
    with PretendDevice() as device:
        assert not device.waits and (x + 1).device == DEVICE
        for read in (
            lambda: x.sum().item(),
            lambda: x[x > 0],
            lambda: x.nonzero(),
            lambda: bool(x[0]),
            lambda: x.cpu(),
        ):
            before = sum(device.waits.values())
            read()
            assert sum(device.waits.values()) == before + 1
        free = torch.ones(3).to(DEVICE) + torch.zeros(3, device=DEVICE)
        assert isinstance(free, OnDevice) and torch.ones(3).sum().item() == 3
        with pytest.raises(RuntimeError, match="two devices"):
            x.add_(torch.ones(3))
    assert sum(device.waits.values()) == 5


STEPS = [("modat", False), ("modat", True), ("temporal", True), ("mixer", True), ("visual queries", False)]


@pytest.mark.parametrize(("name", "padded"), STEPS)
def test_a_training_step_does_not_wait(name: str, padded: bool) -> None:
    assert not train(name, 1, padded).waits


def test_embeddings_are_found_in_the_cache_without_waiting(tmp_path: Path) -> None:
    assert not train("modat", 1, padded=True, cache=tmp_path).waits


def test_a_semantic_training_step_does_not_wait() -> None:
    assert not train("modat", 3, padded=True).waits


@pytest.mark.parametrize("num_classes", [1, 3])
def test_matching_waits_for_its_costs(num_classes: int) -> None:
    waits = train("mask classification, every layer", num_classes, padded=True).waits
    assert sum(waits.values()) == (2 if num_classes == 1 else 4), waits  # of two steps
    assert all("matching.py" in place for _, place in waits)


@pytest.mark.parametrize(("task", "num_classes"), [("ms3", 1), ("avss", 3)])
def test_evaluation_waits_for_its_scores_alone(task: str, num_classes: int) -> None:
    torch.manual_seed(0)
    model = build_model(tiny({}, num_classes=num_classes))
    metrics = TaskMetrics(task, num_classes)
    with PretendDevice():
        move(model)
        move(metrics)
    counts = []
    for batches in (1, 3):
        with PretendDevice() as device:
            loader: Any = Loader([batch(num_classes, padded=True)] * batches)
            evaluate(predictor(model, DEVICE), loader, metrics)
        counts.append(sum(device.waits.values()))
    assert counts[0] == counts[1] > 0


def test_a_late_check_names_the_step_that_broke_before_anything_is_saved(tmp_path: Path) -> None:
    check = FiniteCheck(tmp_path, Fabric(accelerator="cpu", devices=1), late=True)
    broken = {"total": torch.tensor(torch.nan), "mask_loss": torch.tensor(2.0)}
    check.add({"total": torch.tensor(1.0), "mask_loss": torch.tensor(1.0)}, {"name": ["first"]}, Position(step=3))
    check.add(broken, {"name": ["second", "third"]}, Position(step=4))
    with pytest.raises(NonFiniteLossError, match=r"step 4 .*total nan, mask_loss 2\.0; clips second, third"):
        check.finish()
    assert json.loads((tmp_path / "nonfinite.json").read_text())["clips"] == ["second", "third"]
    check.finish()
    check.add(broken, {"name": ["fourth"]}, Position(step=5))
    with pytest.raises(NonFiniteLossError, match="step 5 "):
        check.add(broken, {"name": ["fifth"]}, Position(step=6))
    with pytest.raises(NonFiniteLossError, match="step 7 "):
        FiniteCheck(tmp_path, check.fabric).add(broken, {"name": ["now"]}, Position(step=7))


@pytest.mark.parametrize("late", [False, True])
def test_a_signal_is_agreed_upon_at_once_or_a_step_later(late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`late` is how GPUs ask: the host waits for the step before, whose work is done."""
    received_elsewhere = torch.tensor(0)
    asked: list[int] = []

    def reduce(value: Tensor, operation: str) -> None:
        asked.append(1)
        value.copy_(getattr(torch, operation)(value, received_elsewhere))

    monkeypatch.setattr(torch.distributed, "all_reduce", reduce)
    monkeypatch.setattr(torch.distributed, "ReduceOp", SimpleNamespace(MAX="maximum"))
    fabric: Any = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    stop = AgreedSignal(StopSignals(), fabric, late=late)
    assert stop.ask() == 0
    received_elsewhere.fill_(15)
    assert stop.ask() == (0 if late else 15)
    assert stop.ask() == 15 and len(asked) == 3, "every call asks all processes, once"
    assert stop.now() == 15
    received_elsewhere.zero_()
    stop.signals.received = 10
    assert stop.now() == 10
    fabric.world_size = 1
    assert stop.ask() == stop.now() == 10 and len(asked) == 5, "one process asks no others"


def test_processes_started_by_one_that_fails_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Any] = []
    monkeypatch.setattr("atexit.register", lambda *call: at_exit.append(call))
    with subprocess.Popen(["sleep", "60"]) as waiting:
        fabric: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[waiting])))
        with ends_with_this_process(fabric):
            pass
        with pytest.raises(NonFiniteLossError), ends_with_this_process(fabric, (NonFiniteLossError,)):
            raise NonFiniteLossError("on all of them")
        assert not at_exit
        with pytest.raises(OSError, match="disk full"), ends_with_this_process(fabric):
            raise OSError("disk full")
        assert waiting.poll() is None, "the message comes first"
        ((call, *given),) = at_exit
        call(*given)
        assert waiting.wait(timeout=20) < 0
    call(SimpleNamespace(strategy=SimpleNamespace(launcher=None)))  # a single process has no launcher
