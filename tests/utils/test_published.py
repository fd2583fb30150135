"""Published config keys and their counterparts."""

import pytest
from mmengine.config import ConfigDict

from utils.errors import ConfigError
from utils.published import translate, translate_key


def section(**changes: object) -> ConfigDict:
    return ConfigDict({"model": {"head": {}}, "dataset": {}, **changes})


def test_the_meaning_of_mask_num_depends_on_the_data_set() -> None:
    cfg = section(
        dataset={
            "train": {"type": "S4Dataset", "mask_num": 1},
            "val": {"type": "V2Dataset", "mask_num": 10, "num_class": 71},
        }
    )
    translate(cfg)
    assert cfg.dataset.train == {"type": "S4Dataset", "num_labelled_frames": 1}
    assert cfg.dataset.val == {"type": "AVSSDataset", "num_frames": 10, "num_classes": 71}
    assert translate_key("dataset.train.mask_num", cfg) == "dataset.train.num_labelled_frames"
    assert translate_key("dataset.val.mask_num", cfg) == "dataset.val.num_frames"


def test_a_key_under_both_names_is_refused_unless_they_agree() -> None:
    cfg = section(model={"T": 5, "num_frames": 5, "head": {}})
    translate(cfg)
    assert cfg.model.num_frames == 5 and "T" not in cfg.model
    with pytest.raises(ConfigError, match=r"model\.T=10 and model\.num_frames=5 are one key under two names"):
        translate(section(model={"T": 10, "num_frames": 5, "head": {}}))


def test_published_blocks_carry_their_keys_along() -> None:
    generator = {"type": "EncoderDecoderGenerator", "query_num": 9, "early_fusion": {"type": "MTA", "hidden_dim": 64}}
    cfg = section(
        model={"vggish": {"freeze_audio_extractor": False}, "head": {"type": "AVSegHead", "query_generator": generator}}
    )
    cfg.model.head.scale_factor = 4
    translate(cfg)
    assert cfg.model.audio_encoder == {"frozen": False} and cfg.model.head.type == "SegHead"
    assert cfg.model.head.query_generator.num_queries == 9
    assert cfg.model.head.query_generator.av_fusion == {"type": "AVFusion", "ffn_dim": 64}
    assert cfg.model.head.mask_head.scale_factor == 4
    key = "model.head.query_generator.early_fusion.hidden_dim"
    assert translate_key(key, cfg) == "model.head.query_generator.av_fusion.ffn_dim"


def test_two_published_keys_freeze_the_audio_encoder_and_one_chooses_the_source_of_sound() -> None:
    cfg = section(
        model={"freeze_audio_backbone": False, "vggish": {"preprocess_audio_to_log_mel": True}, "head": {}},
        dataset={"train": {"type": "V2Dataset"}, "val": {"type": "V2Dataset", "audio": "auto"}},
    )
    translate(cfg)
    assert cfg.model.audio_encoder == {"frozen": False}
    assert cfg.dataset.train.audio == "wav" and cfg.dataset.val.audio == "auto"


def test_published_losses_become_weights() -> None:
    cfg = section(loss={"weight_dict": {"iou_loss": 2.0, "mix_loss": 0.5}, "loss_type": "bce"})
    translate(cfg)
    assert cfg.loss == {"mask_weight": 2.0, "mix_weight": 0.5, "mask_loss": "bce"}
    for weights, words in (({"mask_loss": 1.0}, "write mix_loss"), ({"box": 1.0}, "weight_dict.box is not a loss")):
        with pytest.raises(ConfigError, match=words):
            translate(section(loss={"weight_dict": weights}))
