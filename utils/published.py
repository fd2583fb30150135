"""Config keys of the published MoDAT and AVSegFormer, in this project's terms.

`load_config` passes every file and every `key=value` through here, so that published config files work unchanged and no
other file knows a published key. Names of published weights are translated in model/checkpoint.py.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

from mmengine.config import ConfigDict

from utils.errors import ConfigError

SPLITS = ("train", "val", "test")

GENERATOR = "model.head.query_generator"
KEYS = (  # (published, ours) in order: a renamed section is followed by its keys
    ("model.T", "model.num_frames"),
    ("model.backbone.init_weights_path", "model.backbone.weights"),
    ("model.vggish", "model.audio_encoder"),
    ("model.audio_encoder.freeze_audio_extractor", "model.audio_encoder.frozen"),
    ("model.audio_encoder.pretrained_vggish_model_path", "model.audio_encoder.weights"),
    ("model.audio_encoder.postprocess_log_mel_with_pca", "model.audio_encoder.pca"),
    ("model.audio_encoder.pretrained_pca_params_path", "model.audio_encoder.pca_weights"),
    ("model.head.query_num", "model.head.num_queries"),
    ("model.head.scale_factor", "model.head.mask_head.scale_factor"),
    (f"{GENERATOR}.query_num", f"{GENERATOR}.num_queries"),
    (f"{GENERATOR}.num_layers_decoder", f"{GENERATOR}.num_layers"),
    (f"{GENERATOR}.hidden_dim", f"{GENERATOR}.ffn_dim"),
    (f"{GENERATOR}.early_fusion", f"{GENERATOR}.av_fusion"),
    (f"{GENERATOR}.av_fusion.hidden_dim", f"{GENERATOR}.av_fusion.ffn_dim"),
    ("model.head.transformer.encoder.layer.dim", "model.head.transformer.encoder.layer.embed_dim"),
    ("model.head.transformer.decoder.layer.dim", "model.head.transformer.decoder.layer.embed_dim"),
    ("loss.loss_type", "loss.mask_loss"),
    ("loss.weight_dict.iou_loss", "loss.mask_weight"),
    ("loss.weight_dict.mix_loss", "loss.mix_weight"),
    ("process.num_works", "process.num_workers"),
)
TYPES = {  # key -> published type name -> ours
    "model.head.type": {"AVSegHead": "SegHead"},
    f"{GENERATOR}.av_fusion.type": {"MTA": "AVFusion"},
    "model.head.fusion_block.type": {"CSA": "DualAttentionMoE"},
    "model.head.transformer.type": {"AVSTransformer": "Transformer"},
    **{f"dataset.{split}.type": {"V2Dataset": "AVSSDataset"} for split in SPLITS},
}
WEIGHTS = ("iou_loss", "mix_loss")


def translate(cfg: MutableMapping[str, Any]) -> None:
    """Rename published keys and types of a config in place; a config in our terms stays as it is.

    Raises:
        ConfigError: a key is given under both names, or says something that this project cannot do.
    """
    _check_loss(cfg)
    for published, ours in _renames(cfg):
        _move(cfg, published, ours)
    for key, names in TYPES.items():
        section = _section(cfg, key)
        if section is not None and isinstance(section.get("type"), str) and section["type"] in names:
            section["type"] = names[section["type"]]
    loss = _section(cfg, "loss.weight_dict")
    if loss is not None and loss.get("weight_dict") == {}:
        del loss["weight_dict"]
    _settle_model(cfg)


def translate_key(key: str, cfg: Mapping[str, Any]) -> str:
    """The key of an override in our terms: `model.vggish.pca` -> `model.audio_encoder.pca`."""
    for published, ours in _renames(cfg):
        if key == published or key.startswith(f"{published}."):
            key = ours + key[len(published) :]
    return key


def _renames(cfg: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield from KEYS
    for split in SPLITS:
        where = f"dataset.{split}"
        yield f"{where}.num_class", f"{where}.num_classes"
        # mask_num is the number of frames in the semantic data set, and that of labelled frames in the binary ones.
        section = _section(cfg, f"{where}.type")
        semantic = section is not None and section.get("type") in ("V2Dataset", "AVSSDataset")
        yield f"{where}.mask_num", f"{where}.{'num_frames' if semantic else 'num_labelled_frames'}"
        yield f"{where}.frames_per_clip", f"{where}.num_frames"


def _section(cfg: Mapping[str, Any], key: str) -> MutableMapping[str, Any] | None:
    """The dictionary that holds the last part of a dotted key; None where the config has none."""
    node: Any = cfg
    for part in key.split(".")[:-1]:
        node = node.get(part) if isinstance(node, Mapping) or hasattr(node, "get") else None
        if not isinstance(node, MutableMapping):
            return None
    return node


def _move(cfg: MutableMapping[str, Any], published: str, ours: str) -> None:
    source, old = _section(cfg, published), published.rpartition(".")[2]
    if source is None or old not in source:
        return
    parent, _, name = ours.rpartition(".")
    if _section(cfg, ours) is None:  # the section of the new key need not exist yet
        outer = _section(cfg, parent)
        if outer is None:
            return
        outer[parent.rpartition(".")[2]] = ConfigDict()
    target = _section(cfg, ours)
    assert target is not None
    value = source.pop(old)
    if isinstance(target.get(name), Mapping) and isinstance(value, Mapping):
        target[name] = ConfigDict({**target[name], **value})
    elif name in target and target[name] != value:
        raise ConfigError(f"{published}={value!r} and {ours}={target[name]!r} are one key under two names: give one.")
    else:
        target[name] = value


def _check_loss(cfg: Mapping[str, Any]) -> None:
    section = _section(cfg, "loss.weight_dict")
    if section is None or "weight_dict" not in section:
        return
    weights = section["weight_dict"]
    if not isinstance(weights, Mapping):
        raise ConfigError(f"loss.weight_dict={weights!r} must be a dictionary with the keys {', '.join(WEIGHTS)}.")
    if "mask_loss" in weights and "mix_loss" not in weights:
        raise ConfigError("loss.weight_dict.mask_loss is an early AVSegFormer's name of mix_loss: write mix_loss.")
    for key in weights:
        if key not in WEIGHTS:
            raise ConfigError(f"loss.weight_dict.{key} is not a loss: known are {', '.join(WEIGHTS)}.")


def _settle_model(cfg: MutableMapping[str, Any]) -> None:
    """Published keys without a counterpart: no neck exists, two keys freeze VGGish, one chooses the source of sound."""
    model = cfg.get("model")
    if not isinstance(model, MutableMapping):
        return
    if model.pop("neck", None) is not None:
        raise ConfigError("model.neck must be None: there is no network between backbone and head.")
    encoder = model.get("audio_encoder")
    if not model.pop("freeze_audio_backbone", True):
        model["audio_encoder"] = encoder = ConfigDict({**(encoder or {}), "frozen": False})
    if isinstance(encoder, MutableMapping) and encoder.pop("preprocess_audio_to_log_mel", False):
        for split in SPLITS:
            section = _section(cfg, f"dataset.{split}.audio")
            if section is not None:
                section.setdefault("audio", "wav")
