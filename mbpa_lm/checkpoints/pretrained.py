"""A pretrained model as if it were a checkpoint of this package: with a folder for what is measured, and a training text.

Nobody knows what it was trained on. What experts take from a training text (counts of words, the datastore of kNN-LM, the size
of gradients) comes from the training split of the configured corpus.
"""

from pathlib import Path

import numpy as np
import torch

from mbpa_lm.checkpoints.checkpoint import Checkpoint
from mbpa_lm.config import Config
from mbpa_lm.data.corpora import open_corpus
from mbpa_lm.data.streams import open_stream
from mbpa_lm.errors import RunFolderError, reason
from mbpa_lm.models.fingerprint import model_fingerprint
from mbpa_lm.models.pretrained import load_pretrained
from mbpa_lm.system.machine import pick_device
from mbpa_lm.system.progress import token_progress


def pretrained_checkpoint(config: Config, needs_training_text: bool = True) -> Checkpoint:
    """Load the model that `model.pretrained` names; raises ConfigError where it cannot be, DataError where there is no text.

    What is measured on the training text is kept beside the tokens, in a folder that is named by the model's fingerprint.
    Where no training text is needed, none is read, and there is no such folder.
    """
    model, tokenizer = load_pretrained(config.model, pick_device(config.run.device))
    if not needs_training_text:
        no_counts = torch.zeros(model.vocabulary_size, dtype=torch.int64)
        return Checkpoint(Path(), model, tokenizer, no_counts, {}, model_fingerprint(model.causal_lm), None)
    corpus = open_corpus(config.data)
    with token_progress(f"tokenizing {corpus.name} train") as progress:
        tokens = open_stream(corpus, "train", tokenizer, Path(config.data.token_folder), progress).tokens
    fingerprint = model_fingerprint(model.causal_lm)
    folder = Path(config.data.token_folder) / f"pretrained-{fingerprint[:12]}-{corpus.fingerprint('train')[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{folder} could not be made: {reason(error)}; name another data.token_folder") from None
    counts = torch.from_numpy(np.bincount(tokens, minlength=model.vocabulary_size))
    of_corpus = {"name": corpus.name, **{split: corpus.fingerprint(split) for split in ("train", "valid")}}
    return Checkpoint(folder, model, tokenizer, counts, of_corpus, fingerprint, None)
