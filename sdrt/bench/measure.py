"""One process that measures one bundle: it loads the bundle, makes pictures, and writes what it saw as JSON.

Every set of samples gets a fresh process, because processes differ more than pictures do. The process reads its request
from a file and writes its answer to another, so nothing that a library prints can mix with it. Before the first picture
it imports hardly more than the runtime needs.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sdrt.bench.device_times import DEVICE_METRICS
from sdrt.bundle.graphs import STEP
from sdrt.errors import MachineError, SdrtError
from sdrt.machine.memory import peak_rss_bytes

if TYPE_CHECKING:
    from sdrt.bench.instruments import Readings
    from sdrt.bench.throttle import Watch
    from sdrt.bundle.folder import Bundle
    from sdrt.runtime import Pipeline

_FIT_SHARES = (0.25, 0.5)
"""Shares of the steps for further pictures, which serve the fit of fixed and per-call cost."""
_FIT_PICTURES = 3
ONCE = ("import_ms", "load_ms", "engine_load_ms", "first_picture_ms", "cold_ms")
"""Metrics that a process takes once, at its start."""


@dataclass(frozen=True)
class Request:
    """What to measure.

    Times are limits in seconds. `prompts` take turns and replace `prompt`, if there are any. `python` is the
    interpreter to measure in, None for this one. `spawned_ns` is `time.monotonic_ns()` of the caller just before it
    started this process.
    """

    bundle: str
    scenario: str = "single"
    backend: str = "auto"
    device: int = 0
    threads: int | None = None
    size: tuple[int, int] | None = None
    steps: int = 20
    cfg: float = 7.0
    sampler: str = "euler"
    schedule: str | None = None
    prompt: str = "a red apple on a wooden table"
    prompts: tuple[str, ...] = ()
    negative: str = ""
    seed: int = 0
    batch: int = 1
    pictures: int = 20
    limit_s: float = 30.0
    warm_up_s: float = 30.0
    rate: float = 1.0
    duration_s: float = 30.0
    queue: int = 8
    process: int = 0
    layers: bool = False
    python: str | None = None
    spawned_ns: int = 0


class _Sampler:
    """Makes pictures and keeps the cost of each, in ms."""

    def __init__(self, pipe: Pipeline, readings: Readings, request: Request) -> None:
        self._pipe, self._readings, self._request = pipe, readings, request
        self._made = 0
        self.samples: dict[str, list[float]] = {}
        self.points: list[tuple[int, float]] = []
        self.last: Any = None
        self.watch: Watch | None = None
        self.throttled: dict[str, list[float]] = {}
        self.dropped = 0

    def picture(self, *, steps: int | None = None, keep: bool = False, same: bool = False) -> float:
        """Make one call's pictures. `keep` stores its samples. Each call has a prompt of its own, unless it is to be
        the `same` as in other runs.
        """
        request, readings = self._request, self._readings
        self._made += 1
        prompts = request.prompts or (request.prompt,)
        prompt = prompts[0] if same else f"{prompts[(self._made - 1) % len(prompts)]}, {self._made}"
        readings.reset()
        if self.watch is not None and keep:
            self.watch.begin()
        started = readings.clock()
        self.last = self._pipe(
            prompt,
            negative=request.negative,
            steps=steps or request.steps,
            cfg=request.cfg,
            seed=request.seed,
            sampler=request.sampler,
            schedule=request.schedule,
            size=request.size,
            batch=request.batch,
            count=request.batch,
        )
        total = (readings.clock() - started - readings.waited) / 1e6
        slowed = keep and self.watch is not None and self.watch.throttled()
        if keep:
            self.dropped += slowed
            self._keep(total, self.throttled if slowed else self.samples)
        if not slowed:
            self.points.append((len(readings.steps), total))
        return total

    def _keep(self, total: float, kept: dict[str, list[float]]) -> None:
        readings = self._readings
        found = {
            "total_ms": [total],
            "step_ms": [ns / 1e6 for ns in readings.steps],
            "host_ms": [total - readings.inside / 1e6],
        }
        tokenise_ms = self.last.timings_ms.get("tokenise")
        for name, value in (
            ("tokenise_ms", tokenise_ms),
            ("text_encoder_ms", readings.text_encoder / 1e6),
            ("decode_ms", readings.decode / 1e6),
        ):
            if value:  # 0: nothing was done, as with cached prompts; no sample is better than a fast one
                found[name] = [value]
        found["copies_ms"] = [readings.copies / 1e6]
        if readings.device is not None:
            for part, times in readings.device.read().items():
                if part in DEVICE_METRICS:  # text encoder and decoder may run several times for one picture
                    found[DEVICE_METRICS[part]] = times if part == STEP else [sum(times)]
        if self._request.batch > 1:
            found["picture_ms"] = [total / self._request.batch]
        for name, values in found.items():
            kept.setdefault(name, []).extend(values)

    def counted(self) -> tuple[dict[str, list[float]], list[str]]:
        """The samples, without those of pictures made while the machine throttled, and notes about that."""
        if not self.dropped:
            return self.samples, []
        if not self.samples:
            return self.throttled, [
                f"the machine throttled in every picture of a process ({self.dropped}): none was dropped"
            ]
        return self.samples, [
            f"{self.dropped} pictures of a process dropped: the machine throttled while they were made"
        ]


class _Turns:
    """The other end of `sdrt.bench.turns`. It reads words from standard input. After each word it makes one picture, in
    turns with the other process.

    `TURN_MS` is the shortest turn. It is long compared with the cost of changing processes, and short compared with the
    time in which a busy machine changes its speed. A GPU goes on working after the host has moved on, so with a GPU a
    turn is a whole picture.
    """

    TURN_MS = 50.0

    def __init__(self, said: IO[str], told: IO[str]) -> None:
        self._said, self._told = said, told
        self._began = 0.0

    def tell(self, word: str) -> None:
        self._told.write(word + "\n")
        self._told.flush()

    def hear(self) -> str:
        word = self._said.readline().strip()
        if not word:
            raise MachineError("whoever asked for pictures is gone")
        self._began = time.perf_counter()
        return word

    def between(self) -> None:
        """After a model call: let the other process work, if this turn has been long enough."""
        if (time.perf_counter() - self._began) * 1e3 >= self.TURN_MS:
            self.tell("turn")
            self.hear()

    def make(self, sampler: _Sampler, readings: Readings) -> None:
        """Make the pictures asked for, first `warm` ones and then those that count, until the word `end`."""
        engine = sampler.last.engine
        self.tell(
            json.dumps({"peak_rss_bytes": peak_rss_bytes(), "engine": engine, "parameters": sampler.last.parameters})
        )
        while (word := self.hear()) != "end":
            readings.between = self.between if engine.get("device") == "cpu" else None
            sampler.picture(keep=word == "picture")
            readings.between = None
            self.tell("done")


def measure(request: Request, turns: _Turns | None = None) -> dict[str, Any]:
    """Measure in this process, alone or in turns with another.

    Raises:
        SdrtError: whatever loading and making pictures raise.
    """
    from sdrt.runtime import Pipeline  # first, because the import time is measured

    imported_ns = time.monotonic_ns()
    from sdrt.bench.instruments import Readings

    readings = Readings()
    started = time.monotonic_ns()
    pipe = Pipeline.load(
        request.bundle,
        backend=request.backend,
        device=request.device,
        threads=request.threads,
        observe=readings.observe,
    )
    loaded_ns = time.monotonic_ns()
    sampler = _Sampler(pipe, readings, request)
    first_ms = sampler.picture()
    cold_ns = time.monotonic_ns()
    imported = [name for name in sys.modules if not name.startswith("sdrt.bench")]
    once = {
        "import_ms": (imported_ns - request.spawned_ns) / 1e6,
        "load_ms": (loaded_ns - started) / 1e6,
        "engine_load_ms": readings.engine_load / 1e6,
        "first_picture_ms": first_ms,
        "cold_ms": (cold_ns - request.spawned_ns) / 1e6,
    }
    return _sustained(
        request, pipe, readings, sampler, {name: [value] for name, value in once.items()}, imported, turns
    )


def _sustained(
    request: Request,
    pipe: Pipeline,
    readings: Readings,
    sampler: _Sampler,
    samples: dict[str, list[float]],
    imported: list[str],
    turns: _Turns | None = None,
) -> dict[str, Any]:
    """Everything after the first picture. Here other imports may begin."""
    from sdrt.bench.fidelity import check_references, picture_record
    from sdrt.bench.scenarios import repeat, warm_up
    from sdrt.bench.throttle import Watch, gpu_state

    if request.layers:
        from sdrt.bench.layers import check_backend

        check_backend(sampler.last.engine["backend"])  # before the long part starts
    readings.keep = True
    sampler.picture(same=True)
    readings.keep = False
    counters = dict(sorted(readings.calls.items())) | {
        "model_calls": len(readings.steps),
        "modules_imported": len(imported),
        "packages_imported": len(_packages(imported)),
    }
    pixels, latents = sampler.last.images, readings.kept["latents"]
    sampler.points.clear()
    server: dict[str, Any] | None = None
    warm = warm_up(sampler.picture, limit_s=request.warm_up_s, now=time.monotonic) if turns is None else None
    sampler.points.clear()
    gpu = gpu_state(pipe._engine, request.device)
    watch = sampler.watch = Watch(gpu)
    machine: dict[str, Any] = {
        "told": watch.told,
        "before": watch.now(),
        "gpu": gpu.identity() if gpu is not None else None,
    }
    if turns is not None:
        turns.make(sampler, readings)
    elif request.scenario == "server":
        server = _serve(request, sampler)
    else:
        for _ in repeat(request.pictures, limit_s=request.limit_s, now=time.monotonic):
            sampler.picture(keep=True)
    machine |= {"after": watch.now(), "dropped": sampler.dropped}
    for _ in repeat(_FIT_PICTURES, limit_s=request.limit_s / 4, now=time.monotonic) if turns is None else ():
        for share in _FIT_SHARES:
            sampler.picture(steps=max(1, round(request.steps * share)))
    kept, throttled = sampler.counted()
    samples |= kept
    if (peak := peak_rss_bytes()) is not None:
        samples["peak_rss_bytes"] = [float(peak)]
    if (device := _device_bytes(sampler.last.engine)) is not None:
        samples["device_bytes"] = [float(device)]
    engine = sampler.last.engine
    assert pipe._engine is not None
    checks, problems, skipped = (
        check_references(pipe._engine, pipe.bundle) if turns is None or request.process == 0 else ([], [], [])
    )
    record, wrong = picture_record(request.seed, latents, pixels)
    answer: dict[str, Any] = {
        "samples": samples,
        "counters": (
            counters
            | {"bundle_bytes": sum(file.size_bytes for file in pipe.bundle.manifest.files.values())}
            | _engine_bytes(pipe.bundle, engine)
        ),
        "packages": sorted(_packages(imported)),
        "engine": engine,
        "parameters": sampler.last.parameters,
        "fit": sampler.points,
        "warm_up": None if warm is None else asdict(warm),
        "machine": machine,
        "warnings": (
            skipped
            + throttled
            + (
                []
                if warm is None or warm.stable
                else [f"warm-up: pictures still varied by more than 2 % after {warm.seconds:.0f} s"]
            )
        ),
        "fidelity": {
            "ok": not problems and not wrong,
            "checks": checks,
            "problems": problems + wrong,
            "picture": record,
        },
    }
    if server is not None:
        answer["samples"] |= server.pop("samples")
        answer["server"] = server
    if request.layers:
        from statistics import median

        from sdrt.bench.layers import profile
        from sdrt.bundle.graphs import TEXT_ENCODER, VAE_DECODER

        host = {TEXT_ENCODER: "text_encoder_ms", STEP: "step_ms", VAE_DECODER: "decode_ms"}
        taken = {
            graph: samples.get(DEVICE_METRICS[graph]) or samples.get(name) for graph, name in host.items()
        }  # without the copies, where that is known
        wall_ms = {graph: median(values) for graph, values in taken.items() if values}
        answer["layers"] = profile(pipe, readings.kept, wall_ms)
    return answer


def _serve(request: Request, sampler: _Sampler) -> dict[str, Any]:
    from sdrt.bench.scenarios import attained_rate, poisson_arrivals, serve

    arrivals = poisson_arrivals(request.rate, request.duration_s, request.seed + request.process)
    requests = serve(
        arrivals, lambda: sampler.picture(keep=True), queue=request.queue, now=time.monotonic, sleep=time.sleep
    )
    done = [
        (one.arrived, one.started, one.ended) for one in requests if one.started is not None and one.ended is not None
    ]
    return {
        "samples": {
            "latency_ms": [(ended - arrived) * 1e3 for arrived, _, ended in done],
            "queue_ms": [(began - arrived) * 1e3 for arrived, began, _ in done],
        },
        "offered_per_s": request.rate,
        "attained_per_s": attained_rate(requests),
        "arrivals": len(requests),
        "completed": len(done),
        "rejected": len(requests) - len(done),
    }


def _packages(modules: list[str]) -> set[str]:
    """Top-level packages that are not Python's own."""
    own = {*sys.stdlib_module_names, "cython_runtime"}
    return {
        name
        for name in (module.partition(".")[0] for module in modules)
        if name not in own and not name.startswith("_")
    }


