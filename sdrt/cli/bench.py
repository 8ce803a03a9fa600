"""`sdrt bench`: run, compare, ab and trend."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sdrt.cli import options
from sdrt.cli.bench_tables import print_comparison, print_result, print_trends
from sdrt.cli.cache import bundle_given
from sdrt.cli.output import print_json
from sdrt.cli.progress import changing_line
from sdrt.errors import (
    InconclusiveError,
    InputFileError,
    NotComparableError,
    ResourceError,
    UsageError,
    nearest,
    printable,
)
from sdrt.files.read import read_given

if TYPE_CHECKING:
    from sdrt.bench.compare import Comparison
    from sdrt.bench.measure import Request
    from sdrt.bench.metrics import Gates

_STEP_SUMMARY = "GITHUB_STEP_SUMMARY"
_PROMPTS_BYTES = 1 << 20
_SAME_THING = (
    "Have both sides measure the same thing: choose with --backend, --size and --threads, or install the same engines "
    "for both."
)
_SAME_MACHINE = (
    "Measure both on the same machine with the same settings, or use: sdrt bench ab OLD.sdrt NEW.sdrt; or look at them "
    "with: sdrt bench compare --force"
)
_PROMPT = "a red apple on a wooden table"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    epilog="Example: sdrt bench run model.sdrt --output result.json",
)


@app.callback()
def bench() -> None:
    """Measure a bundle's latency, and tell whether a change made it slower.

    Exit codes: 0 nothing gated is worse; 1 slower, a counter up, or wrong pictures; 8 cannot tell; 9 not comparable.
    """


@app.command(
    "run",
    epilog="Example: sdrt bench run model.sdrt --steps 20 --output result.json --emit html=report.html --history runs",
)
def run_command(
    ctx: typer.Context,
    bundle: options.MeasuredBundle = None,
    scenario: options.BenchScenario = "single",
    size: options.BenchSize = None,
    steps: options.BenchSteps = 20,
    cfg: options.BenchCfg = 7.0,
    sampler: options.BenchSampler = "euler",
    schedule: options.BenchSchedule = None,
    prompt: options.BenchPrompt = _PROMPT,
    prompts: options.BenchPrompts = None,
    seed: options.BenchSeed = 0,
    batch: options.BenchBatch = None,
    processes: options.Processes = 5,
    pictures: options.Pictures = 20,
    limit_s: options.MaxPictureTime = 30.0,
    warm_up_s: options.WarmUp = 30.0,
    rate: options.Rate = 1.0,
    duration_s: options.Duration = 30.0,
    queue: options.Queue = 8,
    lora: options.Loras = None,
    embedding: options.Embeddings = None,
    hypernetwork: options.Hypernetworks = None,
    vae: options.Vae = None,
    backend: options.BenchBackend = "auto",
    device: options.BenchDevice = 0,
    threads: options.Threads = None,
    layers: options.Layers = False,
    label: options.Label = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE.json", help="Write the result, raw samples included."),
    ] = None,
    history: Annotated[
        Path | None, typer.Option("--history", metavar="DIR", help="Add this run to the history in a folder.")
    ] = None,
    check_machine: options.CheckMachine = False,
    check_time: options.CheckTime = 60.0,
    emit: options.Emit = None,
    as_json: options.Json = False,
) -> None:
    """Measure a bundle in fresh processes, and check that its pictures are right. Exit code 1 if they are not.

    Like generate it takes a checkpoint in a bundle's place, with --lora, --embedding, --hypernetwork and --vae.
    """
    from sdrt.bench import history as runs
    from sdrt.bench.compare import fidelity_problems
    from sdrt.bench.formats import RESULT_FORMATS, result_markdown
    from sdrt.bench.result import write_json
    from sdrt.bench.run import run
    from sdrt.bundle.folder import check_outside_bundles, open_bundle
    from sdrt.bundle.manifest import WEIGHTS
    from sdrt.bundle.remembered import check_file

    targets = _targets(emit)
    for option, folder in (("--output", output and output.parent), ("--history", history)):
        if folder is not None:
            check_outside_bundles(option, folder)
    if bundle is None and not check_machine:
        raise UsageError("BUNDLE is missing", "Give a folder made by `sdrt build`, or --check-machine.")
    _refuse_unused(ctx, check_machine, bundle is not None)
    _at_least("--processes", processes, 1)
    request = _request(ctx, bundle or Path())
    if bundle is not None:
        bundle = ctx.with_resource(bundle_given(bundle, backend, ctx.params))
        request = replace(request, bundle=str(bundle.absolute()))
    if check_machine:
        _check_machine(bundle, request, check_time, [output, history, *targets], as_json)
        return
    assert bundle is not None
    opened = open_bundle(bundle)
    check_file(opened, WEIGHTS)  # now, or the first process would take longer to load than the others
    document = run(opened, request, processes, _say)
    if label is not None:
        document["bundle"]["label"] = label
    if output is not None:
        write_json(output, document)
    if history is not None:
        runs.append(history, document)

    def page() -> str:
        from sdrt.bench.report import result_html

        return result_html(document, runs.trends(runs.read(history)) if history is not None else ())

    _write_all(
        targets, {name: (lambda make=make: make(document)) for name, make in RESULT_FORMATS.items()} | {"html": page}
    )
    _step_summary(lambda: result_markdown(document))
    if as_json:
        print_json(document)
    else:
        print_result(document)
    if problems := fidelity_problems(document):
        wrong = f"{bundle}: the pictures are wrong: {'; '.join(problems)}"
        typer.echo(f"error: {printable(wrong)}", err=True)
        typer.echo("  fix: Run: sdrt verify BUNDLE, and build or compile it again.", err=True)
        raise typer.Exit(1)


_OF_CHECK_MACHINE = {"check_machine", "check_time", "as_json", "bundle"}
_REFUSED_BY_NAME = {"output", "history", "emit", "layers", "scenario"}
_OF_PICTURES = {
    *("size", "steps", "cfg", "sampler", "schedule", "prompt", "prompts", "seed", "batch"),
    *("backend", "device", "threads", "lora", "embedding", "hypernetwork", "vae"),
}


def _refuse_unused(ctx: typer.Context, check_machine: bool, with_bundle: bool) -> None:
    """Raise UsageError for options that were given and that this form of `run` does not read."""
    given = {
        param.name: param.opts[0]
        for param in ctx.command.params
        if param.name is not None
        and (source := ctx.get_parameter_source(param.name)) is not None
        and source.name == "COMMANDLINE"
    }
    if not check_machine:
        if "check_time" in given:
            raise UsageError("--check-time: is for --check-machine", "Add --check-machine, or leave it out.")
        return
    read = _OF_CHECK_MACHINE | _REFUSED_BY_NAME | (_OF_PICTURES if with_bundle else set())
    if unread := sorted(option for name, option in given.items() if name not in read):
        form = "--check-machine" if with_bundle else "--check-machine without a BUNDLE"
        raise UsageError(f"{', '.join(unread)}: {form} does not use it", "Leave it out.")


def _check_machine(
    bundle: Path | None, request: Request, limit_s: float, files: Sequence[object], as_json: bool
) -> None:
    """Print how small a change this machine can show.

    Raises:
        Exit: with code 8, where the default margin is out of reach.
    """
    from sdrt.bench.machine_noise import machine_noise, pictures_of, steady_work
    from sdrt.bundle.folder import open_bundle

    if any(file is not None for file in files) or request.layers:
        raise UsageError(
            "--check-machine: measures no result that --output, --history, --emit or --layers could take",
            "Leave them out; --json prints what it found.",
        )
    if request.scenario == "server":
        raise UsageError(
            "--check-machine: looks at one picture after the other, not at a server", "Leave --scenario server out."
        )
    if not 5 <= limit_s <= 3600:
        raise UsageError(f"--check-time {limit_s:g}: expected 5 to 3600 seconds")
    if bundle is None:
        found = machine_noise(steady_work, "a few ms of numpy's arithmetic", limit_s, _say)
    else:
        what = f"pictures of {bundle.name}, {request.steps} steps of {request.sampler}"
        found = machine_noise(pictures_of(open_bundle(bundle), request), what, limit_s, _say)
    if as_json:
        print_json(asdict(found) | {"fit": found.fit, "words": found.words()})
    else:
        typer.echo("\n".join(map(printable, found.words())))
    if not found.fit:
        raise typer.Exit(InconclusiveError.exit_code)


@app.command("compare", epilog="Example: sdrt bench compare base.json new.json --emit markdown=summary.md")
def compare_command(
    base: Annotated[Path, typer.Argument(metavar="BASE.json", help="Result of the base.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.json", help="Result of the change.")],
    force: options.CompareAnyway = False,
    config: options.Gates = None,
    emit: options.Emit = None,
    as_json: options.Json = False,
) -> None:
    """Judge one result against another.
    Two separate runs saw two moments of a machine, so margins are doubled; `ab` is the better gate.
    """
    from sdrt.bench.compare import compare
    from sdrt.bench.result import read_result

    targets, gates = _targets(emit), _gates(config, new)
    (old, old_hash), (now, new_hash) = read_result(base), read_result(new)
    comparison = compare(old, now, gates, interleaved=False, identical=old_hash == new_hash, force=force)
    _conclude(comparison, targets, as_json)


@app.command("ab", epilog="Example: sdrt bench ab old.sdrt new.sdrt --pairs 10 --emit junit=bench.xml")
def ab_command(
    ctx: typer.Context,
    old: Annotated[Path, typer.Argument(metavar="OLD.sdrt", help="Bundle of the base.")],
    new: Annotated[Path, typer.Argument(metavar="NEW.sdrt", help="Bundle of the change.")],
    scenario: options.BenchScenario = "single",
    size: options.BenchSize = None,
    steps: options.BenchSteps = 20,
    cfg: options.BenchCfg = 7.0,
    sampler: options.BenchSampler = "euler",
    schedule: options.BenchSchedule = None,
    prompt: options.BenchPrompt = _PROMPT,
    prompts: options.BenchPrompts = None,
    seed: options.BenchSeed = 0,
    batch: options.BenchBatch = None,
    pairs: options.Pairs = None,
    margin: options.Margin = None,
    max_time: options.MaxTime = 900.0,
    old_python: options.OldPython = None,
    pictures: options.Pictures = 20,
    limit_s: options.MaxPictureTime = 5.0,
    warm_up_s: options.WarmUp = 10.0,
    rate: options.Rate = 1.0,
    duration_s: options.Duration = 30.0,
    queue: options.Queue = 8,
    backend: options.BenchBackend = "auto",
    device: options.BenchDevice = 0,
    threads: options.Threads = None,
    config: options.Gates = None,
    emit: options.Emit = None,
    as_json: options.Json = False,
) -> None:
    """Measure two bundles side by side: pairs of fresh processes that take turns, until the verdict is settled.
    The gate for machines that others use too.

    Where memory does not hold both at once they run one after the other, which tells less. --warm-up is for that.
    """
    from sdrt.bench.metrics import with_margin
    from sdrt.bench.run import side_by_side
    from sdrt.bench.statistics import MAX_PAIRS
    from sdrt.bundle.folder import open_bundle
    from sdrt.bundle.manifest import WEIGHTS
    from sdrt.bundle.remembered import check_file

    targets, gates = _targets(emit), _gates(config, new)
    if pairs is not None:
        _at_least("--pairs", pairs, 1)
        if pairs > MAX_PAIRS:
            fix = "What so many cannot show takes a quieter machine, or a wider margin."
            raise UsageError(f"--pairs {pairs}: expected at most {MAX_PAIRS}", fix)
        gates = replace(gates, pairs=pairs)
    if margin is not None:
        gates = with_margin(gates, margin)
    request = _request(ctx, old)
    first, second = open_bundle(old), open_bundle(new)
    for opened in (first, second):
        check_file(opened, WEIGHTS)
    if old_python is not None and not os.access(old_python, os.X_OK):
        raise UsageError(
            f"--old-python {old_python}: expected a Python interpreter",
            "Write it as --old-python venv-base/bin/python.",
        )
    interpreter = str(old_python.absolute()) if old_python is not None else None
    sides = (
        (first, replace(request, bundle=str(first.path), python=interpreter)),
        (second, replace(request, bundle=str(second.path))),
    )
    with changing_line() as say:
        comparison = side_by_side(*sides, gates, say, max_s=max_time)
    _conclude(comparison, targets, as_json)


@app.command("trend", epilog="Example: sdrt bench trend runs --html trend.html")
def trend_command(
    history: Annotated[Path, typer.Argument(metavar="DIR", help="Folder given to `sdrt bench run --history`.")],
    page: Annotated[
        Path | None, typer.Option("--html", metavar="FILE.html", help="Write plots of all metrics.")
    ] = None,
    check: options.FailBeyondFence = False,
    as_json: options.Json = False,
) -> None:
    """Show each metric over past runs, and whether
    the newest lies beyond Q3 + 3 IQR of those before it, ten at least.
    """
    from sdrt.bench import history as runs
    from sdrt.bundle.folder import check_outside_bundles

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


def _request(ctx: typer.Context, bundle: Path) -> Request:
    """What the options say to measure of `bundle`. A parameter of the command fills the request's field of its name.

    Raises:
        InputFileError: the file of prompts cannot be read, or holds none.
        UsageError: an option has a value that nothing can be measured with.
    """
    from sdrt.bench.measure import Request

    given = {field.name: ctx.params[field.name] for field in fields(Request) if field.name in ctx.params}
    _check_scenario(given["scenario"], given["batch"])
    if given["batch"] is None:
        given["batch"] = 4 if given["scenario"] == "batch" else 1
    given["size"] = options.parse_size(given["size"])
    given["prompts"] = _prompts(Path(given["prompts"])) if given["prompts"] is not None else ()
    request = Request(**given | {"bundle": str(bundle.absolute())})
    _at_least("--batch", request.batch, 1)
    _at_least("--pictures", request.pictures, 1)
    _at_least("--queue", request.queue, 0)
    for option, value, most in (
        ("--rate", request.rate, 1000.0),
        ("--duration", request.duration_s, 86_400.0),
        ("--max-picture-time", request.limit_s, 86_400.0),
        ("--warm-up", request.warm_up_s, 86_400.0),
    ):
        if not 0 < value <= most:
            raise UsageError(f"{option} {value:g}: expected above 0, at most {most:g}")
    requests = request.rate * request.duration_s
    if requests > 100_000:
        raise UsageError(
            f"--rate {request.rate:g} for {request.duration_s:g} s: {requests:,.0f} requests, the limit is 100,000"
        )
    return request


def _check_scenario(scenario: str, batch: int | None) -> None:
    from sdrt.bench.scenarios import SCENARIOS

    if scenario not in SCENARIOS:
        raise UsageError(
            f"--scenario {scenario}: unknown{nearest(scenario, SCENARIOS)}", f"Choose one of: {', '.join(SCENARIOS)}."
        )
    if scenario == "single" and batch not in (None, 1):
        raise UsageError(
            f"--batch {batch}: the single scenario makes one picture at a time", "Choose --scenario batch."
        )


def _prompts(path: Path) -> tuple[str, ...]:
    """The lines of a file of prompts that hold anything.

    Raises:
        InputFileError: the file cannot be read, is too long, is no UTF-8, or holds no prompt.
    """
    fix = "--prompts takes a text file, one prompt a line."
    try:
        text = read_given(path, _PROMPTS_BYTES, fix).data.decode()
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path}: not UTF-8 at byte {error.start}", fix) from error
    prompts = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not prompts:
        raise InputFileError(f"{path}: no prompt in it", fix)
    return prompts


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{option} {value}: expected at least {least}")


def _gates(config: Path | None, new: Path) -> Gates:
    """The gates of `--config`, or of the `bench.toml` beside the new bundle or file, or the default ones."""
    from sdrt.bench.metrics import Gates, read_gates

    if config is not None:
        return read_gates(config)
    beside = new.absolute().parent / "bench.toml"
    return read_gates(beside) if beside.is_file() else Gates()


def _targets(emit: Sequence[str] | None) -> list[tuple[str, Path]]:
    """The formats and files that `--emit FORMAT=FILE` names, checked before anything is measured."""
    from sdrt.bundle.folder import check_outside_bundles

    targets = []
    for text in emit or []:
        name, equals, file = text.partition("=")
        if name not in options.BENCH_FORMATS:
            raise UsageError(
                f"--emit {text}: format {name!r} is unknown{nearest(name, options.BENCH_FORMATS)}",
                f"Choose one of: {', '.join(options.BENCH_FORMATS)}.",
            )
        if not equals or not file:
            raise UsageError(f"--emit {text}: expected FORMAT=FILE", f"Write it as --emit {name}=FILE.")
        if not Path(file).absolute().parent.is_dir():
            raise UsageError(f"--emit {text}: no folder {Path(file).parent}", "Make the folder first.")
        check_outside_bundles("--emit", Path(file).parent)
        if name == "html":
            import matplotlib  # noqa: F401  where it is missing, say so before the benchmark, not after it
        targets.append((name, Path(file)))
    return targets


def _write_all(targets: Sequence[tuple[str, Path]], makers: Mapping[str, Callable[[], str]]) -> None:
    for name, path in targets:
        _write(path, makers[name]())


def _write(path: Path, text: str) -> None:
    from sdrt.files.publish import staged_file, write_file

    with staged_file(path) as stage:
        write_file(stage, text.encode())


def _step_summary(make: Callable[[], str]) -> None:
    """Add to the summary page of a GitHub Actions step, where one is asked for."""
    if path := os.environ.get(_STEP_SUMMARY):
        try:
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(make() + "\n")
        except OSError as error:
            raise ResourceError(
                f"{path}: cannot add the summary: {error.strerror}", f"Free some space, or unset {_STEP_SUMMARY}."
            ) from error


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _conclude(comparison: Comparison, targets: Sequence[tuple[str, Path]], as_json: bool) -> None:
    """Write what was asked for, print the table, and end with the verdict's exit code.

    Raises:
        NotComparableError: after that, where there is no verdict. With `as_json` the JSON says so.
    """
    from sdrt.bench.compare import listed
    from sdrt.bench.formats import COMPARISON_FORMATS, comparison_markdown

    def page() -> str:
        from sdrt.bench.report import comparison_html

        return comparison_html(comparison)

    _write_all(
        targets,
        {name: (lambda make=make: make(comparison)) for name, make in COMPARISON_FORMATS.items()} | {"html": page},
    )
    _step_summary(lambda: comparison_markdown(comparison))
    if as_json:
        print_json(
            {
                "verdict": comparison.headline,
                "exit_code": comparison.exit_code,
                "ran": comparison.ran,
                "interleaved": comparison.interleaved,
                "metrics": [asdict(row) | {"failed": row.failed} for row in comparison.rows],
                "problems": list(comparison.problems),
                "notes": list(comparison.notes),
                "different": list(comparison.different),
                "base": dict(comparison.base),
                "new": dict(comparison.new),
            }
        )
    else:
        print_comparison(comparison)
    if comparison.different and not as_json:
        fix = _SAME_THING if comparison.interleaved else _SAME_MACHINE
        raise NotComparableError(f"not comparable: {listed(comparison.different)}", fix)
    if comparison.exit_code:
        raise typer.Exit(comparison.exit_code)
