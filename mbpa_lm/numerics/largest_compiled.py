"""The largest numbers of a long row, in compiled loops: a threshold guessed from a sample leaves few to choose from."""

import numpy as np

from mbpa_lm.numerics.compiled import compiled_part

STRIDE = 16
"""Every so manieth number of a row is looked at to guess which are among its largest."""

BLOCK = 64
"""Numbers that are compared with the threshold at once."""


@compiled_part
def place_largest(numbers: np.ndarray, chosen: np.ndarray) -> None:
    """Fill `chosen` int32 with the places of the largest numbers of a row (at least as many), in any order.

    A NaN is chosen last.
    """
    size, count = len(numbers), len(chosen)
    candidates = np.empty(size + 1, np.int32)  # one more, which a loop without branches writes to
    rank = 3 * count // (2 * STRIDE) + 3
    found = 0
    while found < count:
        found = 0
        if rank * STRIDE >= size:
            for place in range(size):
                candidates[place] = place
            found = size
        else:
            found = _above(numbers, _sampled_threshold(numbers, rank), candidates)
        rank *= 2
    values = np.empty(found, numbers.dtype)
    for place in range(found):
        values[place] = numbers[candidates[place]]
    smallest = np.partition(values, found - count)[found - count]
    taken = 0
    for equal in range(2):  # first those above the smallest, then as many equal to it as there is room for
        for place in range(found):
            if taken < count and (values[place] == smallest if equal else values[place] > smallest):
                chosen[taken] = candidates[place]
                taken += 1
    for place in range(taken, count):  # only where numbers are NaN
        chosen[place] = candidates[place]


@compiled_part
def _above(numbers: np.ndarray, threshold: float, places: np.ndarray) -> int:
    """Write down the places of the numbers that are at least the threshold; return how many there are."""
    found = np.uint64(0)  # unsigned, or every index would be tested for being negative
    whole = len(numbers) // BLOCK * BLOCK
    blocks = numbers[:whole].reshape(whole // BLOCK, BLOCK)
    for block in range(len(blocks)):
        any_above = np.int32(0)
        for offset in range(BLOCK):
            any_above |= np.int32(blocks[block, offset] >= threshold)
        if any_above:
            for offset in range(BLOCK):
                places[found] = block * BLOCK + offset
                found += np.uint64(blocks[block, offset] >= threshold)
    for place in range(whole, len(numbers)):
        places[found] = place
        found += np.uint64(numbers[place] >= threshold)
    return np.int64(found)  # type: ignore[return-value]


@compiled_part
def _sampled_threshold(numbers: np.ndarray, rank: int) -> float:
    """Return the number of the given rank, the largest being 1, among every STRIDE-th number of the row."""
    largest = np.full(rank, -np.inf, numbers.dtype)  # descending
    for place in range(0, len(numbers), STRIDE):
        number = numbers[place]
        if number > largest[rank - 1]:
            rise = rank - 1
            while rise > 0 and largest[rise - 1] < number:
                largest[rise] = largest[rise - 1]
                rise -= 1
            largest[rise] = number
    return largest[rank - 1]  # type: ignore[no-any-return]
