"""The command line as a person meets it: help with examples, one-line errors, exit codes."""
import errno
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hawk_jax.__main__ import COMMANDS, main, parser
from hawk_jax.config import load

ROOT = Path(__file__).parents[1]


def test_help_of_every_command_has_an_example(capsys):
    for command in (None, *COMMANDS):
        with pytest.raises(SystemExit) as e:
            main([*([command] if command else []), "--help"])
        assert e.value.code == 0
        assert f"python -m hawk_jax {command or 'demo'} " in capsys.readouterr().out.split("example", 1)[1]


def test_config_prints_what_it_resolved(capsys):
    assert main(["config", "configs/demo.py:stage1", "--json", "optim.learning_rate=0.5"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["optim"]["learning_rate"] == 0.5 and tree["run"]["name"] == "stage1" and len(tree["digest"]) == 16


@pytest.mark.parametrize("arguments, said", [
    (["config", "configs/demo.py", "optm.x=1"], "did you mean 'optim'"),
    (["config", "configs/demoo.py"], "did you mean 'configs/demo.py'"),
    (["config", "configs/demo.py", "run.seed=x"], "expected int"),
    (["config", "configs/demo.py", "model.vit_copies=2"], "needs model.qformer_copies=2"),
    (["data-digest", "configs/demo.py", "--steps", "x"], "expected FIRST:END"),
    (["data-digest", "configs/demo.py", "--steps", "5:5"], "expected FIRST:END"),
    (["demo", "configs/demo.py:stage1"], "takes the file with both stages"),
])
def test_mistakes_are_one_line_and_exit_2(arguments, said, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and error.startswith(f"hawk_jax {arguments[0]}: ")


@pytest.mark.parametrize("arguments", [["data-digest", "configs/demo.py", "--hosts", "0"], ["render", "configs/demo.py", "--out", "x",
                                                                                              "--workers", "-1"]])
def test_numbers_of_processes_are_at_least_one(arguments, capsys):
    with pytest.raises(SystemExit) as e:        # without workers `prepare` would wait for ever
        main(arguments)
    assert e.value.code == 2 and "at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("code, line", [(errno.ENOSPC, "hawk_jax config: x: No space left on device\n"), (errno.EBADF, None)])
def test_what_the_machine_refuses_is_one_line_and_other_faults_are_not_hidden(monkeypatch, capsys, code, line):
    def refused(*_):
        raise OSError(code, os.strerror(code), "x")
    monkeypatch.setattr("hawk_jax.config.load", refused)
    if line:
        assert main(["config", "configs/demo.py"]) == 2 and capsys.readouterr().err == line
    else:
        with pytest.raises(OSError):
            main(["config", "configs/demo.py"])


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr("hawk_jax.config.load", interrupted)
    assert main(["config", "configs/demo.py"]) == 130 and capsys.readouterr().err == "hawk_jax config: interrupted\n"


def documented():
    """Command lines in the code blocks of README and docs, as a shell would split them."""
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in page.read_text().replace("\\\n", " ").splitlines():
            if " -m hawk_jax " in line and not line.startswith("|") and "`" not in line and "..." not in line:
                yield page.name, shlex.split(line.partition(" -m hawk_jax ")[2], comments=True)


def test_documented_commands_are_understood():
    prepared, trained, pages = None, None, set()
    for page, words in documented():
        args, rest = parser().parse_known_args(words)
        assert all("=" in word for word in rest), words
        config = load(str(ROOT / args.config), [*args.options, *rest]) if getattr(args, "config", None) else None
        prepared = config.prepare if page == "README.md" and args.command == "prepare" else prepared
        trained = config.prepare if page == "README.md" and args.command == "train" else trained
        pages.add(page)
    assert pages >= {"README.md", "prepare.md", "train.md", "weights.md"}
    assert prepared == trained              # else training would refuse what the line above it prepared


def test_as_a_process_without_a_traceback():
    done = subprocess.run([sys.executable, "-m", "hawk_jax", "train", "configs/none.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr and "no configuration file" in done.stderr


def test_the_shipped_configurations_resolve_and_the_recipe_is_the_papers(capsys):
    for file in sorted((ROOT / "configs").glob("*.py")):
        assert main(["config", str(file), "--json"]) == 0
        json.loads(capsys.readouterr().out)
    main(["config", str(ROOT / "configs/hawk_7b_stage1.py"), "--json"])
    tree = json.loads(capsys.readouterr().out)
    # recipe of the released code: 160 epochs of 2500 steps, 1e-5 -> 1e-6 after 1000 warm-up steps, decay 0.05, 32 frames of 224 pixels
    assert (tree["optim"]["epochs"], tree["optim"]["steps_per_epoch"], tree["optim"]["warmup_steps"]) == (160, 2500, 1000)
    assert (tree["optim"]["learning_rate"], tree["optim"]["min_learning_rate"], tree["optim"]["weight_decay"]) == (1e-5, 1e-6, 0.05)
    assert (tree["prepare"]["frames"], tree["prepare"]["size"], tree["model"]["vit"]["depth"]) == (32, 224, 39)
