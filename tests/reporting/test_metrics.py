import math

import numpy as np
import pytest

from mbpa_lm.data.streams import TokenStream
from mbpa_lm.numerics.perplexities import perplexity
from mbpa_lm.reporting.metrics import Targets, summarize


def make_stream() -> TokenStream:
    return TokenStream(
        name="stream",
        tokens=np.array([0, 1, 2, 1, 3, 0, 1], dtype=np.uint16),
        characters=np.array([4, 3, 1, 3, 2, 4, 3], dtype=np.uint16),
        words=np.array([1, 1, 1, 1, 0, 1, 1], dtype=np.uint16),
        document_starts=np.array([0, 4]),
    )


def test_the_first_token_is_not_scored_and_the_rest_is() -> None:
    targets = Targets.of(make_stream(), np.array([7, 100, 0, 1001]))
    assert targets.training_counts.tolist() == [100, 0, 100, 1001, 7, 100]
    assert targets.distances.tolist() == [0, 0, 2, 0, 5, 3]
    assert targets.document_positions.tolist() == [2, 3, 4, 1, 2, 3]
    assert (targets.words, targets.characters) == (5, 16)


def test_numbers_by_hand() -> None:
    losses = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=np.float32)
    report = summarize(losses, Targets.of(make_stream(), np.array([7, 100, 0, 1001])))
    assert report["tokens"] == 6
    assert report["perplexity"] == pytest.approx(math.exp(21 / 6))
    assert report["bits_per_token"] == pytest.approx(21 / 6 / math.log(2))
    assert report["bits_per_word"] == pytest.approx(21 / 5 / math.log(2))
    assert report["bits_per_character"] == pytest.approx(21 / 16 / math.log(2))
    frequency = {name: group["tokens"] for name, group in report["by_training_frequency"].items()}
    assert frequency == {"unseen": 1, "1-10": 1, "11-100": 3, "101-1,000": 0, "1,001-10,000": 1, "more than 10,000": 0}
    assert report["by_training_frequency"]["11-100"]["nats_per_token"] == pytest.approx((1 + 3 + 6) / 3)
    again = report["by_recurrence"]
    assert again["seen before in the stream"]["nats_per_token"] == pytest.approx((3 + 5 + 6) / 3)
    assert again["first time in the stream"]["nats_per_token"] == pytest.approx((1 + 2 + 4) / 3)
    assert again["seen before, at most 10 times in training"]["tokens"] == 1
    assert report["by_document_position"]["1-10"]["tokens"] == 6
    assert [part["tokens"] for part in report["along_stream"]] == [1] * 6


def test_every_breakdown_counts_every_token() -> None:
    generator = np.random.default_rng(0)
    count = 5000
    stream = TokenStream("s", generator.integers(0, 50, count), np.ones(count), np.ones(count), np.array([0, 70, 900]))
    report = summarize(generator.random(count - 1), Targets.of(stream, 10 ** generator.integers(0, 6, 50)))
    for group in ("by_training_frequency", "by_document_position"):
        assert sum(part["tokens"] for part in report[group].values()) == count - 1
    assert sum(part["tokens"] for part in report["along_stream"]) == count - 1
    total = sum(part["nats_per_token"] * part["tokens"] for part in report["along_stream"])
    assert total / (count - 1) == pytest.approx(report["nats_per_token"])


def test_a_hopeless_loss_is_a_number() -> None:
    assert math.isfinite(perplexity(1e6))
