"""A million tokens through a window of 5,000 entries: does memory stay flat, does speed, do results drift?

    python benchmarks/soak.py --output runs/soak.json            # a million tokens, some minutes
    python benchmarks/soak.py --quick --output runs/soak.json    # 60,000

A small LSTM reads random words of a Zipf distribution; `mbpa`, `persistent`, and caches of 500 and 5,000 predict beside it.
Resident memory and speed are taken every 10,000 tokens. In the end the last 6,000 hidden states are put into an empty window,
and the last 1,000 predictions made from it are compared with those that the long run made. It ends with 1 where memory
grew by more than 2% after the first 50,000 tokens, where a tenth of the run was more than 10% slower than the median tenth in
processor time, or where a prediction is another one.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from mbpa_lm.adaptation.slow_weights import GradientScale, SlowRule, SlowWeights
from mbpa_lm.config import AdaptationConfig, ModelConfig
from mbpa_lm.experts.base import Expert
from mbpa_lm.experts.base_model import BaseModelExpert
from mbpa_lm.experts.cache import CacheExpert
from mbpa_lm.experts.mbpa import MbpaExpert
from mbpa_lm.experts.persistent import PersistentExpert
from mbpa_lm.memory.window import WindowMemory
from mbpa_lm.models.base import LanguageModel, ModelOutput, OutputLayer, State
from mbpa_lm.models.lstm import LSTMLanguageModel
from mbpa_lm.scoring.resources import make_history
from mbpa_lm.scoring.stream import StreamScores, score_stream
from mbpa_lm.system.machine import describe_machine, keep_freed_memory, resident_bytes

VOCABULARY, HIDDEN_SIZE, WINDOW, EVERY = 2_000, 64, 5_000, 10_000
TAIL, COMPARED = 6_000, 1_000
WARM_UP = 50_000


class Recorded:
    """A model that keeps the last hidden states it gave, and can give them again."""

    carries_state_in_training = True

    def __init__(self, model: LSTMLanguageModel) -> None:
        self.model, self.kept_Nd = model, torch.empty(0, HIDDEN_SIZE)
        self.vocabulary_size, self.hidden_size = model.vocabulary_size, model.hidden_size

    def __call__(self, tokens: Tensor, state: State | None = None) -> ModelOutput:
        output: ModelOutput = self.model(tokens, state)
        self.kept_Nd = torch.cat([self.kept_Nd, output.hidden_states[0]])[-TAIL:]
        return output

    def output_layer(self) -> OutputLayer:
        return self.model.output_layer()


class Replayed:
    """A model that gives hidden states one after another, whatever it reads."""

    carries_state_in_training = True

    def __init__(self, hidden_states_Nd: Tensor, layer: OutputLayer) -> None:
        self.hidden_states_Nd, self.layer = hidden_states_Nd, layer
        self.vocabulary_size, self.hidden_size = layer.weight.shape

    def __call__(self, tokens: Tensor, state: State | None = None) -> ModelOutput:
        begin = state or 0
        end = begin + tokens.shape[1]
        return ModelOutput(self.hidden_states_Nd[None, begin:end], end, torch.zeros(()))

    def output_layer(self) -> OutputLayer:
        return self.layer


def experts(layer: OutputLayer, with_slow: bool) -> list[Expert]:
    found: list[Expert] = [BaseModelExpert(), MbpaExpert(layer, AdaptationConfig(alpha=0.05), 32)]
    found += [CacheExpert(500, 0.2, 0.1), CacheExpert(WINDOW, 0.2, 0.1)]
    return [*found, PersistentExpert()] if with_slow else found


def score(model: LanguageModel, tokens: np.ndarray, with_slow: bool, told: Any = None) -> StreamScores:
    layer = model.output_layer()
    every = experts(layer, with_slow)
    memory = WindowMemory(WINDOW, HIDDEN_SIZE, 64, torch.float32, torch.device("cpu"))
    slow = None
    if with_slow:
        scale = GradientScale(torch.ones_like(layer.weight), None if layer.bias is None else torch.ones_like(layer.bias))
        slow = SlowWeights(layer.weight, layer.bias, SlowRule(20, 1e-3, 1e-3, 3.0), scale)
    more = () if told is None else (told,)
    return score_stream(model, tokens, every, memory, 200, slow, make_history(every, model), *more)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    keep_freed_memory()  # as evaluate.py does
    torch.manual_seed(0)
    count = 60_000 if arguments.quick else 1_000_000
    weights = 1 / np.arange(1, VOCABULARY + 1)
    tokens = np.random.default_rng(0).choice(VOCABULARY, count + 1, p=weights / weights.sum())
    model = Recorded(LSTMLanguageModel(ModelConfig(hidden_size=HIDDEN_SIZE, layers=1), VOCABULARY).eval())
    points: list[tuple[int, float, int]] = [(0, time.process_time(), resident_bytes())]

    def note(scored: int, scores: StreamScores) -> None:
        if scored - points[-1][0] >= EVERY:
            points.append((scored, time.process_time(), resident_bytes()))
            print(f"{scored:,} tokens, {points[-1][2] / 2**20:,.0f} MiB", flush=True)

    scores = score(model, tokens, True, note)
    tail = score(Replayed(model.kept_Nd, model.output_layer()), tokens[-TAIL - 1 :], False)
    drift = max(float(np.abs(tail.losses[name][-COMPARED:] - scores.losses[name][-COMPARED:]).max()) for name in tail.losses)
    scored, seconds, resident = (np.array(column) for column in zip(*points, strict=True))
    settled = resident[scored >= min(WARM_UP, count // 2)]
    grown = float(settled.max() / settled[0] - 1)
    speeds = np.diff(scored) / np.diff(seconds)
    tenths = np.array([part.mean() for part in np.array_split(speeds, min(10, len(speeds)))])
    slower = float(1 - tenths.min() / np.median(tenths))
    row: dict[str, Any] = {
        "tokens": count,
        "resident": int(settled[-1]),
        "grown": grown,
        "speed": float(np.median(speeds)),
        "slower": slower,
    }
    row |= {"drift": drift, "points": [list(map(float, point)) for point in points]}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": describe_machine(torch.device("cpu")), **row}, indent=1))
    Console(width=120).print(
        f"{count:,} tokens: {settled[-1] / 2**20:,.0f} MiB, grown by {grown:.2%} after the first {WARM_UP:,}; "
        f"{row['speed']:,.0f} tokens a second of processor time, the slowest tenth {slower:.1%} below the median; "
        f"largest difference from a fresh window {drift:.1e} nats"
    )
    return int(grown > 0.02 or slower > 0.10 or drift > 1e-4)


if __name__ == "__main__":
    raise SystemExit(main())
