"""Pretrained causal language models of transformers, from a folder or from the hub, with their tokenizers."""

from typing import Any

import torch
from safetensors import SafetensorError

from mbpa_lm.config import ModelConfig
from mbpa_lm.data.tokenizers import HuggingFaceTokenizer
from mbpa_lm.errors import ConfigError, ModelError, reason
from mbpa_lm.models.head import positions_of
from mbpa_lm.models.transformer import TransformerLanguageModel

LONGEST_CONTEXT = 1024
"""Tokens of a block, or of a document that is read at once, where the model does not say how many positions it has."""


def load_pretrained(config: ModelConfig, device: torch.device) -> tuple[TransformerLanguageModel, HuggingFaceTokenizer]:
    """Return the model that `model.pretrained` names, on the device or as `model.device_map` says, and its tokenizer.

    Nothing in its files is executed. Raises ConfigError where it cannot be loaded, or where its output layer is of a kind that
    cannot be adapted: quantized, cut over several devices, or no linear layer.
    """
    from transformers import AutoModelForCausalLM

    name = config.pretrained
    assert name is not None
    placed: dict[str, Any] = {} if config.device_map is None else {"device_map": config.device_map}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=config.dtype or "auto", trust_remote_code=False, use_safetensors=True, **placed
        )
        model = (model if placed else model.to(device)).eval()
        context = min(config.context_length, positions_of(model) or LONGEST_CONTEXT)
        language_model = TransformerLanguageModel(model, context, min(config.context_overlap, context // 2)).eval()
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError, ModelError) as error:
        raise ConfigError(f"model.pretrained {name!r} could not be loaded: {reason(error)}") from None
    tokenizer = HuggingFaceTokenizer.load(name)
    if tokenizer.vocabulary_size > language_model.vocabulary_size:
        raise ConfigError(
            f"model.pretrained {name!r} has {language_model.vocabulary_size:,} words, but its tokenizer knows "
            f"{tokenizer.vocabulary_size:,}; it is another model's"
        )
    return language_model, tokenizer
