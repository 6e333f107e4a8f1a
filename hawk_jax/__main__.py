"""`python -m hawk_jax COMMAND ...`: one line per command, no logic."""
import argparse
import errno
import sys

from hawk_jax import commands as c
from hawk_jax.config import HawkError

COMMANDS = {   # name: (what it does, function that adds arguments, function that runs, example)
    "demo": ("every stage on the synthetic world, with report and export", c.demo_arguments, c.demo, "demo configs/demo.py"),
    "config": ("print the resolved configuration and its digest", c.config_arguments, c.config,
               "config configs/hawk_7b_stage1.py optim.learning_rate=3e-5"),
    "render": ("render the synthetic surveillance world as mp4 files", c.render_arguments, c.render,
               "render configs/demo.py --out runs/world"),
    "prepare": ("videos and annotations to records", c.prepare_arguments, c.prepare,
                "prepare --videos clips --annotations all.json --out data_sets/mine --spacy en_core_web_sm configs/hawk_7b_stage1.py"),
    "inspect": ("draw a record: frames, masks, texts", c.inspect_arguments, c.inspect, "inspect data_sets/mine --clip 3 --out clip.png"),
    "data-digest": ("one hash per step of the input, for any number of hosts", c.data_digest_arguments, c.data_digest,
                    "data-digest configs/demo.py:stage1 --steps 0:20 --hosts 4"),
    "pretrain": ("stage 0 of the demo: a toy encoder and decoder", c.pretrain_arguments, c.pretrain,
                 "pretrain configs/demo.py:stage1 --labels runs/demo/world/labels.jsonl"),
    "train": ("train, or go on with, a run", c.train_arguments, c.train, "train configs/demo.py:stage1 optim.learning_rate=1e-3"),
    "evaluate": ("generate on a split and score against controls", c.evaluate_arguments, c.evaluate, "evaluate configs/demo.py:stage2"),
    "import": ("weights from PyTorch files to a frozen tree and a checkpoint", c.import_arguments, c.import_,
               "import configs/hawk_7b_stage1.py --eva eva_vit_g.pth --blip2 blip2.pth --llama llama-2-7b-chat --out weights/hawk_frozen"),
    "export": ("a run as a folder that transformers opens, and the authors' .pth, proven by reading it again", c.export_arguments, c.export,
               "export configs/demo.py:stage2 --out exported"),
    "prove": ("compare an exported folder with what JAX computed before it was written", c.prove_arguments, c.prove, "prove exported"),
    "verify": ("compare every reference file of a folder with what this project computes", c.verify_arguments, c.verify,
               "verify --goldens goldens/hawk --json verify.json"),
}


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    examples = "examples:\n" + "\n".join(f"  python -m hawk_jax {example}" for *_, example in COMMANDS.values())
    top = argparse.ArgumentParser(prog="python -m hawk_jax", formatter_class=raw, epilog=examples,
                                  description="HAWK in JAX: open-world video anomaly understanding.")
    subs = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (text, add_arguments, run, example) in COMMANDS.items():
        sub = subs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", formatter_class=raw,
                              epilog=f"example:\n  python -m hawk_jax {example}")
        add_arguments(sub)
        sub.set_defaults(run=run)
    return top


def main(arguments: list[str] | None = None) -> int:
    top = parser()
    args, rest = top.parse_known_args(arguments)
    # argparse takes positionals in one run: overrides behind a --flag come back as unknown
    overrides = [r for r in rest if "=" in r and not r.startswith("-")]
    if len(overrides) < len(rest) or (rest and not hasattr(args, "options")):
        top.error(f"unrecognised arguments: {' '.join(r for r in rest if r not in overrides or not hasattr(args, 'options'))}")
    if overrides:
        args.options = [*args.options, *overrides]
    try:
        return args.run(args) or 0      # a command's own status, where it has one
    except HawkError as error:
        print(f"hawk_jax {args.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:             # `... | head` closed the pipe
        sys.stderr.close()
    except OSError as error:            # what the machine refuses is no fault of the program; anything else is, and keeps its traceback
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR):
            raise
        print(f"hawk_jax {args.command}: {error.filename or ''}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:           # `train` hears it itself, and saves
        print(f"hawk_jax {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
