"""One pass over the beginning of the validation text, as all kinds of tuning make it."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from mbpa_lm.checkpoints.checkpoint import Checkpoint
from mbpa_lm.checkpoints.tuned import Tuned
from mbpa_lm.config import Config, RemoteConfig
from mbpa_lm.data.streams import TokenStream
from mbpa_lm.experts.base import Expert
from mbpa_lm.memory.base import Memory
from mbpa_lm.scoring.resources import make_history, make_memory, make_slow_weights
from mbpa_lm.scoring.stream import StreamScores, score_stream
from mbpa_lm.system.progress import ProgressBar


@dataclass(frozen=True)
class Validation:
    """What is tuned, and on which text."""

    config: Config
    checkpoint: Checkpoint
    stream: TokenStream

    def first(self, tokens: int) -> "Validation":
        """Return that of the first predictions only."""
        return replace(self, stream=self.stream.first(tokens + 1))

    def score(
        self, what: str, experts: Sequence[Expert], memory: Memory | None = None, tuned: Tuned | None = None
    ) -> StreamScores:
        """Run experts over the text, with a memory as configured and the metric of `tuned` where none is given."""
        config, model = self.config, self.checkpoint.model
        metric = None if tuned is None else tuned.metric_tensor()
        slow_weights = make_slow_weights(config, self.checkpoint, experts)
        bar = ProgressBar(f"{what} on {self.stream.name}", len(self.stream) - 1)
        here = replace(config, remote=RemoteConfig())  # no database is to remember the validation text
        with bar as progress, ExitStack() as closing:
            return score_stream(
                model,
                self.stream.tokens,
                experts,
                make_memory(here, self.checkpoint, metric, closing) if memory is None else memory,
                config.evaluation.chunk_length,
                slow_weights,
                make_history(experts, model),
                lambda scored, _: progress.reach(scored),
            )
