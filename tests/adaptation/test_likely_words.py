"""The likeliest words of a distribution, against a plain sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.adaptation.likely_words import likely_words, likely_words_of_logits

ROWS = {
    "random": lambda shape, generator: torch.randn(shape, generator=generator, dtype=torch.float64),
    "peaked": lambda shape, generator: 9 * torch.randn(shape, generator=generator, dtype=torch.float64),
    "constant": lambda shape, generator: torch.zeros(shape, dtype=torch.float64),
    "of three values": lambda shape, generator: torch.randint(0, 3, shape, generator=generator).double(),
    "rising": lambda shape, generator: torch.randn(shape, generator=generator, dtype=torch.float64).sort(1).values,
    "falling": lambda shape, generator: -torch.randn(shape, generator=generator, dtype=torch.float64).sort(1).values,
    "largest where the sample looks": lambda shape, generator: (
        (torch.arange(shape[1]) % 16 == 0).double().expand(shape).clone()
    ),
    "largest where the sample does not": lambda shape, generator: (
        (torch.arange(shape[1]) % 16 != 0).double().expand(shape).clone()
    ),
    "mostly impossible": lambda shape, generator: torch.where(
        torch.arange(shape[1]) % 5 > 0, -torch.inf, torch.randn(shape, generator=generator, dtype=torch.float64)
    ),
}


def assert_likeliest(log_probabilities: torch.Tensor, count: int) -> None:
    words, probabilities = likely_words(log_probabilities, count)
    assert words.dtype == torch.int32
    assert probabilities.dtype == log_probabilities.dtype
    assert words.shape == probabilities.shape == (len(log_probabilities), count)
    assert torch.equal(log_probabilities.gather(1, words.long()).exp(), probabilities)
    assert all(len(set(row)) == count for row in words.tolist())
    largest = log_probabilities.topk(count, dim=1).values  # among equals any word will do
    assert torch.equal(log_probabilities.gather(1, words.long()).sort(1, descending=True).values, largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ROWS)
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 700), st.floats(0, 1), st.integers(0, 1000))
def test_they_are_those_of_a_sort(kind: str, dtype: torch.dtype, C: int, V: int, share: float, seed: int) -> None:
    logits = ROWS[kind]((C, V), torch.Generator().manual_seed(seed))
    assert_likeliest(torch.log_softmax(logits, dim=1).to(dtype), round(share * V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("V", "count"), [(1, 1), (100, 64), (100, 100), (97, 96), (16, 1), (17, 8), (5000, 96), (5000, 0)])
def test_vocabularies_hardly_larger_than_the_count_and_much_larger(V: int, count: int, dtype: torch.dtype) -> None:
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_likeliest(torch.log_softmax(logits, dim=1).to(dtype), count)


def test_rows_may_lie_apart() -> None:
    log_probabilities = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)).log_softmax(0).T
    assert not log_probabilities.is_contiguous()
    assert_likeliest(log_probabilities, 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("V", "count"), [(500, 10), (500, 500), (20, 15), (1000, 96)])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_nan_gives_words_of_the_vocabulary_all_the_same(V: int, count: int, dtype: torch.dtype, share: float) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(5, V, generator=generator, dtype=dtype)
    numbers[torch.rand(5, V, generator=generator) < share] = torch.nan
    numbers[0] = torch.nan
    words, _ = likely_words(numbers, count)
    assert words.shape == (5, count)
    assert bool(((words >= 0) & (words < V)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 60.0, -400.0])
@pytest.mark.parametrize("size", [7, 96, 5000])
def test_logits_give_the_same_without_being_normalized(dtype: torch.dtype, shift: float, size: int) -> None:
    logits = (4 * torch.randn(9, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64) + shift).to(dtype)
    words, probabilities, log_partitions = likely_words_of_logits(logits, 7)
    expected = logits.double().log_softmax(-1)
    accuracy = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(log_partitions.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=accuracy)
    torch.testing.assert_close(probabilities.double(), expected.gather(1, words.long()).exp(), rtol=1e-3, atol=accuracy)
    torch.testing.assert_close(
        probabilities.double().sort(1).values, expected.topk(7).values.exp().sort(1).values, rtol=1e-3, atol=accuracy
    )
