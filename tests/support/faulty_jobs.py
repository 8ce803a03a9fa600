"""Small jobs through the one writer, for tests that make it fail, and a process that kills them at every point. Imports
no torch.

`python faulty_jobs.py FOLDER JOB` runs JOB once for each point, in a child killed there, then once more to its end. It
prints, for each point, what the target held after the kill and what lay beside it after the next run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from write_faults import arm

from sdrt.files import publish

FILES = {
    "graphs/weights.safetensors": 3_000_000,
    "graphs/step.fp32.onnx": 70_000,
    "tokenizer/tokenizer.json": 5_000,
    "reference/step.npz": 1,
}
ENOUGH = 10_000


def content(name: str, size_bytes: int) -> bytes:
    return (hashlib.sha256(name.encode()).digest() * (size_bytes // 32 + 1))[:size_bytes]


def write_bundle(target: Path, *, replace: bool = False) -> None:
    """The order of a build: folders, large files in pieces, the manifest last."""
    with publish.staged_folder(target, replace=replace) as stage:
        for part in ("graphs", "tokenizer", "reference"):
            publish.new_folder(stage / part)
        for name, size_bytes in FILES.items():
            data = content(name, size_bytes)
            with publish.new_file(stage / name, size_bytes) as stream:
                for start in range(0, size_bytes, 400_000):
                    stream.write(data[start : start + 400_000])
        publish.write_file(
            stage / "manifest.json",
            json.dumps({name: hashlib.sha256(content(name, n)).hexdigest() for name, n in FILES.items()}).encode(),
        )


def old_bundle(target: Path) -> None:
    (target / "graphs").mkdir(parents=True)
    (target / "graphs" / "old").write_text("old")
    (target / "manifest.json").write_text("{}")


def write_new(folder: Path) -> None:
    write_bundle(folder / "x.sdrt")


def write_over(folder: Path) -> None:
    write_bundle(folder / "x.sdrt", replace=True)


def write_over_in_two_renames(folder: Path) -> None:
    exchange = publish._renameat2
    publish._renameat2 = lambda old, new, flags: 38 if flags == 2 else exchange(old, new, flags)
    try:
        write_over(folder)
    finally:
        publish._renameat2 = exchange


def write_picture(folder: Path) -> None:
    with publish.staged_file(folder / "x.sdrt") as stage:
        publish.write_file(stage, b"new picture" * 200_000)


def prepare_picture(folder: Path) -> None:
    (folder / "x.sdrt").write_text("old picture")


def prepare_old(folder: Path) -> None:
    old_bundle(folder / "x.sdrt")


def prepare_nothing(folder: Path) -> None:
    pass


JOBS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "new": (prepare_nothing, write_new),
    "over": (prepare_old, write_over),
    "two renames": (prepare_old, write_over_in_two_renames),
    "picture": (prepare_picture, write_picture),
}


def state(path: Path) -> str:
    """A digest of a file, or of every name and byte of a folder; empty where there is nothing."""
    if not os.path.lexists(path):
        return ""
    digest = hashlib.sha256()
    for file in [path, *sorted(path.rglob("*"))]:
        digest.update(
            os.fsencode(file.relative_to(path))
            + (b"/" if file.is_dir() else hashlib.sha256(file.read_bytes()).digest())
        )
    return digest.hexdigest()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_child(job: Callable[[], None]) -> int:
    """The exit status of a job in a process of its own: 0, or minus a signal."""
    pid = os.fork()
    if not pid:
        try:
            job()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(number: int, job: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        arm(number, "kill")
        job()

    return run


def main() -> None:
    root, (prepare, job) = Path(sys.argv[1]), JOBS[sys.argv[2]]
    rows = []
    for number in range(1, ENOUGH):
        folder = root / str(number)
        folder.mkdir()
        prepare(folder)
        status = in_child(killed(number, lambda folder=folder: job(folder)))
        after_kill = state(folder / "x.sdrt")
        with suppress(OSError):
            shutil.rmtree(root / "again")
        again = in_child(lambda folder=folder: (write_over if sys.argv[2] == "new" else job)(folder))
        rows.append(
            {
                "status": status,
                "after kill": after_kill,
                "again": again,
                "in the end": state(folder / "x.sdrt"),
                "beside": names(folder),
            }
        )
        shutil.rmtree(folder)
        if status == 0:
            break
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
