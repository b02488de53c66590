"""Everything that a YAML file or the command line can say, with its unit and default.

One dataclass a section; `--help` shows the docstrings below, so they are written for it. A section checks
its own values when it is made. Nothing here reads files or knows what the values are used for.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from mbpa_lm.errors import ConfigError, did_you_mean

SettingValue = bool | int | float | str | None


def _require(key: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is {value!r}; it must be {expected}")


def _require_positive(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(f"{section}.{name}", value, value > 0, "greater than 0")


def _require_not_negative(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(f"{section}.{name}", value, value >= 0, "0 or more")


def _require_probability(section: str, config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(f"{section}.{name}", value, 0 <= value < 1, "at least 0 and less than 1")


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
        _require("run.folder", self.folder, bool(self.folder.strip()), "the path of a folder")
        _require_not_negative("run", self, "threads", "seed")


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
            _require("data.path", self.path, bool(self.path), "a text file or a folder when data.corpus is text")
        if self.document_pattern is not None:
            try:
                re.compile(self.document_pattern)
            except re.error as error:
                raise ConfigError(f"data.document_pattern is no regular expression: {error}") from None
        for name in ("valid_fraction", "test_fraction"):
            value = getattr(self, name)
            _require(f"data.{name}", value, 0 < value <= 0.4, "more than 0 and at most 0.4")


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
        _require_positive("tokenizer", self, "min_count")
        _require_not_negative("tokenizer", self, "vocabulary_size")
        if self.kind == "huggingface":
            _require("tokenizer.name", self.name, bool(self.name), "given when tokenizer.kind is huggingface")


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

    def __post_init__(self) -> None:
        _require_positive("model", self, "hidden_size", "layers", "context_length")
        _require_not_negative("model", self, "embedding_size", "activation_penalty", "change_penalty", "context_overlap")
        _require_probability("model", self, "dropout", "embedding_dropout", "input_dropout", "weight_dropout")
        _require(
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
    patience: int = 0
    """Epochs without a better validation loss before training stops; 0: never."""
    save_steps: int = 0
    """Steps between checkpoints inside an epoch; 0: only at the end of each epoch."""
    validation_rows: int = 16
    """Parts of the validation text read side by side after each epoch (evaluate.py reads it as one stream)."""

    def __post_init__(self) -> None:
        _require_positive("training", self, "epochs", "batch_size", "sequence_length", "learning_rate", "validation_rows")
        _require_not_negative("training", self, "weight_decay", "gradient_norm", "patience", "save_steps", "sampled_words")
        _require_not_negative("training", self, "averaging_patience")
        _require_probability("training", self, "warmup_fraction")


@dataclass(frozen=True)
class MemoryConfig:
    """What is remembered of the stream."""

    size: int = 5000
    """Entries in the window: the most recent (hidden state, next token) pairs."""
    neighbours: int = 32
    """Entries retrieved for a prediction (K)."""
    likely_words: int = 96
    """Likeliest next words kept with an entry, for the restricted solver."""

    def __post_init__(self) -> None:
        _require_positive("memory", self, "size", "neighbours", "likely_words")


@dataclass(frozen=True)
class AdaptationConfig:
    """How the softmax layer is adapted to the neighbours (Sprechmann et al. 2018)."""

    solver: Literal["restricted", "dual", "reference"] = "restricted"
    """restricted: moves only the words that the steps can move most, at a cost that does not depend on the vocabulary;
    dual: the whole vocabulary, exact; reference: autograd on a copy of the layer, the definition, very slow."""
    moved_words: int = 16
    """restricted: words that are moved beside the neighbours' own."""
    tolerance: float = 0.1
    """restricted: most nats by which the bound of a prediction's error may pass; above, that prediction is solved with more
    words."""
    optimizer: Literal["sgd", "momentum", "rmsprop", "adam"] = "sgd"
    """Rule of a gradient step; rmsprop and adam need the reference solver."""
    momentum: float = 0.9
    """momentum: share of the last step's direction that the next one goes on in."""
    steps: int = 10
    """Gradient steps for a prediction (T); 0 leaves the base model."""
    alpha: float = 0.05
    """Size of a gradient step; 0 leaves the base model."""
    schedule: list[float] | None = None
    """Size of each step relative to alpha, one number a step; empty: all the same."""
    beta: float = 0.0
    """Strength of the pull back to the trained weights."""
    kernel: Literal["inverse_distance", "gaussian"] = "inverse_distance"
    """Similarity of a neighbour at squared distance D: 1 / (epsilon + D), or exp(-D / (2 bandwidth^2))."""
    epsilon: float = 1e-3
    """inverse_distance: added to the squared distance."""
    bandwidth: float = 1.0
    """gaussian: distance at which a neighbour counts exp(-1/2) of one at distance 0."""
    weighting: Literal["normalized", "within_reach", "unnormalized"] = "normalized"
    """normalized: the neighbours' weights sum to 1, however far they are; within_reach: to less where they are farther than
    reach; unnormalized: a neighbour weighs its similarity relative to one at distance 0."""
    reach: float = 1.0
    """within_reach: distance at which a single neighbour weighs a half."""
    selection: Literal["nearest", "informative"] = "nearest"
    """informative: the neighbours that together tell most about the query (SIFT), so that copies of one context count once."""
    candidates: int = 96
    """informative: nearest entries that the neighbours are chosen from."""
    bias: bool = True
    """Whether the output layer's bias is adapted beside its weight."""
    weight: float = 1.0
    """Share of the adapted prediction where it is reported alone; the rest is that of the weights that the steps start from."""

    def __post_init__(self) -> None:
        _require("adaptation.weight", self.weight, 0 < self.weight <= 1, "greater than 0 and at most 1")
        _require_not_negative("adaptation", self, "steps", "alpha", "beta", "moved_words")
        _require_positive("adaptation", self, "tolerance", "candidates", "reach")
        _require_probability("adaptation", self, "momentum")
        if self.schedule is not None:
            fits = len(self.schedule) == self.steps and all(share >= 0 for share in self.schedule)
            _require("adaptation.schedule", self.schedule, fits, f"{self.steps} numbers (adaptation.steps) of 0 or more")
        _require("adaptation.epsilon", self.epsilon, self.epsilon >= 1e-12, "at least 1e-12")
        _require("adaptation.bandwidth", self.bandwidth, self.bandwidth >= 1e-6, "at least 1e-6")
        if self.alpha * self.beta > 1:
            _require(
                "adaptation.beta", self.beta, False, f"at most 1 / adaptation.alpha ({1 / self.alpha:g}), or steps diverge"
            )
        if self.optimizer not in ("sgd", "momentum"):
            _require("adaptation.solver", self.solver, self.solver == "reference", f"reference with {self.optimizer}")


