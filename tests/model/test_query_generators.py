"""Query generators: the diversity loss, queries from pixels, and every leaf of config/ablation at a small size."""

import re
from typing import Any

import pytest
import torch

from model import build_model
from model.criterion import build_criterion
from model.query_generators import diversity_loss
from tests.support import VARIANTS, example, tiny
from utils.config import SECTIONS, check_classes, load_config
from utils.errors import ConfigError
from utils.runtime import ROOT

FOLDER = ROOT / "config/ablation"
ABLATIONS = sorted(path.name for path in FOLDER.glob("*.py"))
SMALLER: dict[str, Any] = {"num_layers": 1, "layer": {"ffn_dim": 32, "num_heads": 4}}


def test_diversity_of_orthogonal_parallel_and_given_queries() -> None:
    assert diversity_loss(torch.eye(4)[None]) == 0
    assert diversity_loss(torch.tensor([[[1.0, 2.0], [-2.0, -4.0]]])) == pytest.approx(1.0)  # antiparallel is parallel
    three = torch.tensor([[[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])  # squared cosines 0, 1/2, 1/2
    assert diversity_loss(three) == pytest.approx(1 / 3)
    assert diversity_loss(torch.randn(2, 1, 4)) == 0
    queries = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert diversity_loss(queries) == pytest.approx(0.5)
    assert diversity_loss(queries, torch.tensor([0.0, 1.0])) == 0
    assert diversity_loss(queries, torch.zeros(2)) == 0
    tight = torch.tensor([[[1.0, 0.0], [-0.5, 3**0.5 / 2], [-0.5, -(3**0.5) / 2]]])  # Q = 3 > C = 2: 1 / 4 at least
    assert diversity_loss(tight) == pytest.approx(0.25)


def test_descending_the_diversity_loss_drives_queries_apart() -> None:
    torch.manual_seed(0)
    queries = (torch.ones(1, 4, 8) + 0.1 * torch.randn(1, 4, 8)).requires_grad_()
    optimizer = torch.optim.Adam([queries], lr=0.1)
    assert diversity_loss(queries) > 0.9
    for _ in range(60):
        optimizer.zero_grad()
        diversity_loss(queries).backward()
        optimizer.step()
    assert diversity_loss(queries) < 0.05


def test_the_diversity_loss_is_part_of_the_models_in_training_only() -> None:
    change = {"query_generator": {"query_init": "learned", "diversity_weight": 2.0}, "fusion_block": None}
    torch.manual_seed(0)
    network: Any = build_model(tiny(change))
    found: list[torch.Tensor] = []
    network.head.query_generator.register_forward_hook(lambda _module, _inputs, out: found.append(out.queries))
    out = network.train()(*example(2))
    torch.testing.assert_close(out.aux_loss, 2.0 * diversity_loss(found[0]))
    assert network.eval()(*example(2)).aux_loss == 0


@pytest.mark.parametrize(
    ("generator", "words"),
    [
        ({"diversity_weight": 0.1}, r"diversity_weight=0\.1 has no effect on equal queries: set query_init='learned'"),
        ({"query_init": "learned", "diversity_weight": -1}, "diversity_weight=-1 must be a number, 0 or more"),
        ({"_delete_": True, "type": "AttentionGenerator", "diversity_weight": "x"}, "diversity_weight='x' must be"),
        ({"_delete_": True, "type": "RepeatGenerator", "diversity_weight": 1}, "diversity_weight is not an option of"),
        ({"_delete_": True, "type": "VisualQueryGenerator", "num_scales": 0}, "num_scales=0 must be at least 1"),
    ],
)
def test_a_wrong_option_is_named(generator: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_model(tiny({"query_generator": generator}))


def test_visual_queries_depend_on_pixels_and_the_audio_scales_them() -> None:
    torch.manual_seed(0)
    network: Any = build_model(tiny(VARIANTS["visual queries"])).eval()
    generator = network.head.query_generator
    features = [torch.randn(1, 16, size, size) for size in (8, 4, 2)]
    audio = torch.randn(1, 1, 16)
    with torch.no_grad():
        queries = generator(audio, features).queries
        elsewhere = generator(audio, [x.flip(-1) for x in features]).queries
        generator.query_gate.weight.zero_()
        generator.query_gate.bias.fill_(-20)
        generator.audio_gate.weight.zero_()
        generator.audio_gate.bias.fill_(1)
        silent = generator(audio, features).queries
    assert not torch.allclose(queries, elsewhere, atol=1e-3)
    assert queries.std(dim=1).min() > 1e-3, "queries differ from each other"
    assert silent.abs().max() < 1e-6 < queries.abs().max()


def shrunk(cfg: Any) -> Any:
    """A leaf's model at a small size; what the leaf exchanges stays."""
    cfg.backbone = {"type": "pvt_v2_b0"}
    cfg.audio_encoder = {"type": "VGGish", "channels": (2, 4, 4, 8), "hidden_dim": 16, "frozen": False}
    cfg.embed_dim = 32
    cfg.audio_dim = 128
    cfg.head.num_queries = 6
    for part in ("encoder", "decoder"):
        cfg.head.transformer[part] = SMALLER
    if cfg.head.mask_head is not None and "hidden_dim" in cfg.head.mask_head:
        cfg.head.mask_head.hidden_dim = 16
    return cfg


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_takes_a_step(name: str) -> None:
    cfg = load_config(FOLDER / name)
    text = (FOLDER / name).read_text()
    assert text.startswith(f'"""bash train.sh {cfg.task} config/ablation/{name}\n'), "the docstring holds the command"
    torch.manual_seed(0)
    model = build_model(shrunk(cfg.model)).train()
    frames = cfg.model.num_frames
    criterion = build_criterion(cfg.loss, num_classes=cfg.model.head.num_classes)
    masks = (torch.rand(frames, 64, 64) > 0.7).to(torch.uint8)
    losses = criterion(model(*example(frames, 64, 64)), masks, torch.ones(frames))
    losses["total"].backward()
    assert losses["total"].isfinite()
    assert not [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.mark.parametrize("name", [name for name in ABLATIONS if "backbone=" in (FOLDER / name).read_text()])
def test_a_leafs_own_backbone_builds_at_full_size(name: str) -> None:
    cfg = load_config(FOLDER / name)
    check_classes(cfg)
    with torch.device("meta"):  # shapes without weights
        model = build_model(cfg.model)
    assert len((model.neck or model.backbone).channels) == 4  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_differs_from_its_base(name: str) -> None:
    leaf = load_config(FOLDER / name)
    base = re.search(r'_base_ = \["((?:\.\./[a-z0-9]+|\.)/\w+\.py)"\]', (FOLDER / name).read_text())
    assert base is not None, "a leaf of config/ablation has one base, another leaf"
    published = load_config(FOLDER / base[1])
    assert any(leaf[section] != published[section] for section in SECTIONS)
