"""A model with a memory: its logits are adapted, and what it reads is remembered, as long as a `with` block lasts.

    with mbpa_lm.adapt(model, memory):
        model.generate(**tokenizer("The new pump is called", return_tensors="pt"))

Hooks see the hidden states and replace the logits of `model(...)`; `model.generate` is told apart, so that prompts and
generated text can be treated differently. After the block the model is what it was.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mbpa_lm.errors import ConfigError, ModelError
from mbpa_lm.integrations.generation import Generation, Write
from mbpa_lm.integrations.memory import Memory
from mbpa_lm.integrations.reading import Piece, RowReader
from mbpa_lm.models.fingerprint import model_fingerprint

CACHES = {"cache", "past_key_values", "cache_params"}
"""Names by which models take what they have read before."""


@contextmanager
def adapt(model: Any, memory: Memory, write: Write = "prompts") -> Iterator["Adapter"]:
    """Give a model a memory.

    Args: write: what is remembered of what the model reads: nothing; prompts, which is all that is given to `model(...)` and to
    `generate`; or everything, generated text too. Raises ModelError where the memory is of another model, or another memory is
    in use.
    """
    if write not in get_args(Write):
        raise ConfigError(f"write is {write!r}, but must be one of {', '.join(get_args(Write))}")
    if not isinstance(memory, Memory):
        raise ConfigError(f"the memory is a {type(memory).__name__}; make one with Memory(model), or open one with Memory.load")
    if memory.language_model.causal_lm is not model:
        raise ModelError(f"the memory was made for another {type(model).__name__}: Memory(model)")
    if model_fingerprint(model) != memory.identity.model:
        raise ModelError(f"the weights of this {type(model).__name__} have changed since its memory was made: Memory(model)")
    if write != "nothing" and not CACHES & inspect.signature(model.forward).parameters.keys():
        raise ModelError(
            f"{type(model).__name__} takes no cache that would say what it has read before, so that nothing can be remembered "
            f"rightly: write='nothing'"
        )
    if "generate" in vars(model):
        raise ModelError(f"this {type(model).__name__} is adapted already; leave the other block first")
    adapter = Adapter(model, memory, write)
    hooks = [
        memory.language_model.head.base.register_forward_hook(adapter.after_base),
        model.register_forward_pre_hook(adapter.before, with_kwargs=True),
        model.register_forward_hook(adapter.after, with_kwargs=True),
    ]
    model.generate = adapter.generate
    try:
        yield adapter
    finally:
        del model.generate
        for hook in hooks:
            hook.remove()


def _by_name(signature: inspect.Signature, inputs: tuple[Any, ...], positional_and_named: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by their names."""
    named = dict(signature.bind_partial(*inputs, **positional_and_named).arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named |= named.pop(parameter.name, {})
    return named


@dataclass(frozen=True)
class _Call:
    """A call of `model(...)` that is under way."""

    tokens_BT: Tensor | None
    mask_BT: Tensor | None  # bool
    first_column: int  # of these tokens in their texts
    named: dict[str, Any]  # all that it was given


@dataclass
class _Texts:
    """What is being read, a text in each row of a batch."""

    rows: list[RowReader]
    ended: list[bool]  # by a token that ends a text
    columns: int = 0  # that have been read


class Adapter:
    """What the hooks do; `write` may be changed while they do it."""

    def __init__(self, model: Any, memory: Memory, write: Write) -> None:
        self._model, self._memory, self.write = model, memory, write
        self._generate, self._signature = model.generate, inspect.signature(model.forward)
        self._generation: Generation | None = None
        self._call: _Call | None = None
        self._hidden_states_BTd: Tensor | None = None
        self._texts = _Texts([], [])
        self._by_cache: WeakKeyDictionary[Any, _Texts] = WeakKeyDictionary()  # texts may be read in turns

    def before(self, model: Any, inputs: tuple[Any, ...], positional_and_named: dict[str, Any]) -> None:
        """Note what is about to be read."""
        named = _by_name(self._signature, inputs, positional_and_named)
        tokens = named.get("input_ids")
        if tokens is None and self.write != "nothing":
            raise ModelError("inputs_embeds has no tokens that could be remembered; adapt(..., write='nothing') reads them")
        cache = next((named[name] for name in CACHES if named.get(name) is not None), None)
        size = tokens if tokens is not None else named["inputs_embeds"]
        first = self._read_before(cache)
        mask = named.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            mask = None if self._generation is None else self._generation.mask_of(first + size.shape[1])
        columns = size.shape[1]
        if mask is not None:
            mask = (mask[:, first : first + columns] if mask.shape[1] >= first + columns else mask[:, -columns:]).bool()
        known = self._by_cache.get(cache) if first else None
        if known is None or len(known.rows) != size.shape[0]:
            known = _Texts([RowReader(self._memory, row) for row in range(size.shape[0])], [False] * size.shape[0])
            for row in known.rows:
                row.begin()
        self._texts, self._call = known, _Call(tokens, mask, first, named)

    def after_base(self, base: Any, inputs: Any, output: Any) -> None:
        """Note the hidden states."""
        self._hidden_states_BTd = output[0]

    @torch.no_grad()
    def after(self, model: Any, inputs: tuple[Any, ...], positional_and_named: dict[str, Any], output: Any) -> Any:
        """Return the output with adapted logits, and the loss of those where there are labels."""
        call, hidden_states, self._call, self._hidden_states_BTd = self._call, self._hidden_states_BTd, None, None
        if call is None or hidden_states is None:
            raise ModelError(
                f"the hidden states of this {type(model).__name__} were not seen: it was compiled before this block, or is "
                f"called from two threads; compile it inside the block, and call it from one thread"
            )
        self._texts.columns = call.first_column + hidden_states.shape[1]
        parts = output.values() if hasattr(output, "values") else output
        cache = next((part for part in parts if hasattr(part, "get_seq_length")), None)
        if cache is not None:
            self._by_cache[cache] = self._texts
        named = call.named
        labels = named.get("labels")
        place = 0 if labels is None else 1
        logits = output["logits"] if hasattr(output, "keys") else output[place]
        with torch.autocast(hidden_states.device.type, enabled=False):
            adapted = self._adapted(call, hidden_states, logits, named.get("logits_to_keep", 0))
        loss = None
        if labels is not None:
            more = {name: named[name] for name in ("num_items_in_batch", "shift_labels", "ignore_index") if name in named}
            size = self._memory.language_model.vocabulary_size
            loss = model.loss_function(logits=adapted, labels=labels, vocab_size=size, **more)
            of_router = getattr(output, "aux_loss", None)
            if of_router is not None:
                loss = loss + model.router_aux_loss_coef * of_router.to(loss.device)
        if hasattr(output, "keys"):
            output["logits"] = adapted
            if loss is not None:
                output["loss"] = loss
            return output
        return (*(() if loss is None else (loss,)), adapted, *output[place + 1 :])

    def end(self, tokens_B: Tensor) -> None:
        """Say which token follows each text that was read last, for the last position to be remembered."""
        for row, token in zip(self._texts.rows, tokens_B, strict=True):
            row.end(token[None])

    def generate(self, *inputs: Any, **named: Any) -> Any:
        """Do what the model's own `generate` does; raises ModelError for ways that cannot be remembered."""
        if self._generation is not None:
            raise ModelError(
                "generate was called inside generate (assistant_model is the model itself?); give another assistant"
            )
        self._generation = Generation.of(self._model, inputs, named, self.write)
        try:
            return self._generate(*inputs, **{"disable_compile": True, **named})  # a compiled model would pass the hooks by
        finally:
            self._generation = None

    def _read_before(self, cache: Any) -> int:
        """Return how many tokens of its texts the model has read before this call."""
        if cache is None:
            return 0
        try:
            return int(cache.get_seq_length())
        except ValueError:  # of a recurrent model, which does not count
            known = self._by_cache.get(cache)
            return 0 if known is None else known.columns

    def _adapted(self, call: _Call, hidden_states_BTd: Tensor, logits_BkV: Tensor, kept: int | Tensor) -> Tensor:
        rows, columns = hidden_states_BTd.shape[:2]
        if isinstance(kept, Tensor) and kept.ndim > 1:
            raise ModelError("logits_to_keep with places for each row is not supported; give one list of places for all rows")
        places_k = torch.arange(columns, device=logits_BkV.device)
        places_k = places_k[kept.to(places_k)] if isinstance(kept, Tensor) else places_k[-kept:] if kept else places_k
        order_k = places_k.argsort()
        keys_BTd = self._memory.language_model.head.keys(hidden_states_BTd).to(logits_BkV.device)
        adapted_BkV = logits_BkV.detach().clone() if logits_BkV.requires_grad else logits_BkV
        for row in range(rows):
            valid_T = torch.ones_like(keys_BTd[row, :, 0], dtype=torch.bool)
            if call.mask_BT is not None:
                valid_T = call.mask_BT[row].to(valid_T)
            valid_n = valid_T.nonzero()[:, 0]
            tokens_n = valid_n.new_zeros(len(valid_n)) if call.tokens_BT is None else call.tokens_BT[row].to(valid_n)[valid_n]
            stored_n = self._stored(row, call.first_column + valid_n, tokens_n)
            wanted = order_k[valid_T[places_k[order_k]]]
            is_all = torch.equal(wanted, torch.arange(logits_BkV.shape[1], device=wanted.device))
            logits_kV = adapted_BkV[row] if is_all else adapted_BkV[row, wanted]
            self._texts.rows[row].read(
                Piece(tokens_n, keys_BTd[row, valid_n], stored_n, logits_kV, torch.searchsorted(valid_n, places_k[wanted]))
            )
            if not is_all:
                adapted_BkV[row, wanted] = logits_kV
        return adapted_BkV

    def _stored(self, row: int, columns_n: Tensor, tokens_n: Tensor) -> Tensor:
        """Return which positions (n,) of a row are to be remembered."""
        generation = self._generation
        stored_n = torch.full_like(tokens_n, self.write != "nothing", dtype=torch.bool)
        if generation is None:
            return stored_n
        if self.write == "prompts":
            stored_n &= columns_n + 1 < generation.prompt_columns
        if self._memory.rows == "shared" and row % generation.copies:
            stored_n[:] = False  # the same prompt is in another row
        for place in (columns_n >= generation.prompt_columns).nonzero()[:, 0].tolist():
            self._texts.ended[row] |= int(tokens_n[place]) in generation.ends
            stored_n[place] &= not self._texts.ended[row]
        return stored_n