@dataclass(frozen=True)
class PersistentConfig:
    """How the softmax layer slowly follows the stream (dynamic evaluation of the output layer, Krause et al. 2018)."""

    interval: int = 20
    """Tokens between steps."""
    rate: float = 3e-3
    """Size of a step: a gradient as large as it was in training on average moves a parameter by rate / (1 + smoothing)."""
    decay: float = 3e-3
    """Share of the way back to the trained weights that a step takes, for a parameter of average gradients in training."""
    smoothing: float = 3.0
    """Added to a parameter's gradient scale, 1 being the mean: large for equal steps, small for equal relative ones."""
    statistics_tokens: int = 100000
    """Training tokens that the gradient scales are measured on, once a checkpoint; they are kept with it."""

    def __post_init__(self) -> None:
        _require_positive("persistent", self, "interval", "smoothing", "statistics_tokens")
        _require_not_negative("persistent", self, "rate", "decay")


@dataclass(frozen=True)
class CacheConfig:
    """Continuous caches over windows of the stream (Grave et al. 2017), one expert each."""

    windows: list[int] = field(default_factory=lambda: [100, 500, 5000])
    """Most recent entries that each cache sees; 0: the whole stream (the unbounded cache)."""
    thetas: list[float] = field(default_factory=lambda: [0.3, 0.3, 0.3])
    """Sharpness of each: an entry counts exp(theta times the scalar product of its hidden state with the query)."""
    weights: list[float] = field(default_factory=lambda: [0.1, 0.1, 0.1])
    """Share of each where it predicts alone; the rest is the base model's."""

    def __post_init__(self) -> None:
        for name in ("thetas", "weights"):
            values = getattr(self, name)
            wanted = f"{len(self.windows)} numbers, one for each of cache.windows"
            _require(f"cache.{name}", values, len(values) == len(self.windows), wanted)
        _require(
            "cache.windows", self.windows, all(window >= 0 for window in self.windows), "lengths, or 0 for the whole stream"
        )
        _require("cache.windows", self.windows, len(set(self.windows)) == len(self.windows), "different lengths")
        _require("cache.thetas", self.thetas, all(theta >= 0 for theta in self.thetas), "numbers of 0 or more")
        _require("cache.weights", self.weights, all(0 < weight < 1 for weight in self.weights), "numbers between 0 and 1")


