"""A model from its configuration."""

from mbpa_lm.config import ModelConfig
from mbpa_lm.models.lstm import LSTMLanguageModel
from mbpa_lm.models.transformer import TransformerLanguageModel

Model = LSTMLanguageModel | TransformerLanguageModel


def build_model(config: ModelConfig, vocabulary_size: int) -> Model:
    """Build an untrained model; raises ConfigError where the settings do not make one."""
    if config.kind == "lstm":
        return LSTMLanguageModel(config, vocabulary_size)
    return TransformerLanguageModel(config, vocabulary_size)
