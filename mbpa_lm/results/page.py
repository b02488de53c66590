"""The page: every number comes from a run, but what was published elsewhere."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mbpa_lm.errors import DAMAGES, DataError
from mbpa_lm.numerics.perplexities import perplexity
from mbpa_lm.reporting.report import METRICS_FILE
from mbpa_lm.results.runs import Run, changed
from mbpa_lm.scoring.mixed_scores import GATE

PUBLISHED = (
    ("AWD-LSTM", 57.3, 65.8, "Merity et al. 2018"),
    ("AWD-LSTM with a continuous cache", 52.8, 52.0, "Merity et al. 2018"),
    ("AWD-LSTM with dynamic evaluation", 51.1, 44.3, "Krause et al. 2018"),
)
"""Model, test perplexity on Penn Treebank and on WikiText-2, and who reports it."""

GROUPS = {
    "by_training_frequency": "occurrences of the word in training",
    "by_recurrence": "occurrence in the stream",
    "by_distance": "positions since the word last occurred in the stream",
}
FIGURES = {
    "along_stream": "perplexity along the stream",
    "gain": "gain",
    "gate_weights": "weights",
    "quality_against_cost": "cost",
}


def results_page(runs: Sequence[Run], folder: Path) -> str:
    """Return the page. Raises DataError where a run lacks something that is shown."""
    details = [_whole(run) for run in runs]
    parts = [
        "# Results",
        f"Written by `python -m mbpa_lm.results {folder}` from the run folders there: every number comes from the "
        f"`{METRICS_FILE}` of the run that is named beside it, and the command that made it is there too. Nothing was chosen "
        'on a test text. "As configured" are the defaults and the file in `configs/`, some of which were chosen on validation '
        "texts (`docs/log.md`).",
        "## At a glance",
        _overview(runs),
        *_seeds(runs),
        "## Published numbers, for orientation",
        "Other base models, trained far longer: not comparable with ours in absolute terms. What can be compared is how much a "
        "method takes off its own base model.",
        _published(runs),
    ]
    for part in details:
        parts += part
    return "\n\n".join(parts) + "\n"


def _whole(run: Run) -> list[str]:
    """Return the details of a run of which everything can be shown."""
    try:
        _overview([run])
        return _details(run)
    except (*DAMAGES, ArithmeticError) as error:
        raise DataError(changed(run.folder / METRICS_FILE, error)) from None


def _overview(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        experts = run.experts
        base = experts["base"]["perplexity"]
        alone = {name: values["perplexity"] for name, values in experts.items() if name in run.metrics["gate"]["without"]}
        best = min(alone, key=lambda name: alone[name])
        gate = experts[GATE]
        rows.append(
            [
                run.text,
                run.model,
                run.settings,
                f"{base:.2f}",
                f"{alone[best]:.2f} ({best})",
                f"{gate['perplexity']:.2f}",
                _change(gate["perplexity"], base),
                f"{gate['tokens_per_second']:,.0f}",
                f"`{run.folder.name}`",
            ]
        )
    header = ["text", "model", "experts", "base", "best alone", "gate", "against base", "tokens/s", "run"]
    return _table(header, rows)


def _seeds(runs: Sequence[Run]) -> list[str]:
    groups: dict[str, dict[int, Run]] = defaultdict(dict)
    for run in runs:
        groups[run.is_like()].setdefault(run.seed, run)  # one model may have been evaluated on two machines
    rows = []
    for by_seed in groups.values():
        seeds, group = sorted(by_seed), list(by_seed.values())
        if len(seeds) > 1:
            base, gate = ([run.experts[name]["perplexity"] for run in group] for name in ("base", GATE))
            gains = [100 * (1 - of_gate / of_base) for of_base, of_gate in zip(base, gate, strict=True)]
            first = group[0]
            names = ", ".join(str(seed) for seed in seeds)
            rows.append([first.text, first.model, first.settings, names, *map(_spread, (base, gate, gains))])
    if not rows:
        return []
    header = ["text", "model", "experts", "seeds", "base", "gate", "gain, %"]
    return ["## Seeds", "Mean and standard deviation over models trained with different seeds.", _table(header, rows)]


def _spread(numbers: Sequence[float]) -> str:
    return f"{statistics.mean(numbers):.2f} ± {statistics.stdev(numbers):.2f}"


def _published(runs: Sequence[Run]) -> str:
    rows = [[model, f"{ptb}", f"{wikitext}", source] for model, ptb, wikitext, source in PUBLISHED]
    ours: dict[tuple[str, str], dict[str, Run]] = defaultdict(dict)
    for run in sorted(runs, key=lambda run: len(run.folder.name)):  # of runs that differ by their seed, the plainest name
        if run.split == "test" and run.is_lstm and not run.metrics["config"]["evaluation"]["max_tokens"]:
            ours[run.model, run.settings].setdefault(run.metrics["config"]["data"]["corpus"], run)
    seen: list[list[str]] = []
    for (model, settings), by_corpus in ours.items():
        for expert, what in (
            ("base", f"our {model}"),
            ("cache-500", f"our {model} with a continuous cache"),
            ("dynamic", f"our {model} with dynamic evaluation"),
            (GATE, f"our {model} with the gate over all"),
        ):
            cells = []
            for corpus in ("ptb", "wikitext-2"):
                found = by_corpus[corpus].experts.get(expert) if corpus in by_corpus else None
                cells.append(f"{found['perplexity']:.1f}" if found else "")
            if any(cells) and [what, *cells] not in seen:
                seen.append([what, *cells])
                rows.append([f"{what} ({settings})", *cells, "this page"])
    return _table(["test perplexity", "Penn Treebank", "WikiText-2", "source"], rows)


def _details(run: Run) -> list[str]:
    metrics, experts = run.metrics, run.experts
    base, gate = experts["base"]["perplexity"], metrics["gate"]
    whole = experts[GATE]["perplexity"]
    rows = []
    for name, values in experts.items():
        without, weight = gate["without"].get(name), gate["weights"].get(name)
        rows.append(
            [
                name,
                f"{values['perplexity']:.2f}",
                "" if name == "base" else _change(values["perplexity"], base),
                "" if weight is None else f"{weight:.3f}",
                "" if without is None else f"{without['perplexity'] / whole - 1:+.2%}",
                f"{values['bits_per_character']:.3f}",
                f"{values['tokens_per_second']:,.0f}",
            ]
        )
    header = ["expert", "perplexity", "against base", "weight in the gate", "the gate without it", "bits/character", "tokens/s"]
    stream, noisy = metrics["stream"], gate["with_a_noise_expert"]["perplexity"]
    hindsight = gate["best_fixed_weights_in_hindsight"]["perplexity"]
    parts = [
        f"## {run.text}: {run.model}, {run.settings} (`{run.folder.name}`)",
        f"{stream['scored']:,} tokens scored. {_trained(run)}",
        _table(header, rows),
        f"Best fixed weights in hindsight: {hindsight:.2f}. The gate with one more expert that predicts noise: {noisy:.2f} "
        f"({noisy / whole - 1:+.2%})." + _without_groups(gate, whole),
    ]
    for group, label in GROUPS.items():
        parts.append(_by_group(experts, group, label))
    pictures = {name: run.folder / "figures" / f"{name}.png" for name in FIGURES}
    shown = [
        f"![{FIGURES[name]}]({path.as_posix()})" for name, path in pictures.items() if path.is_file() and run.split == "test"
    ]
    if shown:
        parts.append("\n".join(shown))
    parts.append(_provenance(run))
    return parts


def _trained(run: Run) -> str:
    trained = run.metrics["checkpoint"]["trained"]
    if "seconds" not in trained:
        return f"Seed {run.seed}."
    where = f" on {trained['machine']}" if "machine" in trained else ""
    return (
        f"The model: {run.metrics['parameters'] / 1e6:.1f} M parameters, seed {run.seed}, {trained['training']['epochs']} "
        f"epochs in {trained['seconds'] / 60:.0f} minutes{where}, validation perplexity {perplexity(trained['best_loss']):.2f}."
    )


def _without_groups(gate: dict[str, Any], whole: float) -> str:
    groups = {name: found for name, found in gate["without"].items() if name not in gate["weights"]}
    return "".join(
        f" Without {name}: {found['perplexity']:.2f} ({found['perplexity'] / whole - 1:+.1%})."
        for name, found in groups.items()
    )


def _by_group(experts: dict[str, Any], group: str, label: str) -> str:
    filled = {row: values for row, values in experts["base"][group].items() if values["tokens"]}
    header = [f"perplexity by {label}", *(f"{row} ({values['tokens']:,})" for row, values in filled.items())]
    rows = [[name, *(_short(values[group][row]["perplexity"]) for row in filled)] for name, values in experts.items()]
    return _table(header, rows)


def _provenance(run: Run) -> str:
    metrics = run.metrics
    commands = [metrics["checkpoint"]["trained"].get("command"), metrics["command"]]
    lines = "\n".join(f"    {_plain(command)}" for command in commands if command)
    return (
        f"{lines}\n\nCommit {metrics['commit']}, {metrics['date'][:10]}, {metrics['machine']}; all experts side by side took "
        f"{metrics['seconds'] / 60:.1f} minutes and {metrics['peak_memory_bytes'] / 1e6:,.0f} MB."
    )


def _plain(command: str) -> str:
    """Return a command as a user types it."""
    return command if command.startswith("python ") else f"python {command}"


def _change(number: float, base: float) -> str:
    return f"{number / base - 1:+.1%}"


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.1f}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
