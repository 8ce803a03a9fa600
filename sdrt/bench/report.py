"""The HTML report: one file that needs nothing else, with plots as SVG inside it. Matplotlib draws them; it is imported here only."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from sdrt.bench.compare import Comparison, fidelity_problems
from sdrt.bench.formats import interval, median, number, share, word
from sdrt.bench.history import Trend
from sdrt.bench.metrics import METRICS
from sdrt.bench.result import ran
from sdrt.errors import printable

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; background: #fff; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.88rem; } th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid #d8dee4; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; } th.n { text-align: right; }
svg { max-width: 100%; height: auto; } .bad { color: #b3261e; font-weight: 600; } .good { color: #1a7f37; font-weight: 600; } .unsure { color: #9a6700; font-weight: 600; } .note { color: #57606a; }
"""
_COLOURS = ("#1f6feb", "#d1570c", "#1a7f37", "#8250df", "#9a6700", "#57606a")
_WIDTH_IN = 8.6


def result_html(document: Mapping[str, Any], history: Sequence[Trend] = ()) -> str:
    """One run: its table, per-step times, distributions, the trend of earlier runs and the profile, as far as each is there."""
    problems = fidelity_problems(document)
    verdict = _verdict("FAILED: " + "; ".join(problems), "bad") if problems else _verdict("fidelity ok", "good")
    parts = [verdict, _paragraph(ran(document)), _notes(document["warnings"]), _stats_table(document)]
    if steps := _per_step(document):
        parts += ["<h2>Time per model call</h2>", steps]
    parts += ["<h2>Distribution over processes</h2>", _distributions({"": document})]
    if document.get("fit"):
        fit = document["fit"]
        parts.append(_paragraph(f"time = {fit['fixed_ms']:.2f} ms + model calls x {fit['per_call_ms']:.3f} ms (largest deviation {fit['residual_ms']:.2f} ms)"))
    if history:
        parts += ["<h2>Trend</h2>", *_trend_plots(history)]
    if document.get("layers"):
        parts += _layers(document["layers"])
    return _page(f"sdrt bench: {document['bundle'].get('name', '')}", [*parts, *_environment(document)])


def comparison_html(comparison: Comparison) -> str:
    """Two runs side by side."""
    kind = "bad" if comparison.failures else "unsure" if comparison.undecided else "good"
    parts = [_verdict(comparison.headline, kind), _paragraph(comparison.ran), _notes(comparison.notes)]
    rows = [(row.name, number(row.base, row.unit), number(row.new, row.unit), interval(row), word(row, comparison.interleaved)) for row in comparison.rows]
    parts.append(_table(("metric", "base", "new", "new / base [95 % interval]", "verdict"), rows, numbers=(1, 2)))
    parts += ["<h2>Distribution over processes</h2>", _distributions({"base": comparison.base, "new": comparison.new})]
    return _page("sdrt bench: base and new", [*parts, *_environment(comparison.new)])


def trend_html(trends: Sequence[Trend]) -> str:
    """All runs of a history."""
    return _page("sdrt bench: trend", _trend_plots(trends))


def _stats_table(document: Mapping[str, Any]) -> str:
    rows = []
    for name, stats in document["stats"].items():
        known = METRICS.get(name)
        unit = known.unit if known else ""
        rows.append((name, median(stats, unit), number(stats["p90"], unit), number(stats["p99"], unit), str(stats["n"]), known.meaning if known else ""))
    rows += [(name, f"{value:,}", "", "", "", "counter") for name, value in document["counters"].items()]
    return _table(("metric", "median [95 % interval]", "p90", "p99", "n", "what it is"), rows, numbers=(2, 3, 4))


def _per_step(document: Mapping[str, Any]) -> str:
    calls, samples = document["counters"].get("model_calls"), document["samples"].get("step_ms")
    if not calls or not samples:
        return ""
    rows = [np.reshape(values, (-1, calls)) for values in samples if values and len(values) % calls == 0]
    if not rows:
        return ""
    table = np.concatenate(rows)
    figure, axes = _axes(2.8)
    x = np.arange(1, calls + 1)
    low, middle, high = np.percentile(table, [10, 50, 90], axis=0)
    axes.fill_between(x, low, high, color=_COLOURS[0], alpha=0.2, linewidth=0, label="10 to 90 %")
    axes.plot(x, middle, color=_COLOURS[0], marker="o", markersize=3, label=f"median of {len(table)} pictures")
    axes.set(xlabel="model call", ylabel="ms", ylim=(0, 1.2 * float(high.max()) or 1.0))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False, ncols=2)
    return _svg(figure)


