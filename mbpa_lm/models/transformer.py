"""Any causal language model of the transformers library, built from its configuration.

A stream is read in blocks of `context_length` tokens. Inside a block, keys and values are cached, so a prediction
costs one token's work; when a block is full, the next one starts by reading its last `context_overlap` tokens again.
Where blocks begin depends on the position in the stream alone, never on how the stream was cut into pieces. A model that
does not give the same in pieces as at once (it takes no such cache, or forgets its own state) reads its block again from
the block's beginning for every piece.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mbpa_lm.config import ModelConfig
from mbpa_lm.config.checks import require
from mbpa_lm.errors import ConfigError, ModelError, did_you_mean, reason
from mbpa_lm.models.base import ModelOutput, OutputLayer
from mbpa_lm.models.head import find_head, positions_of, reads_in_pieces


@dataclass
class BlockState:
    """The block being read: its tokens so far, and the keys and values of all its layers."""

    tokens: Tensor  # (B, n) with n <= context_length
    cache: Any  # transformers.Cache; None of a model that reads its block again
    is_used: bool = False  # whether it has been read on from: the cache is not that of the tokens any more


def check_settings(config: ModelConfig) -> None:
    """Refuse an architecture that the library does not have, or a setting that the architecture does not have."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = did_you_mean(config.architecture, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ConfigError(f"model.architecture {config.architecture!r} is no causal language model of transformers; {hint}")
    defaults = CONFIG_MAPPING[config.architecture]()
    valid = {*defaults.to_dict(), *defaults.attribute_map}
    for name in config.settings:
        if name not in valid:
            raise ConfigError(f"model.settings.{name} does not exist for {config.architecture}; {did_you_mean(name, valid)}")
    for name, value in config.settings.items():
        size = isinstance(getattr(defaults, name, None), int) and not isinstance(value, bool)
        require(f"model.settings.{name}", value, not (size and isinstance(value, int) and value < 0), "0 or more")
    chosen = "left out: the tokenizer says how many tokens there are (tokenizer.vocabulary_size)"
    require("model.settings.vocab_size", config.settings.get("vocab_size"), "vocab_size" not in config.settings, chosen)


class TransformerLanguageModel(nn.Module):
    """A causal LM of the transformers library behind this package's protocol."""

    carries_state_in_training = False

    def __init__(self, causal_lm: Any, context_length: int, context_overlap: int) -> None:
        """Raises ModelError for a model whose output layer cannot be adapted: see `head.find_head`."""
        super().__init__()
        self.causal_lm = causal_lm
        self.head = find_head(causal_lm)
        self._context_length, self._context_overlap = context_length, context_overlap
        self.vocabulary_size, self.hidden_size = self.output_layer().weight.shape
        self._takes_cache = reads_in_pieces(causal_lm, self.head)

    @classmethod
    def build(cls, config: ModelConfig, vocabulary_size: int) -> "TransformerLanguageModel":
        """Build an untrained one; raises ConfigError where settings make none, ModelError where it cannot be trained."""
        causal_lm = _from_configuration(config, vocabulary_size)
        longest = positions_of(causal_lm)
        if longest is not None and longest < config.context_length:
            raise ConfigError(
                f"model.context_length is {config.context_length}, but model.settings give {config.architecture} "
                f"only {longest} positions"
            )
        try:
            model = cls(causal_lm, config.context_length, config.context_overlap)
        except ModelError as error:
            raise ModelError(f"model.architecture {config.architecture!r}: {error}") from None
        if model.head.scale != 1 or model.head.softcap is not None:
            raise ModelError(
                f"model.architecture {config.architecture!r} does more to its logits than a linear layer; train another one"
            )
        return model

    @staticmethod
    def parameters_of(config: ModelConfig, vocabulary_size: int, most_layers: int) -> list[Tensor]:
        """Return the parameters that a model would have; raises ConfigError where it has too many layers, before it is made."""
        return list(_from_configuration(config, vocabulary_size, most_layers).parameters())

    def output_layer(self) -> OutputLayer:
        return self.head.layer()

    def forward(self, tokens: Tensor, state: BlockState | None = None) -> ModelOutput:
        if self.training:
            hidden_states = self.head.keys(self.head.base(input_ids=tokens, use_cache=False).last_hidden_state)
            return ModelOutput(hidden_states, None, tokens.new_zeros((), dtype=torch.float32))
        pieces = []
        while tokens.shape[1] > 0:
            state = self._room(state, tokens)
            count = min(tokens.shape[1], self._context_length - state.tokens.shape[1])
            hidden_states, state = self._read(state, tokens[:, :count])
            pieces.append(hidden_states)
            tokens = tokens[:, count:]
        return ModelOutput(torch.cat(pieces, dim=1), state, tokens.new_zeros((), dtype=torch.float32))

    def _room(self, state: BlockState | None, tokens: Tensor) -> BlockState:
        """Return a block with room for a token: the current one, or a new one that has read the overlap."""
        if state is not None and state.tokens.shape[1] < self._context_length:
            return state
        empty = BlockState(tokens[:, :0], self._empty_cache())
        if state is None or self._context_overlap == 0:
            return empty
        return self._read(empty, state.tokens[:, -self._context_overlap :])[1]

    def _read(self, state: BlockState, tokens: Tensor) -> tuple[Tensor, BlockState]:
        every, cache = torch.cat([state.tokens, tokens], dim=1), state.cache
        if not self._takes_cache:
            hidden_states = self.head.base(input_ids=every, use_cache=False).last_hidden_state
            return self.head.keys(hidden_states[:, -tokens.shape[1] :]), BlockState(every, None)
        if state.is_used:  # by a call that failed, for want of memory
            cache = self._empty_cache()
            if state.tokens.shape[1]:
                self.head.base(input_ids=state.tokens, cache=cache, use_cache=True)
        state.is_used = True
        output = self.head.base(input_ids=tokens, cache=cache, use_cache=True)
        return self.head.keys(output.last_hidden_state), BlockState(every, cache)

    def _empty_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.causal_lm.config) if self._takes_cache else None


def _from_configuration(config: ModelConfig, vocabulary_size: int, most_layers: int | None = None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        no_special_tokens = {"bos_token_id": None, "eos_token_id": None}  # the defaults are ids of other vocabularies
        settings = AutoConfig.for_model(
            config.architecture, **{"vocab_size": vocabulary_size, **no_special_tokens, **config.settings}
        )
        if most_layers is not None and settings.num_hidden_layers > most_layers:
            raise ValueError(f"{settings.num_hidden_layers} layers of {most_layers} weights")
        return AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # each architecture has its own ways to reject a value
        raise ConfigError(f"model.architecture {config.architecture!r} with model.settings: {reason(error)}") from None
