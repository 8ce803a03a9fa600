"""Signals and time limits end native calls, and nothing that still runs is torn down."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import ROOT
from graph_files import with_graph
from onnx import TensorProto, helper

from sdrt.errors import TimeLimitError, UsageError
from sdrt.machine import interruptible as module
from sdrt.machine.interruptible import abandoned, interruptible, time_limit, wait_for

LONG_S = 300.0
"""What would not end by itself within a test, and how long a test waits at most before it says so."""
SOON_S = 20.0


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    abandoned.clear()


def interrupted_soon() -> threading.Timer:
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    return timer


def test_a_call_gives_its_result_or_its_error_from_any_thread() -> None:
    assert interruptible(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)
    assert interruptible(lambda: interruptible(lambda: 8)) == 8
    assert interruptible(threading.current_thread) is interruptible(threading.current_thread)
    seen: list[Any] = []
    other = threading.Thread(target=lambda: seen.append(interruptible(threading.current_thread)))
    other.start()
    other.join()
    assert seen == [other]


def test_a_call_that_stops_when_told() -> None:
    stop, ended = threading.Event(), threading.Event()

    def call() -> None:
        stop.wait(LONG_S)
        ended.set()

    before = interruptible(threading.current_thread)
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        timer = interrupted_soon()
        interruptible(call, stop.set)
    assert time.monotonic() - started < SOON_S and ended.is_set() and not abandoned
    timer.join()
    assert interruptible(threading.current_thread) is before


def test_a_call_that_does_not_stop_is_left_alone_and_another_can_be_made() -> None:
    release = threading.Event()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        timer = interrupted_soon()
        interruptible(lambda: release.wait(LONG_S))
    timer.join()
    assert time.monotonic() - started < SOON_S and len(abandoned) == 1
    assert interruptible(lambda: 9) == 9
    release.set()


@pytest.mark.parametrize("stops", [True, False])
def test_a_call_in_threads_of_the_engine(stops: bool) -> None:
    stop, used = threading.Event(), np.zeros(3)
    with pytest.raises(KeyboardInterrupt):
        timer = interrupted_soon()
        wait_for(lambda ms: stop.wait(ms / 1000), stop.set if stops else lambda: None, used)
    timer.join()
    assert [kept is used for kept in abandoned.values()] == ([] if stops else [True])


def test_a_forked_process_makes_calls_too() -> None:
    script = (
        "import os, sys\nfrom sdrt.machine.interruptible import interruptible\ninterruptible(int)\nchild = os.fork()\n"
        "if not child: os._exit(interruptible(lambda: 5))\nprint(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == "5\n", done.stderr


def test_a_time_limit() -> None:
    with time_limit(LONG_S, "this", "wait"):
        pass
    with (
        pytest.raises(TimeLimitError, match=r"this: not done within 0\.2 seconds") as caught,
        time_limit(0.2, "this", "wait"),
    ):
        interruptible(lambda: time.sleep(2))
    assert caught.value.exit_code == 7 and caught.value.fix == "wait"
    with pytest.raises(KeyboardInterrupt), time_limit(LONG_S, "this", "wait"):
        timer = interrupted_soon()
        time.sleep(LONG_S)
    timer.join()


def test_a_limit_that_comes_with_the_end_ends_nothing_after_it() -> None:
    late = 0
    for wait in np.linspace(0.0, 0.02, 40):
        try:
            with time_limit(0.01, "this", ""):
                time.sleep(wait)
        except TimeLimitError:
            late += 1
        time.sleep(0.001)
    assert 0 < late < 40


def heavy(path: Path) -> Path:
    """A graph of operators that take a fraction of a second each, and minutes together."""
    nodes = [helper.make_node("MatMul", [f"x{i}", "x0"], [f"x{i + 1}"]) for i in range(4000)]
    sides = [1024, 1024]
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, sides)] for name in ("x0", "x4000"))
    onnx.save(
        helper.make_model(
            helper.make_graph(nodes, "heavy", inputs, outputs), opset_imports=[helper.make_opsetid("", 23)]
        ),
        path,
    )
    return path


ENGINES = {
    "onnxruntime": "from sdrt.runtime.backends.onnxruntime.model import run_graph\nrun_graph(path, inputs)",
    "openvino": """
