"""What an adapted prediction costs, by solver, beside the base model's own output layer.

    python benchmarks/adaptation.py --output runs/adaptation.json             # V 10k, 33k, 267k; K 8, 32, 128; T 1, 10
    python benchmarks/adaptation.py --quick --output runs/adaptation.json     # V 10k, 33k; K 32; T 1, 10; d 400

Random layers and hidden states; neighbours are noisy copies of the query, their words drawn from the base model at the key.
"base" is the log-softmax of the layer, as in any evaluation. "peer" is the way of research code, a copy of the layer and
autograd: the reference solver. All in float32, microseconds a query, the best of several runs over the same queries.
The floor is the larger of operations at this machine's measured matrix-product rate and bytes at its measured copy rate.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mbpa_lm.adaptation import dual, reference, restricted
from mbpa_lm.adaptation.problem import Problem
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.machine import describe_machine, keep_freed_memory

QUERIES, LIKELY, MOVED, ALPHA = 128, 64, 64, 0.05
LARGEST_DUAL = 1 << 32
"""Largest K x V x d for which the whole vocabulary is measured at every key of a query."""


def best_seconds(call: Callable[[], object], seconds: float = 1.0) -> float:
    call()
    times: list[float] = []
    while sum(times) < seconds or not times:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def make_problem(V: int, d: int, K: int) -> Problem:
    """A layer whose softmax is about as peaked as a trained language model's."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(V, d, generator=generator) * (2.5 / d**0.5)
    queries = torch.randn(QUERIES, d, generator=generator)
    keys = queries[:, None] + 0.5 * torch.randn(QUERIES, K, d, generator=generator)
    bias = torch.randn(V, generator=generator)
    values = torch.empty(QUERIES, K, dtype=torch.int64)
    for row in range(QUERIES):
        values[row] = torch.multinomial(torch.softmax(keys[row] @ weight.T + bias, dim=-1), 1, generator=generator)[:, 0]
    parts = Problem(weight, bias, keys, values, torch.full((QUERIES, K), 1 / K), queries).split(4)
    bases = [part.with_base(LIKELY).base for part in parts]
    stacked = [torch.cat([getattr(base, name) for base in bases]) for name in vars(bases[0])]
    return Problem(weight, bias, keys, values, torch.full((QUERIES, K), 1 / K), queries, type(bases[0])(*stacked))


def floor_microseconds(V: int, d: int, K: int, T: int, rates: dict[str, float]) -> dict[str, float]:
    """Operations and bytes that a query needs at least: the layer once a batch, the chosen rows and keys once a query."""
    moved = K + MOVED
    operations = {"base": 2 * V * d, "restricted": 2 * K * d * (moved + K) + 2 * T * moved * K * K}
    bytes_ = {"base": 4 * (V * d / QUERIES + V), "restricted": 4 * (moved * d + K * d + 2 * K * LIKELY)}
    return {name: 1e6 * max(operations[name] / rates["operations"], bytes_[name] / rates["bytes"]) for name in operations}


def measure_rates() -> dict[str, float]:
    left, source = torch.randn(2048, 2048), torch.randn(1 << 25)
    target = torch.empty_like(source)
    return {
        "operations": 2 * 2048**3 / best_seconds(lambda: left @ left),
        "bytes": 2 * 4 * source.numel() / best_seconds(lambda: target.copy_(source)),
    }


def measure(V: int, d: int, K: int, T: int, rates: dict[str, float], problem: Problem) -> dict[str, float]:
    rule, targets = AdaptationRule(T, ALPHA), problem.values_BK[:, 0]
    few = problem.split(2)[0]
    row: dict[str, float] = {"V": V, "d": d, "K": K, "T": T}
    layer = torch.nn.functional.linear
    row["base"] = (
        1e6 / QUERIES * best_seconds(lambda: layer(problem.queries_Bd, problem.weight_Vd, problem.bias_V).log_softmax(-1))
    )
    row["restricted"] = 1e6 / QUERIES * best_seconds(lambda: restricted.solve(problem, rule, targets, MOVED))
    if K * V * d <= LARGEST_DUAL:
        row["dual"] = 1e6 / 2 * best_seconds(lambda: dual.solve(few, rule, targets[:2]))
        exact = dual.solve(few, rule, targets[:2])
        row["restricted_error_nats"] = float((restricted.solve(few, rule, targets[:2], MOVED) - exact).abs().max())
    row["peer"] = 1e6 / 2 * best_seconds(lambda: reference.solve(few, rule, targets[:2]), 0.0)
    row |= {f"{name}_floor": floor for name, floor in floor_microseconds(V, d, K, T, rates).items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    arguments = parser.parse_args()
    keep_freed_memory()
    sizes = (
        [(10_000, 400), (33_278, 400)] if arguments.quick else list(itertools.product((10_000, 33_278, 267_735), (400, 1024)))
    )
    neighbours = (32,) if arguments.quick else (8, 32, 128)
    rates = measure_rates()
    columns = ("base", "restricted", "restricted_floor", "dual", "peer")
    table = Table(title="microseconds a query")
    for name in ("V", "d", "K", "T", *columns):
        table.add_column(name.replace("_", " "), justify="right")
    rows = []
    for (V, d), K in itertools.product(sizes, neighbours):
        problem = make_problem(V, d, K)
        for T in (1, 10):
            row = measure(V, d, K, T, rates, problem)
            rows.append(row)
            cells = [f"{row[name]:,.0f}" if name in row else "" for name in columns]
            table.add_row(f"{V:,}", str(d), str(K), str(T), *cells)
    Console().print(table)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": describe_machine(torch.device("cpu")), "rates": rates, "queries": QUERIES, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