@dataclass(frozen=True)
class KnnConfig:
    """Nearest contexts of the training text (kNN-LM, Khandelwal et al. 2020)."""

    neighbours: int = 256
    """Entries that a prediction looks at (K)."""
    temperature: float = 10.0
    """An entry counts exp(minus its squared distance over the temperature)."""
    weight: float = 0.1
    """Its share where it predicts alone; the rest is the base model's."""
    grows: bool = False
    """Whether the stream so far is searched together with the training text."""
    entries: int = 0
    """First training tokens that are stored, once a checkpoint; 0: all. They are kept with it."""
    cells_searched: int = 32
    """Cells of the inverted file that a query looks into; more is slower and finds more of the true neighbours."""

    def __post_init__(self) -> None:
        _require_positive("knn", self, "neighbours", "temperature", "cells_searched")
        _require_not_negative("knn", self, "entries")
        _require("knn.weight", self.weight, 0 < self.weight < 1, "between 0 and 1")


@dataclass(frozen=True)
class DynamicConfig:
    """How the whole model goes on learning from the stream (dynamic evaluation, Krause et al. 2018)."""

    interval: int = 10
    """Tokens between steps, and as far back as their gradients flow."""
    optimizer: Literal["rms", "sgd"] = "rms"
    """rms: steps and decay scaled by each parameter's gradients on the training text; sgd: all the same."""
    rate: float = 2e-3
    """Size of a step; for rms in the units of persistent.rate."""
    decay: float = 3e-3
    """Share of the way back to the trained parameters that a step takes."""
    smoothing: float = 3.0
    """rms: added to a parameter's gradient scale, 1 being the mean."""
    statistics_tokens: int = 20000
    """rms: training tokens that the gradient scales are measured on, once a checkpoint; they are kept with it."""

    def __post_init__(self) -> None:
        _require_positive("dynamic", self, "interval", "smoothing", "statistics_tokens")
        _require_not_negative("dynamic", self, "rate", "decay")


@dataclass(frozen=True)
class GateConfig:
    """How the gate over all experts learns from the stream; it needs no tuning."""

    rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    """Sizes of a step (Adam), one gate each; they are mixed by how well each has predicted so far."""
    shared: float = 0.01
    """Share of the trust in each that is given back to all at every token, so that another may take over later."""

    def __post_init__(self) -> None:
        _require("gate.rates", self.rates, len(self.rates) > 0, "at least one number")
        _require("gate.rates", self.rates, all(rate >= 0 for rate in self.rates), "numbers of 0 or more")
        _require_probability("gate", self, "shared")


EXPERTS = ("base", "mbpa", "persistent", "mbpa+persistent", "cache", "knn", "dynamic")
MEMORY_EXPERTS = EXPERTS[:5]


@dataclass(frozen=True)
class EvaluationConfig:
    """Which stream is scored, and in what pieces."""

    experts: list[str] = field(default_factory=lambda: list(MEMORY_EXPERTS))
    """Ways to predict that are run side by side: base, mbpa, persistent, mbpa+persistent, cache, knn, dynamic. The base model
    always is. The last two cost much: knn stores the training text first, dynamic trains the model on the stream."""

    split: Literal["train", "valid", "test"] = "test"
    """Split of the corpus that is scored."""
    text: str | None = None
    """Score this text file or folder of files instead, with the checkpoint's tokenizer."""
    chunk_length: int = 256
    """Tokens processed at once; it changes speed and memory, never a result beyond rounding."""
    max_tokens: int = 0
    """Score only so many first tokens of the stream; 0: all."""
    tuned: bool = True
    """Whether what evaluate.py --tune found and kept with the checkpoint, where it did, replaces the configured settings."""

    def __post_init__(self) -> None:
        _require_positive("evaluation", self, "chunk_length")
        for name in self.experts:
            if name not in EXPERTS:
                raise ConfigError(f"evaluation.experts names {name!r}; {did_you_mean(name, EXPERTS)}")
        _require_not_negative("evaluation", self, "max_tokens")


@dataclass(frozen=True)
class TrackingConfig:
    """Where numbers are sent beside the run folder."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto is online when you are logged in and offline otherwise."""
    project: str = "mbpa_lm"
    """Project on Weights & Biases."""


@dataclass(frozen=True)
class Config:
    """One experiment."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    persistent: PersistentConfig = field(default_factory=PersistentConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.model.kind == "transformer":
            _require(
                "training.sequence_length",
                self.training.sequence_length,
                self.training.sequence_length == self.model.context_length,
                f"model.context_length ({self.model.context_length}), the block that a transformer reads",
            )
