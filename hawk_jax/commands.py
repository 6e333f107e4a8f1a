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


def import_arguments(p):
    _with_config(p)
    p.add_argument("--eva", type=Path, default=None, metavar="FILE", help="eva_vit_g.pth: the picture encoder of both branches")
    p.add_argument("--blip2", type=Path, default=None, metavar="FILE", help="the BLIP-2 Q-Former file")
    p.add_argument("--llama", type=Path, default=None, metavar="FOLDER", help="Hugging Face folder of the decoder")
    p.add_argument("--hawk", type=Path, default=None, metavar="FILE", help="a checkpoint of the authors' code: trained values")
    p.add_argument("--video-llama", type=Path, default=None, metavar="FILE", help="a Video-LLaMA checkpoint: its video Q-Former")
    p.add_argument("--motion-qformer", default="", metavar="copy|seeded|FILE",
                   help="the motion branch's image Q-Former: the video branch's, the released code's random one drawn anew, or from a file")
    p.add_argument("--out", type=Path, required=True, help="folder of the frozen tree: run.frozen of training")
    p.add_argument("--run", dest="run_folder", type=Path, default=None, metavar="FOLDER",
                   help="run folder for the trained values, as checkpoint 0")
    p.add_argument("--ignore", action="append", default=[], metavar="PATTERN",
                   help="pass over these names (* within one part of a name, ** across parts); may be repeated")
    p.add_argument("--expect-sha256", action="append", default=[], metavar="FILE=HEX", help="refuse a file with another hash")


def import_(args):
    from hawk_jax.convert.layouts import Sources
    from hawk_jax.convert.to_jax import import_weights, summary
    expected = {}
    for text in args.expect_sha256:
        file, _, value = text.rpartition("=")
        if not file or len(value) != 64:
            raise cfg.ConfigError(f"--expect-sha256 {text}: expected FILE=HEX with 64 hexadecimal digits")
        expected[file] = value
    sources = Sources(args.eva, args.blip2, args.llama, args.video_llama, args.hawk, args.motion_qformer, tuple(args.ignore))
    print(summary(import_weights(sources, _load(args), args.out, args.run_folder, expected), args.out))


def export_arguments(p):
    _with_config(p)
    p.add_argument("--out", type=Path, required=True, help="folder that AutoModel.from_pretrained opens")
    p.add_argument("--pth", choices=("released", "full", "none"), default="released",
                   help="hawk.pth of the authors' layout: what their code saves (165 tensors, default), the whole model, or no such file")
    p.add_argument("--proof", choices=("full", "bytes"), default="full",
                   help="full (default): where torch is installed its results are compared too, which needs the model in float32 in memory")
    p.add_argument("--step", type=int, default=None, help="which checkpoint (default: the best, the newest if none was validated)")


def export(args):
    from hawk_jax.mesh import start_processes
    from hawk_jax.pipeline import export_run
    c = _load(args)
    start_processes()
    if text := export_run(c, args.out, args.pth, args.step, args.proof == "full"):
        print(text)


def prove_arguments(p):
    p.add_argument("folder", type=Path, help="what `export` wrote")
    p.add_argument("--evaluation", type=Path, default=None, help="what `evaluate` wrote: its questions are asked of the folder too")
    p.add_argument("--videos", type=Path, default=None, help="folder that the sources in --evaluation start from")


def prove(args):
    from hawk_jax.convert.proof import prove_here, report_text
    if (args.evaluation is None) != (args.videos is None):
        raise cfg.ConfigError("--evaluation and --videos go together: questions are asked about the video files")
    proof = prove_here(args.folder, args.evaluation, args.videos)
    print(report_text(proof))
    if proof["verdict"] == "differs":
        raise cfg.HawkError(f"{args.folder} is not what was exported")


def verify_arguments(p):
    p.add_argument("--goldens", type=Path, required=True, metavar="DIR", help="folder of unit files, see docs/verify.md")
    p.add_argument("--json", type=Path, default=None, metavar="FILE", help="every tensor's errors and tolerances")


def verify(args):
    from hawk_jax.convert.verify import verify
    return 0 if verify(args.goldens, args.json) else 1


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
