"""`sdrt bench`: run, compare, ab and trend."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrt.cli.bench_tables import print_comparison, print_result, print_trends
from sdrt.cli.output import Json, print_json
from sdrt.document import read_given
from sdrt.errors import InconclusiveError, InputFileError, ResourceError, UsageError, nearest, printable

if TYPE_CHECKING:
    from sdrt.bench.compare import Comparison
    from sdrt.bench.measure import Request
    from sdrt.bench.metrics import Gates

FORMATS = ("markdown", "junit", "bencher", "github", "csv", "html")
SCENARIOS = ("single", "batch", "server")
_STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
_PROMPTS_BYTES = 1 << 20

Scenario = Annotated[str, typer.Option("--scenario", metavar="NAME", help="single: one picture after the other; batch: --batch at a time; server: requests arrive at random, --rate per second.")]  # fmt: skip
Size = Annotated[str | None, typer.Option("--size", metavar="WxH", help="Picture size in pixels; the bundle's own if not given.")]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Steps of the sampler.")]
Cfg = Annotated[float, typer.Option("--cfg", metavar="X", help="Guidance scale; 1 turns guidance off.")]
Sampler = Annotated[str, typer.Option("--sampler", metavar="NAME", help="Sampler, as for generate.")]
Schedule = Annotated[str | None, typer.Option("--schedule", metavar="NAME", help="Schedule, as for generate.")]
Prompt = Annotated[str, typer.Option("--prompt", metavar="TEXT", help="What to show. Every picture gets a number after it, so that no cache of prompts hides the text encoder.")]  # fmt: skip
Prompts = Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="Prompts that take turns, one a line, in place of --prompt.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="Seed of every call, and of the arrivals of a server.")]
Batch = Annotated[int | None, typer.Option("--batch", metavar="N", help="Pictures per model call; 1, or 4 for the batch scenario.")]
Pictures = Annotated[int, typer.Option("--pictures", metavar="N", help="Calls measured per process.")]
MaxPictures = Annotated[float, typer.Option("--max-picture-time", metavar="S", help="Stop a process's measured calls after this many seconds.")]
WarmUp = Annotated[float, typer.Option("--warm-up", metavar="S", help="Longest warm-up; it ends sooner once three medians agree within 2 %.")]
Rate = Annotated[float, typer.Option("--rate", metavar="X", help="server: requests per second.")]
Duration = Annotated[float, typer.Option("--duration", metavar="S", help="server: seconds during which requests arrive.")]
Queue = Annotated[int, typer.Option("--queue", metavar="N", help="server: requests that may wait; further ones are rejected.")]
Backend = Annotated[str, typer.Option("--backend", metavar="NAME", help="Engine to measure, as for generate.")]
Device = Annotated[int, typer.Option("--device", metavar="N", help="GPU to use, counted from 0.")]
Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="CPU threads; the engine's own choice if not given.")]
Emit = Annotated[list[str] | None, typer.Option("--emit", metavar="FORMAT=FILE", help=f"Also write a file for a CI system; may be repeated. Formats: {', '.join(FORMATS)}.")]  # fmt: skip
Config = Annotated[
    Path | None, typer.Option("--config", metavar="bench.toml", help="Margins and gates; bench.toml beside the new bundle or file if it is there.")
]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown", epilog="Example: sdrt bench run model.sdrt --output result.json")


@app.callback()
def bench() -> None:
    """Measure a bundle's latency, and tell whether a change made it slower.

    Exit codes: 0 nothing gated is worse; 1 slower, a counter up, or wrong pictures; 8 cannot tell, or not comparable.
    """


@app.command("run", epilog="Example: sdrt bench run model.sdrt --steps 20 --output result.json --emit html=report.html --history runs")
def run_command(
    ctx: typer.Context,
    bundle: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="A folder made by `sdrt build`, such as model.sdrt; only --check-machine can do without.")] = None,
    scenario: Scenario = "single", size: Size = None, steps: Steps = 20, cfg: Cfg = 7.0, sampler: Sampler = "euler",
    schedule: Schedule = None, prompt: Prompt = "a red apple on a wooden table", prompts: Prompts = None, seed: Seed = 0, batch: Batch = None,
    processes: Annotated[int, typer.Option("--processes", metavar="N", help="Fresh processes, one after the other.")] = 5,
    pictures: Pictures = 20, max_pictures: MaxPictures = 30.0, warm_up: WarmUp = 30.0, rate: Rate = 1.0, duration: Duration = 30.0, queue: Queue = 8,
    backend: Backend = "auto", device: Device = 0, threads: Threads = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also profile each graph: slowest operators, arithmetic, share of the machine's measured peak.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE.json", help="Write the result, raw samples included.")] = None,
    history: Annotated[Path | None, typer.Option("--history", metavar="DIR", help="Add this run to the history in a folder.")] = None,
    check_machine: Annotated[bool, typer.Option("--check-machine", help="Only say how small a change this machine can show: with BUNDLE's pictures, or without one by work of numpy's. Exit code 8 if the default margin is out of reach.")] = False,
    check_time: Annotated[float, typer.Option("--check-time", metavar="S", help="Seconds that --check-machine may take.")] = 60.0,
    emit: Emit = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Measure a bundle in fresh processes, and check that its pictures are right. Exit code 1 if they are not."""
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.bench import history as runs
    from sdrt.bench.compare import fidelity_problems
    from sdrt.bench.formats import RESULT_FORMATS, result_markdown
    from sdrt.bench.result import write_json
    from sdrt.bench.run import run
    from sdrt.bundle import WEIGHTS, check_outside_bundles, open_bundle
    from sdrt.checked import check_file

    targets = _targets(emit)
    for option, folder in (("--output", output and output.parent), ("--history", history)):
        if folder is not None:
            check_outside_bundles(option, folder)
    if bundle is None and not check_machine:
        raise UsageError("BUNDLE is missing", "Give a folder made by `sdrt build`, or --check-machine.")
    _refuse_unused(ctx, check_machine, bundle is not None)
    request = _request(
        bundle or Path(), scenario, size, steps, cfg, sampler, schedule, prompt, prompts, seed, batch, pictures, max_pictures, warm_up, rate, duration, queue, backend, device, threads
    )  # fmt: skip
    if check_machine:
        _check_machine(bundle, request, check_time, [output, history, *targets], layers, as_json)
        return
    assert bundle is not None
    _at_least("--processes", processes, 1)
    opened = open_bundle(bundle)
    check_file(opened, WEIGHTS)  # here, so that the first process does not take longer to load than the others
    document = run(opened, _with_layers(request, layers), processes, _say)
    if output is not None:
        write_json(output, document)
    if history is not None:
        runs.append(history, document)

    def page() -> str:
        from sdrt.bench.report import result_html

        return result_html(document, runs.trends(runs.read(history)) if history is not None else ())

    _write_all(targets, {name: (lambda make=make: make(document)) for name, make in RESULT_FORMATS.items()} | {"html": page})
    _step_summary(lambda: result_markdown(document))
    if as_json:
        print_json(document)
    else:
        print_result(document)
    if problems := fidelity_problems(document):
        typer.echo(f"error: {printable(str(bundle))}: the pictures are wrong: {printable('; '.join(problems))}", err=True)
        typer.echo("  fix: Run: sdrt verify BUNDLE, and build or compile it again.", err=True)
        raise typer.Exit(1)


