"""One causal pass over a stream, all experts side by side.

The model reads the stream in chunks; a chunk is only a matter of speed. At each position the experts predict the next
token from the tokens so far and from the memory, in which a position is stored after its own target has been scored.

Dimensions: `C` positions of a chunk, `V` vocabulary, `d` hidden size.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch

from mbpa_lm.adaptation.likely_words import likely_words
from mbpa_lm.adaptation.problem import at_least_single, normalize, pick
from mbpa_lm.adaptation.slow_weights import SlowWeights
from mbpa_lm.errors import AdaptationError
from mbpa_lm.experts.base import Chunk, Expert, SlowSoftmax
from mbpa_lm.memory.base import Entries, Memory, Neighbours, SearchesAhead
from mbpa_lm.memory.history import StreamHistory, Stretch
from mbpa_lm.mixing.features import FEATURES, features, principal_directions
from mbpa_lm.models.base import LanguageModel, State
from mbpa_lm.scoring.guard import Guard
from mbpa_lm.system.out_of_memory import in_halves


@dataclass
class StreamScores:
    """What a pass over a stream of n tokens gives."""

    losses: dict[str, np.ndarray]  # expert -> (n - 1,) float32 nats, minus the log-probability of each token
    components: dict[str, np.ndarray]  # expert -> (n - 1,) float32, its own log-probability, without the base model's share
    features: np.ndarray  # (n - 1, F) float32, what a gate may know before the token (features.FEATURES); 0 of a single expert
    seconds: dict[str, float] = field(default_factory=dict)  # expert -> time that it needs when run alone
    part_seconds: dict[str, float] = field(default_factory=dict)  # part of the pass -> its time: see `shared_work`


@torch.no_grad()
def score_stream(
    model: LanguageModel,
    tokens: np.ndarray,
    experts: Sequence[Expert],
    memory: Memory,
    chunk_length: int,
    slow_weights: SlowWeights | None = None,
    history: StreamHistory | None = None,
    on_progress: Callable[[int, StreamScores], None] = lambda scored, scores: None,
    guard: Guard | None = None,
) -> StreamScores:
    """Score every token of a stream but the first, which is read and not scored.

    Args: tokens (n,) ids; slow_weights and history are there where an expert needs them, and learn from the stream;
    on_progress is told how many tokens have been scored so far; guard, which stops at the first violation where none is given,
    looks at every prediction. The model must be in evaluation mode. Returns the loss of every expert at every position.
    """
    guard = guard or Guard()
    count = len(tokens) - 1
    # Written to at once, so that what will not fit fails now and not at the end.
    losses, components = ({expert.name: np.full(count, np.nan, dtype=np.float32) for expert in experts} for _ in range(2))
    scores = StreamScores(losses, components, np.full((count, len(FEATURES)), 0, dtype=np.float32))
    neighbours = max(expert.neighbours for expert in experts)
    directions = principal_directions(model.output_layer().weight) if len(experts) > 1 else None
    # A memory that searches what the caches look at needs no products of its own.
    one_retrieval = history is not None and memory.takes_products(history.size)
    clock = _Clock(model.output_layer().weight.device)
    pieces = _read(model, tokens, chunk_length, clock)
    ahead = memory if neighbours and isinstance(memory, SearchesAhead) else None
    following = next(pieces, None)
    while following is not None:
        begin, inputs_C, targets_C, hidden_states_Cd, base_CV, log_partitions_C = following
        end = begin + len(inputs_C)
        if ahead is not None:
            ahead.begin(hidden_states_Cd, neighbours)
            following = next(pieces, None)  # the model reads on while a memory far away is searched
        stretch: Stretch | None = None
        if history is not None:
            with clock.measure("history"):
                stretch = history.read_and_write(hidden_states_Cd, targets_C)
        found: Neighbours | None = None
        if neighbours:
            with clock.measure("memory"):
                likely = likely_words(base_CV, memory.likely_words)
                entries = Entries(hidden_states_Cd, targets_C, log_partitions_C, *likely)
                products = stretch.products if stretch and one_retrieval else None
                stored = -pick(base_CV, targets_C) >= memory.surprise if memory.surprise else None
                found = memory.read_and_write(entries, neighbours, products, stored)
        chunk = Chunk(inputs_C, hidden_states_Cd, base_CV, log_partitions_C, found, None, stretch)
        for expert in experts:
            if not expert.needs_slow_weights:
                with clock.measure(expert.name):
                    _score(expert, chunk, targets_C, scores, begin, guard)
        if slow_weights is not None:
            from_slow_weights = [expert for expert in experts if expert.needs_slow_weights]
            _score_from_slow_weights(from_slow_weights, slow_weights, chunk, targets_C, scores, begin, clock, guard)
        if directions is not None:
            with clock.measure("features"):
                scores.features[begin:end] = features(chunk, begin, directions).float().cpu().numpy()
        scores.part_seconds |= clock.seconds
        for expert in experts:
            parts = {*shared_work(expert), expert.name, *(["history"] if one_retrieval and expert.neighbours else [])}
            scores.seconds[expert.name] = sum(clock.seconds[part] for part in parts)
        on_progress(end, scores)
        if ahead is None:
            following = next(pieces, None)
    return scores


class _Piece(NamedTuple):
    """A chunk as the model reads it."""

    begin: int
    inputs_C: torch.Tensor
    targets_C: torch.Tensor
    hidden_states_Cd: torch.Tensor
    base_CV: torch.Tensor
    log_partitions_C: torch.Tensor


def _read(model: LanguageModel, tokens: np.ndarray, chunk_length: int, clock: "_Clock") -> Iterator[_Piece]:
    """Read a stream chunk by chunk, without any memory."""
    layer, count = model.output_layer(), len(tokens) - 1
    state: State | None = None
    for begin in range(0, count, chunk_length):
        read = torch.from_numpy(tokens[begin : min(begin + chunk_length, count) + 1].astype(np.int64)).to(layer.weight.device)

        def piece(part: slice, read: torch.Tensor = read, begin: int = begin) -> _Piece:
            nonlocal state
            with clock.measure("model"):
                output = model(read[None, part], state)
                hidden_states_Cd = output.hidden_states[0]
                # Half precision is too coarse for what enters a result: its distributions are off one by up to a hundredth.
                base_CV, log_partitions_C = normalize(at_least_single(layer.logits(hidden_states_Cd)))
            state = output.state
            targets_C = read[part.start + 1 : part.stop + 1]
            return _Piece(begin + part.start, read[part], targets_C, hidden_states_Cd, base_CV, log_partitions_C)

        yield from in_halves(piece, len(read) - 1, "the model")


def _score_from_slow_weights(
    experts: Sequence[Expert],
    slow_weights: SlowWeights,
    chunk: Chunk,
    targets_C: torch.Tensor,
    scores: StreamScores,
    first: int,
    clock: "_Clock",
    guard: Guard,
) -> None:
    """Score the positions of a chunk, which start at `first`, in parts between which the slow weights take a step."""
    begin = 0
    while begin < len(targets_C):
        part = slice(begin, begin + min(slow_weights.positions_to_next_step(), len(targets_C) - begin))
        with clock.measure("slow weights"):
            log_probabilities, log_partitions = slow_weights.log_probabilities(chunk.hidden_states[part])
        slow = SlowSoftmax(slow_weights.weight_Vd, slow_weights.bias_V, log_probabilities, log_partitions)
        for expert in experts:
            with clock.measure(expert.name):
                _score(expert, replace(chunk.part(part), slow=slow), targets_C[part], scores, first + part.start, guard)
        with clock.measure("slow weights"):
            slow_weights.learn(chunk.hidden_states[part], log_probabilities, targets_C[part])
        begin = part.stop


def _score(expert: Expert, chunk: Chunk, targets: torch.Tensor, scores: StreamScores, first: int, guard: Guard) -> None:
    """Write down what an expert gives for the positions of a chunk, which start at `first`; in parts where memory is short."""

    def score(part: slice) -> None:
        left = [part]
        while left:  # and no function that calls itself, which would keep the chunk until Python looks for cycles
            part = left.pop()
            own_chunk = chunk if part == slice(0, len(targets)) else chunk.part(part)
            try:
                own = _own(expert, own_chunk, targets[part], first + part.start, guard)
            except AdaptationError:
                if not guard.may_fall_back(expert.name):
                    raise
                if part.stop - part.start > 1 and not expert.learns:
                    middle = (part.start + part.stop) // 2  # so that no position falls back for what happens at another
                    left += [slice(middle, part.stop), slice(part.start, middle)]
                    continue
                own = torch.full(targets[part].shape, math.nan)
            _write_down(expert, own, own_chunk, targets[part], scores, first + part.start, guard)

    if expert.learns:
        score(slice(0, len(targets)))
    else:
        for _ in in_halves(score, len(targets), f"expert {expert.name}"):
            pass


def _own(expert: Expert, chunk: Chunk, targets: torch.Tensor, first: int, guard: Guard) -> torch.Tensor:
    """Return an expert's log-probabilities of the targets; look at its whole distributions where that is wanted."""
    for index in guard.positions_to_inspect(first, len(targets)):
        own_CV = expert.log_probabilities(chunk)
        guard.check_distribution(expert.name, _alone(expert, own_CV[index], _base(chunk)[index]), first + index)
    return expert.target_log_probabilities(chunk, targets)