from sdrt.runtime.backends.openvino.model import compile_graph, import_openvino, run_once
ov = import_openvino("tests")
compiled, _ = compile_graph(ov, ov.Core(), path, {"x0": inputs["x0"].shape}, "fp32", 1)
run_once(ov, compiled, "heavy", inputs)
""",
    "openvino's requests": """
from sdrt.machine.interruptible import wait_for
from sdrt.runtime.backends.openvino.model import compile_graph, import_openvino
ov = import_openvino("tests")
compiled, _ = compile_graph(ov, ov.Core(), path, {"x0": inputs["x0"].shape}, "fp32", 1)
request = compiled.create_infer_request()
request.set_tensor("x0", ov.Tensor(inputs["x0"]))
request.start_async()
wait_for(request.wait_for, request.cancel, request)
""",
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_ends_an_engine_after_the_operator_it_is_at(engine: str, tmp_path: Path) -> None:
    script = f"""
import signal, sys, threading, time
from pathlib import Path
import numpy as np
from sdrt.machine.interruptible import abandoned
def stop(*_): raise KeyboardInterrupt
signal.signal(signal.SIGTERM, stop)
path, inputs = Path(sys.argv[1]), {{"x0": np.full((1024, 1024), 1e-3, np.float32)}}
threading.Timer(4, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)).start()
try:
{"".join(f"    {line}{chr(10)}" for line in ENGINES[engine].splitlines())}
except KeyboardInterrupt:
    print("ended", len(abandoned), flush=True)
"""
    command = [sys.executable, "-c", script, str(heavy(tmp_path / "heavy.onnx"))]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LONG_S, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (done.stdout, done.returncode) == ("ended 0\n", 0), done.stderr


def make_heavy(m: Any) -> None:
    """What folding constants takes minutes for, while the graph is loaded."""
    graph = m.graph
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([2048, 2048], np.int64), "heavy.shape"))
    graph.node.append(helper.make_node("ConstantOfShape", ["heavy.shape"], ["heavy.0"]))
    graph.node.extend(helper.make_node("MatMul", [f"heavy.{i}", "heavy.0"], [f"heavy.{i + 1}"]) for i in range(2000))
    graph.node.append(helper.make_node("ReduceMax", ["heavy.2000"], ["heavy.max"], keepdims=0))
    last = graph.node[next(i for i, node in enumerate(graph.node) if "denoised" in node.output)]
    last.output[list(last.output).index("denoised")] = "heavy.before"
    graph.node.append(helper.make_node("Add", ["heavy.before", "heavy.max"], ["denoised"]))


@pytest.mark.parametrize(("limit", "code"), [("4", 7), (None, 130)])
def test_b5_a_graph_that_takes_for_ever(small_bundle: Path, tmp_path: Path, limit: str | None, code: int) -> None:
    """`verify` ends at its time limit, `generate` when it is told to; neither waits for the engine."""
    bundle = str(with_graph(small_bundle, tmp_path / "heavy.sdrt", make_heavy))
    arguments = ["verify", bundle, "--timeout", limit] if limit else ["generate", bundle, "apple", "--output", "x.png"]
    command = [sys.executable, "-m", "sdrt", *arguments]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}
    ) as process:
        try:
            if not limit:
                time.sleep(5)
                assert process.poll() is None
                process.terminate()
            said = process.communicate(timeout=SOON_S * 3)[1]
        finally:
            process.kill()
    assert process.returncode == code, said
    assert ("not done within 4 seconds" if limit else "interrupted") in said


def test_a_limit_that_is_none(small_bundle: Path) -> None:
    from typer.testing import CliRunner

    from sdrt.cli.app import app

    for limit in ("0", "-1", "nan", "inf"):
        done = CliRunner().invoke(app, ["verify", str(small_bundle), "--timeout", limit])
        assert done.exit_code == UsageError.exit_code and "--timeout" in done.stderr
    assert module.GRACE_S + 0.2 < 1
