"""Ratios, intervals and PSNR of a race, and its table. No process is started here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sdrt.bench.environment import environment, git_revision, load
from sdrt.bench.statistics import paired

MEASURES = {
    "step_ms": "step, ms",
    "decode_ms": "decode, ms",
    "text_ms": "text, ms",
    "cold_ms": "cold start, ms",
    "peak_rss_mb": "peak memory, MB",
}

Figures = Mapping[str, Any]


def psnr_db(pixels: np.ndarray, reference: np.ndarray) -> float | None:
    """Peak signal-to-noise ratio of uint8 pictures, decibels; None where they are equal."""
    error = float(((pixels.astype(float) - reference.astype(float)) ** 2).mean())
    return 10 * float(np.log10(255**2 / error)) if error else None


def report(
    settings: Mapping[str, Any],
    bases: Mapping[str, str],
    samples: Mapping[str, Sequence[Figures | None]],
    first: Mapping[str, Figures],
    pictures: Mapping[str, np.ndarray],
    sizes_mb: Mapping[str, float],
    failures: Mapping[str, str],
    reference: str,
) -> dict[str, Any]:
    """Every row against its base: `ratio` with `low` and `high`, the 95 % interval of the median over pairs of
    processes of the same round.
    """
    rows: dict[str, Any] = {}
    for name, base in bases.items():
        row: dict[str, Any] = {"base": base, "failure": failures.get(name), "measures": {}}
        rows[name] = row
        if not any(figures is not None for figures in samples[name]):
            continue
        for key in MEASURES:
            both = [
                (b, n)
                for b, n in zip(samples[base], samples[name], strict=True)
                if b and n and b[key] is not None and n[key] is not None
            ]
            found = [figures[key] for figures in samples[name] if figures and figures[key] is not None]
            estimate = paired([[b[key]] for b, _ in both], [[n[key]] for _, n in both])
            row["measures"][key] = {
                "median": statistics.median(found) if found else None,
                "ratio": estimate and estimate.ratio,
                "low": estimate and estimate.low,
                "high": estimate and estimate.high,
                "pairs": len(both),
            }
        row["first_cold_ms"] = first[name]["cold_ms"] if name in first else None
        row["install_mb"] = sizes_mb.get(name)
        row["install_ratio"] = sizes_mb[name] / sizes_mb[base] if name in sizes_mb and base in sizes_mb else None
        known = name in pictures and reference in pictures and pictures[name].shape == pictures[reference].shape
        row["psnr_db"] = psnr_db(pictures[name], pictures[reference]) if known else None
        row["equal"] = known and row["psnr_db"] is None
    machine = {"environment": environment(), "load": load(), "revision": git_revision()}
    return {
        "settings": dict(settings),
        **machine,
        "reference": reference,
        "rows": rows,
        "samples": {name: list(runs) for name, runs in samples.items()},
    }


def markdown(report: Mapping[str, Any]) -> str:
    """The table: medians, and in brackets the ratio to the row's base with its interval. Below it, the rows that are
    missing and why.
    """
    settings, machine = report["settings"], report["environment"]
    width, height = settings["picture"]
    lines = [
        (
            f"{settings['size']}, {width}x{height}, {settings['steps']} Euler steps, guidance {settings['cfg']},"
            f" {settings['threads']} threads of {machine['cpu']} ({machine['cores']} cores), load"
            f" {report['load']['load_1min']}, revision {report['revision']}."
        ),
        *([report["note"]] if report.get("note") else []),
        (
            "Ratios above 1 mean slower or larger than sdrt on OpenVINO in the same precision; in brackets their 95 %"
            " interval over pairs of processes."
        ),
        "",
        "| | " + " | ".join(MEASURES.values()) + " | installed, MB | PSNR |",
        "|---" * (len(MEASURES) + 3) + "|",
    ]
    for name, row in report["rows"].items():
        if not row["measures"]:
            continue
        cells = [_cell(row["measures"][key], name == row["base"]) for key in MEASURES]
        install = "" if row["install_mb"] is None else f"{row['install_mb']:.0f}"
        if row["install_ratio"] is not None and name != row["base"]:
            install += f" {row['install_ratio']:.2f}x"
        psnr = (
            "reference"
            if name == report["reference"]
            else "equal"
            if row["equal"]
            else ""
            if row["psnr_db"] is None
            else f"{row['psnr_db']:.1f} dB"
        )
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {install} | {psnr} |")
    missing = [f"- {name}: {row['failure']}" for name, row in report["rows"].items() if row["failure"]]
    return "\n".join([*lines, *(["", "Not measured, or not to the end:", *missing] if missing else []), ""])


def _cell(measure: Mapping[str, Any], is_base: bool) -> str:
    if measure["median"] is None:
        return "not told"
    value = f"{measure['median']:.{0 if measure['median'] >= 100 else 1}f}"
    if is_base or measure["ratio"] is None:
        return value
    interval = f" [{measure['low']:.2f}, {measure['high']:.2f}]" if measure["pairs"] > 1 else ""
    return f"{value} {measure['ratio']:.2f}x{interval}"
