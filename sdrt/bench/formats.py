"""Text for CI systems: Markdown, JUnit XML, Bencher metric format, github-action-benchmark's format, and CSV.

Every line says which engine and shapes ran.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from typing import Any
from xml.etree import ElementTree

from sdrt.bench.compare import Comparison, Row, fidelity_problems, what_settles
from sdrt.bench.metrics import METRICS
from sdrt.bench.result import ran, series
from sdrt.bench.statistics import AMBIGUOUS
from sdrt.errors import printable

STEP_SUMMARY_BYTES = 1_000_000
"""GitHub refuses a step summary above 1 MiB."""
_PERCENTILES = ("p50", "p90", "p99")


def number(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit == "bytes":
        return f"{value / 1e6:,.1f} MB"
    if unit == "count":
        return f"{value:,.0f}"
    return f"{value:,.1f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def share(value: float | None) -> str:
    """A share in per cent, or a dash where it is unknown."""
    return "–" if value is None else f"{value:.0%}"


def interval(row: Row) -> str:
    if row.ratio is None:
        return "–"
    return (
        f"{row.ratio:.3f}"
        if row.low is None or row.high is None
        else f"{row.ratio:.3f} [{row.low:.3f}, {row.high:.3f}] n={row.n}"
    )


def word(row: Row, interleaved: bool) -> str:
    """A row's verdict, what would settle it, and whether it counts."""
    if not row.gated:
        return f"{row.verdict} (not gated)"
    return f"{row.verdict}: {what_settles(row, interleaved)}" if row.verdict == AMBIGUOUS else row.verdict


def comparison_markdown(comparison: Comparison) -> str:
    """Verdict, one table, and the environment folded away. Cut to the size of a GitHub step summary."""
    lines = [f"### sdrt bench: {_cell(comparison.headline)}", "", f"{_cell(comparison.ran)}", ""]
    lines += [f"- {_cell(note)}" for note in comparison.notes] + ([""] if comparison.notes else [])
    lines += (
        ["| metric | base | new | new / base [95 % interval] | verdict |", "|---|---:|---:|---|---|"]
        if comparison.rows
        else []
    )
    for row in comparison.rows:
        cells = (
            row.name,
            number(row.base, row.unit),
            number(row.new, row.unit),
            interval(row),
            word(row, comparison.interleaved),
        )
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return _cut("\n".join([*lines, "", *_folded(comparison.new)]))


def result_markdown(document: Mapping[str, Any]) -> str:
    problems = fidelity_problems(document)
    verdict = f"FAILED: {'; '.join(problems)}" if problems else "fidelity ok"
    lines = [f"### sdrt bench: {_cell(verdict)}", "", _cell(ran(document)), ""]
    lines += ["| metric | median [95 % interval] | p90 | p99 | n |", "|---|---|---:|---:|---:|"]
    for name, stats in document["stats"].items():
        unit = METRICS[name].unit if name in METRICS else ""
        cells = (
            name,
            median(stats, unit),
            number(stats["p90"], unit),
            number(stats["p99"], unit),
            f"{stats['n']} in {stats['processes']}",
        )
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    lines += [
        "",
        "| counter | value |",
        "|---|---:|",
        *(f"| {_cell(name)} | {value:,} |" for name, value in document["counters"].items()),
    ]
    return _cut("\n".join([*lines, "", *_folded(document)]))


def median(stats: Mapping[str, Any], unit: str) -> str:
    if stats["ci95"] is None:
        return number(stats["p50"], unit)
    low, high = stats["ci95"]
    return f"{number(stats['p50'], unit)} [{number(low, unit)}, {number(high, unit)}]"


def _folded(document: Mapping[str, Any]) -> list[str]:
    fields = [*document["env"].items(), *((f"engine {name}", value) for name, value in document["engine"].items())]
    lines = [f"| {_cell(name)} | {_cell(str(value))} |" for name, value in fields if value is not None]
    warnings = [f"- {_cell(str(warning))}" for warning in document["warnings"]]
    return [
        *warnings,
        "",
        "<details><summary>machine and engine</summary>",
        "",
        "| | |",
        "|---|---|",
        *lines,
        "",
        "</details>",
        "",
    ]


