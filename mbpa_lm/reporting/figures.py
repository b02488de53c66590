"""Figures of an evaluation, drawn from its metrics alone.

Every expert keeps its colour in all of them. Base is grey; a gate over all, black.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from mbpa_lm.errors import RunFolderError, reason
from mbpa_lm.scoring.mixed_scores import GATE, UNIFORM

FOLDER = "figures"
DOTS_PER_INCH = 120
HIGHEST = 1e9
"""Perplexity that is drawn: that of an expert that diverged may be beyond what an axis can show."""

Metrics = Mapping[str, Any]


def write_figures(folder: Path, metrics: Metrics) -> dict[str, Path]:
    """Draw into FOLDER of a run folder; return the files by name. Raises RunFolderError where they cannot be written."""
    drawings = {"along_stream": along_stream(metrics), "quality_against_cost": quality_against_cost(metrics)}
    if len(metrics["experts"]) > 1:
        drawings["gain"] = gain(metrics)
    if "gate" in metrics:
        drawings["gate_weights"] = gate_weights(metrics)
    paths = {}
    try:
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)
        for name, figure in drawings.items():
            paths[name] = folder / FOLDER / f"{name}.png"
            figure.savefig(paths[name], dpi=DOTS_PER_INCH)
    except OSError as error:
        raise RunFolderError(f"figures could not be written to {folder / FOLDER}: {reason(error)}") from None
    return paths


def along_stream(metrics: Metrics) -> Figure:
    """Draw the perplexity of every expert on equal parts of the stream."""
    figure, (axes,) = _make_figure(1, "perplexity along the stream", metrics)
    for name, values in metrics["experts"].items():
        segments = values["along_stream"]
        places = [100 * (number + 0.5) / len(segments) for number in range(len(segments))]
        axes.plot(places, [min(segment["perplexity"], HIGHEST) for segment in segments], **_style(name, metrics))
    axes.set(xlabel="% of the stream", ylabel="perplexity", yscale="log")
    _put_legend(axes)
    return figure


def gain(metrics: Metrics) -> Figure:
    """Draw how much less than the base model every expert loses on a word, by how frequent and how recent the word is."""
    figure, both = _make_figure(2, "nats gained over base", metrics)
    groups = {
        "by_training_frequency": "occurrences of the word in the training text",
        "by_distance": "positions since the word last occurred in the stream",
    }
    for axes, (group, label) in zip(both, groups.items(), strict=True):
        base = {row: values for row, values in metrics["experts"]["base"][group].items() if values["tokens"]}
        for name, values in metrics["experts"].items():
            if name != "base":
                gains = [base[row]["nats_per_token"] - values[group][row]["nats_per_token"] for row in base]
                axes.plot(range(len(base)), gains, marker="o", **_style(name, metrics))
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_xticks(range(len(base)), [f"{row}\n({values['tokens']:,})" for row, values in base.items()], fontsize=7)
        axes.set(xlabel=label, ylabel="nats a token")
    _put_legend(both[-1])
    return figure


def gate_weights(metrics: Metrics) -> Figure:
    """Draw how the gate shares its trust along the stream."""
    figure, (axes,) = _make_figure(1, "weights of the gate along the stream", metrics)
    curves = metrics["gate"]["weights_along_stream"]
    count = len(curves["base"])
    places = [100 * (number + 0.5) / count for number in range(count)]
    colours = [_style(name, metrics)["color"] if name != UNIFORM else "lightgrey" for name in curves]
    axes.stackplot(places, *curves.values(), labels=list(curves), colors=colours)
    axes.set(
        xlabel="% of the stream", ylabel="mean weight", xlim=(places[0], places[-1]) if count > 1 else (0, 100), ylim=(0, 1)
    )
    _put_legend(axes)
    return figure


def quality_against_cost(metrics: Metrics) -> Figure:
    """Draw perplexity against tokens a second: better is down, faster is right."""
    figure, (axes,) = _make_figure(1, "quality against cost", metrics)
    for name, values in metrics["experts"].items():
        style = _style(name, metrics)
        place = values["tokens_per_second"], min(values["perplexity"], HIGHEST)
        axes.scatter(*place, color=style["color"])
        axes.annotate(name, place, (4, 3), textcoords="offset points", fontsize=7)
    axes.set(xlabel=f"tokens a second, alone ({metrics['machine'].split(',')[0]})", ylabel="perplexity", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


def _make_figure(columns: int, title: str, metrics: Metrics) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(6.5 * columns + 1.5, 4.2), layout="constrained")
    figure.suptitle(f"{metrics['stream']['name']}: {title}", fontsize=10)
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _style(name: str, metrics: Metrics) -> dict[str, Any]:
    """Return colour, label and width of an expert's line."""
    fixed = {"base": "grey", GATE: "black"}
    others = [other for other in metrics["experts"] if other not in fixed]
    colour = fixed[name] if name in fixed else colormaps["tab20"](others.index(name) % 20)
    return {"color": colour, "label": name, "linewidth": 2.2 if name in fixed else 1.2}


def _put_legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7, frameon=False)
