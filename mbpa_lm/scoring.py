"""One causal pass over a stream, all experts side by side.

The model reads the stream in chunks; a chunk is only a matter of speed. At each position the experts predict the next
token from the tokens so far and from the memory, in which a position is stored after its own target has been scored.

Dimensions: `C` positions of a chunk, `V` vocabulary, `d` hidden size.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from mbpa_lm.experts.base import Chunk, Expert
from mbpa_lm.memory.base import Entries, Memory, Neighbours
from mbpa_lm.models.base import LanguageModel, State


@dataclass
class StreamScores:
    """What a pass over a stream of n tokens gives."""

    losses: dict[str, np.ndarray]  # expert -> (n - 1,) float32 nats, minus the log-probability of each token
    seconds: dict[str, float] = field(default_factory=dict)  # expert -> time that it needs when run alone


@torch.no_grad()
def score_stream(
    model: LanguageModel,
    tokens: np.ndarray,
    experts: Sequence[Expert],
    memory: Memory,
    neighbours: int,
    chunk_length: int,
    on_progress: Callable[[int, StreamScores], None] = lambda scored, scores: None,
) -> StreamScores:
    """Score every token of a stream but the first, which is read and not scored.

    Args: tokens (n,) ids; neighbours: K; on_progress is told how many tokens have been scored so far. The model must
    be in evaluation mode. Returns the loss of every expert at every position.
    """
    device = model.output_layer().weight.device
    count = len(tokens) - 1
    scores = StreamScores({expert.name: np.empty(count, dtype=np.float32) for expert in experts})
    clock = _Clock(device)
    state: State | None = None
    for begin in range(0, count, chunk_length):
        end = min(begin + chunk_length, count)
        read = torch.from_numpy(tokens[begin : end + 1].astype(np.int64)).to(device)
        inputs_C, targets_C = read[:-1], read[1:]
        with clock.measure("model"):
            output = model(inputs_C[None], state)
            state = output.state
            hidden_states_Cd = output.hidden_states[0]
            logits_CV = model.output_layer().logits(hidden_states_Cd)
            log_partitions_C = logits_CV.logsumexp(dim=-1)
            base_CV = logits_CV - log_partitions_C[:, None]
        found: Neighbours | None = None
        if any(expert.needs_neighbours for expert in experts):
            with clock.measure("memory"):
                likely = base_CV.topk(memory.likely_words, sorted=False)
                entries = Entries(hidden_states_Cd, targets_C, log_partitions_C, likely.indices, likely.values)
                found = memory.read_and_write(entries, neighbours)
        chunk = Chunk(hidden_states_Cd, base_CV, found)
        for expert in experts:
            with clock.measure(expert.name):
                log_probabilities_C = expert.target_log_probabilities(chunk, targets_C)
                scores.losses[expert.name][begin:end] = -log_probabilities_C.float().cpu().numpy()
        for expert in experts:
            shared = clock.seconds["model"] + (clock.seconds["memory"] if expert.needs_neighbours else 0.0)
            scores.seconds[expert.name] = shared + clock.seconds[expert.name]
        on_progress(end, scores)
    return scores


class _Clock:
    """Adds up the time of named parts, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {"model": 0.0, "memory": 0.0}
        self._cuda = device.type == "cuda"

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self._cuda:
            torch.cuda.synchronize()
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start
