"""What a user can get wrong in a config: each mistake is named by its key, with the way out, before training starts."""

from pathlib import Path

import pytest

from dataloader import build_dataset
from model import build_model
from model.criterion import build_criterion
from model.pretrained import load_pretrained
from scripts.engine.fabric import build_fabric
from scripts.engine.optimizer import build_optimizer, check_gradient_limit
from scripts.engine.run import train
from tests.runs import make_data, write_config
from utils.config import check_classes, load_config
from utils.errors import UserError

MISTAKES = [
    ("process.train_epochs=0", "process.train_epochs=0 must be a whole number, 1 or more"),
    ("process.train_epochs=many", "process.train_epochs='many'"),
    ("process.train_epoch=3", "did you mean 'train_epochs'"),
    ("process.precision=8", "process.precision='8' is not one of '32', 'bf16', '16', 'auto'"),
    ("process.precision=16", "process.precision=16 needs a GPU"),
    ("process.lr_schedule=cosine", "process.lr_schedule='cosine': give None or dict(type=...)"),
    ("process.lr_schedule={'type':'poly'}", "process.lr_schedule.type='poly'"),
    ("process.lr_schedule={'type':'cosine','warmup':3}", "did you mean 'warmup_steps'"),
    ("process.lr_scaling=sqrt", "process.lr_scaling='sqrt'"),
    ("process.matmul_precision=low", "process.matmul_precision='low'"),
    ("process.devices=0", "process.devices=0: give 'auto', a number"),
    ("process.strategy=fsdp process.clip_grad_norm=1", "process.strategy='fsdp' cannot limit the gradient's norm"),
    ("process.strategy=zero", "process.strategy='zero'"),
    ("process.seed=-1", "process.seed=-1 must be a whole number, 0 or more"),
    ("process.clip_grad_norm=-1", "process.clip_grad_norm=-1: give None or a number above 0"),
    ("process.clip_grad_norm=high", "process.clip_grad_norm='high'"),
    ("process.checkpoint_interval=-3", "process.checkpoint_interval=-3"),
    ("optimizer.type=SDG", "optimizer.type='SDG' is not an optimizer of torch.optim: did you mean 'SGD'"),
    ("optimizer.lr=-1", "optimizer.lr=-1"),
    ("optimizer.lr=fast", "optimizer.lr='fast'"),
    ("optimizer.betas=0.9", "optimizer.betas=0.9"),
    ("optimizer.momentum=0.9", "optimizer.momentum is not an option of AdamW"),
    ("optimizer.paramwise={'lr_factor':{'backbon':0.1}}", "no parameter's name starts with 'backbon'"),
    ("optimizer.paramwise={'lr_factor':{'backbone':-1}}", "optimizer.paramwise.lr_factor.backbone=-1"),
    ("optimizer.paramwise={'lr_mult':{}}", "optimizer.paramwise.lr_mult is not an option"),
    ("loss.loss_type=focal", "mask_loss='focal'"),
    ("loss.mask_loss=focal", "mask_loss='focal'"),
    ("loss.weight_dict={'iou':1}", "loss.weight_dict.iou is not a loss"),
    ("loss.mix_weight=-1", "mix_weight=-1"),
    ("loss.mask_weigth=3", "did you mean 'mask_weight'"),
    ("model.type=MoDATT", "did you mean 'MoDAT'"),
    ("model.backbone.type=pvt_v9", "model.backbone.type='pvt_v9' is not a network of timm"),
    ("model.backbone.init_weights_path=/nowhere.pth", "no weights file /nowhere.pth"),
    ("model.backbone.pretrained=True", "model.backbone.pretrained is not an option"),
    ("model.vggish.pretrained_vggish_model_path=/nowhere.pth", "no weights file /nowhere.pth"),
    ("model.vggish.channels=(4,4)", "VGGish has four stages, got channels=(4, 4)"),
    ("model.embed_dim=30", "embed_dim=30 is not a multiple"),
    ("model.neck={'type':'FPN'}", "model.neck must be None"),
    ("model.head.type=Head", "did you mean 'SegHead'"),
    ("model.head.num_classes=71", "model.head.num_classes=71, but dataset.train has 1 classes"),
    ("model.head.query_generator.type=Generator", "model.head.query_generator.type='Generator'"),
    ("model.head.query_generator.early_fusion.type=AVFusions", "did you mean 'AVFusion'"),
    ("model.head.query_generator.query_init=random", "query_init is 'repeat' or 'learned', got 'random'"),
    ("model.head.transformer.encoder.layers=3", "model.head.transformer.encoder.layers is not an option"),
    ("model.head.transformer.encoder.layer.num_heads=5", "not a multiple of num_heads 5"),
    ("model.head.fusion_block.second_policy_train=some", "'some' is not one of all, none, threshold, random"),
    ("model.head.fusion_block.num_experts=0", "num_experts=0"),
    ("model.head.fusion_block.branches=none", "branches is 'both', 'channel' or 'spatial', got 'none'"),
    ("model.T=10", "model.num_frames=10, but clips of dataset.train have 5 frames"),
    ("model.head.depth.x=1", "model.head has no 'depth'"),
    ("dataset.train.type=MS4Dataset", "dataset.train.type='MS4Dataset' is not a data set"),
    ("dataset.train.type=S4Dataset", "its splits belong to different tasks"),
    ("dataset.train.split=training", "has no clip of the split 'training'"),
    ("dataset.train.img_size=64", "img_size=64, expected (height, width)"),
    ("dataset.train.img_size=(0,64)", "img_size=(0, 64)"),
    ("dataset.train.batch_size=0", "batch_size=0, expected a positive whole number"),
    ("dataset.train.anno_csv=/nowhere.csv", "the table /nowhere.csv is missing"),
    ("dataset.train.audio=mp3", "audio='mp3', expected one of auto, wav, log_mel"),
    ("dataset.train.mask_num=9", "num_labelled_frames=9, expected 1 to num_frames=5"),
    ("dataset.train.negatives={'rate':2}", "negatives.rate=2, expected a number from 0 to 1"),
    ("dataset.train.negatives={'rates':0.2}", "negatives.rates is not an option: did you mean 'rate'?"),
    ("dataset.train.augment={'gain':3}", "augment.gain is not an option: did you mean 'gain_db'?"),
    ("dataset.train.augment={'scale':(2,1)}", "augment.scale=(2, 1), expected two numbers"),
    ("dataset.val.negatives={'rate':0.2}", "negatives is for the split 'train', not for 'val'"),
    ("dataset.train.directory=/x", "dataset.train.directory is not an option of MS3Dataset"),
    ("dataset.val=None", "dataset.val is missing"),
    ("extra.key=1", "the config has no 'extra'"),
    ("process", "'process' is not an override: write key=value"),
    ("=3", "'=3' is not an override"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = make_data(tmp_path_factory.mktemp("drawn"), clips=(2, 1, 1), tasks=("ms3",))
    return write_config(tmp_path_factory.mktemp("config") / "tiny.py", data)


def prepare(path: Path, *overrides: str) -> None:
    """Everything that training does before its first step."""
    cfg = load_config(path, overrides, "ms3")
    check_classes(cfg)
    check_gradient_limit(cfg.process.clip_grad_norm)
    for split in ("train", "val", "test"):
        build_dataset(cfg.dataset[split], where=f"dataset.{split}")
    build_criterion(cfg.loss, num_classes=1)
    model = build_model(cfg.model)
    build_optimizer(cfg.optimizer, model)
    load_pretrained(model, cfg.model)
    build_fabric(cfg.process)


def test_the_config_is_sound_without_a_mistake(config: Path) -> None:
    prepare(config)


@pytest.mark.parametrize(("override", "words"), MISTAKES, ids=[override for override, _ in MISTAKES])
def test_a_mistake_is_named(config: Path, override: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        prepare(config, *override.split(" "))
    assert words in str(caught.value)


def test_a_run_is_deleted_only_once_the_new_one_can_start(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "MS3_best.pth").write_bytes(b"weights")
    for overrides, overwrite, words in (
        ([], False, r"already holds a run \(MS3_best\.pth\)"),
        (["optimizer.lr=-1"], True, r"optimizer\.lr=-1"),
        (["model.backbone.type=pvt_v9"], True, "not a network of timm"),
        (["process.strategy=zero"], True, "cannot be had on this machine"),
    ):
        cfg = load_config(config, [f"process.work_dir={tmp_path}", *overrides])
        with pytest.raises(UserError, match=words):
            train(cfg, "tiny", overwrite=overwrite)
        assert (folder / "MS3_best.pth").read_bytes() == b"weights"
