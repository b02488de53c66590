"""A pass over streams with all that it needs: a memory, slow weights, a history and the mixtures of what the experts give."""

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack

import numpy as np

from mbpa_lm.checkpoints.checkpoint import Checkpoint
from mbpa_lm.checkpoints.tuned import Tuned
from mbpa_lm.config import Config
from mbpa_lm.data.streams import TokenStream
from mbpa_lm.experts.base import Expert
from mbpa_lm.mixing.gate import GateRule
from mbpa_lm.numerics.perplexities import perplexity
from mbpa_lm.scoring.documents import Scored
from mbpa_lm.scoring.guard import Guard
from mbpa_lm.scoring.mixed_scores import UNIFORM, mixed_scores
from mbpa_lm.scoring.resources import chunk_length, make_experts, make_history, make_memory, make_slow_weights
from mbpa_lm.scoring.stream import StreamScores, score_stream
from mbpa_lm.system.out_of_memory import OnePositionTooLarge, is_out_of_memory, release_memory
from mbpa_lm.system.progress import ProgressBar, console


class Pass:
    """Scores streams, each from the beginning: state, memory, experts and gate know nothing of another."""

    def __init__(self, config: Config, checkpoint: Checkpoint, tuned: Tuned | None) -> None:
        self.config, self.checkpoint, self.tuned = config, checkpoint, tuned
        self.remembered_before = 0
        self.chunk_length = self.most_at_once = config.evaluation.chunk_length
        self.chunk_lengths: dict[int, int] = {}  # by the id of a stream: what it was scored with
        self.done = 0
        self.totals: dict[str, float] = defaultdict(float)

    def over(
        self, stream: TokenStream, experts: Sequence[Expert], progress: ProgressBar, inspected: Collection[int] = ()
    ) -> Scored:
        """Score a stream with experts that have not seen another; look at their whole distributions at some positions.

        Where memory does not do for what cannot be done in parts, it begins again with chunks of half the length.
        """
        while True:
            before = self.done, dict(self.totals)
            try:
                scored = self._over(stream, experts, progress, inspected)
                self.chunk_lengths[id(stream)] = self.chunk_length
                return scored
            except OnePositionTooLarge:
                raise
            except (MemoryError, RuntimeError) as error:
                # A database would remember what it has been told before.
                if not is_out_of_memory(error) or self.chunk_length == 1 or self.config.remote.address:
                    raise
            self.most_at_once = self.chunk_length // 2
            console.print(
                f"out of memory on {self.chunk_length:,} positions at once: beginning again with {self.most_at_once:,}"
            )
            self.done, self.totals = before[0], defaultdict(float, before[1])
            experts = make_experts(self.config, self.checkpoint)
            release_memory()

    def _over(
        self, stream: TokenStream, experts: Sequence[Expert], progress: ProgressBar, inspected: Collection[int]
    ) -> Scored:
        config, checkpoint, model = self.config, self.checkpoint, self.checkpoint.model
        guard = Guard(config.evaluation.on_error == "base", inspected)
        with ExitStack() as closing:
            metric = None if self.tuned is None else self.tuned.metric_tensor()
            memory = make_memory(config, checkpoint, metric, closing)
            self.remembered_before = len(memory)
            self.chunk_length = min(chunk_length(config, experts, model.hidden_size), self.most_at_once)
            scores = score_stream(
                model,
                stream.tokens,
                experts,
                memory,
                self.chunk_length,
                make_slow_weights(config, checkpoint, experts),
                make_history(experts, model),
                self._show(progress),
                guard,
            )
        details = {expert.name: expert.details() for expert in experts}
        for name, count in guard.fallen_back.items():
            details[name]["fell_back_share"] = count / (len(stream) - 1)
            console.print(
                f"{name} gave no probability at {count:,} positions of {stream.name}; the base model's took its place"
            )
        if len(experts) == 1:
            return Scored(scores, details, None)
        weights = _tuned_weights(self.tuned, [expert.name for expert in experts])
        fixed, vocabulary_size = config.mixture.weights, model.vocabulary_size
        mixed = mixed_scores(scores, experts, gate_rule(config), vocabulary_size, config.run.seed, fixed, weights)
        scores.losses |= mixed.losses
        scores.seconds |= mixed.seconds
        return Scored(scores, details, mixed)

    def _show(self, progress: ProgressBar) -> Callable[[int, StreamScores], None]:
        done = 0

        def show(scored: int, scores: StreamScores) -> None:
            nonlocal done
            for name, losses in scores.losses.items():
                self.totals[name] += float(losses[done:scored].sum(dtype=np.float64))
            self.done += scored - done
            done = scored
            note = ", ".join(f"{name} {perplexity(total / self.done):.1f}" for name, total in self.totals.items())
            progress.reach(self.done, note)

        return show


def gate_rule(config: Config) -> GateRule:
    """Return how the configured gate learns."""
    return GateRule(tuple(config.gate.rates), config.gate.shared)


def _tuned_weights(tuned: Tuned | None, experts: Sequence[str]) -> dict[str, float] | None:
    """Return the weights that were tuned for just these experts, None where there are none."""
    return tuned.weights if tuned is not None and set(tuned.weights) == {*experts, UNIFORM} else None
