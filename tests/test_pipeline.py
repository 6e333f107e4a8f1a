"""Stages of a demo: what is done is not repeated, what changed is, what was interrupted goes on."""
import pytest

from hawk_jax.config import HawkError
from hawk_jax.pipeline import Stages, _claimed, _stage_configs


class Work:
    """Counts its calls and writes a file, like a stage."""

    def __init__(self, folder):
        self.folder, self.calls = folder, 0

    def __call__(self):
        self.calls += 1
        self.folder.mkdir(exist_ok=True)
        (self.folder / "part").write_text("x")
        return {"calls": self.calls}


def run_two(tmp_path, first, second, options):
    stages = Stages(tmp_path)
    stages.run("first", options, [first.folder], first)
    return stages.run("second", {}, [second.folder], second)


def test_finished_stages_are_not_repeated_and_changes_run_down(tmp_path):
    first, second = Work(tmp_path / "a"), Work(tmp_path / "b")
    run_two(tmp_path, first, second, {"x": 1})
    assert run_two(tmp_path, first, second, {"x": 1}) == {"calls": 1} and (first.calls, second.calls) == (1, 1)
    run_two(tmp_path, first, second, {"x": 2})
    assert (first.calls, second.calls) == (2, 2)        # the second stage's own options are equal, what it starts from is not


def test_missing_output_and_interruption(tmp_path):
    first, second = Work(tmp_path / "a"), Work(tmp_path / "b")
    run_two(tmp_path, first, second, {})
    (second.folder / "part").unlink()
    second.folder.rmdir()
    run_two(tmp_path, first, second, {})
    assert (first.calls, second.calls) == (1, 2)

    def interrupted():
        second()
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("third", {}, [second.folder], interrupted)
    kept = second.folder / "part"
    Stages(tmp_path).run("third", {}, [second.folder], lambda: {"found": kept.exists()})
    assert kept.exists()                                # same options: what the interrupted call wrote is there to go on from
    Stages(tmp_path).run("third", {"new": 1}, [second.folder], lambda: {"found": kept.exists()})
    assert not kept.exists()                            # other options: nothing of it leaks in


def test_out_moves_every_path_of_both_stages(tmp_path):
    one, two, out = _stage_configs("configs/demo.py", ["run.seed=3"], tmp_path)
    paths = [one.run.folder, one.run.frozen, one.input.datasets[0].folder, two.run.folder, two.run.frozen, two.run.init_from]
    assert all(p.startswith(str(tmp_path)) for p in paths) and out == tmp_path
    assert two.run.init_from == one.run.folder and one.run.seed == two.run.seed == 3


@pytest.mark.parametrize("option", ["run.folder=runs/x", "run.frozen=elsewhere", "input.datasets=({'folder': 'mine'},)"])
def test_stages_that_would_lie_elsewhere_are_refused(option):
    # their outputs would neither be found nor be replaced when options change
    with pytest.raises(HawkError, match="move all of it with --out"):
        _stage_configs("configs/demo.py", [option], None)


def test_a_damaged_marker_is_named_and_nothing_is_deleted(tmp_path):
    work = Work(tmp_path / "a")
    Stages(tmp_path).run("first", {}, [work.folder], work)
    for content in ("", "[]", '{"key": "x"}', '{"key": "x", "done": true}'):
        (tmp_path / "done/first.json").write_text(content)
        with pytest.raises(HawkError, match="first.json is damaged"):
            Stages(tmp_path).run("first", {}, [work.folder], work)
    assert work.calls == 1 and (work.folder / "part").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    own = tmp_path / "world/holiday.mp4"
    own.parent.mkdir()
    own.touch()
    for fresh in (False, True):
        with pytest.raises(HawkError, match="no demo made"), _claimed(tmp_path, fresh):
            pass
        with pytest.raises(HawkError, match="no demo made|cannot be written"), _claimed(own, fresh):
            pass
    assert own.exists() and not (tmp_path / "done").exists()


def test_fresh_empties_a_demos_folder_and_two_demos_do_not_share_one(tmp_path):
    out, work = tmp_path / "new/demo", Work(tmp_path / "new/demo/a")
    with _claimed(out, False):
        Stages(out).run("first", {}, [work.folder], work)
        with pytest.raises(HawkError, match="another demo is running"), _claimed(out, True):
            pass
        assert work.folder.exists()
    with _claimed(out, True):
        assert [p.name for p in out.rglob("*")] == ["done", "lock"]
