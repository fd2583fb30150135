"""Config files: shipped, published and wrong."""

from pathlib import Path

import pytest
import torch

from model import build_model
from model.criterion import build_criterion
from tests.published_files import MODELS, TASKS, published_config, write_config
from utils.config import SPLITS, load_config
from utils.errors import ConfigError
from utils.runtime import shipped_configs


def shrunk(model: dict) -> dict:
    """A shipped `model` section from random weights."""
    return {**model, "backbone": {**model["backbone"], "weights": None}}


@pytest.mark.parametrize("path", [path for path in shipped_configs() if "/ablation/" not in path])
def test_every_shipped_config_takes_a_training_step(path: str) -> None:
    cfg = load_config(path)
    assert cfg.task == Path(path).parent.name
    torch.manual_seed(0)
    model = build_model(shrunk(cfg.model)).train()
    criterion = build_criterion(cfg.loss, num_classes=cfg.model.head.num_classes)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=cfg.optimizer.lr)
    masks = (torch.rand(2, 64, 64) > 0.7).to(torch.uint8)
    losses = criterion(
        model(torch.randn(2, *model.audio_encoder.input_shape), torch.randn(2, 3, 64, 64)),
        masks,
        torch.tensor([1.0, 0.0]),
    )
    before = model.audio_proj.weight.clone()
    losses["total"].backward()
    optimizer.step()
    assert losses["total"].isfinite() and not torch.equal(before, model.audio_proj.weight)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("model", "backbone"), MODELS)
def test_published_files_run_unchanged(tmp_path: Path, model: str, backbone: str, task: str) -> None:
    path = write_config(published_config(model, backbone, task), tmp_path / f"{model}_{backbone}_{task}.py")
    cfg = load_config(path, task=task)
    shipped = load_config(f"config/{task}/{path.name}")
    assert cfg.model.backbone.type == shipped.model.backbone.type
    computed = published_config(model, backbone, task)["model"]["vggish"]["preprocess_audio_to_log_mel"]
    assert cfg.dataset.train.get("audio", "auto") == ("wav" if computed else "auto")
    assert cfg.optimizer == shipped.optimizer
    with torch.device("meta"):  # shapes without weights
        shapes = [
            {name: tensor.shape for name, tensor in build_model(shrunk(each.model)).state_dict().items()}
            for each in (cfg, shipped)
        ]
    assert shapes[0] == shapes[1]
    schedule = {"train_epochs", "freeze_epochs", "start_eval_epoch", "eval_interval", "num_workers"}
    assert {key: cfg.process[key] for key in schedule} == {key: shipped.process[key] for key in schedule}
    for split in SPLITS:
        assert cfg.dataset[split].type == shipped.dataset[split].type


def test_overrides_reach_every_section() -> None:
    overrides = [
        "process.precision=bf16",
        "model.head.query_num=7",
        "model.vggish.freeze_audio_extractor=False",
        "dataset.train.batch_size=3",
        "optimizer.lr=1e-3",
    ]
    cfg = load_config("config/ms3/MoDAT_pvt2_ms3.py", overrides)
    assert cfg.process.precision == "bf16"
    assert (cfg.model.head.num_queries, cfg.dataset.train.batch_size, cfg.optimizer.lr) == (7, 3, 1e-3)
    assert load_config("config/ms3/MoDAT_pvt2_ms3.py", ["process.precision=32"]).process.precision == "32"
    assert load_config("config/ms3/MoDAT_pvt2_ms3.py", ["process.lr_schedule=None"]).process.lr_schedule is None
    words = ["process.compile=true", "process.check_data=false", "process.clip_grad_norm=null", "process.work_dir=7"]
    process = load_config("config/ms3/MoDAT_pvt2_ms3.py", words).process
    assert (process.compile, process.check_data, process.clip_grad_norm) == (True, False, None)
    assert process.work_dir == "7"


def test_published_avss_settings_of_each_family() -> None:
    for name, crop in (("MoDAT_pvt2", False), ("AVSegFormer_pvt2", True), ("AVSegFormer_res50", True)):
        for split in load_config(f"config/avss/{name}_avss.py").dataset.values():
            assert split.crop_img_and_mask == split.resize_pred_mask == crop and split.batch_size == 2


WRONG = {
    "process.train_epoch=3": "process.train_epoch is not an option: did you mean 'train_epochs'",
    "process.precision=8": "process.precision='8' is not one of '32', 'bf16', '16', 'auto'",
    "process.train_epochs=0": "process.train_epochs=0 must be a whole number, 1 or more",
    "process.seed=-1": "process.seed=-1 must be",
    "process.num_works=two": "process.num_workers='two' must be a whole number",
    "process.deterministic=no": "process.deterministic='no': give True or False",
    "process.compile=no": "process.compile='no' is not one of False, True, 'reduce-overhead', 'max-autotune'",
    "process.lr_schedule.type=linear": "process.lr_schedule.type='linear'",
    "process.lr_schedule.gama=1": "process.lr_schedule.gama",
    "optimizer=3": "optimizer=3: optimizer has the keys",
    "loss.weight_dict.box=1": "loss has no 'weight_dict': Known: ",
    "loss.weight_dict=1": "loss.weight_dict=1 must be a dictionary with the keys iou_loss, mix_loss",
    "model.neck=FPN": "model.neck must be None",
    "proces.seed=1": "the config has no 'proces': did you mean 'process'",
    "model.head.fusion.x=1": "model.head has no 'fusion'",
    "dataset.train.type=Foo": "dataset.train.type='Foo' is not a data set",
    "dataset.val=None": "dataset.val is missing",
    "task=s4": "its data sets are of ms3",
    "extra=1": "'extra' is not a section of a config",
    "seed": "is not an override: write key=value",
    "process.seed.x=1": "process.seed is a value and has no keys",
}


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_graphs_that_are_replayed_add_up_no_gradients(mode: str) -> None:
    path, words = "config/ms3/MoDAT_pvt2_ms3.py", [f"process.compile={mode}", "process.accumulate=2"]
    with pytest.raises(ConfigError, match=f"process.compile='{mode}' replays CUDA graphs.*process.accumulate=2 batch"):
        load_config(path, words)
    assert load_config(path, words[:1]).process.compile == mode
    assert load_config(path, ["process.compile=true", "process.accumulate=2"]).process.compile is True


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_key_or_value_is_named(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("config/ms3/MoDAT_pvt2_ms3.py", [override])
    assert WRONG[override] in str(caught.value)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config file nowhere\.py\. Shipped: .*config/ms3/MoDAT_pvt2_ms3\.py"):
        load_config("nowhere.py")
    broken = tmp_path / "broken.py"
    broken.write_text("model = dict(")
    with pytest.raises(ConfigError, match=r"broken\.py cannot be read: SyntaxError"):
        load_config(broken)
    broken.write_text("x = 1 / 0")
    with pytest.raises(ConfigError, match=r"broken\.py cannot be read: ZeroDivisionError"):
        load_config(broken)
    broken.write_text("model = dict(type='MoDAT')")
    with pytest.raises(ConfigError, match=r"broken\.py has no section 'dataset'"):
        load_config(broken)
    with pytest.raises(ConfigError, match="is a config for ms3, not for s4: run it with ms3"):
        load_config("config/ms3/MoDAT_pvt2_ms3.py", task="s4")
    with pytest.raises(ConfigError, match="'ms4' is not a task"):
        load_config("config/ms3/MoDAT_pvt2_ms3.py", task="ms4")
