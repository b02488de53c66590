"""Everything that a YAML file or the command line can say, with its unit and default.

One dataclass a section; `--help` shows their docstrings, so they are written for it. A section checks
its own values when it is made. Nothing here reads files or knows what the values are used for.
"""

from dataclasses import dataclass, field
from typing import Literal

from mbpa_lm.config.checks import require, require_not_negative, require_positive
from mbpa_lm.config.experts import (
    AdaptationConfig,
    CacheConfig,
    DynamicConfig,
    GateConfig,
    KnnConfig,
    MemoryConfig,
    MixtureConfig,
    PersistentConfig,
    RemoteConfig,
)
from mbpa_lm.config.training import DataConfig, ModelConfig, RunConfig, TokenizerConfig, TrainingConfig
from mbpa_lm.errors import ConfigError, did_you_mean

__all__ = [
    "EXPERTS",
    "MEMORY_EXPERTS",
    "AdaptationConfig",
    "CacheConfig",
    "Config",
    "DataConfig",
    "DynamicConfig",
    "EvaluationConfig",
    "GateConfig",
    "KnnConfig",
    "MemoryConfig",
    "MixtureConfig",
    "ModelConfig",
    "PersistentConfig",
    "RemoteConfig",
    "RunConfig",
    "TokenizerConfig",
    "TrackingConfig",
    "TrainingConfig",
]

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
    """Tokens processed at once, at most; it changes speed and memory, never a result beyond rounding."""
    max_tokens: int = 0
    """Score only so many first tokens of the stream; 0: all."""
    independent: bool = False
    """Whether each document is a stream of its own, with which state, memory, experts and gate begin anew. Processes that were
    launched together share the documents; the result is the same, to the bit, as that of one."""
    on_error: Literal["stop", "base"] = "stop"
    """What follows a prediction that is no probability: the run stops, saying of which expert and where; or the base model's
    prediction takes its place and is counted."""
    tuned: bool = True
    """Whether what evaluate.py --tune found and kept with the checkpoint, where it did, replaces the configured settings."""

    def __post_init__(self) -> None:
        require_positive("evaluation", self, "chunk_length")
        for name in self.experts:
            if name not in EXPERTS:
                raise ConfigError(f"evaluation.experts names {name!r}; {did_you_mean(name, EXPERTS)}")
        require_not_negative("evaluation", self, "max_tokens")
        if self.text is not None:
            require("evaluation.text", self.text, bool(self.text.strip()), "a text file or a folder of files")
            require("evaluation.split", self.split, self.split == "test", "left out with evaluation.text, which is read whole")


@dataclass(frozen=True)
class TrackingConfig:
    """Where numbers are sent beside the run folder."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """Weights & Biases; auto is online when you are logged in and offline otherwise."""
    project: str = "mbpa_lm"
    """Project on Weights & Biases."""
    log_steps: int = 100
    """Training steps between two points of the learning curves, in log.jsonl and on Weights & Biases."""
    artifacts: bool = True
    """Whether Weights & Biases keeps the best and the last checkpoint, and the tables of an evaluation."""

    def __post_init__(self) -> None:
        require_positive("tracking", self, "log_steps")


@dataclass(frozen=True)
class Config:
    """One experiment."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    adaptation: AdaptationConfig = field(default_factory=AdaptationConfig)
    persistent: PersistentConfig = field(default_factory=PersistentConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    dynamic: DynamicConfig = field(default_factory=DynamicConfig)
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if self.model.kind == "transformer":
            require(
                "training.sequence_length",
                self.training.sequence_length,
                self.training.sequence_length == self.model.context_length,
                f"model.context_length ({self.model.context_length}), the block that a transformer reads",
            )
