"""What is given to the Python interface, looked at before it is used: each mistake is a line that says what to give."""

from collections.abc import Iterable, Mapping
from typing import Any

from mbpa_lm.errors import ConfigError, ModelError


def listed(texts: Any, function: str) -> list[Any]:
    """Return texts as a list; raises ConfigError for a single one, or for what is no list."""
    if isinstance(texts, str):
        raise ConfigError(f"{function} takes a list of texts: put the text into one, {function}([text])")
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise ConfigError(f"{function} takes a list of texts, and this is a {type(texts).__name__}")
    return list(texts)


def check_text(text: object) -> None:
    """Raise ConfigError for what is no text, or holds halves of characters, which no tokenizer takes."""
    if not isinstance(text, str):
        raise ConfigError(f"a text is a {type(text).__name__}; give it as str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"a text holds half a character (a lone surrogate) at {error.start}; read it as UTF-8") from None


def check_parts(model: Any, tokenizer: Any | None) -> None:
    """Raise ModelError or ConfigError for what is no model of transformers, or no tokenizer."""
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "config")):
        raise ModelError(
            f"a memory is made for a causal language model of transformers, and this is a {type(model).__name__}; load one "
            f"with AutoModelForCausalLM.from_pretrained(...)"
        )
    if tokenizer is not None and not hasattr(tokenizer, "is_fast"):
        raise ConfigError(f"the tokenizer is a {type(tokenizer).__name__}; load one with AutoTokenizer.from_pretrained(...)")
