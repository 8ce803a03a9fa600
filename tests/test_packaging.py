"""The wheel and the source distribution: what is in them, what they say, and that the wheel alone makes a picture."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

from sdrt.machine.packages import EXTRAS

LOCAL = {".git", ".venv", "demo", "build", "dist"}


def files_below(folder: Path) -> set[str]:
    """Every file of the project, without what it makes as it works."""
    found = set()
    for top in folder.iterdir():
        if (
            top.name in LOCAL
            or top.name.endswith(("_cache", ".egg-info", ".sdrt"))
            or top.name in (".hypothesis", "__pycache__")
        ):
            continue
        found |= {
            path.relative_to(folder).as_posix()
            for path in ([top] if top.is_file() else top.rglob("*"))
            if path.is_file()
        }
    return {name for name in found if "__pycache__" not in name and not name.endswith(".lock")}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built from a copy of this tree with no network."""
    work = tmp_path_factory.mktemp("distributions")
    for name in files_below(ROOT):
        (work / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, work / "tree" / name)
    script = "from setuptools import build_meta as b; b.build_sdist('../out'); b.build_wheel('../out')"
    (work / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=work / "tree", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return work / "out"


def test_extras_are_those_of_the_messages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {name: tuple(wanted) for name, wanted in project["optional-dependencies"].items()}
    assert {name: wanted for name, wanted in extras.items() if name != "dev"} == EXTRAS


def test_no_message_names_a_package_that_does_not_exist() -> None:
    """sdrt lies on no package index, so `pip install 'sdrt[...]'` installs nothing, or what a stranger put there."""
    texts = [
        path
        for folder in ("sdrt", "docs", "examples", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md")
    ]
    assert not [
        path
        for path in [*texts, ROOT / "README.md", ROOT / "Makefile"]
        if re.search(r"install[^\n]*'?\bsdrt\[", path.read_text())
    ]


def test_the_wheel_holds_the_package_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("METADATA"))
    assert names == {name for name in files_below(ROOT) if name.startswith("sdrt/")}
    assert "Operating System :: POSIX :: Linux" in metadata and "Typing :: Typed" in metadata
    # Off the project's page a relative link leads nowhere.
    assert not [link for link in re.findall(r"\]\(([^)]*)\)", metadata) if not link.startswith("https://")]


def test_the_sdist_holds_what_its_tests_need(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_below(ROOT) - names <= {".gitignore", ".gitattributes"}


def test_the_wheel_alone_makes_a_picture(distributions: Path, small_bundle: Path, tmp_path: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {
        "PYTHONPATH": str(tmp_path / "site")
    }
    script = f"import sdrt; assert sdrt.__file__.startswith({str(tmp_path)!r}); from sdrt.cli.app import app; app()"
    command = [
        sys.executable,
        "-c",
        script,
        "generate",
        str(small_bundle),
        "apple",
        "--steps",
        "1",
        "--output",
        "apple.png",
        "--json",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [picture["path"] for picture in json.loads(done.stdout)["pictures"]] == ["apple.png"] and (
        tmp_path / "apple.png"
    ).exists()


def test_the_front_page_is_short_and_its_links_lead_somewhere() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 160
    pages = [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "examples").rglob("*.md"),
    ]
    links = [
        (page, link)
        for page in pages
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        if "://" not in link
    ]
    assert not [f"{page.name}: {link}" for page, link in links if not (page.parent / link).exists()]