def _refuse_unused(ctx: typer.Context, check_machine: bool, with_bundle: bool) -> None:
    """Raise UsageError for options that were given and that this form of `run` does not read."""
    given = {name for name in ctx.params if (source := ctx.get_parameter_source(name)) is not None and source.name == "COMMANDLINE"}
    if not check_machine:
        if "check_time" in given:
            raise UsageError("--check-time: is for --check-machine", "Add --check-machine, or leave it out.")
        return
    read = {"check_machine", "check_time", "as_json", "bundle", "output", "history", "emit", "layers", "scenario"}  # the last ones are refused by name
    if with_bundle:
        read |= {"size", "steps", "cfg", "sampler", "schedule", "prompt", "prompts", "seed", "batch", "backend", "device", "threads"}
    if unread := sorted(given - read):
        options = ", ".join(f"--{name.replace('max_pictures', 'max_picture_time').replace('_', '-')}" for name in unread)
        raise UsageError(f"{options}: --check-machine{'' if with_bundle else ' without a BUNDLE'} does not use it", "Leave it out.")


def _check_machine(bundle: Path | None, request: Request, limit_s: float, files: Sequence[object], layers: bool, as_json: bool) -> None:
    from sdrt.bench.machine_noise import machine_noise, pictures_of, steady_work
    from sdrt.bundle import open_bundle

    if any(file is not None for file in files) or layers:
        raise UsageError(
            "--check-machine: measures no result that --output, --history, --emit or --layers could take", "Leave them out; --json prints what it found."
        )
    if request.scenario == "server":
        raise UsageError("--check-machine: looks at one picture after the other, not at a server", "Leave --scenario server out.")
    if not 5 <= limit_s <= 3600:
        raise UsageError(f"--check-time {limit_s:g}: expected 5 to 3600 seconds")
    if bundle is None:
        found = machine_noise(steady_work, "a few ms of numpy's arithmetic", limit_s, _say)
    else:
        found = machine_noise(
            pictures_of(open_bundle(bundle), request), f"pictures of {bundle.name}, {request.steps} steps of {request.sampler}", limit_s, _say
        )
    if as_json:
        print_json(asdict(found) | {"fit": found.fit, "words": found.words()})
    else:
        typer.echo("\n".join(map(printable, found.words())))
    if not found.fit:
        raise typer.Exit(InconclusiveError.exit_code)


