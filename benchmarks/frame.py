"""The frame of every benchmark: a registry, interleaved timing, and a result that says where and how it was measured."""
import datetime
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hawk_jax.pipeline import versions


@dataclass(frozen=True)
class Benchmark:
    """`run(folder, repeats)` measures inside an empty folder and returns a `report`."""
    name: str
    about: str
    run: Callable[[Path, int], dict]


REGISTRY: dict[str, Benchmark] = {}


def benchmark(name: str, about: str):
    """Registers a function under the name by which `python -m benchmarks NAME` finds it."""
    def register(run):
        REGISTRY[name] = Benchmark(name, about, run)
        return run
    return register


# ------------------------------------------------------------------------------------------------ measuring
def seconds(work: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Rate(NamedTuple):
    """How fast something is done, and what it costs whoever else uses the machine: CPU time of this process, all threads."""
    per_second: float
    cpu_ms: float


def rate(work: Callable[[], object], count: int, least: float = 1.5) -> Rate:
    """Of things of which a call of `work` does `count`, over at least `least` seconds."""
    start, cpu, done = time.perf_counter(), time.process_time(), 0
    while (passed := time.perf_counter() - start) < least:
        work()
        done += count
    return Rate(done / passed, 1000 * (time.process_time() - cpu) / done)


def interleaved(works: dict[str, Callable], repeats: int) -> dict[str, list]:
    """Each work once, then each again, ...: what else the machine does falls on all alike.  A work returns its own figure."""
    samples = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            samples[name].append(work())
    return samples


def figure(samples: list[float], unit: str, better: str) -> dict:
    """Least, median and greatest of the repeats; `better` is "higher" or "lower"."""
    return {"unit": unit, "better": better, "repeats": len(samples), "min": round(min(samples), 4),
            "median": round(statistics.median(samples), 4), "max": round(max(samples), 4)}


def ratio(samples: dict[str, list[float]], ours: str, peer: str) -> dict:
    """ours / peer, repeat by repeat, as both saw the same load; order the two so that more is better."""
    return figure([a / b for a, b in zip(samples[ours], samples[peer])], f"{ours} / {peer}", "higher")


def rates(label: str, samples: dict[str, list[Rate]], thing: str, peer: str) -> tuple[dict, dict]:
    """(figures, ratios) of works whose samples are Rates: speed and CPU time of each, and the CPU time of `peer` over that of each.

    Ratios are of CPU time, as wall time on a busy machine says more about its other users.
    """
    figures, ratios = {}, {}
    for name, values in samples.items():
        figures[f"{label}, {name}"] = figure([r.per_second for r in values], f"{thing}s/s", "higher")
        figures[f"{label}, {name}, CPU"] = figure([r.cpu_ms for r in values], f"CPU ms/{thing}", "lower")
        if name != peer:
            costs = {"ours": [r.cpu_ms for r in values], peer: [r.cpu_ms for r in samples[peer]]}
            ratios[f"{label}, {name} against {peer}"] = ratio(costs, peer, "ours") | {"unit": f"CPU of {peer} / CPU of {name}"}
    return figures, ratios


def report(settings: dict, figures: dict[str, dict], ratios: dict[str, dict]) -> dict:
    """What a benchmark returns: the sizes it ran with, its figures, and its ratios to peers of the same run."""
    return {"settings": settings, "figures": figures, "ratios": ratios}


# ------------------------------------------------------------------------------------------------ where it was measured
def _first_line(file: str, start: str) -> str:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(start)), "")


def _accelerator() -> str:
    try:
        import jax
        devices = jax.devices()
    except (ImportError, RuntimeError) as error:        # a machine that only prepares data has no jax
        return f"none ({type(error).__name__})"
    return f"{len(devices)} x {devices[0].device_kind}"


def machine() -> dict:
    """Processor, cores this process may use, memory, system, accelerator."""
    memory = _first_line("/proc/meminfo", "MemTotal").split()
    return {"cpu": _first_line("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_GiB": round(int(memory[0]) / 2 ** 20, 1) if memory else None,
            "os": platform.platform(), "accelerator": _accelerator()}


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else ""


def run(bench: Benchmark, folder: Path, repeats: int) -> dict:
    """The benchmark's report with its surroundings; the load average tells how quiet the machine was."""
    before, start = os.getloadavg(), time.perf_counter()
    result = bench.run(folder, repeats)
    return {"name": bench.name, "about": bench.about, "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": _git("rev-parse", "HEAD"), "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "command": "python -m benchmarks " + " ".join(sys.argv[1:]), "seconds": round(time.perf_counter() - start, 1),
            "load_average": {"before": before[0], "after": os.getloadavg()[0]},
            "machine": machine(), "versions": versions(), **result}
