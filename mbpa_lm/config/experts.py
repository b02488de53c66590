"""The memory, the ways to predict with it, and the gate over them."""

from dataclasses import dataclass, field
from typing import Literal

from mbpa_lm.config.checks import require, require_at_most, require_not_negative, require_positive, require_probability

MOST_NEIGHBOURS = 100_000
MOST_STEPS = 10_000
"""Gradient steps for a prediction; beyond them is a slip of the finger, which would take all the memory there is."""


@dataclass(frozen=True)
class MemoryConfig:
    """What is remembered of the stream."""

    size: int = 5000
    """Entries in the window: the most recent (hidden state, next token) pairs."""
    neighbours: int = 32
    """Entries retrieved for a prediction (K)."""
    likely_words: int = 96
    """Likeliest next words kept with an entry, for the restricted solver."""
    write: Literal["all", "surprising", "reservoir"] = "all"
    """Which positions are remembered: all; those whose token surprised the base model; or an equal share of the whole stream,
    the entry that a new one replaces being chosen by chance."""
    surprise: float = 3.0
    """surprising: nats, minus the base model's log-probability of a token, from which it is remembered."""
    eviction: Literal["oldest", "least_retrieved"] = "oldest"
    """Which entry a new one replaces: the oldest, or the one that was retrieved, or written, longest ago."""
    datastores: list[str] = field(default_factory=list)
    """Folders that mbpa-memory wrote; they are searched together with the window, and by knn together with the training text.
    The word training stands for the training text of the checkpoint."""
    key_type: Literal["float16", "bfloat16", "float32"] = "float16"
    """Numbers that the keys of a datastore are kept in."""
    index: Literal["auto", "flat", "ivf_flat", "ivf_pq", "hnsw", "cagra"] = "auto"
    """Index of a datastore that is built: flat measures every entry, others find nearly all of the nearest; auto: by size."""
    resident_gib: float = 0.0
    """Resident memory that the process is to stay under while it builds and searches datastores; 0: no limit."""
    gpus: Literal["none", "replicate", "shard"] = "none"
    """Where indexes are searched: on the CPU, or on all GPUs, each holding the whole index or a part of it."""

    def __post_init__(self) -> None:
        require_positive("memory", self, "size", "neighbours", "likely_words")
        require_at_most(MOST_NEIGHBOURS, "memory", self, "neighbours")
        require_not_negative("memory", self, "resident_gib", "surprise")
        if self.write == "reservoir":
            require("memory.eviction", self.eviction, self.eviction == "oldest", "left out with memory.write reservoir")


@dataclass(frozen=True)
class RemoteConfig:
    """A Milvus database that remembers the stream instead of a window, for many machines and for ever."""

    address: str | None = None
    """A file that ends in .db, for Milvus Lite in this process, or http(s)://host:port of a cluster; empty: the window
    remembers. A token, or user and password, come from MBPA_MILVUS_TOKEN, or MBPA_MILVUS_USER and MBPA_MILVUS_PASSWORD."""
    collection: str = "mbpa_lm"
    """Name of the collection; it is made if it is not there, and goes on if it is: what it holds counts as read before."""
    index: Literal["FLAT", "HNSW", "AUTOINDEX"] = "FLAT"
    """How a cluster searches a collection that is made now: exactly, or approximately; Milvus Lite searches exactly."""
    batch: int = 512
    """Entries a write."""
    attempts: int = 5
    """How often a call is tried while the server cannot be reached, after 1, 2, 4, ... seconds."""
    timeout: float = 30.0
    """Seconds that one attempt may take."""

    def __post_init__(self) -> None:
        require_positive("remote", self, "batch", "attempts", "timeout")


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
    alpha: float | None = None
    """Size of a gradient step; 0 leaves the base model; empty: 2 over the mean squared norm of the hidden states."""
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
        require("adaptation.weight", self.weight, 0 < self.weight <= 1, "greater than 0 and at most 1")
        require_not_negative("adaptation", self, "steps", "alpha", "beta", "moved_words")
        require_at_most(MOST_STEPS, "adaptation", self, "steps")
        require_positive("adaptation", self, "tolerance", "candidates", "reach")
        require_probability("adaptation", self, "momentum")
        if self.schedule is not None:
            fits = len(self.schedule) == self.steps and all(share >= 0 for share in self.schedule)
            require("adaptation.schedule", self.schedule, fits, f"{self.steps} numbers (adaptation.steps) of 0 or more")
        require("adaptation.epsilon", self.epsilon, self.epsilon >= 1e-12, "at least 1e-12")
        require("adaptation.bandwidth", self.bandwidth, self.bandwidth >= 1e-6, "at least 1e-6")
        if self.alpha is not None and self.alpha * self.beta > 1:
            require("adaptation.beta", self.beta, False, f"at most 1 / adaptation.alpha ({1 / self.alpha:g}), or steps diverge")
        if self.optimizer not in ("sgd", "momentum"):
            require("adaptation.solver", self.solver, self.solver == "reference", f"reference with {self.optimizer}")


@dataclass(frozen=True)
class PersistentConfig:
    """How the softmax layer slowly follows the stream (dynamic evaluation of the output layer, Krause et al. 2018)."""

    interval: int = 20
    """Tokens between steps."""
    rate: float | None = None
    """Size of a step: a gradient as large as it was in training on average moves a parameter by rate / (1 + smoothing). Empty:
    146 times smoothing, times the mean size of the layer's gradients in training, over the mean squared norm of the hidden
    states; with a vocabulary of fewer than 10,000 as much less."""
    decay: float = 3e-3
    """Share of the way back to the trained weights that a step takes, for a parameter of average gradients in training."""
    smoothing: float = 3.0
    """Added to a parameter's gradient scale, 1 being the mean: large for equal steps, small for equal relative ones."""
    statistics_tokens: int = 100000
    """Training tokens that the gradient scales are measured on, once a checkpoint; they are kept with it."""

    def __post_init__(self) -> None:
        require_positive("persistent", self, "interval", "smoothing", "statistics_tokens")
        require_not_negative("persistent", self, "rate", "decay")
        _require_an_interval("persistent", self)


