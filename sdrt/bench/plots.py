"""The plots of reports, as SVG text. They are drawn by Matplotlib, which is imported only here."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator, NullLocator

from sdrt.bench.compare import Row
from sdrt.bench.history import Trend
from sdrt.bench.metrics import METRICS
from sdrt.bench.statistics import FASTER, SLOWER
from sdrt.errors import printable

_BLUE, _ORANGE, _GREEN, _PURPLE, _OCHRE, _GREY = "#1f6feb", "#d1570c", "#1a7f37", "#8250df", "#9a6700", "#57606a"
_SIDES = (_BLUE, _ORANGE)
_WIDTH_IN = 9.2
_STYLE: Any = {
    "svg.hashsalt": "sdrt",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#afb8c1",
    "axes.labelcolor": "#424a53",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eaeef2",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titlecolor": "#1b1f24",
}
_SHOWN = ("total_ms", "step_ms", "step_gpu_ms", "decode_ms", "latency_ms")
_PARTS = {
    "tokenise_ms": ("tokenise", _PURPLE),
    "text_encoder_ms": ("text encoder", _GREEN),
    "step_ms": ("model calls", _BLUE),
    "decode_ms": ("decoder", _ORANGE),
    "copies_ms": ("copies", _OCHRE),
}
"""Parts of a picture's time, in order, and their colours."""


def per_step(document: Mapping[str, Any]) -> str | None:
    """Time of each model call by its place in the picture. None where calls cannot be told apart."""
    calls, samples = document["counters"].get("model_calls"), document["samples"].get("step_ms")
    if not calls or not samples:
        return None
    rows = [np.reshape(values, (-1, calls)) for values in samples if values and len(values) % calls == 0]
    if not rows:
        return None
    table = np.concatenate(rows)
    with rc_context(_STYLE):
        figure, axes = _axes(2.8)
        x = np.arange(1, calls + 1)
        low, middle, high = np.percentile(table, [10, 50, 90], axis=0)
        axes.fill_between(x, low, high, color=_BLUE, alpha=0.18, linewidth=0, label="10 to 90 %")
        axes.plot(x, middle, color=_BLUE, marker="o", markersize=3.5, label=f"median of {len(table)} pictures")
        axes.set(xlabel="model call", ylabel="ms", xlim=(0.5, calls + 0.5), ylim=(0, 1.25 * float(high.max()) or 1.0))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(ncols=2, loc="upper right")
        return _svg(figure)


def parts_of_a_picture(document: Mapping[str, Any]) -> str | None:
    """One bar: where the median picture spends its time. None where the total is unknown."""
    stats, calls = document["stats"], document["counters"].get("model_calls")
    if "total_ms" not in stats or not calls:
        return None
    # If a GPU gave its own times, they are the parts: the host finishes a call long before the GPU does.
    timed = {name: stats.get(name.replace("_ms", "_gpu_ms"), stats.get(name)) for name in _PARTS}
    parts = [
        (*_PARTS[name], found["p50"] * (calls if name == "step_ms" else 1))
        for name, found in timed.items()
        if found is not None
    ]
    rest = stats["total_ms"]["p50"] - sum(ms for _, _, ms in parts)
    if rest > 0:
        parts.append(("rest", _GREY, rest))
    with rc_context(_STYLE):
        figure, axes = _axes(1.25)
        left = 0.0
        for label, colour, ms in parts:
            axes.barh([0], [ms], left=left, color=colour, height=0.5, label=f"{label} {ms:.3g} ms")
            left += ms
        axes.set(yticks=[], xlabel="ms, medians", xlim=(0, left))
        axes.spines[["left"]].set_visible(False)
        axes.grid(visible=False)
        figure.legend(ncols=len(parts), loc="outside upper left", fontsize=9, handlelength=1, columnspacing=1.2)
        return _svg(figure)


