"""Every output format: byte for byte as it was agreed on (tests/golden/bench), and read back by a schema or parser that is not ours.

After a deliberate change, run with SDRT_WRITE_GOLDEN=1 and look at the difference.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from bench_documents import ORT_OPERATORS, document
from conftest import ROOT
from junitparser import JUnitXml, TestSuite
from markdown_it import MarkdownIt

from sdrt.bench.compare import Comparison, compare
from sdrt.bench.formats import COMPARISON_FORMATS, RESULT_FORMATS, STEP_SUMMARY_BYTES, comparison_markdown, result_markdown
from sdrt.bench.history import Trend
from sdrt.bench.layers import analyse
from sdrt.bench.metrics import Gates
from sdrt.bench.operators import Layer, total
from sdrt.bench.report import comparison_html, result_html, trend_html
from sdrt.bench.result import Document, ran

GOLDEN = ROOT / "tests" / "golden" / "bench"
EXTENSIONS = {"markdown": "md", "junit": "xml", "bencher": "bencher.json", "github": "github.json", "csv": "csv"}
BENCHER_SCHEMA = {
    "type": "object",
    "additionalProperties": {
        "type": "object", "minProperties": 1,
        "additionalProperties": {
            "type": "object", "required": ["value"], "additionalProperties": False,
            "properties": {"value": {"type": "number"}, "lower_value": {"type": "number"}, "upper_value": {"type": "number"}},
        },
    },
}  # fmt: skip
"""What https://bencher.dev/bmf.json asks for, and no further fields."""
GITHUB_SCHEMA = {
    "type": "array", "minItems": 1,
    "items": {
        "type": "object", "required": ["name", "unit", "value"], "additionalProperties": False,
        "properties": {"name": {"type": "string"}, "unit": {"type": "string"}, "value": {"type": "number"}, "range": {"type": "string"}, "extra": {"type": "string"}},
    },
}  # fmt: skip
"""What github-action-benchmark documents for `customSmallerIsBetter`."""


@pytest.fixture(scope="module")
def result() -> Document:
    return document(1, 5)


@pytest.fixture(scope="module")
def comparison(result: Document) -> Comparison:
    """Slower steps, a counter up, one metric too noisy, one gone."""
    new = document(2, 5, slower=0.4)
    new["counters"]["model_calls"] += 1
    new["samples"]["load_ms"] = [[ms * factor] for ms, factor in zip([500, 600, 400, 900, 450], [1, 2, 0.5, 1.5, 1], strict=True)]
    del new["samples"]["peak_rss_bytes"]
    return compare(result, new, Gates(), interleaved=False)