def _require_an_interval(section: str, config: "PersistentConfig | DynamicConfig") -> None:
    """Refuse statistics of fewer tokens than gradients are taken over at once."""
    tokens, wanted = config.statistics_tokens, f"at least {section}.interval ({config.interval})"
    require(f"{section}.statistics_tokens", tokens, tokens >= config.interval, wanted)


@dataclass(frozen=True)
class CacheConfig:
    """Continuous caches over windows of the stream (Grave et al. 2017), one expert each."""

    windows: list[int] = field(default_factory=lambda: [100, 500, 5000])
    """Most recent entries that each cache sees; 0: the whole stream (the unbounded cache)."""
    thetas: list[float] | None = None
    """Sharpness of each: an entry counts exp(theta times the scalar product of its hidden state with the query). Empty: 12.8
    over the mean squared norm of the hidden states."""
    weights: list[float] | None = None
    """Share of each where it predicts alone; the rest is the base model's. Empty: 0.1."""

    def __post_init__(self) -> None:
        require("cache.windows", self.windows, bool(self.windows), "at least one length; leave cache out of evaluation.experts")
        thetas, weights = ([] if values is None else values for values in (self.thetas, self.weights))
        for name, values in (("thetas", self.thetas), ("weights", self.weights)):
            wanted = f"{len(self.windows)} numbers, one for each of cache.windows"
            require(f"cache.{name}", values, values is None or len(values) == len(self.windows), wanted)
        require(
            "cache.windows", self.windows, all(window >= 0 for window in self.windows), "lengths, or 0 for the whole stream"
        )
        require("cache.windows", self.windows, len(set(self.windows)) == len(self.windows), "different lengths")
        require("cache.thetas", thetas, all(theta >= 0 for theta in thetas), "numbers of 0 or more")
        require("cache.weights", weights, all(0 < weight < 1 for weight in weights), "numbers between 0 and 1")


@dataclass(frozen=True)
class KnnConfig:
    """Nearest contexts of the training text, and of memory.datastores (kNN-LM, Khandelwal et al. 2020)."""

    neighbours: int = 256
    """Entries that a prediction looks at (K)."""
    temperature: float | None = None
    """An entry counts exp(minus its squared distance over the temperature). Empty: a quarter of the mean squared norm of the
    hidden states."""
    weight: float = 0.1
    """Its share where it predicts alone; the rest is the base model's."""
    grows: bool = False
    """Whether the stream so far is searched together with the training text."""
    entries: int = 0
    """First training tokens that are stored, once a checkpoint; 0: all. They are kept with it."""

    def __post_init__(self) -> None:
        require_positive("knn", self, "neighbours", "temperature")
        require_at_most(MOST_NEIGHBOURS, "knn", self, "neighbours")
        require_not_negative("knn", self, "entries")
        require("knn.weight", self.weight, 0 < self.weight < 1, "between 0 and 1")


@dataclass(frozen=True)
class DynamicConfig:
    """How the whole model goes on learning from the stream (dynamic evaluation, Krause et al. 2018)."""

    interval: int = 10
    """Tokens between steps, and as far back as their gradients flow."""
    optimizer: Literal["rms", "sgd"] = "rms"
    """rms: steps and decay scaled by each parameter's gradients on the training text; sgd: all the same."""
    rate: float | None = None
    """Size of a step; for rms in the units of persistent.rate. Empty: two thirds of what is said there."""
    decay: float = 3e-3
    """Share of the way back to the trained parameters that a step takes."""
    smoothing: float = 3.0
    """rms: added to a parameter's gradient scale, 1 being the mean."""
    statistics_tokens: int = 20000
    """rms: training tokens that the gradient scales are measured on, once a checkpoint; they are kept with it."""

    def __post_init__(self) -> None:
        require_positive("dynamic", self, "interval", "smoothing", "statistics_tokens")
        require_not_negative("dynamic", self, "rate", "decay")
        _require_an_interval("dynamic", self)


@dataclass(frozen=True)
class MixtureConfig:
    """The mixture of all experts with fixed weights."""

    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each expert by its name in the results, for example {base: 0.8, cache-500: 0.2}; empty: all the same."""

    def __post_init__(self) -> None:
        if self.weights:
            fits = all(weight >= 0 for weight in self.weights.values()) and abs(sum(self.weights.values()) - 1) < 1e-6
            require("mixture.weights", self.weights, fits, "numbers of 0 or more that sum to 1")


@dataclass(frozen=True)
class GateConfig:
    """How the gate over all experts learns from the stream; it needs no tuning."""

    rates: list[float] = field(default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
    """Sizes of a step (Adam), one gate each; they are mixed by how well each has predicted so far."""
    shared: float = 0.01
    """Share of the trust in each that is given back to all at every token, so that another may take over later."""

    def __post_init__(self) -> None:
        require("gate.rates", self.rates, len(self.rates) > 0, "at least one number")
        require("gate.rates", self.rates, all(rate >= 0 for rate in self.rates), "numbers of 0 or more")
        require_probability("gate", self, "shared")
