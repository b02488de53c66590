"""Merging lists of words, by hashing and by sorting, against dictionaries."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.adaptation import words as words_module
from mbpa_lm.adaptation.words import MergedWords, merge_by_sorting, merge_words

PATHS = ["compiled", "pytorch"]
SLACK = {torch.float32: 1e-5, torch.float64: 1e-12}


@contextmanager
def path(name: str) -> Iterator[None]:
    """Have the words merged and summed in compiled loops, or in PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        if name == "pytorch":
            patch.setattr(words_module, "can_take", lambda tensor: False)
        yield


def assert_every_word_has_one_place(words: MergedWords, listed: torch.Tensor, always: torch.Tensor) -> None:
    for row in range(len(listed)):
        own, every = set(always[row].tolist()), {*always[row].tolist(), *listed[row].flatten().tolist()}
        count = int(words.counts_B[row])
        assert count == len(every)
        assert words.filled_Bn[row].tolist() == [place < count for place in range(words.words_Bn.shape[1])]
        assert set(words.words_Bn[row, :count].tolist()) == every
        assert (words.words_Bn[row, count:] == 0).all()
        assert set(words.words_Bn[row, words.always_Bn[row]].tolist()) == own
        assert int(words.always_Bn[row].sum()) == len(own)
        assert torch.equal(words.words_Bn[row, words.listed_places_BKc[row].long()], listed[row].long())
        assert torch.equal(words.words_Bn[row, words.always_places_BA[row]], always[row])
    assert words.words_Bn.shape[1] == int(words.counts_B.max())
    assert words.words_Bn.dtype == words.counts_B.dtype == words.always_places_BA.dtype == torch.int64


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("integer", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", SLACK)
@settings(max_examples=40, deadline=None)
@given(
    *(st.integers(1, 4), st.integers(1, 6), st.integers(0, 8), st.integers(1, 9), st.integers(1, 12)),
    *(st.integers(0, 1000), st.integers(0, 40)),
)
def test_sums_and_choices_are_those_of_a_dictionary(
    name: str, integer: torch.dtype, dtype: torch.dtype, B: int, K: int, c: int, A: int, V: int, seed: int, others: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    listed = torch.randint(0, V, (B, K, c), generator=generator, dtype=integer)
    always = torch.randint(0, V, (B, A), generator=generator)
    factors = torch.rand(B, K, generator=generator, dtype=dtype)
    numbers = torch.rand(B, K, c, generator=generator, dtype=dtype)
    with path(name):
        words = merge_words(listed, always)
        sums = words.sum_by_word(factors, numbers)
        places, filled = words.largest(sums, A + others)
    assert_every_word_has_one_place(words, listed, always)
    assert sums.dtype == dtype
    assert places.shape == filled.shape == (B, min(A + others, words.words_Bn.shape[1]))
    for row in range(B):
        expected: dict[int, float] = dict.fromkeys(always[row].tolist(), 0.0)
        for neighbour in range(K):
            for word, number in zip(listed[row, neighbour].tolist(), numbers[row, neighbour].tolist(), strict=True):
                expected[word] = expected.get(word, 0.0) + float(factors[row, neighbour]) * number
        count = len(expected)
        found = dict(zip(words.words_Bn[row, :count].tolist(), sums[row, :count].tolist(), strict=True))
        assert found == pytest.approx(expected, abs=SLACK[dtype])
        assert (sums[row, count:] == 0).all()
        own = set(always[row].tolist())
        ranked = sorted(expected, key=lambda word: (word not in own, -expected[word]))
        chosen = words.words_Bn[row, places[row, filled[row]]].tolist()
        assert len(chosen) == min(A + others, count)
        assert set(chosen) == set(ranked[: A + others])


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("dtype", SLACK)
@settings(max_examples=40, deadline=None)
@given(
    *(st.integers(1, 4), st.integers(1, 6), st.integers(0, 8), st.integers(1, 9), st.integers(1, 12)),
    *(st.integers(0, 1000), st.floats(0, 300)),
)
def test_masses_and_numbers_are_those_of_the_words_that_are_there(
    name: str, dtype: torch.dtype, B: int, K: int, c: int, A: int, V: int, seed: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    listed = torch.randint(0, V, (B, K, c), generator=generator, dtype=torch.int32)
    always = torch.randint(0, V, (B, A), generator=generator)
    log_probabilities = torch.log_softmax(torch.randn(B, V, generator=generator, dtype=dtype), dim=1)
    with path(name):
        words = merge_words(listed, always)
        shifts = size * torch.randn(words.words_Bn.shape, generator=generator, dtype=dtype)
        shifts[~words.filled_Bn] = 7.0  # must not count
        mass, log_shifted = words.masses(log_probabilities, shifts)
        numbers = torch.stack([words.number_of(torch.full((B,), word), shifts) for word in range(V)])
    for row in range(B):
        count = int(words.counts_B[row])
        expected = dict(zip(words.words_Bn[row, :count].tolist(), shifts[row, :count].tolist(), strict=True))
        log_terms = [float(log_probabilities[row, word]) + shift for word, shift in expected.items()]
        highest = max(log_terms)
        log_sum = highest + math.log(sum(math.exp(term - highest) for term in log_terms))
        assert float(mass[row]) == pytest.approx(sum(float(log_probabilities[row, word].exp()) for word in expected), abs=1e-6)
        assert float(log_shifted[row]) == pytest.approx(log_sum, rel=SLACK[dtype], abs=10 * SLACK[dtype])
        assert numbers[:, row].tolist() == [expected.get(word, 0.0) for word in range(V)]


@pytest.mark.parametrize("name", PATHS)
def test_words_of_a_large_vocabulary_that_hash_alike(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    listed = torch.randint(0, 60, (3, 32, 96), generator=generator, dtype=torch.int32) << 20
    listed[:, ::2] = torch.randint(0, 2**31 - 1, (3, 16, 96), generator=generator, dtype=torch.int32)
    always = torch.randint(0, 2**31 - 1, (3, 32), generator=generator)
    with path(name):
        words = merge_words(listed, always)
    assert_every_word_has_one_place(words, listed, always)


def test_hashing_and_sorting_agree() -> None:
    generator = torch.Generator().manual_seed(0)
    listed = torch.randint(0, 500, (5, 8, 30), generator=generator, dtype=torch.int32)
    always = torch.randint(0, 500, (5, 8), generator=generator)
    hashed, ordered = merge_words(listed, always), merge_by_sorting(listed, always)
    assert torch.equal(hashed.counts_B, ordered.counts_B)
    for row in range(5):
        count = int(hashed.counts_B[row])
        assert torch.equal(hashed.words_Bn[row, :count].sort().values, ordered.words_Bn[row, :count])
    assert_every_word_has_one_place(ordered, listed, always)


@pytest.mark.parametrize("name", PATHS)
def test_numbers_may_be_stored_in_half_precision(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    listed = torch.randint(0, 50, (3, 4, 10), generator=generator, dtype=torch.int32)
    always, factors = torch.randint(0, 50, (3, 4), generator=generator), torch.rand(3, 4, generator=generator)
    stored = torch.rand(3, 4, 10, generator=generator).bfloat16()
    with path(name):
        words = merge_words(listed, always)
        found, expected = words.sum_by_word(factors, stored), words.sum_by_word(factors, stored.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
