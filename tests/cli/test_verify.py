"""`sdrt verify`: what it prints, in words and as JSON."""

from __future__ import annotations

from pathlib import Path

from commands import only_json, run

from sdrt.bundle.graphs import GRAPHS


def test_verify(small_bundle: Path) -> None:
    report = only_json(run("verify", small_bundle, "--json"))
    assert report["ok"] is True
    assert {check["graph"] for check in report["checks"]} == set(GRAPHS)
    assert all(check["error"] <= check["limit"] for check in report["checks"])
    result = run("verify", small_bundle)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == len(report["checks"])
    assert all(line.startswith("ok ") for line in result.stdout.splitlines())