@app.command("compare", epilog="Example: sdrt bench compare base.json new.json --emit markdown=summary.md")
def compare_command(
    ctx: typer.Context,
    base: Annotated[Path, typer.Argument(metavar="BASE.json", help="Result of the base.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="Result of the change.")],
    force: Annotated[bool, typer.Option("--force", help="Show two results that are not comparable side by side all the same. There is no verdict then, and the exit code stays 8.")] = False,
    config: Config = None, emit: Emit = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Judge one result against another. Two separate runs saw two moments of a machine, so margins are doubled; `ab` is the better gate."""
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.bench.compare import compare
    from sdrt.bench.result import read_result

    targets, gates = _targets(emit), _gates(config, new)
    (old, old_hash), (now, new_hash) = read_result(base), read_result(new)
    _conclude(compare(old, now, gates, interleaved=False, identical=old_hash == new_hash, force=force), targets, as_json)


@app.command("ab", epilog="Example: sdrt bench ab old.sdrt new.sdrt --pairs 10 --emit junit=bench.xml")
def ab_command(
    ctx: typer.Context,
    old: Annotated[Path, typer.Argument(metavar="OLD.sdrt", help="Bundle of the base.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.sdrt", help="Bundle of the change.")],
    scenario: Scenario = "single", size: Size = None, steps: Steps = 20, cfg: Cfg = 7.0, sampler: Sampler = "euler", schedule: Schedule = None,
    prompt: Prompt = "a red apple on a wooden table", prompts: Prompts = None, seed: Seed = 0, batch: Batch = None,
    pairs: Annotated[int | None, typer.Option("--pairs", metavar="N", help="Pairs of processes; as bench.toml says, or 10.")] = None,
    max_time: Annotated[float, typer.Option("--max-time", metavar="S", help="Where it stays ambiguous, make further pairs if all it needs fit into this many seconds.")] = 1800.0,
    old_python: Annotated[Path | None, typer.Option("--old-python", metavar="FILE", help="Interpreter to run OLD.sdrt with, where another version of sdrt is installed; this one if not given. Compares runtimes too.")] = None,
    pictures: Pictures = 10, max_pictures: MaxPictures = 15.0, warm_up: WarmUp = 10.0, rate: Rate = 1.0, duration: Duration = 30.0, queue: Queue = 8,
    backend: Backend = "auto", device: Device = 0, threads: Threads = None, config: Config = None, emit: Emit = None, as_json: Json = False,
) -> None:  # fmt: skip
    """Measure two bundles in turn, A B B A, in fresh processes, and judge. The gate for machines that others use too."""
    ctx.find_root().obj = "json" if as_json else None
    from dataclasses import replace

    from sdrt.bench.run import interleave
    from sdrt.bundle import WEIGHTS, open_bundle
    from sdrt.checked import check_file

    targets, gates = _targets(emit), _gates(config, new)
    if pairs is not None:
        _at_least("--pairs", pairs, 1)
        gates = replace(gates, pairs=pairs)
    request = _request(
        old, scenario, size, steps, cfg, sampler, schedule, prompt, prompts, seed, batch, pictures, max_pictures, warm_up, rate, duration, queue, backend, device, threads
    )  # fmt: skip
    first, second = open_bundle(old), open_bundle(new)
    for opened in (first, second):
        check_file(opened, WEIGHTS)
    if old_python is not None and not os.access(old_python, os.X_OK):
        raise UsageError(f"--old-python {old_python}: expected a Python interpreter", "Write it as --old-python venv-base/bin/python.")
    interpreter = str(old_python.absolute()) if old_python is not None else None
    sides = ((first, replace(request, bundle=str(first.path), python=interpreter)), (second, replace(request, bundle=str(second.path))))
    _conclude(interleave(*sides, gates, _say, max_s=max_time), targets, as_json)


@app.command("trend", epilog="Example: sdrt bench trend runs --html trend.html")
def trend_command(
    ctx: typer.Context,
    history: Annotated[Path, typer.Argument(metavar="DIR", help="Folder given to `sdrt bench run --history`.")],
    page: Annotated[Path | None, typer.Option("--html", metavar="FILE.html", help="Write plots of all metrics.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit code 1 if the newest run of any metric lies beyond its fence.")] = False,
    as_json: Json = False,
) -> None:
    """Show each metric over past runs, and whether the newest lies beyond Q3 + 3 IQR of those before it, ten at least."""
    ctx.find_root().obj = "json" if as_json else None
    from sdrt.bench import history as runs
    from sdrt.bundle import check_outside_bundles

    found = runs.trends(runs.read(history))
    if page is not None:
        check_outside_bundles("--html", page.parent)
        from sdrt.bench.report import trend_html

        _write(page, trend_html(found))
    if as_json:
        print_json({"trends": [asdict(trend) | {"outside": trend.outside} for trend in found]})
    else:
        print_trends(found)
    if check and any(trend.outside for trend in found):
        raise typer.Exit(1)


def _request(
    bundle: Path, scenario: str, size: str | None, steps: int, cfg: float, sampler: str, schedule: str | None, prompt: str, prompts: Path | None, seed: int, batch: int | None,
    pictures: int, max_pictures: float, warm_up: float, rate: float, duration: float, queue: int, backend: str, device: int, threads: int | None,
) -> Request:  # fmt: skip
    from sdrt.bench.measure import Request

    if scenario not in SCENARIOS:
        raise UsageError(f"--scenario {scenario}: unknown{nearest(scenario, SCENARIOS)}", f"Choose one of: {', '.join(SCENARIOS)}.")
    if scenario == "single" and batch not in (None, 1):
        raise UsageError(f"--batch {batch}: the single scenario makes one picture at a time", "Choose --scenario batch.")
    _at_least("--pictures", pictures, 1)
    _at_least("--queue", queue, 0)
    for option, value, most in (
        ("--rate", rate, 1000.0), ("--duration", duration, 86_400.0), ("--max-picture-time", max_pictures, 86_400.0), ("--warm-up", warm_up, 86_400.0),
    ):  # fmt: skip
        if not 0 < value <= most:
            raise UsageError(f"{option} {value:g}: expected above 0, at most {most:g}")
    if rate * duration > 100_000:
        raise UsageError(f"--rate {rate:g} for {duration:g} s: {rate * duration:,.0f} requests, the limit is 100,000")
    match = re.fullmatch(r"(\d{1,6})[xX](\d{1,6})", size) if size is not None else None
    if size is not None and match is None:
        raise UsageError(f"--size {size}: expected WIDTHxHEIGHT", "Write it as --size 512x768.")
    return Request(
        bundle=str(bundle.absolute()), scenario=scenario, backend=backend, device=device, threads=threads, size=(int(match[1]), int(match[2])) if match else None,
        steps=steps, cfg=cfg, sampler=sampler, schedule=schedule, prompt=prompt, prompts=_prompts(prompts), seed=seed, batch=batch or (4 if scenario == "batch" else 1), pictures=pictures,
        limit_s=max_pictures, warm_up_s=warm_up, rate=rate, duration_s=duration, queue=queue,
    )  # fmt: skip


def _prompts(path: Path | None) -> tuple[str, ...]:
    """The lines of a file of prompts that hold anything."""
    if path is None:
        return ()
    try:
        text = read_given(path, _PROMPTS_BYTES, "--prompts takes a text file, one prompt a line.").data.decode()
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path}: not UTF-8 at byte {error.start}", "--prompts takes a text file, one prompt a line.") from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise InputFileError(f"{path}: no prompt in it", "--prompts takes a text file, one prompt a line.")
    return prompts


def _with_layers(request: Request, layers: bool) -> Request:
    from dataclasses import replace

    return replace(request, layers=layers)


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{option} {value}: expected at least {least}")


def _gates(config: Path | None, new: Path) -> Gates:
    from sdrt.bench.metrics import Gates, read_gates

    if config is not None:
        return read_gates(config)
    beside = new.absolute().parent / "bench.toml"
    return read_gates(beside) if beside.is_file() else Gates()


def _targets(emit: Sequence[str] | None) -> list[tuple[str, Path]]:
    """`FORMAT=FILE` options taken apart, before anything is measured."""
    from sdrt.bundle import check_outside_bundles

    targets = []
    for text in emit or []:
        name, equals, file = text.partition("=")
        if name not in FORMATS:
            raise UsageError(f"--emit {text}: format {name!r} is unknown{nearest(name, FORMATS)}", f"Choose one of: {', '.join(FORMATS)}.")
        if not equals or not file:
            raise UsageError(f"--emit {text}: expected FORMAT=FILE", f"Write it as --emit {name}=FILE.")
        if not Path(file).absolute().parent.is_dir():
            raise UsageError(f"--emit {text}: no folder {Path(file).parent}", "Make the folder first.")
        check_outside_bundles("--emit", Path(file).parent)
        if name == "html":
            import matplotlib  # noqa: F401  missing, it should be missed before the benchmark, not after
        targets.append((name, Path(file)))
    return targets


def _write_all(targets: Sequence[tuple[str, Path]], makers: Mapping[str, Callable[[], str]]) -> None:
    for name, path in targets:
        _write(path, makers[name]())


def _write(path: Path, text: str) -> None:
    from sdrt.publish import staged_file, write_file

    with staged_file(path) as stage:
        write_file(stage, text.encode())


def _step_summary(make: Callable[[], str]) -> None:
    """Add to the summary page of a GitHub Actions step, where one is asked for."""
    if path := os.environ.get(_STEP_SUMMARY):
        try:
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(make() + "\n")
        except OSError as error:
            raise ResourceError(f"{path}: cannot add the summary: {error.strerror}", f"Free some space, or unset {_STEP_SUMMARY}.") from error


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _conclude(comparison: Comparison, targets: Sequence[tuple[str, Path]], as_json: bool) -> None:
    """Write what was asked for, print the table, and end with the verdict's exit code."""
    from sdrt.bench.formats import COMPARISON_FORMATS, comparison_markdown

    def page() -> str:
        from sdrt.bench.report import comparison_html

        return comparison_html(comparison)

    _write_all(targets, {name: (lambda make=make: make(comparison)) for name, make in COMPARISON_FORMATS.items()} | {"html": page})
    _step_summary(lambda: comparison_markdown(comparison))
    if as_json:
        print_json(
            {
                "verdict": comparison.headline, "exit_code": comparison.exit_code, "ran": comparison.ran, "interleaved": comparison.interleaved,
                "metrics": [asdict(row) | {"failed": row.failed} for row in comparison.rows], "problems": list(comparison.problems), "notes": list(comparison.notes),
                "base": dict(comparison.base), "new": dict(comparison.new),
            }
        )  # fmt: skip
    else:
        print_comparison(comparison)
    if comparison.exit_code:
        raise typer.Exit(comparison.exit_code)
