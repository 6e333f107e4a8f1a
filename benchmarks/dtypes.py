"""What bfloat16 costs in exactness: a trained run in float32, with bfloat16 weights, and computed in bfloat16 as well.

    python -m benchmarks.dtypes configs/demo.py:stage2        after `make demo`

On the test split: logits where the run was taught, under the reference text (teacher forcing), and greedily generated texts.  Writes
benchmarks/results/dtypes.json and docs/dtypes.md.
"""
import argparse
import dataclasses
import json
import sys
from pathlib import Path

import jax
import numpy as np

from benchmarks.frame import machine
from data.stream import Input
from hawk_jax.config import HawkConfig, HawkError, load
from hawk_jax.evaluation.evaluate import generate
from hawk_jax.mesh import use
from hawk_jax.models.build import abstract_params, bind
from hawk_jax.pipeline import load_params, versions

SETTINGS = {    # name: (dtype of frozen weights, dtype of the decoder's and branches' arithmetic)
    "float32": ("float32", "float32"),
    "bfloat16 frozen weights": ("bfloat16", "float32"),
    "bfloat16 throughout": ("bfloat16", "bfloat16"),
}


def with_dtypes(config: HawkConfig, params: dict, frozen: str, compute: str) -> tuple[HawkConfig, dict]:
    """The same run held and computed in other dtypes; norms and trained parameters stay float32, as in training."""
    model = dataclasses.replace(config.model, frozen_dtype=frozen, compute_dtype=compute)
    return dataclasses.replace(config, model=model), jax.tree.map(lambda x, like: x.astype(like.dtype), params, abstract_params(model))


def taught_logits(config: HawkConfig, params: dict, mesh, live: Input) -> tuple[np.ndarray, np.ndarray]:
    """(logits float32 [tokens, V], their targets) at every taught position of the test split."""
    @jax.jit
    def logits(params, batch):
        model = bind(config.model, params)
        return model.llama.logits(model(batch).hidden_RSD)
    found, targets = [], []
    with use(mesh, config.mesh.strategy), live.eval_batches(config.input.test_split) as batches:
        for batch in batches:
            taught = (batch["loss_RS"] > 0) & (batch["weight_B"][batch["clip_RS"]] > 0)
            kept = {k: v for k, v in batch.items() if k != "clip_id_B"}
            found.append(np.asarray(logits(params, kept))[taught])
            targets.append(batch["targets_RS"][taught])
    return np.concatenate(found), np.concatenate(targets)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def texts(outputs: list[dict]) -> list[str]:
    """Descriptions and answers."""
    return [text for o in outputs for text in (o["description"], *(a["answer"] for a in o["answers"]))]


def compare(reference, other) -> dict:
    """Figures of one setting against float32; both are (logits, targets, texts)."""
    (a, targets, said), (b, _, says) = reference, other
    p, q, rows = log_softmax(a), log_softmax(b), np.arange(len(targets))
    return {"tokens": len(targets), "texts": len(said),
            "largest logit error": float(np.abs(a - b).max()), "largest logit": float(np.abs(a).max()),
            "median logit error": float(np.median(np.abs(a - b))),
            "cross-entropy, nats/token": float(-q[rows, targets].mean()),
            "cross-entropy minus float32's": float((p[rows, targets] - q[rows, targets]).mean()),
            "divergence from float32, nats/token": float((np.exp(p) * (p - q)).sum(-1).mean()),
            "same likeliest token, share": float((a.argmax(-1) == b.argmax(-1)).mean()),
            "same greedy text, share": float(np.mean([x == y for x, y in zip(said, says)]))}


def page(config: str, results: dict[str, dict], hardware: dict) -> str:
    """docs/dtypes.md."""
    names = list(next(iter(results.values())))
    lines = [f"| {figure} | {' | '.join(f'{r[figure]:.4g}' for r in results.values())} |" for figure in names]
    return "\n".join([
        "# float32 against bfloat16", "",
        f"Made by `python -m benchmarks.dtypes {config}` on the trained run of that configuration ({hardware['accelerator']}); JSON with "
        "versions and machine: `benchmarks/results/dtypes.json`.", "",
        "Trained parameters and norms are float32 in every column; `model.frozen_dtype` is what frozen weights are held in, "
        "`model.compute_dtype` what the decoder and the branches compute in; softmax, norms, the ViT's residual stream and losses are "
        "float32 always. Logits are compared where the run was taught, under the reference texts of the test split; greedy texts are "
        "generated freely, so that one other token changes all that follow it.", "",
        f"| figure | {' | '.join(results)} |", f"|---|{'---|' * len(results)}", *lines, ""])


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.dtypes", description=__doc__.splitlines()[0],
                                epilog="example: python -m benchmarks.dtypes configs/demo.py:stage2")
    p.add_argument("config", help="configuration of a trained run")
    p.add_argument("options", nargs="*", metavar="OPTION=VALUE")
    args = p.parse_args()
    try:
        config = load(args.config, args.options)
        params, mesh = load_params(config)
        live = Input(dataclasses.replace(config, input=dataclasses.replace(config.input, features="live")))
        found = {}
        for name, dtypes in SETTINGS.items():
            c, held = with_dtypes(config, params, *dtypes)
            found[name] = (*taught_logits(c, held, mesh, live), texts(generate(c, held, live, config.input.test_split, mesh)))
    except HawkError as error:
        print(f"dtypes: {error}", file=sys.stderr)
        return 2
    results, hardware = {name: compare(found["float32"], other) for name, other in found.items()}, machine()
    command = f"python -m benchmarks.dtypes {' '.join([args.config, *args.options])}"
    result = {"name": "dtypes", "command": command, "machine": hardware, "versions": versions(), "results": results}
    Path("benchmarks/results/dtypes.json").write_text(json.dumps(result, indent=1) + "\n")
    Path("docs/dtypes.md").write_text(text := page(args.config, results, hardware))
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
