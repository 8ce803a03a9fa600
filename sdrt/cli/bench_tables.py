"""What `sdrt bench` prints: tables on stdout, notes on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from sdrt.cli.output import print_notes
from sdrt.errors import printable

if TYPE_CHECKING:
    from sdrt.bench.compare import Comparison
    from sdrt.bench.history import Trend


def _print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title)), box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for index, name in enumerate(head):
        table.add_column(name, justify="right" if index in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=180)
    console.print(table)


def print_result(document: Mapping[str, Any]) -> None:
    """Print the result of `bench run`."""
    from sdrt.bench.formats import median, number
    from sdrt.bench.metrics import METRICS
    from sdrt.bench.result import ran

    rows = []
    for name, stats in document["stats"].items():
        unit = METRICS[name].unit
        rows.append(
            (
                name,
                median(stats, unit),
                number(stats["p90"], unit),
                number(stats["p99"], unit),
                f"{stats['n']} in {stats['processes']}",
                METRICS[name].meaning,
            )
        )
    rows += [(name, f"{value:,}", "", "", "", "counter") for name, value in document["counters"].items()]
    head = ("metric", "median [95 % interval]", "p90", "p99", "n", "what it is")
    _print_table(ran(document), head, rows, right=(2, 3, 4))
    if (fidelity := document["fidelity"])["ok"]:
        outputs = f"{len(fidelity['checks'])} outputs of the graphs"
        typer.echo(f"the pictures are right: {outputs} are as close to the bundle's references as its precision allows")
    if fit := document["fit"]:
        typer.echo(f"time = {fit['fixed_ms']:.2f} ms + model calls x {fit['per_call_ms']:.3f} ms")
    if server := document.get("server"):
        attained = ", ".join(f"{rate:.3g}" for rate in server["attained_per_s"])
        rejected = f"{server['rejected']} of {server['arrivals']} rejected"
        typer.echo(f"offered {server['offered_per_s']:g} per second, attained {attained}; {rejected}")
    if layers := document.get("layers"):
        _print_layers(layers)
    seen = document["noise"]["detectable"]
    if seen is not None:
        typer.echo(f"two runs like this one could tell changes of {seen:.1%} or more", err=True)
    print_notes(map(str, document["warnings"]))


def _print_layers(layers: Mapping[str, Any]) -> None:
    from sdrt.bench.formats import share

    for graph, found in layers["graphs"].items():
        done = "operations unknown"
        if found["flops"] is not None:
            intensity = f"{found['intensity'] or 0:.1f} FLOP/byte"
            done = f"{found['flops'] / 1e9:.3f} GFLOP, {found['bytes'] / 1e6:.1f} MB, {intensity}"
        peak, roofline = share(found["share_of_peak"]), share(found["share_of_roofline"])
        reached = f"{peak} of the machine's peak, {roofline} of its roofline"
        typer.echo(f"{graph}: {found['ms']:.2f} ms, profiled {found['operators_ms']:.2f} ms, {done}, {reached}")
        for one in found["slowest"][:5]:
            operator = f"{printable(one['op']):20} {printable(one['name'])}"
            typer.echo(f"  {one['share']:6.1%}  {one['ms']:8.3f} ms  {operator}")
    print_notes(layers["notes"])


def print_comparison(comparison: Comparison) -> None:
    """Print two results side by side, and the verdict."""
    from sdrt.bench.formats import interval, number, word

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
    _print_table(comparison.ran, ("metric", "base", "new", "new / base [95 % interval]", "verdict"), rows, right=(1, 2))
    print_notes(comparison.notes)
    typer.echo(printable(comparison.headline))


def print_trends(trends: Sequence[Trend]) -> None:
    """Print each metric over past runs, a table for each thing that was measured."""
    from sdrt.bench.formats import number

    for label in dict.fromkeys(trend.ran for trend in trends):
        rows = []
        for trend in (trend for trend in trends if trend.ran == label):
            values = sorted(trend.values)
            middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
            state = "BEYOND" if trend.outside else "within" if trend.limit is not None else "too few runs to say"
            rows.append(
                (
                    trend.name,
                    str(len(values)),
                    number(middle, trend.unit),
                    number(trend.values[-1], trend.unit),
                    number(trend.limit, trend.unit),
                    state,
                )
            )
        _print_table(label, ("metric", "runs", "median", "newest", "fence", ""), rows, right=(1, 2, 3, 4))
