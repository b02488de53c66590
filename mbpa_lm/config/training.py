"""What is read, how it becomes tokens, the model, and how it is trained."""

import re
from dataclasses import dataclass, field
from typing import Literal

from mbpa_lm.config.checks import require, require_at_most, require_not_negative, require_positive, require_probability
from mbpa_lm.errors import ConfigError

MOST_THREADS, MOST_LAYERS = 1024, 1000
SettingValue = bool | int | float | str | None


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, and what it runs on."""

    folder: str = "runs/default"
    """Folder of the run: checkpoints, metrics.json, log.jsonl."""
    seed: int = 1
    """Seed of every random number of the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device of the model; auto takes CUDA where there is one."""
    threads: int = 0
    """CPU threads; 0 leaves PyTorch's own choice."""

    def __post_init__(self) -> None:
        require("run.folder", self.folder, bool(self.folder.strip()), "the path of a folder")
        require_at_most(MOST_THREADS, "run", self, "threads")
        require_not_negative("run", self, "threads", "seed")


@dataclass(frozen=True)
class DataConfig:
    """Which text is read."""

    corpus: Literal["builtin", "ptb", "wikitext-2", "wikitext-103", "text"] = "builtin"
    """builtin: the documentation that comes with Python; text: your own files, named by data.path."""
    path: str | None = None
    """Folder with train.txt, valid.txt and test.txt, or (corpus text) a text file or a folder of files. Empty: ptb and
    wikitext are downloaded from the Hugging Face hub."""
    document_pattern: str | None = None
    """Regular expression of a line that starts a new document. Empty: the corpus's own (an article title in WikiText)."""
    valid_fraction: float = 0.05
    """Share of the text held out for validation where the corpus has no splits of its own."""
    test_fraction: float = 0.05
    """Share of the text held out for testing where the corpus has no splits of its own."""
    token_folder: str = "runs/tokens"
    """Folder of the token files: built once, used again while source, tokenizer and settings are the same."""

    def __post_init__(self) -> None:
        if self.corpus == "text":
            require("data.path", self.path, bool(self.path), "a text file or a folder when data.corpus is text")
        if self.document_pattern is not None:
            try:
                re.compile(self.document_pattern)
            except re.error as error:
                raise ConfigError(f"data.document_pattern is no regular expression: {error}") from None
        for name in ("valid_fraction", "test_fraction"):
            value = getattr(self, name)
            require(f"data.{name}", value, 0 < value <= 0.4, "more than 0 and at most 0.4")


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes token ids."""

    kind: Literal["word", "sentencepiece", "huggingface"] = "word"
    """word: split at white space, <eos> at each line end; sentencepiece: subwords trained on the training text;
    huggingface: the tokenizer called tokenizer.name."""
    min_count: int = 1
    """word: a word seen fewer times in the training text becomes <unk>."""
    vocabulary_size: int = 0
    """Tokens in the vocabulary; word: at most so many (0: no limit), sentencepiece: exactly (0: 8000)."""
    name: str | None = None
    """huggingface: a tokenizer's name on the hub, or its folder."""

    def __post_init__(self) -> None:
        require_positive("tokenizer", self, "min_count")
        require_not_negative("tokenizer", self, "vocabulary_size")
        if self.kind == "huggingface":
            require("tokenizer.name", self.name, bool(self.name), "given when tokenizer.kind is huggingface")


