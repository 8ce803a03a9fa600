"""The bundles that are built into the user's cache: for a command that is given a checkpoint, and `sdrt cache`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdrt.cli import options
from sdrt.cli.output import print_json, print_notes
from sdrt.cli.progress import BUILD_STAGES, COMPILE_STAGES, StageProgress
from sdrt.errors import LockedError, UsageError, nearest, printable

if TYPE_CHECKING:
    from sdrt.bundle.cache import Entry
    from sdrt.bundle.manifest import Source

_SHORT_KEY = 8

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    epilog="Example: sdrt cache list",
)


@contextmanager
def bundle_given(path: Path, backend: str, adapters: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the bundle of a command that takes a checkpoint too: the one at `path`, or the one in the cache that the
    checkpoint there and its `adapters` make. `adapters` has the command's parameters; others in it are left alone.
    """
    from sdrt.bundle.folder import is_checkpoint
    from sdrt.runtime.backend import check_backend

    check_backend(backend)
    given = {name: adapters[name] for name in ("lora", "embedding", "hypernetwork", "vae")}
    if not is_checkpoint(path) and not any(given.values()):
        yield path
        return
    from sdrt.cached_bundle import cached_bundle

    with ExitStack() as stack:
        with StageProgress(BUILD_STAGES | COMPILE_STAGES) as progress:
            built = cached_bundle(
                path,
                loras=given["lora"] or (),
                embeddings=given["embedding"] or (),
                hypernetworks=given["hypernetwork"] or (),
                vae=given["vae"],
                backend=backend,
                progress=progress,
                say=lambda text: typer.echo(printable(text), err=True),
            )
            bundle = stack.enter_context(built)
        yield bundle


@app.callback()
def cache() -> None:
    """See and remove the bundles that are built where a command is given a checkpoint.

    They lie in $SDRT_CACHE_DIR, or ~/.cache/sdrt. Those not used for longest go when the limit is passed.
    """


@app.command("list", epilog="Example: sdrt cache list --json")
def list_command(as_json: options.Json = False) -> None:
    """List the bundles, last used first, and what else is kept there."""
    from sdrt.bundle.cache import bundles_folder, entries, limit_bytes, others

    found, limit, folder = entries(), limit_bytes(), bundles_folder().parent
    total = sum(entry.size_bytes for entry in found)
    rest = {kind.name: size_bytes for kind, size_bytes in others().items()}
    if as_json:
        print_json(
            {
                "folder": str(folder),
                "bundles": [_fields(entry) for entry in found],
                "size_bytes": total,
                "limit_bytes": limit,
                "others": rest,
            }
        )
        return
    for entry in found:
        used = datetime.fromtimestamp(entry.used_s).strftime("%Y-%m-%d %H:%M")
        made = entry.problem or ", ".join(map(_words, entry.sources))
        line = f"{entry.key[:_SHORT_KEY]}  {used}  {entry.size_bytes / 1e6:10,.1f} MB  {entry.name}: {made}"
        typer.echo(printable(line))
    within = "no limit" if limit is None else f"the limit is {limit / 1e9:g} GB"
    typer.echo(f"{len(found)} bundles, {total / 1e6:,.1f} MB; {within}")
    for kind, size_bytes in rest.items():
        typer.echo(f"{kind}: {size_bytes / 1e6:,.1f} MB")
    typer.echo(printable(f"in {folder}"), err=True)


@app.command("remove", epilog="Example: sdrt cache remove model+style")
def remove_command(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME|KEY", help="Bundles as `list` shows them; a name stands for all that have it."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove all bundles, and everything else that can be made again.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Remove bundles from the cache. Those in use stay: exit code 7."""
    from sdrt.bundle.cache import entries, remove, remove_others

    if bool(names) == everything:
        raise UsageError("NAME|KEY: expected either bundles to remove, or --all", "See what there is: sdrt cache list")
    found = entries()
    named = [entry for name in names or [] for entry in _named(name, found)]
    chosen = found if everything else [entry for entry in found if entry in named]
    removed = [entry for entry in chosen if remove(entry)]
    used = [entry for entry in chosen if entry not in removed]
    freed_bytes = sum(entry.size_bytes for entry in removed) + (remove_others() if everything else 0)
    if as_json:
        listed = {"removed": [_fields(entry) for entry in removed], "in_use": [_fields(entry) for entry in used]}
        print_json(listed | {"freed_bytes": freed_bytes})
        raise typer.Exit(LockedError.exit_code if used else 0)
    for entry in removed:
        typer.echo(printable(f"removed {entry.key[:_SHORT_KEY]}  {entry.name}"))
    typer.echo(f"{freed_bytes / 1e6:,.1f} MB freed")
    if used:
        raise LockedError(
            f"{', '.join(entry.name for entry in used)}: in use by another process", "Remove it when that has ended."
        )


@app.command("limit", epilog="Example: sdrt cache limit 50GB")
def limit_command(
    size: Annotated[
        str | None, typer.Argument(metavar="SIZE", help="Such as 50GB, or none for any amount. Left out: show it.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show or set how much all bundles in the cache may take; 20 GB if never set. $SDRT_CACHE_LIMIT goes before it.

    A lower one removes those that have not been used for longest.
    """
    from sdrt.bundle.cache import VARIABLE, keep_to_limit, limit_bytes, set_limit

    removed = []
    if size is not None:
        set_limit(size)
        if os.environ.get(VARIABLE):
            print_notes([f"{VARIABLE} is set, and goes before it"])
        removed = keep_to_limit()
    limit = limit_bytes()
    if as_json:
        print_json({"limit_bytes": limit, "removed": [_fields(entry) for entry in removed]})
        return
    for entry in removed:
        typer.echo(printable(f"removed {entry.key[:_SHORT_KEY]}  {entry.name}"))
    typer.echo("no limit" if limit is None else f"{limit / 1e9:g} GB")


def _named(text: str, found: list[Entry]) -> list[Entry]:
    """The entries with that name, or whose key begins so."""
    chosen = [entry for entry in found if entry.name == text]
    chosen = chosen or [entry for entry in found if len(text) >= 4 and entry.key.startswith(text)]
    if not chosen:
        known = [entry.name for entry in found]
        raise UsageError(f"{text}: no such bundle in the cache{nearest(text, known)}", "See them with: sdrt cache list")
    return chosen


def _fields(entry: Entry) -> dict[str, Any]:
    """An entry as `--json` shows it."""
    return {
        "name": entry.name,
        "key": entry.key,
        "bundle": None if entry.bundle is None else str(entry.bundle),
        "size_bytes": entry.size_bytes,
        "last_used": datetime.fromtimestamp(entry.used_s).astimezone().isoformat(timespec="seconds"),
        "sources": [asdict(source) for source in entry.sources],
        **({"problem": entry.problem} if entry.problem else {}),
    }


def _words(source: Source) -> str:
    """A source in short."""
    return source.name + (f" at {source.scale:g}" if source.scale is not None else "")
