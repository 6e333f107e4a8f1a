"""One self-contained HTML page about a run: scores beside controls, clips with texts, loss curves, configuration, versions.

Pictures are embedded, curves are inline SVG, there are no scripts and no outside files.  Every text is escaped by the template.
"""
import base64
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from hawk_jax.config import HawkConfig, HawkError, digest, to_dict
from hawk_jax.evaluation.charts import Series, confusion, curves
from hawk_jax.evaluation.tables import COLUMNS, KINDS, ROWS, figure, ratio
from hawk_jax.evaluation.text_metrics import exact
from hawk_jax.training.telemetry import read_log

LOSSES = {"video_language": "video-language", "motion_language": "motion-language", "consistency": "consistency", "loss": "total"}
STAGE_0 = "pretrain"                    # name of the stage that uses the renderer's labels
TEMPLATES = Path(__file__).parent / "templates"


# ------------------------------------------------------------------------------------------------ scores
def _headline(results: dict) -> list[dict]:
    cards = []
    if classes := results.get("classes"):
        cards.append({"name": "Class named correctly", "figure": figure(classes["right"]),
                      "beside": f"{figure(classes['shuffled_right'])} with clips shuffled, chance {figure(classes['chance'])}; "
                                f"macro recall {figure(classes['macro_recall'])}"})
    for kind, name in (("one_reference", "BLEU-4, one reference"), ("all_references", "BLEU-4, all right sentences")):
        if table := results["descriptions"].get(kind):
            model, shuffled, constant = (figure(table[who]["bleu_4"], "bleu") for who in ("model", "shuffled", "constant"))
            times = f"{ratio(table, 'shuffled'):.1f} × the " if ratio(table, "shuffled") else ""
            cards.append({"name": name, "figure": model,
                          "beside": f"{times}{shuffled} with clips shuffled, {constant} by the best constant"})
    if answers := results.get("answers"):
        cards.append({"name": "Answers equal to the reference", "figure": figure(answers["model"]["exact"]),
                      "beside": f"{figure(answers['shuffled']['exact'])} with clips shuffled, "
                                f"{figure(answers['constant_per_question']['exact'])} by the best constant per question"})
    return cards


def _table(title: str, table: dict) -> dict:
    rows = [{"key": key, "name": name, "figures": [figure(table[key][c], c) for c, _ in COLUMNS]} for key, name in ROWS if key in table]
    return {"title": title, "rows": rows, "constant": table["constant_text"]}


def _tables(results: dict) -> list[dict]:
    tables = [_table(f"{title[0].upper()}{title[1:]} ({results['descriptions'][kind]['clips']} clips)", results["descriptions"][kind])
              for kind, title in KINDS.items() if kind in results["descriptions"]]
    if answers := results.get("answers"):
        tables.append(_table(f"Answers to {answers['answers']} questions", answers))
    return tables


def _classes(classes: dict | None) -> dict | None:
    if not classes:
        return None
    pairs = [{"pair": " / ".join(name.replace("_", " ") for name in p["pair"]), "only": f"{p['only']} only", "clips": p["clips"],
              "right": figure(p["right"]), "percent": round(100 * p["right"]), "swapped": figure(p["swapped"])} for p in classes["pairs"]]
    return {"clips": classes["clips"], "right": figure(classes["right"]), "chance": figure(classes["chance"]),
            "shuffled": figure(classes["shuffled_right"]), "macro": figure(classes["macro_recall"]), "colour": figure(classes["colour"]),
            "place": figure(classes["place"]), "unnamed": figure(classes["unnamed"]), "pairs": pairs,
            "matrix": confusion(classes["confusion"])}


# ------------------------------------------------------------------------------------------------ clips
def _verdict(output: dict) -> dict:
    """Heading of a sample, and whether its class is named; clips without labels have neither."""
    if "label" not in output:
        return {"heading": output["clip"], "verdict": "", "right": None}
    from data.synthetic import class_named
    true, named = output["label"]["class"], class_named(output["description"])
    right = named == true
    said = "✓ class named" if right else f"✗ says {named.replace('_', ' ')}" if named else "✗ names no class, or several"
    return {"heading": true.replace("_", " "), "verdict": said, "right": right}


def _samples(folder: Path) -> list[dict]:
    samples = []
    for number, line in enumerate((folder / "outputs.jsonl").read_text().splitlines()):
        output, picture = json.loads(line), folder / "samples" / f"{number:05d}.jpg"
        if output["sample"] and picture.is_file():
            answers = [a | {"right": exact([a["answer"]], [[a["reference"]]]) == 1} for a in output["answers"]]
            samples.append(output | _verdict(output) | {"answers": answers, "picture": base64.b64encode(picture.read_bytes()).decode()})
    return samples


def _sampled(samples: list[dict]) -> str:
    if any(s["verdict"] for s in samples):
        right = sum(bool(s["right"]) for s in samples)
        return f"{len(samples)} clips, classes in turn, chosen before anything was generated; {right} of them are named correctly."
    return f"{len(samples)} clips, evenly spread over the split, chosen before anything was generated."