def _write_down(
    expert: Expert, own: torch.Tensor, chunk: Chunk, targets: torch.Tensor, scores: StreamScores, first: int, guard: Guard
) -> None:
    base, positions = pick(_base(chunk), targets), slice(first, first + len(targets))
    own = own.to(base.device)
    own_C, alone_C, base_C = (part.float().cpu().numpy() for part in (own, _alone(expert, own, base), base))
    own_C, alone_C = guard.checked(expert.name, own_C, alone_C, base_C, chunk, targets, first)
    scores.components[expert.name][positions] = own_C
    scores.losses[expert.name][positions] = -alone_C


def _base(chunk: Chunk) -> torch.Tensor:
    """Return the log-probabilities (C, V) of the layer that an expert of this chunk starts from."""
    return chunk.base_log_probabilities if chunk.slow is None else chunk.slow.log_probabilities


def _alone(expert: Expert, own: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of an expert that predicts alone: with its share of the base model's."""
    if expert.weight == 1:
        return own
    return torch.logaddexp(base + math.log(1 - expert.weight), own + math.log(expert.weight))


def shared_work(expert: Expert) -> list[str]:
    """Return the parts of a pass that an expert needs beside its own."""
    needed = {"memory": expert.neighbours, "history": expert.window, "slow weights": expert.needs_slow_weights}
    return ["model", *(part for part, wanted in needed.items() if wanted)]


class _Clock:
    """Adds up the time of named parts, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {"model": 0.0, "memory": 0.0, "history": 0.0, "slow weights": 0.0}
        self._cuda = device.type == "cuda"

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