def distributions(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Every sample of the main timings, one column of dots per process, with its median."""
    shown = [name for name in _SHOWN if any(name in document["samples"] for document in documents.values())]
    with rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, 2.5 * max(1, len(shown))), layout="constrained")
        for index, name in enumerate(shown):
            axes = figure.add_subplot(max(1, len(shown)), 1, index + 1)
            for side, (label, document) in enumerate(documents.items()):
                random = np.random.default_rng(0)
                for process, values in enumerate(document["samples"].get(name, [])):
                    place = process + 1 + (side - (len(documents) - 1) / 2) * 0.36
                    axes.scatter(
                        place + random.uniform(-0.1, 0.1, len(values)),
                        values,
                        s=13,
                        alpha=0.45,
                        color=_SIDES[side],
                        linewidths=0,
                    )
                    if values:
                        bar = label if process == 0 else ""
                        axes.hlines(
                            float(np.median(values)),
                            place - 0.15,
                            place + 0.15,
                            color=_SIDES[side],
                            linewidth=2.2,
                            label=bar,
                        )
            axes.set(
                title=f"{name}: {METRICS[name].meaning}",
                ylabel="ms",
                xlabel="process" if index == len(shown) - 1 else "",
            )
            axes.grid(visible=False, axis="x")
            axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
            if len(documents) > 1:
                axes.legend(ncols=2, loc="upper right")
        return _svg(figure)


def ratios(rows: Sequence[Row]) -> str | None:
    """New over base with its interval, one line per timing, gated timings first. The shaded range is the margin, within
    which a gated timing counts as the same.

    The axis is logarithmic and as wide as the gated timings need. An interval that goes beyond it ends in an arrow.
    """
    shown = sorted(
        (row for row in rows if row.ratio is not None and row.low is not None and row.high is not None),
        key=lambda row: not row.gated,
    )
    if not shown:
        return None
    leading = [row for row in shown if row.gated] or shown
    reach = (
        max(max(abs(np.log(row.low or 1)), abs(np.log(row.high or 1)), 3 * np.log1p(row.margin)) for row in leading)
        * 1.08
    )
    least, most = float(np.exp(-reach)), float(np.exp(reach))
    with rc_context(_STYLE):
        figure, axes = _axes(0.9 + 0.27 * len(shown))
        for place, row in enumerate(shown):
            assert row.ratio is not None and row.low is not None and row.high is not None
            colour = (
                _ORANGE if row.verdict == SLOWER else _GREEN if row.verdict == FASTER else _BLUE if row.gated else _GREY
            )
            low, high = (min(max(value, least), most) for value in (row.low, row.high))
            axes.hlines(place, low, high, color=colour, linewidth=2)
            for edge, marker, beyond in ((least, "<", row.low < least), (most, ">", row.high > most)):
                if beyond:
                    axes.plot([edge], [place], color=colour, marker=marker, markersize=7, clip_on=False)
            if least <= row.ratio <= most:
                axes.plot([row.ratio], [place], color=colour, marker="o", markersize=6)
            if row.gated:
                axes.barh(
                    [place],
                    [row.margin + 1 - 1 / (1 + row.margin)],
                    left=[1 / (1 + row.margin)],
                    height=0.75,
                    color=_BLUE,
                    alpha=0.1,
                )
        axes.axvline(1, color=_GREY, linewidth=1)
        axes.set_xscale("log")
        axes.set(
            yticks=range(len(shown)),
            yticklabels=[row.name for row in shown],
            xlabel="new / base: left of 1 is faster",
            xlim=(least, most),
        )
        axes.set_xticks([tick for tick in MaxNLocator(9).tick_values(least, most) if least <= tick <= most])
        axes.xaxis.set_major_formatter(FormatStrFormatter("%.4g"))
        axes.xaxis.set_minor_locator(NullLocator())
        for label, row in zip(axes.get_yticklabels(), shown, strict=True):
            label.set_fontweight("bold" if row.gated else "normal")
        axes.invert_yaxis()
        return _svg(figure)


def trend(found: Trend) -> str:
    """One metric over the runs of a history, with its fence."""
    with rc_context(_STYLE):
        figure, axes = _axes(2.1)
        x = np.arange(1, len(found.values) + 1)
        values, limit = (
            [value / (1e6 if found.unit == "bytes" else 1) for value in series]
            for series in (found.values, [found.limit or 0.0])
        )
        axes.plot(x, values, color=_BLUE, marker="o", markersize=4)
        if found.limit is not None:
            axes.axhline(
                limit[0], color=_ORANGE, linestyle="--", linewidth=1, label="fence: Q3 + 3 IQR of the runs before"
            )
            axes.legend(loc="lower right")
        if found.outside:
            axes.plot(x[-1:], values[-1:], color=_ORANGE, marker="o", markersize=9)
        unit = "MB" if found.unit == "bytes" else found.unit
        meaning = f": {METRICS[found.name].meaning}" if found.name in METRICS else ""
        axes.set(
            title=f"{found.name}{meaning}",
            ylabel=unit,
            xlabel=f"run, {found.times[0][:10]} to {found.times[-1][:10]}",
            xlim=(0.5, len(values) + 0.5),
            ylim=(0, 1.2 * max(*values, limit[0], 0.0) or 1.0),
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        return _svg(figure)


def slowest(operators: Sequence[Mapping[str, Any]]) -> str:
    """The slowest operators of a graph, as bars."""
    with rc_context(_STYLE):
        figure, axes = _axes(0.6 + 0.24 * len(operators))
        labels = [
            printable(one["name"] if one["op"] in one["name"] else f"{one['op']}  {one['name']}")[:60]
            for one in operators
        ]
        axes.barh(range(len(operators)), [one["ms"] for one in operators], color=_BLUE, height=0.7)
        axes.set(yticks=range(len(operators)), yticklabels=labels, xlabel="ms")
        axes.tick_params(axis="y", labelsize=8.5)
        axes.grid(visible=False, axis="y")
        axes.invert_yaxis()
        return _svg(figure)


def _axes(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure) -> str:
    """The figure as an SVG element. Equal figures give equal text: no date, and names from a fixed salt."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]
