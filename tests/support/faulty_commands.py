"""Whole commands made to fail at numbered points of the one writer: `sdrt build` over a bundle, a first build with no
trace cached, `sdrt compile`.

`python faulty_commands.py FOLDER JOB CHECKPOINT KIND=POINTS...` prints one JSON object; POINTS is `all`, or how many of
them to take. Each run is a child forked from a process that has imported everything and knows the traces and compiled
blobs, so it writes all that a command writes, the self-check included, and takes half a second. `problems` says what
was not as it must be, and is empty.
"""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faulty_jobs import names, state
from write_faults import arm

from sdrt.files import publish

Run = Callable[[Path], int]
"""A command on a folder that holds `x.sdrt`, in this process: its exit code."""


@dataclass(frozen=True)
class Job:
    """`prepare` makes what is there before; `run` is the command. `target` is what it replaces or makes, `around` the
    folder that holds that.
    """

    prepare: Callable[[Path], None]
    run: Run
    target: Callable[[Path], Path]


def in_child(work: Callable[[], int], told: Path) -> int:
    """The exit status of some work in a process of its own: its exit code, or minus a signal. What it says on stderr is
    in the file `told`.
    """
    pid = os.fork()
    if not pid:
        code = 71
        try:
            descriptor = os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(descriptor, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(Exception):
                sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def command(arguments: Sequence[object]) -> int:
    """Run `sdrt` in this process."""
    from sdrt.cli.app import app

    try:
        app([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def failing(number: int, kind: str, job: Job, folder: Path) -> Callable[[], int]:
    def work() -> int:
        arm(number, kind)
        return job.run(folder)

    return work


def operations(job: Job, folder: Path, told: Path) -> list[tuple[str, str]]:
    """The points a run without a fault passes: operation, and path below the folder."""
    listed = told.with_suffix(".points")

    def work() -> int:
        fault = arm(0, "kill")
        code = job.run(folder)
        publish.at_point = None
        listed.write_text(json.dumps([(operation, str(path)) for operation, path in fault.passed]))
        return code

    assert in_child(work, told) == 0, told.read_text()
    return [(operation, path) for operation, path in json.loads(listed.read_text())]


def fail_everywhere(job: Job, root: Path, kinds: dict[str, str], enough: int = 10_000) -> dict[str, Any]:
    """Fail a job at its points, in ways and at as many points as `kinds` says."""
    told, reference = root / "told", root / "reference"
    reference.mkdir()
    job.prepare(reference)
    old = state(job.target(reference))
    points = operations(job, reference, told)
    new = state(job.target(reference))
    problems: list[str] = []
    done = dict.fromkeys(kinds, 0)
    for kind, asked in kinds.items():
        for number in chosen(points, asked, kind):
            folder = root / "run"
            folder.mkdir()
            job.prepare(folder)
            status = in_child(failing(number, kind, job, folder), told)
            around, after = job.target(folder).parent, state(job.target(folder))
            where = f"{kind} at {number}, {points[number - 1][0]} {Path(points[number - 1][1]).name}: "
            for problem in [
                *judged(
                    kind,
                    status,
                    told.read_text(),
                    old,
                    new,
                    after,
                    names(around) if around.is_dir() else [],
                    job.target(folder).name,
                )
            ]:
                problems.append(where + problem)
            if kind == "kill":  # the next run, with nothing cleaned up in between
                if (again := in_child(lambda: job.run(folder), told)) != 0:  # noqa: B023
                    problems.append(where + f"the next run ended with {again}: {told.read_text()[-300:]}")
                if (
                    state(job.target(folder)) != new
                    or names(around) != names(job.target(reference).parent)
                    or names(folder) != names(reference)
                ):
                    problems.append(
                        where + f"the next run left {names(folder)}, {names(around)}, the target"
                        f" {'new' if state(job.target(folder)) == new else 'wrong'}"
                    )
            done[kind] += 1
            shutil.rmtree(folder)
    shutil.rmtree(reference)
    return {"points": len(points), "done": done, "problems": problems}


def chosen(points: Sequence[tuple[str, str]], asked: str, kind: str) -> Iterator[int]:
    """Numbers of the points to fail: all, or a seeded choice that has those around the publication in it."""
    if asked == "all":
        yield from range(1, len(points) + 1)
        return
    published = [i + 1 for i, (operation, _) in enumerate(points) if operation in ("exchange", "rename")]
    always = {1, len(points), *published, *(n + 1 for n in published if n < len(points))}
    rest = sorted(set(range(1, len(points) + 1)) - always)
    picked = random.Random(f"points of {kind}").sample(rest, max(0, min(len(rest), int(asked) - len(always))))
    yield from sorted([*sorted(always)[: int(asked)], *picked])


def judged(
    kind: str, status: int, told: str, old: str, new: str, after: str, beside: list[str], target: str
) -> Iterator[str]:
    """What is wrong with the outcome of a run that was made to fail."""
    if kind == "kill":
        if status != -9:
            yield f"ended with {status}, not killed"
        if after not in (old, new):
            yield "the target is neither the old one nor the new one"
        return
    if status not in (0, 6) or (kind == "short" and status):
        yield f"ended with {status}: {told[-300:]}"
    if "Traceback" in told:
        yield "a traceback"
    if status == 6 and ("bytes free there" not in told or "fix: " not in told):
        yield f"does not say where, and what is free: {told[-300:]}"
    # After the publication only a flush and the removal of the old one can fail; before it, nothing may have changed.
    if after not in ((new,) if status == 0 else (old, new)):
        yield (
            f"ended with {status}, but the target is"
            f" {'the old one' if after == old else 'the new one' if after == new else 'neither'}"
        )
    left = [name for name in beside if name != target and name.startswith(f".{target}-")]
    if left and status:
        yield f"left {left}"


# The jobs


def build_arguments(checkpoint: Path, folder: Path, *more: object) -> list[object]:
    return [
        "build",
        "--checkpoint",
        checkpoint,
        "--target",
        "onnxruntime",
        "--size",
        "64x64",
        "--output",
        folder / "x.sdrt",
        *more,
    ]


def remember_traces(checkpoint: Path) -> None:
    """Traces come from memory wherever the cache has none."""
    from sdrt.export import graph, skeletons, trace
    from sdrt.export.read import checkpoint as checkpoints

    with_architecture = checkpoints.open_checkpoint(checkpoint)
    with_architecture.close()
    known = {
        name: skeletons.skeletons(recipe)[0] for name, recipe in graph.recipes(with_architecture.architecture).items()
    }
    trace.trace = lambda recipe: known[recipe.graph]


def build_over(root: Path, checkpoint: Path) -> Job:
    """A build with other options over a bundle."""
    assert in_child(lambda: command(build_arguments(checkpoint, root, "--precision", "fp32")), root / "told") == 0, (
        root / "told"
    ).read_text()
    (root / "x.sdrt").rename(root / "old")

    def prepare(folder: Path) -> None:
        shutil.copytree(root / "old", folder / "x.sdrt", copy_function=os.link)

    return Job(
        prepare,
        lambda folder: command(build_arguments(checkpoint, folder, "--force")),
        lambda folder: folder / "x.sdrt",
    )


def build_first(root: Path, checkpoint: Path) -> Job:
    """A build where there is neither a bundle nor a cache."""

    def run(folder: Path) -> int:
        os.environ["SDRT_CACHE_DIR"] = str(folder / "cache")
        return command(
            build_arguments(checkpoint, folder, "--force")
        )  # --force: a killed run may have published already

    return Job(lambda folder: None, run, lambda folder: folder / "x.sdrt")


def compile_openvino(root: Path, checkpoint: Path) -> Job:
    """`sdrt compile` of one engine into a bundle that has it already, damaged."""
    arguments = [
        "compile",
        root / "x.sdrt",
        "--target",
        "openvino",
        "--tokens",
        "77",
        "--branches",
        "2",
        "--precision",
        "fp32",
    ]
    assert in_child(lambda: command(build_arguments(checkpoint, root)) or command(arguments), root / "told") == 0, (
        root / "told"
    ).read_text()
    (root / "x.sdrt").rename(root / "compiled")
    (engine,) = (root / "compiled" / "engines").iterdir()
    from sdrt.compile import openvino
    from sdrt.compile.options import GraphReport

    blobs = {path.stem: path.read_bytes() for path in engine.glob("*.blob")}
    openvino._compile = lambda ov, core, bundle, graph, shapes, precision: openvino._Blob(
        blobs[graph], GraphReport(0.0, 0.0, 1, len(blobs[graph]), (), None)
    )
    return compile_again(root, arguments, next(engine.glob("*.blob")))


def compile_onnxruntime(root: Path, checkpoint: Path) -> Job:
    """`sdrt compile` of ONNX Runtime's saved models into a bundle that has them already, damaged. What ONNX Runtime
    writes itself is copied.
    """
    arguments = ["compile", root / "x.sdrt", "--target", "onnxruntime"]
    assert in_child(lambda: command(build_arguments(checkpoint, root)) or command(arguments), root / "told") == 0, (
        root / "told"
    ).read_text()
    (root / "x.sdrt").rename(root / "compiled")
    (engine,) = (root / "compiled" / "engines").iterdir()
    from sdrt.compile import worker

    def save_model(
        graph: str, path: Path, folder: Path, reference: Path, version: str
    ) -> tuple[dict[str, Any], int | None]:
        for file in engine.glob(f"{graph}.*"):
            shutil.copyfile(file, folder / file.name)
        return {"build_s": 0.0, "exact": True}, None

    worker.save_model = save_model
    return compile_again(root, arguments, engine / "step.onnx")


def compile_again(root: Path, arguments: Sequence[object], plan: Path) -> Job:
    """A compilation into the bundle `compiled` of `root`, whose engine has one changed byte in `plan`."""
    engine = Path("x.sdrt", *plan.parent.relative_to(root / "compiled").parts)

    def prepare(folder: Path) -> None:
        shutil.copytree(root / "compiled", folder / "x.sdrt", copy_function=os.link)
        damaged = folder / engine / plan.name
        data = damaged.read_bytes()
        damaged.unlink()
        damaged.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    def run(folder: Path) -> int:
        return command([*arguments[:1], folder / "x.sdrt", *arguments[2:]])

    return Job(prepare, run, lambda folder: folder / engine)


JOBS = {"build": build_over, "first build": build_first, "compile": compile_openvino, "save": compile_onnxruntime}


def main() -> None:
    root, name, checkpoint = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    import sdrt.cli.app

    if name == "compile":
        import sdrt.compile.openvino  # noqa: F401
    else:
        from sdrt.export.build import BuildOptions, build

        build(
            BuildOptions(checkpoint, output=root / "x.sdrt", size=(64, 64))
        )  # imports and loads what each child would have to otherwise
        shutil.rmtree(root / "x.sdrt")
        remember_traces(checkpoint)
    gc.collect()
    gc.freeze()
    job = JOBS[name](root, checkpoint)
    print(json.dumps(fail_everywhere(job, root, dict(kind.split("=") for kind in sys.argv[4:]))))


if __name__ == "__main__":
    main()
