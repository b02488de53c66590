"""The text that a model was trained on, read again."""

from pathlib import Path

import numpy as np

from mbpa_lm.checkpoints.checkpoint import Checkpoint
from mbpa_lm.config import Config
from mbpa_lm.data.corpora import Corpus, open_corpus
from mbpa_lm.data.streams import open_stream
from mbpa_lm.errors import CheckpointError
from mbpa_lm.remembering.remember import Text


def own_corpus(config: Config, checkpoint: Checkpoint) -> Corpus:
    """Open the text that the model was trained on."""
    corpus = open_corpus(config.data)
    if corpus.fingerprint("train") != checkpoint.corpus["train"]:
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} was trained on another text ({checkpoint.corpus['name']}) than that of "
            f"{config.data.path or corpus.name}; name its own with data.corpus and data.path, train again, or score any text "
            f"with --evaluation.text"
        )
    return corpus


def training_tokens(config: Config, checkpoint: Checkpoint) -> np.ndarray:
    """Return the text that the model was trained on, as the checkpoint's tokenizer reads it."""
    return training_text(config, checkpoint).tokens


def training_text(config: Config, checkpoint: Checkpoint) -> Text:
    """Return the text that the model was trained on, to be remembered."""
    corpus = own_corpus(config, checkpoint)  # without a second progress bar inside another
    stream = open_stream(corpus, "train", checkpoint.tokenizer, Path(config.data.token_folder))
    return Text(stream.name, corpus.fingerprint("train"), stream.tokens, stream.document_starts)
