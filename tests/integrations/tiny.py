"""Tiny causal language models of many architectures, saved and loaded as pretrained ones are."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

V = 97
LIKE_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "llama": {**LIKE_LLAMA, "num_key_value_heads": 1},
    "qwen2": {**LIKE_LLAMA, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "gemma2": {**LIKE_LLAMA, "num_key_value_heads": 1, "head_dim": 16, "final_logit_softcapping": 3.0, "sliding_window": 16},
    "gpt_neox": LIKE_LLAMA,
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "cohere": LIKE_LLAMA,
    "granite": {**LIKE_LLAMA, "logits_scaling": 4.0},
    "opt": {**LIKE_LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 16},
    "phi": LIKE_LLAMA,  # a bias in the output layer
}
REFUSED = {
    "bert": ({**LIKE_LLAMA, "is_decoder": True}, "BertLMHeadModel changes hidden states between its last layer and its output"),
    "t5gemma": ({}, "T5Gemma"),
}


@cache
def folder_of(architecture: str, root: Path) -> Path:
    """Save a model with weights large enough for predictions that differ, once."""
    torch.manual_seed(0)
    special = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **special, **ARCHITECTURES[architecture]))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8)
    model.save_pretrained(root / architecture)
    return root / architecture


def load(architecture: str, root: Path) -> Any:
    """Load a model as a user does."""
    return AutoModelForCausalLM.from_pretrained(folder_of(architecture, root)).eval()


def tokens(count: int, seed: int = 0) -> torch.Tensor:
    """Return a row (1, count) of random ids, none of them special."""
    return torch.randint(3, V, (1, count), generator=torch.Generator().manual_seed(seed))
