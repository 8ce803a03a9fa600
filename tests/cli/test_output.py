"""Reports in words."""

from __future__ import annotations

import pytest

from sdrt.cli.output import print_report


def test_records_of_a_list_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(
        {
            "sources": [
                {"kind": "lora", "applied": {"step": 2}, "scales": (1, 2)},
                {"kind": "vae", "size_bytes": 1000},
            ],
            "name": "a",
        }
    )
    assert capsys.readouterr().out == (
        "sources:\n  - kind: lora\n    applied:\n      step: 2\n    scales: [1, 2]\n  - kind: vae\n    size_bytes: 1,000\nname: a\n"
    )
