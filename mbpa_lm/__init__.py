"""mbpa_lm: language models with a memory (Memory-based Parameter Adaptation, Sprechmann et al., ICLR 2018).

memory = mbpa_lm.Memory(model, tokenizer)      # of any causal language model of transformers
with mbpa_lm.adapt(model, memory):
    model.generate(...)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mbpa_lm.integrations.adapting import adapt
    from mbpa_lm.integrations.memory import Memory
    from mbpa_lm.integrations.perplexity import perplexity

__version__ = "0.1.0"
__all__ = ["Memory", "adapt", "perplexity"]


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that `--help` need not wait for PyTorch and FAISS."""
    modules = {"Memory": "memory", "adapt": "adapting", "perplexity": "perplexity"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"mbpa_lm.integrations.{modules[name]}"), name)