def matches(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("SDRT_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", RESULT_FORMATS)
def test_results_as_agreed(name: str, result: Document) -> None:
    matches(f"result.{EXTENSIONS[name]}", RESULT_FORMATS[name](result))


@pytest.mark.parametrize("name", COMPARISON_FORMATS)
def test_comparisons_as_agreed(name: str, comparison: Comparison) -> None:
    matches(f"comparison.{EXTENSIONS[name]}", COMPARISON_FORMATS[name](comparison))


def test_the_result_matches_the_published_schema(result: Document) -> None:
    schema = json.loads((ROOT / "docs" / "bench-schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(result)
    jsonschema.Draft202012Validator(schema).validate(result | {"a field of the future": 1})
    for path, value in (
        (("schema",), 2),
        (("samples", "total_ms"), [["1"]]),
        (("counters", "jobs"), 1.5),
        (("config", "size"), [64]),
        (("fidelity", "ok"), "yes"),
    ):
        bad = json.loads(json.dumps(result))
        place = bad
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema).validate(bad)


def suite_of(text: str) -> TestSuite:
    (suite,) = JUnitXml.fromstring(text.encode())
    assert isinstance(suite, TestSuite)
    return suite


def test_junit_of_a_comparison(comparison: Comparison) -> None:
    suite = suite_of(COMPARISON_FORMATS["junit"](comparison))
    cases = {case.name: case for case in suite}
    assert suite.tests == len(cases) == len(comparison.rows) + 1
    assert {name for name, case in cases.items() if case.is_failure} == {"total_ms", "step_ms", "model_calls", "peak_rss_bytes"}
    assert {name for name, case in cases.items() if case.is_skipped} == {"load_ms"}
    assert (suite.failures, suite.skipped, suite.errors) == (4, 1, 0)
    (failure,) = cases["total_ms"].result
    assert "ratio 1.4" in str(failure.message) and "SLOWER" in str(failure.message)
    assert {one.name: one.value for one in suite.properties()}["cpu"] == "A <fast> CPU"


def test_junit_of_a_result(result: Document) -> None:
    suite = suite_of(RESULT_FORMATS["junit"](result))
    assert suite.failures == 0 and {"fidelity", "total_ms"} <= {case.name for case in suite}
    wrong = result | {"fidelity": result["fidelity"] | {"ok": False, "problems": ["pixels\x00 differ"]}}
    suite = suite_of(RESULT_FORMATS["junit"](wrong))
    assert suite.failures == 1
    assert suite_of(RESULT_FORMATS["junit"](result | {"fidelity": {"ok": False}})).failures == 1


def test_bencher(result: Document) -> None:
    found = json.loads(RESULT_FORMATS["bencher"](result))
    jsonschema.validate(found, BENCHER_SCHEMA)
    (latency,) = found[f"total_ms (toy: {ran(result)})"].items()
    assert latency[0] == "latency" and latency[1]["value"] == pytest.approx(result["stats"]["total_ms"]["p50"] * 1e6)  # nanoseconds
    assert latency[1]["lower_value"] <= latency[1]["value"] <= latency[1]["upper_value"]


def test_github_action_benchmark(result: Document) -> None:
    found = json.loads(RESULT_FORMATS["github"](result))
    jsonschema.validate(found, GITHUB_SCHEMA)
    assert found[0]["unit"] == "ms" and found[0]["value"] == pytest.approx(result["stats"]["total_ms"]["p50"]) and found[0]["range"].startswith("± ")


def test_csv(result: Document) -> None:
    rows = list(csv.DictReader(io.StringIO(RESULT_FORMATS["csv"](result)), strict=True))
    assert [row["metric"] for row in rows] == [*result["stats"], *result["counters"]]
    assert float(rows[0]["p50"]) == pytest.approx(result["stats"]["total_ms"]["p50"])
    assert {(row["backend"], row["size"], row["sampler"]) for row in rows} == {("onnxruntime", "64x64", "euler")}  # in every line


def test_markdown_is_a_table_of_all_rows(comparison: Comparison, result: Document) -> None:
    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(comparison_markdown(comparison))
    assert sum(token.type == "tr_open" for token in tokens) >= len(comparison.rows) + 1
    texts = [token.content for token in tokens if token.type == "inline"]
    assert {row.name for row in comparison.rows} <= set(texts)
    assert any("FAILED" in text for text in texts) and comparison.ran in texts
    assert "<fast>" not in comparison_markdown(comparison)  # it would be HTML there
    assert ran(result) in result_markdown(result)


def test_markdown_fits_a_step_summary(result: Document) -> None:
    long = result | {"env": {f"field {i}": "ä" * 1000 for i in range(1000)}}
    text = result_markdown(long)
    assert len(text.encode()) <= STEP_SUMMARY_BYTES + 100 and text.endswith("(cut: longer than a step summary may be)\n")


class Page(HTMLParser):
    """The tags of a page, and everything in it that would load something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "link", "img", "br", "input"):
            self.open.append(tag)
        values = dict(attrs)
        local = {name: value for name in ("src", "href", "xlink:href") if (value := values.get(name)) and not value.startswith("#")}
        self.loads += [f"{tag} {value}" for value in local.values()]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Page:
    page = Page(text)
    assert not page.open and not page.loads and "script" not in page.tags
    assert "url(http" not in text and "@import" not in text
    return page


def test_the_report_needs_nothing_else(result: Document, comparison: Comparison) -> None:
    layers = {
        "backend": "onnxruntime",
        "peak": {"flops_per_s": 1e11, "bytes_per_s": 1e10},
        "peak_of": "numpy on this machine",
        "notes": ["a note"],
        "graphs": {
            "step": analyse(ORT_OPERATORS, total(ORT_OPERATORS), 1.0, {"flops_per_s": 1e11, "bytes_per_s": 1e10}),
            "vae_decoder": analyse([Layer("a", "a", 1.0)], None, 1.0, {"flops_per_s": None, "bytes_per_s": None}),
        },
    }
    history = [Trend("k", ran(result), "total_ms", "ms", ("2026-11-01", "2026-11-23"), (80.0, 90.0), None)]
    page = checked(result_html(result | {"layers": layers}, history))
    assert page.tags.count("svg") == 6  # parts, per step, distribution, trend, operators of two graphs
    server = {"offered_per_s": 2.0, "attained_per_s": [1.9, 1.8], "arrivals": 60, "completed": 57, "rejected": 3}
    assert "attained 1.9, 1.8 in each process: 57 of 60 served, 3 turned away" in result_html(result | {"server": server})
    text = result_html(result)
    assert "A &lt;fast&gt; CPU" in text and "<fast>" not in text
    assert result_html(result) == text  # no date, no random names
    page = checked(comparison_html(comparison))
    assert page.tags.count("svg") == 2  # ratios, distribution
    assert "FAILED" in comparison_html(comparison)
    assert checked(trend_html(history)).tags.count("svg") == 1


def test_golden_files_hold_nothing_of_this_machine() -> None:
    for path in sorted(Path(GOLDEN).iterdir()):
        assert "/" + "work" not in path.read_text(encoding="utf-8")


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_draws_the_report(result: Document, tmp_path: Path) -> None:
    """Title, verdict and plots are to be seen: pixels of their colours, over the page, as a browser draws it."""
    import numpy as np
    from PIL import Image

    assert CHROMIUM is not None
    (tmp_path / "report.html").write_text(result_html(result), encoding="utf-8")
    size = ["--window-size=1000,1800", f"--screenshot={tmp_path / 'page.png'}", f"--user-data-dir={tmp_path / 'profile'}"]
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *size]
    subprocess.run([CHROMIUM, *options, (tmp_path / "report.html").as_uri()], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert pixels.shape == (1800, 1000, 3)
    rows = {name: np.flatnonzero((pixels == colour).all(-1).any(1)) for name, colour in (("verdict", (237, 249, 240)), ("plots", (31, 111, 235)))}
    assert len(rows["verdict"]) > 30 and rows["verdict"].max() < 400, "the verdict is at the top"
    assert len(rows["plots"]) > 20 and rows["plots"].min() > rows["verdict"].max() and np.ptp(rows["plots"]) > 600, (
        "a bar, a line and dots, one below the other"
    )