def _engine_bytes(bundle: Bundle, engine: dict[str, Any]) -> dict[str, int]:
    """The files that the running engine reads: a compiled engine's plans, or the graphs of its precision with the
    weights.
    """
    from sdrt.bundle.manifest import ENGINES, WEIGHTS

    files = bundle.manifest.files
    if "engine" in engine:
        folder = bundle.path / ENGINES / str(engine["engine"])
        return (
            {"engine_bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file())}
            if folder.is_dir()
            else {}
        )
    graphs = {
        by_precision[engine["compute"]].path
        for by_precision in bundle.manifest.graphs.values()
        if engine.get("compute") in by_precision
    }
    return (
        {"engine_bytes": files[WEIGHTS].size_bytes + sum(files[path].size_bytes for path in graphs)} if graphs else {}
    )


def _device_bytes(engine: dict[str, Any]) -> int | None:
    """Memory in use on the GPU, including that of other programs; None on a CPU."""
    if engine.get("device") == "cpu":
        return None
    try:
        from cuda.bindings import driver
    except ImportError:
        return None
    status, free, total = driver.cuMemGetInfo()
    return int(total) - int(free) if status == driver.CUresult.CUDA_SUCCESS else None


def take_turns() -> None:
    """Run as a process that takes turns. Everything that a library prints goes to standard error, so that standard
    output carries only words.
    """
    output, errors = 1, 2
    with os.fdopen(os.dup(output), "w") as told:
        os.dup2(errors, output)
        serve(_Turns(sys.stdin, told))


def serve(turns: _Turns | None = None) -> None:
    """Run as the measuring process. `sys.argv` holds the paths of the request and of the answer."""
    asked = json.loads(Path(sys.argv[1]).read_bytes())
    known = {field.name for field in fields(Request)}  # another version of sdrt may send fields that are unknown here
    request = Request(**{name: value for name, value in asked.items() if name in known})
    request = replace(request, prompts=tuple(request.prompts))  # JSON has lists
    if request.size is not None:
        request = replace(request, size=(request.size[0], request.size[1]))
    try:
        answer = measure(request, turns)
    except SdrtError as error:
        answer = {"error": {"kind": type(error).__name__, "message": error.line, "fix": error.fix}}
    Path(sys.argv[2]).write_text(json.dumps(answer | {"understood": sorted(known)}), encoding="utf-8")
