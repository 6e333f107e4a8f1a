"""Every stage of a run on the synthetic world in order: render, prepare, pretrain, train twice, evaluate, report, export.

A stage that finished with the same options is not repeated; an interrupted one goes on; one whose options changed starts over.
"""
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from hawk_jax import config as cfg
from hawk_jax.config import HawkConfig, HawkError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "grain", "array_record", "tensorflow-datasets",
            "opencv-python", "opencv-python-headless", "av", "spacy", "sentencepiece", "sacrebleu")


def versions() -> dict[str, str]:
    """Python and the packages that decide numbers, for logs and reports."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# ------------------------------------------------------------------------------------------------ stages that know they are done
class Stages:
    """Runs named stages in one folder; `done/NAME.json` holds the key of what made it and its summary."""

    def __init__(self, folder: Path):
        self.folder, self.previous, self.summaries = folder, "", {}
        (folder / "done").mkdir(parents=True, exist_ok=True)

    def run(self, name: str, options: dict, outputs: list[Path], work) -> dict:
        """Calls `work()` unless the stage is done; `options` and every stage before decide what "the same" means."""
        key = hashlib.sha256(json.dumps([name, options, self.previous], sort_keys=True).encode()).hexdigest()[:16]
        marker, self.previous = self.folder / "done" / f"{name}.json", key
        old = _read_marker(marker)
        if old.get("key") == key and old["done"] and all(path.exists() for path in outputs):
            print(f"== {name}: done before in {old['seconds']:.0f} s", flush=True)
            self.summaries[name] = old
            return old["summary"]
        if old.get("key") != key:
            for path in outputs:        # made by other options: nothing of it may leak into this run
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        print(f"== {name}", flush=True)
        _write_json(marker, {"key": key, "done": False})
        start = time.perf_counter()
        summary = work() or {}
        record = {"key": key, "done": True, "seconds": time.perf_counter() - start, "summary": summary}
        _write_json(marker, record)
        self.summaries[name] = record
        return summary


def _read_marker(path: Path) -> dict:
    """What is known of a stage; {} if it was never begun."""
    if not path.is_file():
        return {}
    try:
        old = json.loads(path.read_text())
        if old.keys() >= ({"key", "done", "seconds", "summary"} if old["done"] else {"key"}):
            return old
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    # not taken for "never begun": that would delete what the stage made
    raise HawkError(f"{path} is damaged; delete it to do this stage and all after it again")


def _write_json(path: Path, value) -> None:
    """Whole or not at all: a kill leaves the old file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, default=str))
    temporary.replace(path)


# ------------------------------------------------------------------------------------------------ one run's weights
def load_params(c: HawkConfig, step: int | None = None):
    """(params, mesh) of a run: its trainables (of one step; None: the best) joined with the frozen tree they were trained on."""
    from hawk_jax.mesh import make_mesh
    from hawk_jax.training.checkpoint import load_trained
    mesh = make_mesh(c.mesh)
    return load_trained(c, mesh, step), mesh


def evaluate_run(c: HawkConfig, split: str, labels: Path | None, out: Path) -> dict:
    """Generates descriptions and answers on a split and scores them against controls; writes results.json and outputs.jsonl."""
    from data.stream import Input
    from hawk_jax.evaluation.evaluate import evaluate
    params, mesh = load_params(c)
    live = Input(dataclasses.replace(c, input=dataclasses.replace(c.input, features="live")))
    return evaluate(c, params, live, split, out, labels=labels, mesh=mesh)


def export_run(c: HawkConfig, out: Path, pth: str = "released", step: int | None = None, compute: bool = True) -> str:
    """Writes and proves a folder for PyTorch; returns lines that say what was written."""
    from hawk_jax.convert.export import export
    params, mesh = load_params(c, step)
    return export(params, c, out, mesh=mesh, pth=pth, compute=compute)


# ------------------------------------------------------------------------------------------------ the demo
def _moved(c: HawkConfig, base: str, out: Path) -> HawkConfig:
    """The same configuration with every path below `base` moved below `out`."""
    def move(path: str) -> str:
        return str(out / Path(path).relative_to(base)) if path and Path(path).is_relative_to(base) else path
    r = dataclasses.replace
    return r(c, input=r(c.input, datasets=tuple(r(d, folder=move(d.folder)) for d in c.input.datasets)),
             run=r(c.run, folder=move(c.run.folder), frozen=move(c.run.frozen), init_from=move(c.run.init_from)))


def _stage_configs(file: str, options: list[str], out: Path | None) -> tuple[HawkConfig, HawkConfig, Path]:
    if ":" in file:
        raise cfg.ConfigError(f"demo takes the file with both stages: {file.partition(':')[0]}")
    one, two = (cfg.load(f"{file}:{stage}", options) for stage in ("stage1", "stage2"))
    base = str(Path(one.run.folder).parent)
    out = out or Path(base)
    one, two = _moved(one, base, out), _moved(two, base, out)
    for c, name in ((one, "stage1"), (two, "stage2")):
        places = [c.run.folder, c.run.frozen, *(d.folder for d in c.input.datasets)]
        if [Path(p) for p in places] != [out / name, out / "frozen", out / "records"]:
            raise cfg.ConfigError(f"{file}:{name} uses {', '.join(places)}, the demo makes {out}/{name}, {out}/frozen and {out}/records; "
                                  "leave run.folder, run.frozen and input.datasets alone and move all of it with --out")
    return one, two, out


