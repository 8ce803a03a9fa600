"""docs/security.md: every number of the catalogue has a test that exists and carries it in its name, or a reason."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT

GROUPS = {"C": 21, "P": 13, "L": 12, "E": 7, "H": 5, "B": 13, "I": 10, "D": 6, "T": 10, "S": 5}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "security.md").read_text(encoding="utf-8").split("## The catalogue")[1].splitlines()
    if line.startswith("| ") and re.match(r"\| [A-Z]", line)
]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_the_tests_exist_or_there_is_a_reason(row: list[str]) -> None:
    number, what, proof = row
    assert what
    named = re.findall(r"`([\w/]+)::(\w+)`", proof)
    assert named or proof.startswith(("does not apply", "not kept")), number
    for file, test in named:
        tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
            f"{number}: {file}::{test}"
        )
        assert {*number.lower().split(", ")} & {*test.split("_")}, f"{test}: expected {number} in its name"


def test_no_number_is_left_out() -> None:
    listed = [number for row in ROWS for number in row[0].split(", ")]
    assert len(listed) == len(set(listed))
    expected = {f"{group}{i}" for group, count in GROUPS.items() for i in range(1, count + 1)}
    assert expected | {"C", "L", "B"} == set(listed)
