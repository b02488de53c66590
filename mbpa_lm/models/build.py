"""A model from its configuration."""

from collections.abc import Collection

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


def blocks_of(model: Model) -> Collection[str]:
    """Return the names of the classes of a model's repeated blocks, each of which is best kept in one piece."""
    names: Collection[str] = getattr(getattr(model, "causal_lm", None), "_no_split_modules", None) or ()
    return names
