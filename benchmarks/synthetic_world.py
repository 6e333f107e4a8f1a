"""What a model learns of the synthetic world: joins finished runs (one per seed) into one result and one table.

    python -m hawk_jax demo configs/synthetic.py
    python -m hawk_jax demo configs/synthetic.py --out runs/synthetic_seed1 run.seed=1 model.seed=1 input.seed=1
    python -m benchmarks.synthetic_world runs/synthetic runs/synthetic_seed1

Writes benchmarks/results/synthetic_world.json (scores, losses and seconds of every stage, machine, versions) and docs/synthetic.md.
"""
import argparse
import json
import statistics
import sys
from pathlib import Path

from benchmarks.frame import machine, versions
from hawk_jax.config import HawkError

STAGES = ("stage1", "stage2")
KEPT_LOSSES = 60                        # log lines of a stage that are kept: enough for a curve, small enough to commit


def read_run(folder: Path) -> dict:
    """Scores, seeds, losses and seconds of one finished run."""
    results, done = folder / "evaluation" / "results.json", folder / "done"
    if not results.is_file():
        raise HawkError(f"{folder} has no evaluation/results.json: has `python -m hawk_jax demo ... --out {folder}` finished?")
    stages = {marker.stem: json.loads(marker.read_text()) for marker in sorted(done.glob("*.json"))}
    return {"folder": folder.name, "results": json.loads(results.read_text()),
            "seconds": {name: round(stage["seconds"], 1) for name, stage in stages.items() if stage.get("done")},
            "pretrain": stages.get("pretrain", {}).get("summary", {}).get("phases", []),
            "losses": {stage: _losses(folder / stage / "log.jsonl") for stage in STAGES}}


def _losses(file: Path) -> list[dict]:
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    lines = [{k: v for k, v in line.items() if k != "time"} for line in lines if line["kind"] != "event"]
    return lines[::max(1, len(lines) // KEPT_LOSSES)]


def _over_seeds(runs: list[dict], read) -> dict:
    values = [read(run["results"]) for run in runs]
    return {"mean": statistics.mean(values), "least": min(values), "greatest": max(values), "values": values}


def summarise(runs: list[dict]) -> dict:
    """{figure: {mean, least, greatest, values}} over the runs."""
    def bleu(table, who):
        return lambda r: r["descriptions"][table][who]["bleu_4"]
    figures = {"class named rightly": lambda r: r["classes"]["right"], "class, macro recall": lambda r: r["classes"]["macro_recall"],
               "class, clips shuffled": lambda r: r["classes"]["shuffled_right"], "colour": lambda r: r["classes"]["colour"],
               "place": lambda r: r["classes"]["place"]}
    for table in ("one_reference", "all_references"):
        figures |= {f"description BLEU-4, {table}, {who}": bleu(table, who) for who in ("model", "shuffled", "constant")}
    figures["description BLEU-4, times shuffled"] = lambda r: bleu("one_reference", "model")(r) / bleu("one_reference", "shuffled")(r)
    for who in ("model", "shuffled", "constant", "constant_per_question"):
        figures[f"answer BLEU-4, {who}"] = lambda r, who=who: r["answers"][who]["bleu_4"]
        figures[f"answer exact, {who}"] = lambda r, who=who: r["answers"][who]["exact"]
    for number, pair in enumerate(runs[0]["results"]["classes"]["pairs"]):
        figures[f"pair {' / '.join(pair['pair'])} (only {pair['only']})"] = lambda r, n=number: r["classes"]["pairs"][n]["right"]
    return {name: _over_seeds(runs, read) for name, read in figures.items()}


def table(summary: dict, runs: list[dict]) -> str:
    """The summary as a Markdown page."""
    commands = "\n".join(f"    runs/{run['folder']}" for run in runs)
    lines = [f"| {name} | {s['mean']:.2f} | {' · '.join(f'{v:.2f}' for v in s['values'])} |" for name, s in summary.items()]
    seconds = [f"| {name} | {' · '.join(str(round(run['seconds'].get(name, 0))) for run in runs)} |" for name in runs[0]["seconds"]]
    clips = runs[0]["results"]["clips"]
    return "\n".join([
        "# The synthetic world, measured", "",
        f"Made by `python -m benchmarks.synthetic_world` from {len(runs)} runs of `configs/synthetic.py` ({clips} held-out clips, "
        f"{len(runs[0]['results']['classes']['per_class'])} classes), one per seed; the JSON with losses, machine and versions is "
        "`benchmarks/results/synthetic_world.json`.", "", commands, "",
        "Stage 0 made the encoder and the decoder with labels that only the renderer knows; stages 1 and 2 saw texts alone. \"Shuffled\" "
        "pairs the same outputs with other clips' references; \"constant\" is the best single text, chosen without the test split.", "",
        "| figure | mean | per seed |", "|---|---|---|", *lines, "",
        "| stage | seconds (2 shared cores; stages done before count as they were) |", "|---|---|", *seconds, ""])


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.synthetic_world", description=__doc__.splitlines()[0],
                                epilog="example: python -m benchmarks.synthetic_world runs/synthetic runs/synthetic_seed1")
    p.add_argument("runs", nargs="+", type=Path, help="folders that `python -m hawk_jax demo` finished")
    args = p.parse_args()
    try:
        runs = [read_run(folder) for folder in args.runs]
    except HawkError as error:
        print(f"synthetic_world: {error}", file=sys.stderr)
        return 2
    summary = summarise(runs)
    result = {"name": "synthetic_world", "command": f"python -m benchmarks.synthetic_world {' '.join(map(str, args.runs))}",
              "machine": machine(), "versions": versions(), "summary": summary, "runs": runs}
    Path("benchmarks/results/synthetic_world.json").write_text(json.dumps(result, indent=1) + "\n")
    page = table(summary, runs)
    Path("docs/synthetic.md").write_text(page)
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