def _cell(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _cut(text: str) -> str:
    if len(text.encode()) <= STEP_SUMMARY_BYTES:
        return text
    kept = text.encode()[:STEP_SUMMARY_BYTES].decode(errors="ignore")
    return kept[: kept.rfind("\n")] + "\n\n(cut: longer than a step summary may be)\n"


def comparison_junit(comparison: Comparison) -> str:
    """One test case per metric and counter, and one for fidelity. An AMBIGUOUS verdict becomes a skipped test."""
    suite, cases = _suite(comparison.new, comparison.ran)
    case = _case(suite, comparison.ran, "fidelity")
    if comparison.problems:
        _child(case, "failure", "; ".join(comparison.problems))
    if comparison.different:
        _child(_case(suite, comparison.ran, "comparable"), "error", comparison.headline)
    for row in comparison.rows:
        case = _case(suite, comparison.ran, row.name)
        text = (
            f"{row.name} {row.verdict}: {number(row.base, row.unit)} to {number(row.new, row.unit)}, ratio"
            f" {interval(row)}, margin {row.margin:.1%}"
        )
        if row.failed:
            _child(case, "failure", text)
        elif row.gated and row.verdict == AMBIGUOUS:
            _child(case, "skipped", f"{text}; {what_settles(row, comparison.interleaved)}")
        else:
            ElementTree.SubElement(case, "system-out").text = printable(text)
    return _xml(suite, cases)


def result_junit(document: Mapping[str, Any]) -> str:
    suite, cases = _suite(document, ran(document))
    case = _case(suite, ran(document), "fidelity")
    if problems := fidelity_problems(document):
        _child(case, "failure", "; ".join(problems))
    for name, stats in document["stats"].items():
        case = _case(suite, ran(document), name)
        if name.endswith("_ms"):
            case.set("time", f"{stats['p50'] / 1000:.6f}")
        ElementTree.SubElement(
            case, "system-out"
        ).text = f"median {median(stats, METRICS[name].unit if name in METRICS else '')}, n={stats['n']}"
    return _xml(suite, cases)


def _suite(document: Mapping[str, Any], label: str) -> tuple[ElementTree.Element, ElementTree.Element]:
    root = ElementTree.Element("testsuites", name="sdrt bench")
    suite = ElementTree.SubElement(
        root, "testsuite", name=printable(label), timestamp=printable(document["time"].partition("+")[0].rstrip("Z"))
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in [*document["env"].items(), *document["engine"].items()]:
        ElementTree.SubElement(properties, "property", name=printable(name), value=printable(str(value)))
    return suite, root


def _case(suite: ElementTree.Element, label: str, name: str) -> ElementTree.Element:
    return ElementTree.SubElement(
        suite, "testcase", classname=f"sdrt.bench.{printable(label)}", name=printable(name), time="0"
    )


def _child(case: ElementTree.Element, tag: str, message: str) -> None:
    ElementTree.SubElement(case, tag, message=printable(message)).text = printable(message)


def _xml(suite: ElementTree.Element, root: ElementTree.Element) -> str:
    for element in (suite, root):
        element.set("tests", str(len(suite.findall("testcase"))))
        element.set("failures", str(len(suite.findall("testcase/failure"))))
        element.set("skipped", str(len(suite.findall("testcase/skipped"))))
        element.set("errors", str(len(suite.findall("testcase/error"))))
        element.set("time", f"{sum(float(case.get('time', '0')) for case in suite.findall('testcase')):.6f}")
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def bencher(document: Mapping[str, Any]) -> str:
    """Bencher metric format: benchmark, measure, value with its interval. Times are under `latency` in nanoseconds, as
    Bencher expects.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, stats in document["stats"].items():
        unit = METRICS[name].unit if name in METRICS else ""
        measure, scale = ("latency", 1e6) if unit == "ms" else (unit or "value", 1.0)
        entry = {"value": _rounded(stats["p50"] * scale)}
        if stats["ci95"] is not None:
            entry |= {
                "lower_value": _rounded(stats["ci95"][0] * scale),
                "upper_value": _rounded(stats["ci95"][1] * scale),
            }
        found[_title(document, name)] = {measure: entry}
    for name, value in document["counters"].items():
        found[_title(document, name)] = {"bytes" if name.endswith("_bytes") else "count": {"value": float(value)}}
    return json.dumps(found, indent=1) + "\n"


def github_action_benchmark(document: Mapping[str, Any]) -> str:
    """The list that github-action-benchmark takes as `customSmallerIsBetter`."""
    found: list[dict[str, Any]] = []
    for name, stats in document["stats"].items():
        entry: dict[str, Any] = {
            "name": _title(document, name),
            "unit": METRICS[name].unit if name in METRICS else "",
            "value": _rounded(stats["p50"]),
        }
        if stats["ci95"] is not None:
            entry["range"] = f"± {(stats['ci95'][1] - stats['ci95'][0]) / 2:.4g}"
        found.append(
            entry
            | {
                "extra": (
                    f"n={stats['n']} in {stats['processes']} processes\np90={stats['p90']:.4g}\np99={stats['p99']:.4g}"
                )
            }
        )
    found += [
        {"name": _title(document, name), "unit": "bytes" if name.endswith("_bytes") else "count", "value": value}
        for name, value in document["counters"].items()
    ]
    return json.dumps(found, indent=1, ensure_ascii=True) + "\n"


CSV_COLUMNS = (
    "time",
    "id",
    "label",
    "sdrt",
    "git",
    "backend",
    "version",
    "compute",
    "device",
    "scenario",
    "size",
    "batch",
    "steps",
    "sampler",
    "metric",
    "unit",
    "n",
    "processes",
    "p50",
    "ci_low",
    "ci_high",
    "p90",
    "p99",
    "min",
    "mean",
    "mad",
)


def csv_table(document: Mapping[str, Any]) -> str:
    """One line per metric and counter."""
    engine, config, tool = document["engine"], document["config"], document["tool"]
    shared = {
        "time": document["time"],
        "id": document["id"],
        "label": document["bundle"].get("label") or document["bundle"].get("name"),
        "sdrt": tool.get("sdrt"),
        "git": tool.get("git"),
        "size": "x".join(map(str, config["size"])),
        **{name: engine.get(name) for name in ("backend", "version", "compute", "device")},
        **{name: config.get(name) for name in ("scenario", "batch", "steps", "sampler")},
    }
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for name, stats in document["stats"].items():
        low, high = map(_rounded, stats["ci95"]) if stats["ci95"] else ("", "")
        values = {column: stats[column] for column in ("n", "processes")} | {
            column: _rounded(stats[column]) for column in (*_PERCENTILES, "min", "mean", "mad")
        }
        writer.writerow(
            shared
            | values
            | {
                "metric": name,
                "unit": METRICS[name].unit if name in METRICS else "",
                "ci_low": low,
                "ci_high": high,
            }
        )
    for name, value in document["counters"].items():
        writer.writerow(
            shared
            | {
                "metric": name,
                "unit": "bytes" if name.endswith("_bytes") else "count",
                "n": 1,
                "processes": 1,
                "p50": value,
            }
        )
    return out.getvalue()


def _rounded(value: float) -> float:
    """Nine digits: more than any clock has, and the same on every processor."""
    return float(f"{value:.9g}")


def _title(document: Mapping[str, Any], name: str) -> str:
    return printable(f"{name} ({series(document)})")


RESULT_FORMATS: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "markdown": result_markdown,
    "junit": result_junit,
    "bencher": bencher,
    "github": github_action_benchmark,
    "csv": csv_table,
}
COMPARISON_FORMATS: Mapping[str, Callable[[Comparison], str]] = {
    "markdown": comparison_markdown,
    "junit": comparison_junit,
    "bencher": lambda comparison: bencher(comparison.new),
    "github": lambda comparison: github_action_benchmark(comparison.new),
    "csv": lambda comparison: csv_table(comparison.new),
}