def _distributions(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Every sample of the main timings, a column of dots per process, with its median."""
    shown = [name for name in ("total_ms", "step_ms", "decode_ms", "latency_ms") if any(name in document["samples"] for document in documents.values())]
    figure = Figure(figsize=(_WIDTH_IN, 2.7 * max(1, len(shown))), layout="constrained")
    for index, name in enumerate(shown):
        axes = figure.add_subplot(max(1, len(shown)), 1, index + 1)
        for side, (label, document) in enumerate(documents.items()):
            random = np.random.default_rng(0)
            for process, values in enumerate(document["samples"].get(name, [])):
                place = process + 1 + (side - (len(documents) - 1) / 2) * 0.3
                axes.scatter(place + random.uniform(-0.08, 0.08, len(values)), values, s=16, alpha=0.5, color=_COLOURS[side], linewidths=0)
                if values:
                    bar = label if process == 0 else ""
                    axes.hlines(float(np.median(values)), place - 0.14, place + 0.14, color=_COLOURS[side], linewidth=2, label=bar)
        axes.set(ylabel=name, xlabel="process" if index == len(shown) - 1 else "")
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
        if len(documents) > 1:
            axes.legend(frameon=False)
    return _svg(figure)


def _trend_plots(trends: Sequence[Trend]) -> list[str]:
    parts = []
    for label in dict.fromkeys(trend.ran for trend in trends):
        group = [trend for trend in trends if trend.ran == label and trend.name in (*METRICS, "engine_bytes", "bundle_bytes")]
        parts.append(_paragraph(label))
        for trend in group:
            figure, axes = _axes(2.0)
            x = np.arange(1, len(trend.values) + 1)
            axes.plot(x, trend.values, color=_COLOURS[0], marker="o", markersize=4)
            if trend.limit is not None:
                axes.axhline(trend.limit, color=_COLOURS[1], linestyle="--", linewidth=1, label="Q3 + 3 IQR of the runs before")
                axes.legend(frameon=False)
            if trend.outside:
                axes.plot(x[-1:], trend.values[-1:], color=_COLOURS[1], marker="o", markersize=8)
            top = 1.2 * max(*trend.values, trend.limit or 0.0, 0.0) or 1.0
            axes.set(ylabel=trend.name, xlabel=f"run, {trend.times[0][:10]} to {trend.times[-1][:10]}", xlim=(0.5, len(trend.values) + 0.5), ylim=(0, top))
            axes.xaxis.get_major_locator().set_params(integer=True)
            parts.append(_svg(figure))
    return parts


def _layers(layers: Mapping[str, Any]) -> list[str]:
    peak = layers["peak"]
    at_best = [f"{peak[name] / 1e9:,.1f} {unit}" for name, unit in (("flops_per_s", "GFLOP/s"), ("bytes_per_s", "GB/s")) if peak[name] is not None]
    parts = [
        "<h2>Profile</h2>",
        _paragraph(
            f"{layers['backend']}; this machine at best: {', '.join(at_best) or 'not measured'} ({layers['peak_of']}); a better library may pass 100 %. "
            "Bytes are what operators would move if nothing stayed in a cache. Profiled is the sum of the operators, in runs of their own."
        ),
        _notes(layers["notes"]),
    ]
    rows = [
        (
            graph, f"{found['ms']:.2f}", f"{found['operators_ms']:.2f}", str(found["kernels"]), _scaled(found["flops"], 1e9, 3),
            _scaled(found["bytes"], 1e6, 1), _scaled(found["intensity"], 1, 1), _scaled(found["flops_per_s"], 1e9, 1),
            share(found["share_of_peak"]), share(found["share_of_roofline"]),
        )
        for graph, found in layers["graphs"].items()
    ]  # fmt: skip
    head = ("graph", "ms", "profiled ms", "kernels", "GFLOP", "MB", "FLOP/byte", "GFLOP/s", "of peak", "of roofline")
    parts.append(_table(head, rows, numbers=tuple(range(1, 10))))
    for graph, found in layers["graphs"].items():
        slowest = found["slowest"]
        figure, axes = _axes(0.6 + 0.24 * len(slowest))
        axes.barh([f"{one['op']}  {printable(one['name'])[:46]}" for one in slowest], [one["ms"] for one in slowest], color=_COLOURS[0])
        axes.invert_yaxis()
        axes.set(xlabel="ms")
        parts += [f"<h2>{html.escape(graph)}: slowest operators</h2>", _svg(figure)]
    return parts


def _scaled(value: float | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:,.{digits}f}"


def _environment(document: Mapping[str, Any]) -> list[str]:
    fields = [*document["env"].items(), *((f"engine {name}", value) for name, value in document["engine"].items())]
    return ["<h2>Machine and engine</h2>", _table(("", ""), [(name, str(value)) for name, value in fields if value is not None])]


def _axes(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """The figure as an SVG element. Equal figures are equal text: no date, and names from a fixed salt."""
    with rc_context({"svg.hashsalt": "sdrt", "svg.fonttype": "none", "font.family": "sans-serif"}):
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _verdict(text: str, kind: str) -> str:
    return f'<p class="{kind}">{_escape(text)}</p>'


def _paragraph(text: str) -> str:
    return f"<p>{_escape(text)}</p>"


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="note">{_escape(str(note))}</p>' for note in notes)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def cells(tag: str, values: Sequence[str]) -> str:
        right = dict.fromkeys(numbers, ' class="n"')
        return "".join(f"<{tag}{right.get(index, '')}>{_escape(value)}</{tag}>" for index, value in enumerate(values))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _page(title: str, parts: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_escape(title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><h1>{_escape(title)}</h1>\n{chr(10).join(filter(None, parts))}\n</body></html>\n'
