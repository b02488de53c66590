"""The inner loops of `words.py` on a CPU."""

import numpy as np
from numba import prange

from mbpa_lm.numerics.compiled import compiled_loop, compiled_part, exponential

MULTIPLIER = 2654435761  # Knuth's, of multiplicative hashing


@compiled_loop
def merge_by_hashing(
    listed: np.ndarray,
    always: np.ndarray,
    words: np.ndarray,
    listed_places: np.ndarray,
    always_places: np.ndarray,
    counts: np.ndarray,
) -> None:
    """Give every different word of a query a place, first those always chosen; counts (B, 2) tell how many, and of all."""
    slots = words.shape[1]
    bits = 4
    while (1 << bits) < 2 * slots:
        bits += 1
    for query in prange(len(listed)):
        table = np.full(1 << bits, -1, np.int32)  # the place of the word that hashes here
        count = 0
        for neighbour in range(always.shape[1]):
            word = always[query, neighbour]
            slot = _slot(word, table, words, query)
            if table[slot] < 0:
                table[slot] = count
                words[query, count] = word
                count += 1
            always_places[query, neighbour] = table[slot]
        counts[query, 0] = count
        for neighbour in range(listed.shape[1]):
            for column in range(listed.shape[2]):
                word = listed[query, neighbour, column]
                slot = _slot(word, table, words, query)
                if table[slot] < 0:
                    table[slot] = count
                    words[query, count] = word
                    count += 1
                listed_places[query, neighbour, column] = table[slot]
        counts[query, 1] = count


@compiled_part
def _slot(word: int, table: np.ndarray, words: np.ndarray, query: int) -> int:
    """Return the slot of the table that holds the word, or the empty one where it belongs."""
    mask = len(table) - 1
    slot = ((word * MULTIPLIER) >> 8) & mask
    while table[slot] >= 0 and words[query, table[slot]] != word:
        slot = (slot + 1) & mask
    return slot


@compiled_loop
def sum_by_place(places: np.ndarray, factors: np.ndarray, numbers: np.ndarray, sums: np.ndarray) -> None:
    """Set sums (B, n) to the sum of factors (B, K) times numbers (B, K, c) over each place (B, K, c)."""
    for query in prange(len(places)):
        for place in range(sums.shape[1]):
            sums[query, place] = 0
        for neighbour in range(places.shape[1]):
            factor = factors[query, neighbour]
            for column in range(places.shape[2]):
                sums[query, places[query, neighbour, column]] += factor * numbers[query, neighbour, column]


@compiled_loop
def masses(
    log_probabilities: np.ndarray,
    words: np.ndarray,
    counts: np.ndarray,
    shifts: np.ndarray,
    mass: np.ndarray,
    log_shifted: np.ndarray,
) -> None:
    """Sum the probability of the first words of each query, and that with their logits shifted, the latter as a log.

    All float32 but the sums, which are added up in float64.
    """
    for query in prange(len(words)):
        count = counts[query]
        numbers = np.empty((2, count), np.float32)
        largest = np.float32(-np.inf)
        for place in range(count):
            numbers[0, place] = log_probabilities[query, words[query, place]]
            numbers[1, place] = numbers[0, place] + shifts[query, place]
            largest = max(largest, numbers[1, place])
        for place in range(count):
            numbers[1, place] -= largest
        every = numbers.ravel()
        for place in range(2 * count):
            every[place] = exponential(every[place])
        before, after = 0.0, 0.0
        for place in range(count):
            before += numbers[0, place]
            after += numbers[1, place]
        mass[query] = before
        log_shifted[query] = largest + np.log(after)


@compiled_loop
def number_of(wanted: np.ndarray, words: np.ndarray, counts: np.ndarray, numbers: np.ndarray, found: np.ndarray) -> None:
    """Set found (B,) to the number at the place of the wanted word, 0 where it has none."""
    for query in prange(len(words)):
        found[query] = 0
        for place in range(counts[query]):
            if words[query, place] == wanted[query]:
                found[query] = numbers[query, place]