@dataclass(frozen=True)
class ModelConfig:
    """The language model."""

    kind: Literal["lstm", "transformer"] = "lstm"
    """lstm: the AWD-LSTM; transformer: a causal LM of the transformers library, built from its configuration."""
    hidden_size: int = 400
    """lstm: units in a layer."""
    embedding_size: int = 0
    """lstm: numbers in a word vector, and units of the last layer when weights are tied; 0: hidden_size."""
    layers: int = 2
    """lstm: number of layers."""
    tied: bool = True
    """lstm: the output layer's weight is the embedding's."""
    dropout: float = 0.4
    """lstm: probability of dropping a unit of a layer's output, one mask a sequence (variational dropout)."""
    hidden_dropout: float | None = None
    """lstm: the same for what one layer hands to the next, where it is not to be model.dropout."""
    embedding_dropout: float = 0.1
    """lstm: probability of dropping a word's whole vector."""
    input_dropout: float = 0.4
    """lstm: probability of dropping a number of the input vectors, one mask a sequence."""
    weight_dropout: float = 0.0
    """lstm: probability of dropping a recurrent weight (DropConnect)."""
    activation_penalty: float = 0.0
    """lstm: weight of the mean squared output (AR)."""
    change_penalty: float = 0.0
    """lstm: weight of the mean squared change of the output from one token to the next (TAR)."""
    architecture: str = "gpt2"
    """transformer: model type in the transformers library (gpt2, llama, qwen2, ...)."""
    settings: dict[str, SettingValue] = field(default_factory=dict)
    """transformer: values of that architecture's configuration, by their own names (n_embd, n_layer, ...)."""
    context_length: int = 256
    """transformer: tokens in a block, the most that a prediction can look back on."""
    context_overlap: int = 128
    """transformer: tokens of a full block that are read again as the start of the next, when a stream is evaluated."""

    pretrained: str | None = None
    """Evaluate this causal LM instead of a checkpoint: its name on the hub, or its folder. What experts take from a training
    text comes from the training split of the corpus."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """pretrained: type of its weights; empty: that in which it was saved."""
    device_map: str | None = None
    """pretrained: how accelerate is to spread it over devices (auto, balanced, ...); empty: all on run.device."""

    def __post_init__(self) -> None:
        require_positive("model", self, "hidden_size", "layers", "context_length")
        require_at_most(MOST_LAYERS, "model", self, "layers")
        require_not_negative("model", self, "embedding_size", "activation_penalty", "change_penalty", "context_overlap")
        require_probability("model", self, "dropout", "hidden_dropout", "embedding_dropout", "input_dropout", "weight_dropout")
        require(
            "model.context_overlap",
            self.context_overlap,
            self.context_overlap < self.context_length,
            f"less than model.context_length ({self.context_length})",
        )


@dataclass(frozen=True)
class TrainingConfig:
    """How the model is trained."""

    epochs: int = 24
    """Passes over the training text."""
    batch_size: int = 32
    """Sequences read side by side."""
    sequence_length: int = 50
    """Tokens that gradients flow back through (truncated BPTT); for a transformer the block length."""
    optimizer: Literal["adamw", "sgd", "asgd"] = "adamw"
    """asgd: SGD whose weights are averaged from the moment validation stops improving (NT-ASGD)."""
    learning_rate: float = 3e-3
    """Highest learning rate."""
    schedule: Literal["one_cycle", "cosine", "linear", "constant"] = "one_cycle"
    """Shape of the learning rate; one_cycle warms up along a cosine, the others along a line."""
    warmup_fraction: float = 0.3
    """Share of all steps in which the learning rate rises."""
    weight_decay: float = 0.01
    """Decay of the weights (decoupled for adamw, L2 for sgd and asgd)."""
    gradient_norm: float = 0.25
    """Longest gradient; a longer one is shortened to it. 0: never."""
    averaging_patience: int = 5
    """asgd: epochs without a better validation loss before averaging starts."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of training; auto measures whether bfloat16 is faster on this machine."""
    sampled_words: int = 0
    """Words that the training loss draws, on average, to estimate the softmax's sum; fewer is faster. 0: the whole
    vocabulary. Validation and evaluation always use the whole."""
    hebbian_limit: int = 0
    """Hebbian softmax: occurrences up to which a word's output row moves towards the hidden states before it; 0: off."""
    hebbian_floor: float = 0.0
    """Hebbian softmax: least share of the hidden states in such a move (gamma); their running mean asks for 1 / occurrences."""
    patience: int = 0
    """Epochs without a better validation loss before training stops; 0: never."""
    save_steps: int = 0
    """Steps between checkpoints inside an epoch; 0: only at the end of each epoch."""
    validation_rows: int = 16
    """Parts of the validation text read side by side after each epoch (evaluate.py reads it as one stream)."""

    def __post_init__(self) -> None:
        require_positive("training", self, "epochs", "batch_size", "sequence_length", "learning_rate", "validation_rows")
        require_not_negative("training", self, "weight_decay", "gradient_norm", "patience", "save_steps", "sampled_words")
        require_not_negative("training", self, "averaging_patience", "hebbian_limit")
        require_probability("training", self, "warmup_fraction", "hebbian_floor")
