"""mbpa_lm: language models with a memory (Memory-based Parameter Adaptation, Sprechmann et al., ICLR 2018)."""

__version__ = "0.1.0"
