"""What an adapted prediction costs, by solver, beside the base model's own output layer.

    python benchmarks/adaptation.py --output runs/adaptation.json             # V 10k, 33k, 267k; d 400, 1024; K 8, 32, 128
    python benchmarks/adaptation.py --quick --output runs/adaptation.json     # V 10k, 33k, 267k; d 400; K 32
    python benchmarks/adaptation.py --growth --output runs/growth.json        # the restricted solver alone, over V, in turns

Random layers and hidden states; neighbours are noisy copies of the query, their words drawn from the likeliest at the key.
"base" is the log-softmax of the layer, as in any evaluation. "reference" is this project's definition; "peer" is the way of
research code: `copy.deepcopy` of an `nn.Linear` and RMSProp on it, for every query. All in float32, microseconds a query, the
best of several runs over the same queries, on CUDA where there is one. The floor is the larger of operations at this machine's
measured matrix-product rate and bytes at its measured copy rate. Solvers that see the whole vocabulary are left out where
that is more than LARGEST_EXACT products a query.
"""

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mbpa_lm.adaptation import dual, reference, restricted
from mbpa_lm.adaptation.problem import BaseSoftmax, Problem
from mbpa_lm.adaptation.rule import AdaptationRule
from mbpa_lm.system.machine import describe_machine, keep_freed_memory, pick_device

QUERIES, LIKELY, MOVED, ALPHA = 128, 96, 16, 0.02
LARGEST_EXACT = 1 << 32
VOCABULARIES = (10_000, 33_278, 267_735)
COLUMNS = ("base", "base_floor", "restricted", "restricted_floor", "restricted_bytes", "dual", "reference", "peer")
DEVICE = pick_device("auto")


