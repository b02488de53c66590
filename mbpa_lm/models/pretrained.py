"""Pretrained causal language models of transformers, from a folder or from the hub, with their tokenizers."""

import sys
from typing import Any

import torch
from safetensors import SafetensorError

from mbpa_lm.config import ModelConfig
from mbpa_lm.data.tokenizers import HuggingFaceTokenizer
from mbpa_lm.errors import DAMAGES, ConfigError, ModelError, reason
from mbpa_lm.models.head import positions_of
from mbpa_lm.models.transformer import TransformerLanguageModel
from mbpa_lm.system.progress import console

LONGEST_CONTEXT = 1024
"""Tokens of a block, or of a document that is read at once, where the model does not say how many positions it has."""


def load_pretrained(config: ModelConfig, device: torch.device) -> tuple[TransformerLanguageModel, HuggingFaceTokenizer]:
    """Return the model that `model.pretrained` names, on the device or as `model.device_map` says, and its tokenizer.

    Nothing in its files is executed. Raises ConfigError where it cannot be loaded, or lacks weights, and ModelError where its
    output layer is of a kind that cannot be adapted: quantized, cut over several devices, or no linear layer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():
        disable_progress_bar()
    name = config.pretrained
    assert name is not None
    placed: dict[str, Any] = {} if config.device_map is None else {"device_map": config.device_map}
    try:
        described = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if type(described) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ModelError(f"{described.model_type} is no causal language model of transformers; only such can have a memory")
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=config.dtype or "auto",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **placed,
        )
        _check_weights(loading)
        model = (model if placed else model.to(device)).eval()
        context = min(config.context_length, positions_of(model) or LONGEST_CONTEXT)
        language_model = TransformerLanguageModel(model, context, min(config.context_overlap, context // 2)).eval()
    except ModelError as error:
        raise ModelError(f"model.pretrained {name!r}: {error}") from None
    except (*DAMAGES, ImportError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"model.pretrained {name!r} could not be loaded: {reason(error)}") from None
    tokenizer = HuggingFaceTokenizer.load(name, "model.pretrained")
    if tokenizer.vocabulary_size > language_model.vocabulary_size:
        raise ConfigError(
            f"model.pretrained {name!r} has {language_model.vocabulary_size:,} words, but its tokenizer knows "
            f"{tokenizer.vocabulary_size:,}; it is another model's"
        )
    return language_model, tokenizer


def _check_weights(loading: dict[str, Any]) -> None:
    """Raise ValueError where the files lack weights, which would be made up; say what they hold beside the model's."""
    if loading["missing_keys"]:
        names = sorted(loading["missing_keys"])
        raise ValueError(f"its files lack {len(names)} weights of its config.json, {names[0]} among them")
    unused = sorted(loading["unexpected_keys"])
    if unused:
        console.print(f"{len(unused)} weights are not part of the model that config.json describes, {unused[0]} among them")
