"""Audio encoders of Hugging Face's transformers by the name of a model: AST, CLAP's audio tower, and others."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from utils.errors import CheckpointError, ConfigError
from utils.optional import import_optional
from utils.registry import MODELS


@MODELS.register_module()
class TransformersAudio(nn.Module):
    """One embedding, or several tokens, per second of sound; zeros for digital silence.

    The network is built from the model's configuration, with random weights; `audio_encoder.weights='transformers'`
    loads the model's own. Input are the features of its own feature extractor, see dataloader/transformers_features.py.

    Args:
        name: of a model on the hub, for example 'MIT/ast-finetuned-audioset-10-10-0.4593' or
            'laion/clap-htsat-unfused', or its folder.
        num_tokens: audio tokens per second: 1 is the mean of the network's last hidden states; more are means of as
            many groups of successive states.
        frozen: keep the weights as they are, and record no gradient.
        audio_dim: size of the embedding; the network's hidden size, which is taken where it is left out.

    Attributes:
        front_end: 'transformers:NAME'.

    Raises:
        ConfigError: transformers is not installed, the model cannot be found or has no audio network, or sizes differ.
    """

    def __init__(self, name: str, num_tokens: int = 1, frozen: bool = True, audio_dim: int | None = None) -> None:
        super().__init__()
        if not isinstance(num_tokens, int) or num_tokens < 1:
            raise ConfigError(f"model.audio_encoder.num_tokens={num_tokens!r} must be a whole number above 0.")
        self.name = name
        self._class, config = _audio_network(name)
        self.network: nn.Module = self._class(config)
        self.audio_dim = int(config.hidden_size)
        if audio_dim not in (None, self.audio_dim):
            raise ConfigError(
                f"model.audio_dim={audio_dim}, but {name} has embeddings of {self.audio_dim} numbers: "
                f"set model.audio_dim={self.audio_dim}."
            )
        self.num_tokens = num_tokens
        self.frozen = frozen
        self.front_end = self.front_end_of({"name": name})
        forward = inspect.signature(self.network.forward).parameters
        self._input = next(key for key in ("input_values", "input_features") if key in forward)
        if frozen:
            self.requires_grad_(False)

    @staticmethod
    def front_end_of(options: Any) -> str:
        """The front end that the options of a config ask of the data sets."""
        return f"transformers:{options.get('name', '')}"

    def load_own_weights(self) -> None:
        """Load the model's pretrained weights, from the hub or its folder.

        Raises:
            CheckpointError: they cannot be had.
        """
        try:
            network = self._class.from_pretrained(self.name)
        except (OSError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"model.audio_encoder.weights='transformers': {self.name} was not loaded ({reason}); fetch it on a "
                f"machine with network (huggingface-cli download {self.name} --local-dir FOLDER), and give "
                "model.audio_encoder.name=FOLDER."
            ) from error
        self.network.load_state_dict(network.state_dict())

    def train(self, mode: bool = True) -> "TransformersAudio":
        """A frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)

    def forward(self, features: Tensor) -> Tensor:
        """Features of the model's extractor (N, ...) -> embeddings (N, D), or tokens (N, num_tokens, D)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = self.network(**{self._input: features}).last_hidden_state
            states = states if states.dim() == 3 else states.flatten(2).transpose(1, 2)  # (N, states, D)
            tokens = F.adaptive_avg_pool1d(states.transpose(1, 2), self.num_tokens).transpose(1, 2)
            # The front end writes zeros for silence, and for nothing else.
            silent = (features == 0).flatten(1).all(dim=1)
            tokens = tokens.masked_fill(silent[:, None, None], 0.0)
            return tokens[:, 0] if self.num_tokens == 1 else tokens


def _audio_network(name: str) -> tuple[Any, Any]:
    """Class and configuration of a model's audio network."""
    transformers = import_optional("transformers", "model.audio_encoder.type='TransformersAudio'")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"model.audio_encoder.name={name!r} was not found ({reason})") from error
    if hasattr(config, "audio_config"):  # CLAP and its like: text beside audio
        if getattr(config.audio_config, "enable_fusion", False):
            raise ConfigError(
                f"model.audio_encoder.name={name!r} fuses crops of long sounds, which seconds are not: take its "
                "unfused sibling, for example 'laion/clap-htsat-unfused'."
            )
        config = config.audio_config
        network = getattr(transformers, type(config).__name__.removesuffix("Config") + "Model", None)
    else:
        network = transformers.MODEL_MAPPING.get(type(config), None)
    parameters = inspect.signature(network.forward).parameters if network is not None else {}
    if not {"input_values", "input_features"} & set(parameters) or not hasattr(config, "hidden_size"):
        raise ConfigError(f"model.audio_encoder.name={name!r} ({type(config).__name__}) is not an audio encoder.")
    return network, config
