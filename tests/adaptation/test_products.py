"""Products with chosen rows against plain matrix products, at all the sizes at which loops have a remainder."""

import pytest
import torch

from mbpa_lm.adaptation.products import gram, products_with_rows


def random_arguments(K: int, S: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * K + 10 * S + d)
    keys, table = torch.randn(3, K, d, generator=generator, dtype=dtype), torch.randn(7, d, generator=generator, dtype=dtype)
    return keys, table, torch.randint(0, 7, (3, S), generator=generator)  # rows recur


@pytest.mark.parametrize("d", [1, 3, 5, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_the_chosen_rows(dtype: torch.dtype, d: int) -> None:
    for K in range(1, 10):
        for S in range(1, 10):
            keys, table, rows = random_arguments(K, S, d, dtype)
            found = products_with_rows(keys, table, rows)
            assert found.dtype == dtype
            torch.testing.assert_close(found, keys @ table[rows].mT, msg=f"K {K}, S {S}")


@pytest.mark.parametrize("d", [1, 5])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_table_in_half_precision_is_read_as_it_is(half: torch.dtype, d: int) -> None:
    for K in range(1, 10):
        for S in range(1, 10):
            keys, table, rows = random_arguments(K, S, d, torch.float32)
            table = table.to(half)
            found = products_with_rows(keys, table, rows)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, keys @ table.float()[rows].mT, msg=f"K {K}, S {S}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_matrices(dtype: torch.dtype) -> None:
    for K in range(1, 10):
        keys = random_arguments(K, 1, 5, dtype)[0]
        torch.testing.assert_close(gram(keys), keys @ keys.mT, msg=f"K {K}")


def test_tensors_may_lie_in_any_order_and_the_table_may_want_gradients() -> None:
    keys, table, rows = random_arguments(6, 4, 5, torch.float32)
    expected = keys @ table[rows].mT
    keys_apart, table_apart, rows_apart = keys.mT.contiguous().mT, table.T.contiguous().T, rows.T.contiguous().T
    found = products_with_rows(keys_apart, table_apart.requires_grad_(), rows_apart)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gram(keys_apart), keys @ keys.mT)


def test_nothing_chosen() -> None:
    keys, table, _ = random_arguments(4, 1, 5, torch.float32)
    assert products_with_rows(keys, table, torch.empty(3, 0, dtype=torch.int64)).shape == (3, 4, 0)
