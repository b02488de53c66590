"""A model from its configuration."""

from collections.abc import Collection

import torch
from torch import Tensor

from mbpa_lm.config import ModelConfig
from mbpa_lm.errors import ConfigError
from mbpa_lm.models.lstm import LSTMLanguageModel
from mbpa_lm.models.transformer import TransformerLanguageModel, check_settings

Model = LSTMLanguageModel | TransformerLanguageModel


def check_model(config: ModelConfig) -> None:
    """Raise ConfigError for settings that can be known to be wrong before any text is read."""
    if config.pretrained:
        raise ConfigError(
            f"model.pretrained {config.pretrained!r} is evaluated, not trained here; leave it out, or use evaluate.py"
        )
    if config.kind == "transformer":
        check_settings(config)


def build_model(config: ModelConfig, vocabulary_size: int) -> Model:
    """Build an untrained model; raises ConfigError where the settings do not make one."""
    if config.kind == "lstm":
        return LSTMLanguageModel(config, vocabulary_size)
    if config.kind == "transformer":
        return TransformerLanguageModel.build(config, vocabulary_size)
    raise ConfigError(f"model.kind {config.kind!r} is none of lstm, transformer")


def check_sizes(config: ModelConfig, vocabulary_size: int, weights: Collection[Tensor]) -> None:
    """Raise ConfigError where a model of this configuration has not just as many numbers as the weights that it is to be given.

    Nothing of the size that the configuration claims is allocated to find out.
    """
    numbers = sum(weight.numel() for weight in weights)
    claimed = [vocabulary_size, config.hidden_size, config.embedding_size, *config.settings.values()]
    if any(isinstance(size, int) and size > numbers for size in claimed) or config.layers > len(weights):
        raise ConfigError(f"the configuration claims a larger model than {numbers:,} weights make")
    with torch.device("meta"):
        if config.kind == "lstm":
            parameters: list[Tensor] = list(LSTMLanguageModel(config, vocabulary_size).parameters())
        else:
            parameters = TransformerLanguageModel.parameters_of(config, vocabulary_size, most_layers=len(weights))
    found = sum(parameter.numel() for parameter in parameters)
    if found != numbers:
        raise ConfigError(f"the configuration is of a model of {found:,} weights, but there are {numbers:,}")


def blocks_of(model: Model) -> Collection[str]:
    """Return the names of the classes of a model's repeated blocks, each of which is best kept in one piece."""
    names: Collection[str] = getattr(getattr(model, "causal_lm", None), "_no_split_modules", None) or ()
    return names
