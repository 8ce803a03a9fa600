"""The HTML report: one file that needs nothing else, with plots as SVG inside it."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from sdrt.bench import plots
from sdrt.bench.compare import UP, Comparison, fidelity_problems
from sdrt.bench.formats import interval, median, number, share, word
from sdrt.bench.history import Trend
from sdrt.bench.metrics import METRICS
from sdrt.bench.result import ran
from sdrt.bench.statistics import AMBIGUOUS, FASTER, SLOWER
from sdrt.errors import printable

_STYLE = """
body {
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; max-width: 60rem;
  margin: 2.5rem auto; padding: 0 1.2rem; color: #1b1f24; background: #fff;
}
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.3rem; }
.subtitle { color: #57606a; margin: 0.3rem 0 1.2rem; }
.verdict { padding: 0.7rem 1rem; border-left: 5px solid; border-radius: 4px; font-weight: 600; }
.verdict.bad { background: #fff0ee; border-color: #b3261e; }
.verdict.good { background: #edf9f0; border-color: #1a7f37; }
.verdict.unsure { background: #fff8e5; border-color: #9a6700; }
.bad { color: #b3261e; } .good { color: #1a7f37; } .unsure { color: #9a6700; } .plain { color: #57606a; }
td.bad, td.good { font-weight: 600; }
.notes { color: #57606a; font-size: 0.9rem; }
.notes p { margin: 0.8rem 0 0; }
.notes ul { margin: 0.1rem 0 0.8rem; padding-left: 1.3rem; }
.cards { display: flex; flex-wrap: wrap; gap: 0.8rem; margin: 1.2rem 0; }
.cards div { flex: 1 1 8.6rem; border: 1px solid #d8dee4; border-radius: 8px; padding: 0.6rem 0.9rem; }
.cards small { display: block; color: #57606a; font-size: 0.8rem; } .cards b { font-size: 1.35rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.87rem; margin: 0.6rem 0; }
th, td { padding: 0.28rem 0.6rem; border-bottom: 1px solid #eaeef2; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #d8dee4; }
td:first-child { white-space: nowrap; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { display: block; width: 100%; height: auto; }
summary { font-size: 1.2rem; font-weight: 700; margin-top: 2rem; cursor: pointer; }
@media print { body { margin: 0; max-width: none; } svg, tr, .cards div { break-inside: avoid; } }
"""
_CARDS = (
    ("total_ms", "one picture"),
    ("picture_ms", "a picture of the batch"),
    ("latency_ms", "arrival to pixels"),
    ("step_gpu_ms", "a model call, GPU"),
    ("step_ms", "a model call"),
    ("load_ms", "loading"),
    ("cold_ms", "cold start"),
    ("peak_rss_bytes", "peak memory"),
    ("device_bytes", "GPU memory"),
)


def result_html(document: Mapping[str, Any], history: Sequence[Trend] = ()) -> str:
    """One run: its numbers, where a picture's time goes, per-step times, distributions, the trend of earlier runs and
    the profile. Missing parts are left out.
    """
    problems = fidelity_problems(document)
    right = "The pictures are right: fixed-seed latents and pixels agree with the bundle's references."
    stats = document["stats"]
    cards = [
        (label, number(stats[name]["p50"], METRICS[name].unit), _beside(stats[name], METRICS[name].unit))
        for name, label in _CARDS
        if name in stats
    ]
    fit = document.get("fit")
    parts = [
        _verdict("FAILED: " + "; ".join(problems), "bad") if problems else _verdict(right, "good"),
        _cards(cards),
        _notes(document["warnings"]),
        _section(
            "Where a picture's time goes",
            plots.parts_of_a_picture(document),
            _paragraph(
                f"Fitted over several numbers of steps: {fit['fixed_ms']:.2f} ms"
                f" + model calls x {fit['per_call_ms']:.3f} ms (largest deviation {fit['residual_ms']:.2f} ms)."
            )
            if fit
            else "",
        ),
        _server(document.get("server")),
        _section("Time per model call", plots.per_step(document)),
        _section("Every sample, by process", plots.distributions({"": document})),
        "<h2>All timings and sizes</h2>",
        _stats_table(document),
        "<h2>Counters</h2>",
        _table(
            ("counter", "per picture, or in all"),
            [(name, f"{value:,}") for name, value in document["counters"].items()],
            numbers=(1,),
        ),
    ]
    if history:
        parts += ["<h2>Trend</h2>", *_trend_plots(history)]
    if document.get("layers"):
        parts += _layers(document["layers"])
    name = document["bundle"].get("name", "")
    return _page(f"Latency of {name}" if name else "Latency", _subtitle(document), [*parts, _environment(document)])


def comparison_html(comparison: Comparison) -> str:
    """Two runs side by side."""
    kind = "bad" if comparison.failures else "unsure" if comparison.undecided or comparison.different else "good"
    rows = [
        (
            row.name,
            number(row.base, row.unit),
            number(row.new, row.unit),
            interval(row),
            word(row, comparison.interleaved),
        )
        for row in comparison.rows
    ]
    words = {SLOWER: "bad", UP: "bad", FASTER: "good", AMBIGUOUS: "unsure"}
    kinds = [
        "bad" if row.failed else words.get(row.verdict, "plain") if row.gated else "plain" for row in comparison.rows
    ]
    parts = [
        _verdict(comparison.headline, kind),
        _notes(comparison.notes),
        _section(
            "Ratios with their 95 % intervals",
            plots.ratios(comparison.rows),
            _paragraph(
                "Bold is gated, and its margin is shaded; grey is only reported. "
                "An arrow: the interval goes on beyond the axis."
            ),
        ),
        "<h2>All metrics</h2>",
        _table(
            ("metric", "base", "new", "new / base [95 % interval]", "verdict"), rows, numbers=(1, 2, 3), kinds=kinds
        ),
        _section("Every sample, by process", plots.distributions({"base": comparison.base, "new": comparison.new})),
    ]
    old, new = (side["bundle"].get("name") or "" for side in (comparison.base, comparison.new))
    title = f"Latency of {new}, base and new" if old == new else f"Latency of {new} beside {old}"
    return _page(title, _subtitle(comparison.new), [*parts, _environment(comparison.new)])


def trend_html(trends: Sequence[Trend]) -> str:
    """All runs of a history."""
    outside = list(dict.fromkeys(trend.name for trend in trends if trend.outside))
    judged = any(trend.limit is not None for trend in trends)
    verdict = (
        _verdict(f"Beyond the fence: {', '.join(outside)}", "bad")
        if outside
        else _verdict("The newest runs lie within their fences.", "good")
    )
    too_few = _verdict("No fence yet: ten earlier runs of one kind are needed.", "unsure")
    return _page(
        "Latency over time",
        f"{max((len(trend.values) for trend in trends), default=0)} runs",
        [verdict if judged else too_few, *_trend_plots(trends)],
    )


def _server(server: Mapping[str, Any] | None) -> str:
    if not server:
        return ""
    attained = ", ".join(f"{rate:.3g}" for rate in server["attained_per_s"])
    text = (
        f"Offered {server['offered_per_s']:g} requests per second at random, attained {attained} in each process:"
        f" {server['completed']} of {server['arrivals']} served, "
    )
    return f"<h2>Server</h2>{_paragraph(text + str(server['rejected']) + ' turned away by a full queue.')}"


def _subtitle(document: Mapping[str, Any]) -> str:
    tool, cpu = document["tool"], document["env"].get("gpu") or document["env"].get("cpu")
    made = f"sdrt {tool.get('sdrt')}" + (f" ({tool['git'][:9]})" if tool.get("git") else "")
    return "; ".join(
        filter(
            None, (ran(document), str(cpu or ""), document["time"].replace("T", " ").partition("+")[0] + " UTC", made)
        )
    )


def _beside(stats: Mapping[str, Any], unit: str) -> str:
    if stats["ci95"] is None:
        return f"median, n={stats['n']}"
    low, high = (number(value, unit) for value in stats["ci95"])
    return f"{low} to {high}, n={stats['n']}"


def _stats_table(document: Mapping[str, Any]) -> str:
    rows = []
    for name, stats in document["stats"].items():
        known = METRICS.get(name)
        unit = known.unit if known else ""
        n = f"{stats['n']} in {stats['processes']}"
        rows.append(
            (
                name,
                median(stats, unit),
                number(stats["p90"], unit),
                number(stats["p99"], unit),
                n,
                known.meaning if known else "",
            )
        )
    return _table(
        ("metric", "median [95 % interval]", "p90", "p99", "n in processes", "what it is"), rows, numbers=(1, 2, 3, 4)
    )


def _trend_plots(trends: Sequence[Trend]) -> list[str]:
    parts = []
    for label in dict.fromkeys(trend.ran for trend in trends):
        group = [
            found for found in trends if found.ran == label and found.name in (*METRICS, "engine_bytes", "bundle_bytes")
        ]
        first = [
            found
            for found in group
            if found.outside
            or found.name not in METRICS
            or METRICS[found.name].gated
            or found.name in ("cold_ms", "peak_rss_bytes")
        ]
        rest = [found for found in group if found not in first]
        parts += [f"<h3>{_escape(label)}</h3>", *map(plots.trend, first)]
        if rest:
            parts.append(f"<details><summary>{len(rest)} more</summary>{''.join(map(plots.trend, rest))}</details>")
    return parts


def _layers(layers: Mapping[str, Any]) -> list[str]:
    peak = layers["peak"]
    at_best = [
        f"{peak[name] / 1e9:,.1f} {unit}"
        for name, unit in (("flops_per_s", "GFLOP/s"), ("bytes_per_s", "GB/s"))
        if peak[name] is not None
    ]
    parts = [
        "<h2>Profile</h2>",
        _paragraph(
            f"{layers['backend']}; this machine at best: {', '.join(at_best) or 'not measured'} ({layers['peak_of']});"
            " a better library may pass 100 %. Bytes are what operators would move if nothing stayed in a cache."
            " Profiled is the sum of the operators, in runs of their own."
        ),
        _notes(layers["notes"]),
    ]
    rows = [
        (
            graph,
            f"{found['ms']:.2f}",
            f"{found['operators_ms']:.2f}",
            str(found["kernels"]),
            _scaled(found["flops"], 1e9, 3),
            _scaled(found["bytes"], 1e6, 1),
            _scaled(found["intensity"], 1, 1),
            _scaled(found["flops_per_s"], 1e9, 1),
            share(found["share_of_peak"]),
            share(found["share_of_roofline"]),
        )
        for graph, found in layers["graphs"].items()
    ]
    head = ("graph", "ms", "profiled ms", "kernels", "GFLOP", "MB", "FLOP/byte", "GFLOP/s", "of peak", "of roofline")
    parts.append(_table(head, rows, numbers=tuple(range(1, 10))))
    for graph, found in layers["graphs"].items():
        parts += [f"<h3>{html.escape(graph)}: slowest operators</h3>", plots.slowest(found["slowest"])]
    return parts


def _scaled(value: float | None, unit: float, digits: int) -> str:
    return "–" if value is None else f"{value / unit:,.{digits}f}"


def _environment(document: Mapping[str, Any]) -> str:
    fields = [*document["env"].items(), *((f"engine {name}", value) for name, value in document["engine"].items())]
    table = _table(("", ""), [(name, str(value)) for name, value in fields if value is not None])
    return f"<details open><summary>Machine and engine</summary>{table}</details>"


def _verdict(text: str, kind: str) -> str:
    return f'<p class="verdict {kind}">{_escape(text)}</p>'


def _paragraph(text: str) -> str:
    return f"<p>{_escape(text)}</p>"


def _notes(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{_escape(str(note))}</li>" for note in notes)
    return f'<div class="notes"><p>To be read with it:</p><ul>{items}</ul></div>' if items else ""


def _cards(cards: Sequence[tuple[str, str, str]]) -> str:
    """The most important numbers: label, value, and its interval or its meaning."""
    boxes = "".join(
        f"<div><small>{_escape(label)}</small><b>{_escape(value)}</b><small>{_escape(beside)}</small></div>"
        for label, value, beside in cards
    )
    return f'<div class="cards">{boxes}</div>' if boxes else ""


def _section(title: str, plot: str | None, below: str = "") -> str:
    return f"<h2>{_escape(title)}</h2>{plot}{below}" if plot else ""


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), kinds: Sequence[str] = ()
) -> str:
    """`kinds` are classes of the last cell of each row."""

    def cells(tag: str, values: Sequence[str], kind: str = "") -> str:
        named = dict.fromkeys(numbers, "n") | ({len(values) - 1: kind} if kind else {})
        return "".join(
            f"<{tag}{_class(named.get(index, ''))}>{_escape(value)}</{tag}>" for index, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row, kinds[index] if kinds else '')}</tr>" for index, row in enumerate(rows))
    return f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>{body}</tbody></table>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _page(title: str, subtitle: str, parts: Sequence[str]) -> str:
    head = (
        '<meta charset="utf-8"><meta name="viewport"'
        f' content="width=device-width"><title>{_escape(title)}</title><style>{_STYLE}</style>'
    )
    top = f"<h1>{_escape(title)}</h1><p class='subtitle'>{_escape(subtitle)}</p>"
    return (
        "<!doctype html>\n<html"
        f' lang="en"><head>{head}</head><body>{top}\n{chr(10).join(filter(None, parts))}\n</body></html>\n'
    )
