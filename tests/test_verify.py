"""`verify` through the command: the shared goldens pass, every weight matters, other sizes pass too, and damage is named.

Other sizes are recorded from PyTorch (record_goldens.py).  What is compiled for a set of sizes is compiled once in this file.
"""
import contextlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_run import quick_compile

from data import released_chat
from hawk_jax.__main__ import main
from hawk_jax.convert import verify as command
from hawk_jax.convert.verify_unit import TOLERANCES, Comparison, Fields, Sheet, Unit, UnitError, read_unit

# Changes that no output can show: a key bias adds the same to all scores of a query, and queries go straight into a LayerNorm, which
# removes any factor.  Queries that train are seen in their gradient, which has the inverse factor.
KEY_BIAS, QUERIES = ".key.bias", "query_tokens"


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    with quick_compile(tmp_path_factory):
        yield


def run(folder: Path, tmp_path: Path) -> tuple[int, dict, str]:
    """(exit status, report, what was printed) of the command."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["verify", "--goldens", str(folder), "--json", str(tmp_path / "out" / "report.json")])
    return status, json.loads((tmp_path / "out" / "report.json").read_text()), printed.getvalue()


def rows(report: dict) -> dict[str, dict]:
    return {unit["unit"]: unit for unit in report["units"]}


# ------------------------------------------------------------------------------------------------ the shared goldens
def test_the_shared_goldens_pass(shared, tmp_path):
    folder = shared / "goldens/hawk"
    status, report, printed = run(folder, tmp_path)
    assert status == 0 and report["passed"], printed
    assert rows(report).keys() == {f.stem for f in folder.glob("*.json")}
    assert printed.count("passed") == len(report["units"])
    for name, unit in rows(report).items():
        if (folder / f"{name}.safetensors").exists():       # every output is in the report, under its own name or element by element
            listed = {t["name"].removesuffix("[:1]").removesuffix("[1:]") for t in unit["tensors"]}
            assert {k for k in load_file(folder / f"{name}.safetensors") if k.startswith("outputs/")} <= listed


def changed(unit: Unit, name: str, value) -> Unit:
    """The unit with another value of one weight; arrays are shared."""
    other = Unit(unit.name, unit.folder, unit.info, {})
    other.inputs, other.outputs, other.weights = unit.inputs, unit.outputs, Fields(unit.weights | {name: value}, "tensor weights")
    return other


def passes(unit: Unit, kind: command.Kind) -> bool:
    return all(line.passed for line in command.verify_unit(unit, kind, first_failure_ends=True))


def perturbed(weight: np.ndarray, name: str) -> np.ndarray:
    if weight.dtype.kind != "f":
        return weight + 1
    if not name.endswith((QUERIES, f"{QUERIES}_motion")):
        return weight * np.float32(1.001)
    other = weight.copy()
    other.flat[0] += np.float32(1e-3) * np.abs(weight).max()
    return other


@pytest.mark.parametrize("name", ["eva_vit", "qformer", "video_qformer", "projection", "llama", "full_model_stage1"])
def test_a_thousandth_more_of_any_weight_fails(shared, name):
    """Each tensor in turn, whole; queries in one element."""
    assert not escaping(shared / "goldens/hawk", name)


def escaping(folder: Path, name: str) -> list[str]:
    """Weights of a unit whose change nothing notices."""
    unit = read_unit(folder, name, True)
    kind = command.kind_of(name, unit.info)
    assert passes(unit, kind)
    return [key for key, weight in unit.weights.items()
            if not key.endswith(KEY_BIAS) and passes(changed(unit, key, perturbed(weight, key)), kind)]


# ------------------------------------------------------------------------------------------------ other sizes
@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    torch.set_num_threads(1)
    import record_goldens
    folder = tmp_path_factory.mktemp("recorded")
    record_goldens.record_all(folder, seed=1)
    return folder


def test_files_of_other_sizes_pass(recorded, tmp_path):
    """Oblong pictures, depths that frequencies do not divide, 6 and 4 queries, three heads, other recipes.

    Compiling a stage takes half a minute of a core: the conversation path (noise for pictures) runs where HAWK_SLOW_TESTS is set.
    """
    if not os.environ.get("HAWK_SLOW_TESTS"):
        for file in recorded.glob("full_model_stage2*"):
            file.unlink()
    status, report, printed = run(recorded, tmp_path)
    assert status == 0 and report["passed"] and len(report["units"]) == len({*recorded.glob("*.json")}) >= 8, printed
    kinds = {t["kind"] for unit in report["units"] for t in unit["tensors"]}
    assert kinds >= TOLERANCES.keys() - {"resized", "grey", "flow"}


@pytest.mark.parametrize("stem", ["eva_vit", "qformer", "video_qformer", "projection", "llama"])
def test_a_thousandth_more_of_any_weight_fails_at_other_sizes(recorded, stem):
    file, = recorded.glob(f"{stem}_*.safetensors")
    assert not escaping(recorded, file.stem)


# ------------------------------------------------------------------------------------------------ damage
def copy(shared, folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        for file in (shared / "goldens/hawk").glob(f"{name}.*"):
            shutil.copy(file, folder / file.name)
            (folder / file.name).chmod(0o644)
    return folder


def rewrite(path: Path, change) -> None:
    """change(tensors) in place; the JSON stays as it is."""
    tensors = dict(load_file(path))
    change(tensors)
    save_file(tensors, path)


def relist(folder: Path, name: str, **fields) -> None:
    """Other fields in the JSON, and a table that fits the tensors."""
    info = json.loads((folder / f"{name}.json").read_text()) | fields
    if (folder / f"{name}.safetensors").exists():
        info["tensors"] = {k: [x.dtype.name, list(x.shape)] for k, x in load_file(folder / f"{name}.safetensors").items()}
    (folder / f"{name}.json").write_text(json.dumps(info))


def test_one_damaged_file_of_each_sort_is_one_row_with_its_reason(shared, tmp_path):
    """What is whole beside it still passes; the command ends with status 1."""
    folder = copy(shared, tmp_path / "units", "projection", "farneback_64", "farneback_64_pan", "farneback_64_noise", "video_transform",
                  "lr_schedule", "caption_cleaning", "motion_phrases", "qformer")
    (folder / "notes.md").write_text("not a unit")
    shutil.copytree(shared / "goldens/hawk/toy_tokenizer", folder / "toy_tokenizer")
    (folder / "strange.json").write_text(json.dumps({"unit": "audio branch"}))
    (folder / "broken.json").write_text('{"unit": ')
    (folder / "orphan.safetensors").write_bytes((folder / "projection.safetensors").read_bytes())
    (folder / "values.npz").write_bytes(b"")
    (folder / "farneback_64.safetensors").write_bytes((folder / "farneback_64.safetensors").read_bytes()[:100_000])
    rewrite(folder / "farneback_64_noise.safetensors", lambda t: t.pop("outputs/mask"))
    (folder / "farneback_64_pan.safetensors").unlink()
    text = (folder / "caption_cleaning.json").read_text()
    (folder / "caption_cleaning.json").write_text(text.replace("a man walks his dog, near", "a man walks his dog near"))
    relist(folder, "lr_schedule", schedules=[])
    relist(folder, "qformer", layer_norm_eps="small")
    rewrite(folder / "video_transform.safetensors", lambda t: t.update({"outputs/depth_map": np.zeros(3, np.float32)}))
    relist(folder, "video_transform")
    status, report, printed = run(folder, tmp_path)
    expected = {
        "strange": "no such kind of unit: 'audio branch'", "broken": "broken.json cannot be read", "orphan": "orphan.json is missing",
        "values.npz": "neither a .json nor a .safetensors", "farneback_64": "farneback_64.safetensors cannot be read",
        "farneback_64_noise": "lacks outputs/mask", "farneback_64_pan": "farneback_64_pan.safetensors is missing",
        "caption_cleaning": "cases[0]", "lr_schedule": "schedules is empty", "qformer": "cannot be verified", "video_transform":
        "outputs/depth_map: nothing here computes this output"}
    assert status == 1 and not report["passed"]
    lines = {line.split()[0]: line for line in printed.splitlines() if line}
    for name, reason in expected.items():
        assert not rows(report)[name]["passed"] and "FAILED" in lines[name] and reason in lines[name], lines[name]
    assert {name for name, row in rows(report).items() if row["passed"]} == {"projection", "motion_phrases"}
    assert len(rows(report)) == len(expected) + 2


@pytest.mark.parametrize("name, tensor", [("farneback_64", "outputs/flow"), ("farneback_64", "outputs/gray"),
                                          ("farneback_64", "outputs/mask"),
                                          ("farneback_64", "outputs/motion_frames"), ("farneback_64", "outputs/indices_used"),
                                          ("projection", "outputs/cosine_consistency"), ("video_transform", "outputs/hard_crop1_train"),
                                          ("video_transform", "outputs/hard_eval"), ("video_transform", "outputs/smooth_crop2_resized")])
def test_one_changed_value_is_named(shared, tmp_path, name, tensor):
    folder = copy(shared, tmp_path / "units", name)

    def change(tensors):
        value = tensors[tensor] = tensors[tensor].copy()
        value.flat[value.size // 2] += 2 if value.dtype.kind != "f" else 0.02
    rewrite(folder / f"{name}.safetensors", change)
    status, report, _ = run(folder, tmp_path)
    assert status == 1 and tensor in [t["name"] for t in rows(report)[name]["tensors"] if not t["passed"]]


@pytest.mark.parametrize("name, field, value, told", [
    ("farneback_64", "threshold", 0.4, "outputs/motion_frames"),
    ("video_transform", "crops_top_left_height_width", [[3, 5, 30, 25]] * 3, "crop"),
    ("farneback_64", "recorded_args", [None, 0.5, 3, 11, 3, 5, 1.2, 0], "recorded_args"), ("caption_cleaning", "max_words", 40, "cases[3]"),
    ("projection", "compressed", 24, "compressed 24")])
def test_parameters_of_the_file_are_used(shared, tmp_path, name, field, value, told):
    folder = copy(shared, tmp_path / "units", name)
    relist(folder, name, **{field: value})
    status, _, printed = run(folder, tmp_path)
    assert status == 1 and told in printed


def test_a_folder_without_units_is_an_error(tmp_path, capsys):
    for folder, told in ((tmp_path / "missing", "no such folder"), (tmp_path, "holds no unit files")):
        assert main(["verify", "--goldens", str(folder)]) == 2
        assert told in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ the sheet
def sheet(**outputs) -> Sheet:
    return Sheet(Unit("unit", Path(), {}, {f"outputs/{k}": np.asarray(v) for k, v in outputs.items()}))


def test_measures_of_error():
    """Numbers worked out by hand; NaN and another shape fail whatever the tolerance."""
    s = sheet(a=[1.0, -4.0], b=[3.0, 4.0], c=[1, 2], d=[np.nan], e=[1.0])
    s.output("forward", "a", [1.0, -4.0 + 8e-5])
    s.output("gradient", "b", [3.0, 4.0 + 5e-4])
    s.output("exact", "c", [1, 3])
    s.output("forward", "d", [np.nan])
    s.output("loss", "e", [[1.0]])
    a, b, c, d, e = s.lines
    assert a.error == pytest.approx(2e-5) and not a.passed and b.error == pytest.approx(1e-4) and c.error == 1 and not c.passed
    assert not d.passed and not e.passed and "shape [1, 1] here, [1] in the file" in e.note
    worst = command.Result("unit", "", s.lines, "", 0.0).worst
    assert isinstance(worst, Comparison) and not worst.passed
    with pytest.raises(UnitError, match="nothing that could be compared"):
        sheet().close()


def test_the_demo_asks_before_it_shows_and_a_question_never_joins_a_reply():
    asked_first = released_chat.prompts_of("S", [("ask", "Why?"), ("upload", ""), ("answer", "So.")])
    assert asked_first == ["[INST] <<SYS>>\nS\n<</SYS>>\n\nWhy? [/INST] <Video><ImageHere></Video>  </s>"]
    shown_first = released_chat.prompts_of("S", [("upload", ""), ("ask", "Why?"), ("answer", "So."), ("ask", "Who?"), ("answer", "He.")])
    assert shown_first[1].endswith("</Video>  Why? [/INST] So. </s><s>[INST] Who? [/INST]")