# ------------------------------------------------------------------------------------------------ training
def _charts(folder: Path) -> list[dict]:
    train, validation = read_log(folder), read_log(folder, "validation")
    charts = []
    for key, name in LOSSES.items():
        series = [Series(kind, [(line["step"], line[key]) for line in lines if isinstance(line.get(key), (int, float))], kind)
                  for kind, lines in (("train", train), ("validation", validation))]
        if svg := curves(f"{name} loss over steps", series):
            charts.append({"name": f"{name} loss, nats" if key != "consistency" else "consistency loss, 1 − cosine", "svg": svg})
    return charts


def _stage_facts(config: HawkConfig, summary: dict) -> str:
    """One line of figures of a training stage; what its summary lacks is left out."""
    parts = [f"{config.steps} steps of {config.input.clips} clips"]
    texts = {"clips_per_s": "{:.0f} clips/s", "tokens_per_s": "{:.0f} tokens/s", "waited": "waited for input in {:.0%} of the steps",
             "best_validation_loss": "best validation loss {:.4f}", "best_step": "at step {}", "losses_digest": "first 20 losses {}"}
    return ", ".join(parts + [text.format(summary[key]) for key, text in texts.items() if summary.get(key) is not None])


def _stages(configs: Mapping[str, HawkConfig], summaries: Mapping[str, dict]) -> list[dict]:
    stages = []
    for name, config in configs.items():
        if charts := _charts(Path(config.run.folder)):
            task = "conversations" if config.input.conversation_share else "captions"
            facts = _stage_facts(config, summaries.get(name, {}).get("summary", {}))
            stages.append({"name": f"{name}: {task}", "facts": facts, "charts": charts})
    return stages


def _timings(summaries: Mapping[str, dict]) -> list[dict]:
    total = sum(s["seconds"] for s in summaries.values())
    rows = [{"name": name, "seconds": f"{s['seconds']:.1f}", "percent": round(100 * s["seconds"] / max(total, 1e-9))}
            for name, s in summaries.items()]
    return [*rows, {"name": "all stages", "seconds": f"{total:.1f}", "percent": 100}] if rows else []


# ------------------------------------------------------------------------------------------------ the page
def _options(tree: dict, prefix: str = "") -> list[str]:
    lines = []
    for key, value in tree.items():
        lines += _options(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key} = {value!r}"]
    return lines


def _lead(results: dict, configs: Mapping[str, HawkConfig]) -> str:
    trained = f" after {' and '.join(configs)}" if configs else ""
    return (f"A HAWK model{trained} describes {results['clips']} clips of the {results['split']} split that it never trained on"
            + (", and answers questions about them" if results.get("answers") else "")
            + ". Every figure stands beside what the same texts score with clips shuffled, and what one constant text scores.")


def report(folder: Path, out_html: Path, configs: Mapping[str, HawkConfig], summaries: Mapping[str, dict],
           versions: Mapping[str, str]) -> Path:
    """Writes the page and returns its path.

    folder: holds evaluation/ as `evaluate` wrote it (results.json, outputs.jsonl, samples/).
    configs: {stage name: its configuration}, in order; loss curves come from log.jsonl in each one's run.folder (a stage without a
    log has no curves).  summaries: {stage name: {"seconds": float, "summary": dict}} of everything that ran, in order, for timings and
    facts; a stage named "pretrain" brings the note that stage 0 uses labels only the renderer knows.  versions: {package: version}.
    Raises HawkError if there is no evaluation.
    """
    evaluation, out_html = Path(folder) / "evaluation", Path(out_html)
    try:
        results = json.loads((evaluation / "results.json").read_text())
        samples = _samples(evaluation)
    except (OSError, ValueError) as error:
        raise HawkError(f"no evaluation to report in {evaluation} ({error}); run evaluate first") from error
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined,
                                     trim_blocks=True, lstrip_blocks=True)
    made = (f"Made {datetime.now(UTC):%Y-%m-%d %H:%M} UTC on {platform.machine()} {platform.system()} with {os.cpu_count()} cores; seeds "
            + ", ".join(f"{name} {seed}" for name, seed in results["seeds"].items()))
    page = environment.get_template("report.html").render(
        title=f"HAWK report: {results['run']} on {results['clips']} clips", lead=_lead(results, configs), made=made,
        headline=_headline(results), labels_used=STAGE_0 in summaries, bleu=results["bleu"], chosen_on=results["constants_chosen_on"],
        tables=_tables(results), columns=[name for _, name in COLUMNS], controls=_control_names(results),
        classes=_classes(results.get("classes")), samples=samples, sampled=_sampled(samples), stages=_stages(configs, summaries),
        timings=_timings(summaries), versions=list(versions.items()),
        configs=[{"name": name, "digest": digest(c), "text": "\n".join(_options(to_dict(c)))} for name, c in configs.items()],
        facts=[{"name": name, "text": json.dumps(s.get("summary", {}), indent=1, default=str)} for name, s in summaries.items()])
    out_html.parent.mkdir(parents=True, exist_ok=True)
    out_html.write_text(page, encoding="utf-8")
    return out_html


def _control_names(results: dict) -> list[tuple[str, str]]:
    names = dict(ROWS)
    return [(names[key], meaning) for key, meaning in results["controls"].items()]
