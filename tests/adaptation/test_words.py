"""Merging lists of words, against dictionaries."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mbpa_lm.adaptation.words import merge_words


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(0, 30), st.integers(1, 6), st.integers(1, 12), st.integers(0, 100), st.integers(0, 40))
def test_sums_and_choices_are_those_of_a_dictionary(B: int, m: int, K: int, V: int, seed: int, others: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    listed = torch.randint(0, V, (B, m), generator=generator)
    always = torch.randint(0, V, (B, K), generator=generator)
    numbers = torch.rand(B, m, generator=generator, dtype=torch.float64)
    count = K + others
    words = merge_words(listed, always)
    sums = words.sum_by_word(numbers)
    chosen, places = words.largest(sums, count)
    for row in range(B):
        expected: dict[int, float] = dict.fromkeys(always[row].tolist(), 0.0)
        for word, number in zip(listed[row].tolist(), numbers[row].tolist(), strict=True):
            expected[word] = expected.get(word, 0.0) + number
        last = words.last_Bn[row]
        found = dict(zip(words.words_Bn[row, last].tolist(), sums[row, last].tolist(), strict=True))
        assert found.keys() == expected.keys()
        assert all(abs(found[word] - expected[word]) < 1e-12 for word in expected)
        assert (sums[row, ~last] == 0).all()
        own = set(always[row].tolist())
        ranked = sorted(expected, key=lambda word: (word not in own, -expected[word]))
        real = places[row] >= 0
        assert int(real.sum()) == min(count, len(expected))
        assert set(chosen[row, real].tolist()) == set(ranked[:count])


def test_values_are_put_at_their_places_and_nowhere_else() -> None:
    words = merge_words(torch.tensor([[5, 3, 5]]), torch.tensor([[3]]))  # sorted: 3 3 5 5
    placed = words.put(torch.zeros(1, 4), torch.tensor([[3, -1]]), torch.tensor([[7.0, 9.0]]))
    assert placed.tolist() == [[0.0, 0.0, 0.0, 7.0]]