@contextlib.contextmanager
def _claimed(out: Path, fresh: bool):
    """Within it `out` belongs to this demo alone.  Refuses a folder with other things in it: stages delete what they make anew."""
    if out.exists() and not (out / "done").is_dir() and (not out.is_dir() or any(out.iterdir())):
        raise HawkError(f"{out} holds what no demo made, and the stages would replace it; name another folder with --out")
    try:
        (out / "done").mkdir(parents=True, exist_ok=True)
        lock = open(out / "done" / "lock", "w")
    except OSError as error:
        raise HawkError(f"{out} cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HawkError(f"another demo is running in {out}") from None
        for path in [*out.iterdir(), *out.glob("done/*.json")] if fresh else ():
            if path.name != "done":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def _world_version() -> int:
    """Raised when the same options draw other clips."""
    from data.synthetic import VERSION
    return VERSION


def _embedded_hash() -> str:
    """Hash over the embedded tokenizer and language pipeline: other ones make other records and other token ids."""
    from data.text import EMBEDDED
    files = sorted(p for p in EMBEDDED.parent.rglob("*") if p.is_file() and p.suffix != ".md")
    return hashlib.sha256(b"".join(p.name.encode() + p.read_bytes() for p in files)).hexdigest()[:16]


def _parts(c: HawkConfig, *names: str) -> dict:
    tree = cfg.to_dict(c)
    return {name: tree[name] for name in names}


def demo(file: str, options: list[str], out: Path | None = None, fresh: bool = False) -> dict:
    """All stages of `configs/demo.py` or a file like it.  Ends with the path of the report and the digest of the first losses."""
    one, two, out = _stage_configs(file, options, out)
    start = time.perf_counter()
    with _claimed(out, fresh):
        stages = _run_stages(one, two, out)
    _goodbye(stages, out, time.perf_counter() - start)
    _compare_losses(stages, Path(file))
    print(f"report               {(out / 'report.html').resolve()}")
    return stages.summaries


def _run_stages(one: HawkConfig, two: HawkConfig, out: Path) -> Stages:
    stages, labels = Stages(out), out / "world" / "labels.jsonl"

    def render():
        from data.synthetic import render
        return render(one.world, out / "world")

    def prepare():
        from data.prepare import prepare
        return prepare(videos=out / "world", annotations=out / "world", out=out / "records", spacy="embedded", config=one)

    def pretrain():
        from hawk_jax.training.pretrain import pretrain
        return pretrain(one, labels)

    def train(c: HawkConfig):
        from hawk_jax.training.loop import train
        return train(c)

    def report():
        from hawk_jax.evaluation.report import report
        return {"path": str(report(out, out / "report.html", {"stage1": one, "stage2": two}, stages.summaries, versions()))}

    learn = ("input", "model", "loss", "optim", "mesh", "run")
    stages.run("render", _parts(one, "world") | {"drawing": _world_version()}, [out / "world"], render)
    stages.run("prepare", _parts(one, "prepare") | {"embedded": _embedded_hash()}, [out / "records"], prepare)
    stages.run("pretrain", _parts(one, "pretrain", "input", "model", "mesh"), [out / "frozen"], pretrain)
    stages.run("stage1", _parts(one, *learn), [out / "stage1"], lambda: train(one))
    stages.run("stage2", _parts(two, *learn), [out / "stage2"], lambda: train(two))
    stages.run("evaluate", _parts(two, "generate"), [out / "evaluation"],
               lambda: evaluate_run(two, two.input.test_split, labels, out / "evaluation"))
    stages.run("report", {}, [out / "report.html"], report)
    stages.run("export", {}, [out / "exported"], lambda: {"written": export_run(two, out / "exported")})
    return stages


def _goodbye(stages: Stages, out: Path, seconds: float) -> None:
    print("\nstage        seconds")
    for name, record in stages.summaries.items():
        print(f"{name:12} {record['seconds']:7.1f}")
    print(f"\nfor PyTorch          {stages.summaries['export']['summary']['written']}")
    print(f"this call            {seconds:.0f} s")
    print(f"first 20 losses      {stages.summaries['stage1']['summary']['losses_digest']}  (stage 1; equal for equal runs on one machine)")


def _compare_losses(stages: Stages, file: Path) -> None:
    """How far the first losses of the very first phase are from the committed ones; later phases amplify rounding."""
    committed, phases = file.with_name(f"{file.stem}_losses.json"), stages.summaries["pretrain"]["summary"]["phases"]
    if committed.is_file() and "first_losses" in phases[0]:      # a stage done by an older version has none
        there, here = json.loads(committed.read_text())["first_losses"], phases[0]["first_losses"]
        furthest = max(abs(a - b) / abs(b) for a, b in zip(here, there))
        print(f"committed losses     within {furthest:.1e} (stage 0a, first {len(here)}; expected below 1e-3 unless options were changed)")
