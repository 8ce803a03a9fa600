"""docs/security.md: every number of the catalogue has a test that exists and carries it in its name, or a reason."""

from __future__ import annotations

import re

from conftest import ROOT

GROUPS = {"C": 21, "P": 13, "L": 12, "E": 7, "H": 5, "B": 13, "I": 10, "D": 6, "T": 10, "S": 5}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "security.md").read_text(encoding="utf-8").split("## The catalogue")[1].splitlines()
    if line.startswith("| ") and re.match(r"\| [A-Z]", line)
]


def test_the_tests_exist_or_there_is_a_reason() -> None:
    """A file is named by the end of its path below tests/."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    wrong = []
    for number, what, proof in ROWS:
        named = re.findall(r"`([\w/]+)::(\w+)`", proof)
        assert what and (named or proof.startswith(("does not apply", "not kept"))), number
        for file, test in named:
            sources = [p.read_text(encoding="utf-8") for p in files if f"/{file}.py" in p.as_posix()]
            if not any(re.search(rf"^def {test}\(", source, re.MULTILINE) for source in sources):
                wrong.append(f"{number}: {file}::{test} does not exist")
            if not {*number.lower().split(", ")} & {*test.split("_")}:
                wrong.append(f"{test}: expected {number} in its name")
    assert not wrong, "\n".join(wrong)


def test_no_number_is_left_out() -> None:
    listed = [number for row in ROWS for number in row[0].split(", ")]
    assert len(listed) == len(set(listed))
    expected = {f"{group}{i}" for group, count in GROUPS.items() for i in range(1, count + 1)}
    assert expected | {"C", "L", "B"} == set(listed)
