"""The commands of `python -m hawk_jax`: each reads its arguments and calls the module that does the work.

Heavy imports happen inside the commands, so that `--help` and `config` answer at once.
"""
import argparse
import json
from pathlib import Path

from hawk_jax import config as cfg


def _with_config(parser: argparse.ArgumentParser, optional: bool = False) -> None:
    parser.add_argument("config", nargs="?" if optional else None, default=None, metavar="CONFIG",
                        help="configs/FILE.py or configs/FILE.py:FUNCTION")
    parser.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="dotted overrides, for example optim.learning_rate=3e-5")


def _load(args) -> cfg.HawkConfig:
    """The configuration of a command; without a file the defaults.  A first word with `=` is an override, not a file."""
    file, options = args.config, list(args.options)
    if file and "=" in file:
        file, options = None, [file, *options]
    return cfg.load(file, options) if file else cfg.override(cfg.HawkConfig(), options)


def _count(text: str) -> int:
    """Type of arguments that count processes or hosts."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


# ------------------------------------------------------------------------------------------------ configuration
def config_arguments(p):
    _with_config(p)
    p.add_argument("--json", action="store_true", help="print JSON instead of one option a line")


def config(args):
    c = _load(args)
    if args.json:
        print(json.dumps(cfg.to_dict(c) | {"digest": cfg.digest(c)}, indent=1))
        return
    for part, options in cfg.to_dict(c).items():
        print(f"{part}  (digest {cfg.digest(getattr(c, part))})")
        _print_tree(options, "  ")
    print(f"digest {cfg.digest(c)}")


def _print_tree(tree: dict, indent: str) -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            print(f"{indent}{key}")
            _print_tree(value, indent + "  ")
        else:
            print(f"{indent}{key} = {value!r}")


# ------------------------------------------------------------------------------------------------ data
def render_arguments(p):
    _with_config(p)
    p.add_argument("--out", type=Path, required=True, help="folder for videos/, annotations_*.json, labels.jsonl")
    p.add_argument("--workers", type=_count, default=None, help="processes (default: all cores)")
    p.add_argument("--force", action="store_true", help="replace the clips of another world in this folder")


def render(args):
    from data.synthetic import render
    _print_summary(render(_load(args).world, args.out, workers=args.workers, force=args.force))


def prepare_arguments(p):
    p.add_argument("--videos", type=Path, required=True, help="folder that the paths in the annotations start from")
    p.add_argument("--annotations", type=Path, required=True, help="JSON of the authors' form, WebVid CSV, or a folder of these")
    p.add_argument("--out", type=Path, required=True, help="data set folder; run the command again to go on after an interruption")
    p.add_argument("--spacy", default="en_core_web_sm",
                   help="spaCy pipeline by name or path (default: en_core_web_sm); `embedded` only fits the synthetic world")
    p.add_argument("--split", default=None, help="split of entries that name none (default: by the file's name, else train)")
    p.add_argument("--workers", type=_count, default=None, help="processes (default: all cores)")
    p.add_argument("--retry-rejected", action="store_true", help="make clips again that were rejected because their process died or "
                   "for an unexpected error; all others stay")
    _with_config(p, optional=True)


def prepare(args):
    from data.prepare import prepare
    prepare(videos=args.videos, annotations=args.annotations, out=args.out, spacy=args.spacy, config=_load(args), split=args.split,
            workers=args.workers, retry_rejected=args.retry_rejected)


def inspect_arguments(p):
    p.add_argument("folder", type=Path, help="a data set that `prepare` wrote")
    p.add_argument("--split", default="train", help="default: train")
    p.add_argument("--clip", default="0", help="number or name of the clip (default: 0)")
    p.add_argument("--view", type=int, default=0, help="0 (default): evenly spread frames; 1, 2, ...: the head-tail draws")
    p.add_argument("--out", type=Path, default=Path("clip.png"), help="the picture (default: clip.png)")


def inspect(args):
    from data.inspect import inspect
    print(inspect(args.folder, args.split, args.clip, args.out, args.view))


def data_digest_arguments(p):
    _with_config(p)
    p.add_argument("--steps", default="0:20", help="FIRST:END (default: 0:20)")
    p.add_argument("--hosts", type=_count, default=1, help="separate pipelines, each reading its own rows only (default: 1)")


def data_digest(args):
    from data.digest import data_digest
    first, _, end = args.steps.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise cfg.ConfigError(f"--steps {args.steps}: expected FIRST:END, for example 0:20")
    for step, line in zip(range(int(first), int(end)), data_digest(_load(args), range(int(first), int(end)), args.hosts)):
        print(step, line)


# ------------------------------------------------------------------------------------------------ training and what follows
def pretrain_arguments(p):
    _with_config(p)
    p.add_argument("--labels", type=Path, required=True, help="labels.jsonl that `render` wrote")


def pretrain(args):
    from hawk_jax.training.pretrain import pretrain
    _print_summary(pretrain(_load(args), args.labels))


def train_arguments(p):
    _with_config(p)


def train(args):
    from hawk_jax.mesh import start_processes
    from hawk_jax.training.loop import train
    c = _load(args)
    start_processes()
    _print_summary(train(c))


def evaluate_arguments(p):
    _with_config(p)
    p.add_argument("--split", default=None, help="default: input.test_split")
    p.add_argument("--labels", type=Path, default=None, help="labels.jsonl of the synthetic world: class, colour and place scores")
    p.add_argument("--out", type=Path, default=None, help="default: RUN/evaluation")


def evaluate(args):
    from hawk_jax.pipeline import evaluate_run
    c = _load(args)
    evaluate_run(c, split=args.split or c.input.test_split, labels=args.labels, out=args.out or Path(c.run.folder) / "evaluation")


def export_arguments(p):
    _with_config(p)
    p.add_argument("--out", type=Path, required=True, help="folder for the safetensors files")


def export(args):
    from hawk_jax.pipeline import export_run
    print(export_run(_load(args), args.out))


def demo_arguments(p):
    p.add_argument("config", metavar="CONFIG", help="file with functions stage1 and stage2, for example configs/demo.py")
    p.add_argument("--out", type=Path, default=None, help="folder of the whole run (default: the parent of the stages' run.folder)")
    p.add_argument("--fresh", action="store_true", help="delete the folder and do every stage again")
    p.add_argument("options", nargs="*", metavar="OPTION=VALUE", help="dotted overrides for both stages")


def demo(args):
    from hawk_jax.pipeline import demo
    demo(args.config, args.options, out=args.out, fresh=args.fresh)


def _print_summary(summary: dict) -> None:
    for key, value in summary.items():
        if not isinstance(value, (dict, list)):
            print(f"{key:24} {value:.6g}" if isinstance(value, float) else f"{key:24} {value}")
