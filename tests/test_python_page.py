"""docs/python.md: its code runs, in the order in which it is printed, and its tables say what the code says."""

from __future__ import annotations

import json
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from PIL import Image

from sdrt import errors, runtime
from sdrt.errors import Cancelled, SdrtError
from sdrt.runtime import Pipeline, Request, Result, Step, Stream

PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
APP = next(block for block in BLOCKS if block.startswith("# app.py"))


@pytest.fixture
def beside_a_bundle(
    small_bundle: Path,
    small_checkpoint: Path,
    small_lora: Path,
    own_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    shutil.copytree(small_bundle, tmp_path / "model.sdrt")
    shutil.copy(small_checkpoint, tmp_path / "model.safetensors")
    shutil.copy(small_lora, tmp_path / "style.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(head: str) -> dict[str, list[str]]:
    """The table whose first line begins so: cells by the name in the first one."""
    lines = PAGE[PAGE.index(f"\n| {head} |") + 1 :].split("\n\n", 1)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def test_the_code_runs(beside_a_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    try:
        for block in BLOCKS:
            if block != APP:
                exec(compile(block, "docs/python.md", "exec"), names)
        assert names["draw_square"]("fox", 64, steps=1).images.shape == (1, 64, 64, 3)
    finally:
        names["pipe"].close()
    with Image.open(beside_a_bundle / "apple.png") as image:
        assert image.info["parameters"].startswith("a red apple\n")
    said = capsys.readouterr().out
    for line in (
        "(3, 64, 64, 3) (1, 2, 3)",
        "8 of 8, picture 1 of 1",
        "request: cancelled after ",
        "steps 0: expected 1 to 1000",
    ):
        assert line in said
    assert names["styled"].bundle.manifest.name == "model+style"
    assert names["preview"].shape == (1, 64, 64, 3) and names["apple"].images.shape == names["pear"].images.shape


def test_settings_are_those_of_a_request() -> None:
    given = {name: cells[0].strip("`") for name, cells in rows("setting").items()}
    assert given == {
        field.name: "" if field.default is MISSING else json.dumps(field.default).replace("null", "None")
        for field in fields(Request)
    }


def test_errors_are_those_that_are_public() -> None:
    kinds = {name: getattr(errors, name) for name in runtime.__all__ if issubclass(getattr(runtime, name), SdrtError)}
    given = {name: (int(status), public == "yes") for name, (status, public, _) in rows("error").items()}
    assert given == {name: (kind.http_status, kind.public) for name, kind in kinds.items() if name != "SdrtError"}


def test_what_a_result_has_is_listed() -> None:
    listed = {name.partition("(")[0] for name in rows("of a result")}
    assert listed == {field.name for field in fields(Result)} | {
        name for name, value in vars(Result).items() if callable(value) and name[0] != "_"
    }
    assert {"preview", "noisy_preview", "denoised"} == {
        name for name, value in vars(Step).items() if callable(value) and name[0] != "_"
    }


# The application


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The application in a server of its own; its address."""
    uvicorn = pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


def test_the_application(beside_a_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture, a mistake, progress, and two clients that go away: what was drawn for them is cancelled."""
    pytest.importorskip("fastapi")
    httpx = pytest.importorskip("httpx")
    names: dict[str, Any] = {"__name__": "app"}
    exec(compile(APP, "docs/python.md", "exec"), names)
    streams: list[Stream] = []
    real = Pipeline.stream
    monkeypatch.setattr(
        Pipeline, "stream", lambda *args, **kwargs: streams.append(real(*args, **kwargs)) or streams[-1]
    )
    with served(names["app"]) as address, httpx.Client(base_url=address, timeout=60) as client:
        response = client.post("/picture", json={"prompt": "fox", "steps": 2, "seed": 3})
        assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
        with Image.open(BytesIO(response.content)) as image:
            assert image.size == (64, 64) and "Seed: 3" in image.info["parameters"]

        response = client.post("/picture", json={"prompt": "fox", "steps": 0})
        assert (response.status_code, response.json()) == (
            400,
            {"error": "steps 0: expected 1 to 1000", "kind": "UsageError"},
        )

        events = client.post("/progress", json={"prompt": "fox", "steps": 6, "seed": 3}).text.strip().split("\n\n")
        kinds = [event.partition("\n")[0] for event in events]
        assert kinds == ["event: step"] * 5 + ["event: picture"] and "jpeg" in events[4] and "png" in events[5]

        def leave_picture() -> None:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/picture", json={"prompt": "fox", "steps": 1000}, timeout=1)

        def leave_progress() -> None:
            with client.stream("POST", "/progress", json={"prompt": "fox", "steps": 1000}) as answer:
                assert next(answer.iter_lines()) == "event: step"

        for leave in (leave_picture, leave_progress):
            before = len(streams)
            leave()
            assert len(streams) == before + 1
            left, until = streams[-1], time.monotonic() + 20
            while not left._course.cancelled.is_set() or left._steps.gi_running:
                assert time.monotonic() < until
                time.sleep(0.02)
            with pytest.raises(Cancelled):
                left.result()
