"""The perplexity of texts under a causal language model, with or without a memory, as others define it.

    found = perplexity(model, tokenizer, texts)                          # windows side by side, as lm-evaluation-harness
    found = perplexity(model, tokenizer, texts, stride=512)              # overlapping windows, as the transformers guide
    found = perplexity(model, tokenizer, texts, memory=memory)           # the texts are remembered as they are read

Words are what white space separates, as lm-evaluation-harness counts them, bytes are those of UTF-8.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from mbpa_lm.errors import ConfigError
from mbpa_lm.integrations.adapting import adapt
from mbpa_lm.integrations.arguments import check_parts, check_text, listed
from mbpa_lm.integrations.generation import Write
from mbpa_lm.integrations.memory import Memory
from mbpa_lm.models.head import positions_of

LONGEST_WINDOW = 2048
"""Tokens of a window where the model has any number of positions, as in lm-evaluation-harness."""


@dataclass(frozen=True)
class Perplexity:
    """The loss of all texts, and what it may be divided by."""

    nats: float
    tokens: int
    words: int
    bytes: int

    @property
    def per_token(self) -> float:
        """Return exp of the loss of a token."""
        return math.exp(self.nats / self.tokens)

    @property
    def per_word(self) -> float:
        """Return `word_perplexity` of lm-evaluation-harness."""
        return math.exp(self.nats / self.words)

    @property
    def per_byte(self) -> float:
        """Return `byte_perplexity` of lm-evaluation-harness."""
        return math.exp(self.nats / self.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Return `bits_per_byte` of lm-evaluation-harness."""
        return self.nats / self.bytes / math.log(2)


@dataclass(frozen=True)
class _Window:
    """Tokens that are predicted, and those before them that are only read."""

    context: list[int]  # at least one
    scored: list[int]


@torch.no_grad()
def perplexity(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    window: int | None = None,
    stride: int | None = None,
    memory: Memory | None = None,
    write: Write = "prompts",
) -> Perplexity:
    """Return the perplexity of texts, which are read one after another.

    Args: window: most tokens that the model sees at once, None for as many as it has positions; stride: how far windows are
    apart, the first token of a text not being scored; None: each begins with the last token of the one before, the first with
    the tokenizer's own first token, and all are scored; memory, which is adapted to, and remembers what `write` says; what is
    read again as context is remembered once. Raises ConfigError for an impossible window.
    """
    check_parts(model, tokenizer)
    if memory is None and "generate" in vars(model):
        raise ConfigError("the model is adapted now; call perplexity outside of the with block, with memory=")
    if tokenizer is None:
        raise ConfigError("perplexity needs the model's tokenizer: perplexity(model, tokenizer, texts)")
    texts = listed(texts, "perplexity")
    for text in texts:
        check_text(text)
    longest = positions_of(model) or LONGEST_WINDOW
    size = longest if window is None else window
    if not isinstance(size, int) or not 2 <= size <= longest:
        raise ConfigError(f"window is {size!r}; it must be a whole number from 2 to {longest:,}, the positions of the model")
    if stride is not None and (not isinstance(stride, int) or not 1 <= stride <= size):
        raise ConfigError(f"stride is {stride!r}; it must be a whole number from 1 to {size:,}, the window")
    nats, tokens = 0.0, 0
    with nullcontext() if memory is None else adapt(model, memory, write) as adapted:
        for text in texts:
            ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            for each in _side_by_side(ids, _first_token(tokenizer), size) if stride is None else _sliding(ids, size, stride):
                nats += _loss(model, each, adapted, write)
                tokens += len(each.scored)
    if not tokens:
        raise ConfigError("the texts hold no token that could be scored; with a stride, the first of each text is not")
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    return Perplexity(nats, tokens, words, sum(len(text.encode()) for text in texts))


def _first_token(tokenizer: Any) -> int:
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ConfigError("the tokenizer has neither a first nor a last token for a text to begin with; give a stride")


def _side_by_side(ids: list[int], first: int, size: int) -> Iterator[_Window]:
    """Cut a text as `get_rolling_token_windows` of lm-evaluation-harness does, with a context of one token.

    The last window begins so early that it is as long as the others.
    """
    for begin in range(0, len(ids), size):
        end = min(begin + size, len(ids))
        context = ids[max(0, end - size - 1) : begin] if begin else [first]
        yield _Window(context, ids[begin:end])


def _sliding(ids: list[int], size: int, stride: int) -> Iterator[_Window]:
    """Cut a text as the guide "Perplexity of fixed-length models" of transformers does."""
    before = 1
    for begin in range(0, len(ids), stride):
        end = min(begin + size, len(ids))
        scored = max(before, begin + 1)  # the first token of a window that has no context is not predicted
        if end > scored:
            yield _Window(ids[begin:scored], ids[scored:end])
        before = end
        if end == len(ids):
            break


def _loss(model: Any, window: _Window, adapted: Any, write: Write) -> float:
    """Return the loss of the scored tokens; what is only read is not remembered."""
    every = torch.tensor([window.context + window.scored], device=model.device)
    ids = every[:, :-1]
    known, kept = len(window.context) - 1, {}
    if known:
        if adapted is not None:
            adapted.write = "nothing"
        kept = {"cache": model(ids[:, :known], use_cache=True, logits_to_keep=1).cache}
    if adapted is not None:
        adapted.write = write
    logits = model(ids[:, known:], use_cache=bool(known), **kept).logits[0].float()
    if adapted is not None:
        adapted.end(every[:, -1])
    return float(torch.nn.functional.cross_entropy(logits, every[0, known + 1 :], reduction="sum"))
