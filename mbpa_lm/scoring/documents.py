"""Documents that are streams of their own: scored by themselves, shared out over processes, joined in their order.

Each array of a document is put at its place in an array of zeros for all of them, and these are added over the processes. So
the sum is exact, and the result that of one process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mbpa_lm.data.streams import TokenStream
from mbpa_lm.errors import ConfigError
from mbpa_lm.scoring.mixed_scores import MixedScores
from mbpa_lm.scoring.stream import StreamScores
from mbpa_lm.system.processes import Processes

WORST = "worst"
"""In the name of a detail of which the largest counts, not the mean."""


@dataclass(frozen=True)
class Scored:
    """What a pass over a stream gives: the experts' losses, what they say of themselves, and the mixtures of several."""

    scores: StreamScores
    details: dict[str, dict[str, float]]
    mixed: MixedScores | None


def score_documents(documents: Sequence[TokenStream], score: Callable[[TokenStream], Scored], processes: Processes) -> Scored:
    """Score every document by itself and return all together, as if they were one stream without the first token of each.

    Raises ConfigError where there are fewer documents than processes.
    """
    if len(documents) < processes.count:
        raise ConfigError(f"{processes.count} processes cannot share {len(documents)} documents; start fewer")
    longest_first = sorted(range(len(documents)), key=lambda index: -len(documents[index]))
    found = {index: score(documents[index]) for index in longest_first[processes.rank :: processes.count]}
    return _Joiner(found, [len(document) - 1 for document in documents], processes).joined()


class _Joiner:
    """The documents that this process scored, and where those of all belong."""

    def __init__(self, found: dict[int, Scored], lengths: Sequence[int], processes: Processes) -> None:
        self.found, self.processes, self.lengths = found, processes, np.array(lengths)
        self.ends = np.cumsum(self.lengths)

    def joined(self) -> Scored:
        example = next(iter(self.found.values()))
        scores = StreamScores(
            losses=self._along(lambda part: part.scores.losses),
            components={},
            features=np.zeros((0, 0), dtype=np.float32),
            seconds=self._sums(lambda part: part.scores.seconds),
            part_seconds=self._sums(lambda part: part.scores.part_seconds),
        )
        details = {expert: self._details(expert) for expert in example.details}
        return Scored(scores, details, None if example.mixed is None else self._mixed())

    def _mixed(self) -> MixedScores:
        def of(part: Scored) -> MixedScores:
            assert part.mixed is not None  # every document has the same experts
            return part.mixed

        marks = self._means(lambda part: {"noise": of(part).with_noise, "fixed": of(part).best_fixed})
        return MixedScores(
            losses=self._along(lambda part: of(part).losses),
            seconds=self._sums(lambda part: of(part).seconds),
            gate_weights=self._along(lambda part: {"weights": of(part).gate_weights})["weights"],
            without=self._means(lambda part: of(part).without),
            with_noise=marks["noise"],
            best_fixed=marks["fixed"],
        )

    def _along(self, arrays: Callable[[Scored], Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Join named arrays along the stream of all documents."""
        joined = {}
        for name, example in arrays(next(iter(self.found.values()))).items():
            whole = np.zeros((self.ends[-1], *example.shape[1:]), dtype=example.dtype)
            for index, part in self.found.items():
                whole[self.ends[index] - self.lengths[index] : self.ends[index]] = arrays(part)[name]
            joined[name] = self.processes.total_array(whole)
        return joined

    def _by_document(self, numbers: Callable[[Scored], Mapping[str, float]]) -> dict[str, np.ndarray]:
        joined = {}
        for name in numbers(next(iter(self.found.values()))):
            values = np.zeros(len(self.lengths))
            for index, part in self.found.items():
                values[index] = numbers(part).get(name, 0.0)
            joined[name] = self.processes.total_array(values)
        return joined

    def _sums(self, numbers: Callable[[Scored], Mapping[str, float]]) -> dict[str, float]:
        return {name: float(values.sum()) for name, values in self._by_document(numbers).items()}

    def _means(self, numbers: Callable[[Scored], Mapping[str, float]]) -> dict[str, float]:
        """Return means over tokens of what are means in each document."""
        found = self._by_document(numbers).items()
        return {name: float((values * self.lengths).sum() / self.ends[-1]) for name, values in found}

    def _details(self, expert: str) -> dict[str, float]:
        worst = {name: float(values.max()) for name, values in self._by_document(lambda part: part.details[expert]).items()}
        means = self._means(lambda part: part.details[expert])
        return {name: worst[name] if WORST in name else mean for name, mean in means.items()}