def best_seconds(call: Callable[[], object], seconds: float = 0.7) -> float:
    call()
    times: list[float] = []
    while sum(times) < seconds or not times:
        start = time.perf_counter()
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def make_problem(V: int, d: int, K: int) -> Problem:
    """A layer whose softmax is about as peaked as a trained language model's."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(V, d, generator=generator) * (2.5 / d**0.5)).to(DEVICE)
    bias = torch.randn(V, generator=generator).to(DEVICE)
    queries = torch.randn(QUERIES, d, generator=generator)
    keys = (queries[:, None] + 0.5 * torch.randn(QUERIES, K, d, generator=generator)).to(DEVICE)
    weights, no_values = torch.full((QUERIES, K), 1 / K, device=DEVICE), torch.zeros(QUERIES, K, dtype=torch.int64)
    problem = Problem(weight, bias, keys, no_values, weights, queries.to(DEVICE))
    bases = [part.with_base(LIKELY).base for part in problem.split(4)]
    names = ("log_probabilities_BV", "log_partitions_BK", "likely_words_BKc", "likely_probabilities_BKc")
    base, partitions, words, likely = (torch.cat([getattr(base, name) for base in bases]) for name in names)
    columns = torch.multinomial(likely.flatten(0, 1), 1)
    values = words.flatten(0, 1).gather(1, columns).view(QUERIES, K)
    return Problem(weight, bias, keys, values, weights, problem.queries_Bd, BaseSoftmax(base, partitions, words.int(), likely))


def adapt_copies(problem: Problem, rule: AdaptationRule, targets: torch.Tensor) -> list[float]:
    """Predict the targets as research code does, one query after another."""
    assert problem.bias_V is not None
    layer = torch.nn.Linear(problem.weight_Vd.shape[1], len(problem.weight_Vd), device="meta")
    layer.weight = torch.nn.Parameter(problem.weight_Vd)
    layer.bias = torch.nn.Parameter(problem.bias_V)
    found = []
    for query, target in enumerate(targets):
        adapted = copy.deepcopy(layer)
        optimizer = torch.optim.RMSprop(adapted.parameters(), lr=rule.alpha)
        for _ in range(rule.steps):
            logits = adapted(problem.keys_BKd[query])
            losses = torch.nn.functional.cross_entropy(logits, problem.values_BK[query], reduction="none")
            optimizer.zero_grad()
            (losses * problem.weights_BK[query]).sum().backward()
            optimizer.step()
        with torch.no_grad():
            found.append(float(adapted(problem.queries_Bd[query]).log_softmax(-1)[target]))
    return found


def least_work(V: int, d: int, K: int, T: int, rates: dict[str, float]) -> dict[str, float]:
    """Operations and bytes that a query needs at least: the layer once a batch, the chosen rows and keys once a query."""
    moved = K + MOVED
    operations = {"base": 2 * V * d, "restricted": 2 * K * d * (moved + K / 2) + 2 * (T - 1) * moved * K * K}
    bytes_ = {"base": 4 * (V * d / QUERIES + V), "restricted": 4 * (moved * d + K * d + 2 * K * LIKELY)}
    work: dict[str, float] = {}
    for name, needed in operations.items():
        work[f"{name}_bytes"] = bytes_[name]
        work[f"{name}_floor"] = 1e6 * max(needed / rates["operations"], bytes_[name] / rates["bytes"])
    return work


def measure_rates() -> dict[str, float]:
    left, source = torch.randn(2048, 2048, device=DEVICE), torch.randn(1 << 25, device=DEVICE)
    target = torch.empty_like(source)
    return {
        "operations": 2 * 2048**3 / best_seconds(lambda: left @ left),
        "bytes": 2 * 4 * source.numel() / best_seconds(lambda: target.copy_(source)),
    }


def measure(V: int, d: int, K: int, T: int, rates: dict[str, float], problem: Problem) -> dict[str, float]:
    rule, targets = AdaptationRule(T, ALPHA), problem.values_BK[:, 0]
    layer = torch.nn.functional.linear

    def base() -> torch.Tensor:
        return layer(problem.queries_Bd, problem.weight_Vd, problem.bias_V).log_softmax(-1)

    def solve() -> restricted.Solution:
        return restricted.solve_with_bounds(problem, rule, targets, MOVED, float("inf"))

    row: dict[str, float] = {"V": V, "d": d, "K": K, "T": T, "base": 1e6 / QUERIES * best_seconds(base)}
    row["restricted"] = 1e6 / QUERIES * best_seconds(solve)
    row["restricted_bound_nats"] = float(solve().bounds_B.mean())
    if K * V * d * T <= LARGEST_EXACT:
        few = problem.split(2)[0]
        row["dual"] = 1e6 / 2 * best_seconds(lambda: dual.solve(few, rule, targets[:2]), 0.0)
        row["reference"] = 1e6 / 2 * best_seconds(lambda: reference.solve(few, rule, targets[:2]), 0.0)
        row["peer"] = 1e6 / 2 * best_seconds(lambda: adapt_copies(few, rule, targets[:2]), 0.0)
    return row | least_work(V, d, K, T, rates)


def measure_growth(turns: int = 40) -> dict[str, float]:
    """Microseconds a query of the restricted solver by vocabulary, d 400, K 32, T 10: one turn each, again and again."""
    rule, problems = AdaptationRule(10, ALPHA), {V: make_problem(V, 400, 32) for V in VOCABULARIES}
    times: dict[int, list[float]] = {V: [] for V in problems}
    for _ in range(turns):
        for V, problem in problems.items():
            targets = problem.values_BK[:, 0]
            start = time.perf_counter()
            restricted.solve(problem, rule, targets, MOVED, float("inf"))
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times[V].append(time.perf_counter() - start)
    return {str(V): 1e6 / QUERIES * min(values) for V, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes")
    parser.add_argument("--growth", action="store_true", help="only the restricted solver's time by vocabulary")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    arguments = parser.parse_args()
    keep_freed_memory()
    widths, neighbours = ((400,), (32,)) if arguments.quick else ((400, 1024), (8, 32, 128))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    if arguments.growth:
        growth = measure_growth()
        arguments.output.write_text(json.dumps({"machine": describe_machine(DEVICE), "microseconds": growth}, indent=1) + "\n")
        Console().print(growth)
        return
    rates = measure_rates()
    table = Table(title="microseconds a query (and bytes)")
    for name in ("V", "d", "K", "T", *COLUMNS):
        table.add_column(name.replace("_", " "), justify="right")
    rows = []
    for d, V, K in itertools.product(widths, VOCABULARIES, neighbours):
        problem = make_problem(V, d, K)
        for T in (1, 10):
            row = measure(V, d, K, T, rates, problem)
            rows.append(row)
            result = {"machine": describe_machine(DEVICE), "rates": rates, "queries": QUERIES, "rows": rows}
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")  # after each row: the last ones take long
            cells = [f"{row[name]:,.0f}" if name in row else "" for name in COLUMNS]
            table.add_row(f"{V:,}", str(d), str(K), str(T), *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
