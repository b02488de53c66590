"""Training a model from text, by `train.py` or from Python."""

from mbpa_lm.training.run import TrainingResult, train

__all__ = ["TrainingResult", "train"]
