"""Configuration: what a person types, what is refused and how, and what the presets mean."""
import json

import pytest

from hawk_jax import config as C

BASE = C.HawkConfig()


def test_typed_overrides_apply_at_once():
    # vit_copies=2 alone is refused: together with qformer_copies=2 it must pass, whatever the order
    c = C.override(BASE, ["model.vit_copies=2", "model.qformer_copies=2", "optim.learning_rate=3e-5", "optim.clip_norm=None",
                          "input.buckets=(64, 128)", "run.name=2024", "input.datasets=({'folder': 'x'},)", "model.remat=dots",
                          "pretrain.learning_rate=1", "world.classes=('fire',)"])
    assert (c.model.vit_copies, c.optim.learning_rate, c.optim.clip_norm, c.run.name) == (2, 3e-5, None, "2024")
    assert c.input.buckets == (64, 128) and c.input.datasets == (C.DataSource("x"),)
    assert isinstance(c.pretrain.learning_rate, float) and c.world.classes == ("fire",)
    assert C.override(c, ["world.classes=()"]).world.classes == ()


@pytest.mark.parametrize("text, said", [
    ("optm.learning_rate=1", "did you mean 'optim'"),
    ("optim.lerning_rate=1", "did you mean 'learning_rate'"),
    ("model.remat=foo", "one of none, dots, full"),
    ("run.seed=1.5", "expected int"),
    ("run.seed=True", "expected int"),
    ("run.tensorboard=1", "expected bool"),
    ("input.crop_scale=(1,)", "tuple[float, float]"),
    ("optim.warmup_steps=-1", "must be >= 0"),
    ("optim=3", "is a part, not an option"),
    ("run.seed.x=3", "no options inside"),
    ("noequals", "expected option=value"),
    ("model.vit_copies=2", "needs model.qformer_copies=2"),
    ("input.features=memory", "needs input.views >= 1"),
    ("prepare.frames=64", "exceeds model.frame_positions"),
    ("model.llama.heads=3", "not a multiple"),
    ("world.width=160", "at least 320x240"),
    ("model.llama.heads=0", "model.llama.heads=0: must be at least 1"),
    ("model.compress=0", "must be at least 1"),
    ("optim.accumulation=0", "must be at least 1"),
    ("run.log_every=0", "must be at least 1"),
    ("loss.group_rows=-1", "must be at least 0"),
    ("prepare.validation_share=1.5", "a share: 0..1"),
])
def test_refusals_are_one_clear_line(text, said):
    with pytest.raises(C.ConfigError) as e:
        C.override(BASE, [text])
    assert said in str(e.value) and "\n" not in str(e.value)


def test_dict_round_trip_through_json():
    c = C.override(BASE, ["input.datasets=({'folder': 'x', 'weight': 2},)", "input.buckets=(64,)", "optim.clip_norm=None"])
    assert C.from_dict(C.HawkConfig, json.loads(json.dumps(C.to_dict(c)))) == c
    with pytest.raises(C.ConfigError, match="did you mean 'seed'"):
        C.from_dict(C.RunConfig, {"sead": 1})


def test_digest_names_content_and_differences_name_fields():
    c = C.override(BASE, ["optim.learning_rate=2e-5"])
    assert C.digest(c.model) == C.digest(BASE.model) and C.digest(c) != C.digest(BASE)
    assert C.differences(C.to_dict(BASE), C.to_dict(c)) == ["optim.learning_rate: 1e-05 -> 2e-05"]
    assert hash(c) != hash(BASE)        # a configuration is a static jit argument


def test_released_changes_every_option_of_the_disagreement_table():
    # the rows of the table of paper against released code, by the option that stands for each
    one, two = C.released(BASE, 1), C.released(BASE, 2)
    changed = {line.split(":")[0] for line in C.differences(C.to_dict(BASE), C.to_dict(one))}
    assert changed == {
        "input.mask", "input.branch_crops", "input.branch_frames", "input.first_motion_index", "input.prompt", "input.phrases",
        "input.text_mask", "input.max_caption_tokens", "input.end_symbol", "input.clean_captions", "input.description_replacement",
        "model.qformer_copies", "model.train_query_tokens_motion", "model.pixels", "model.antialias",
        "loss.group_rows", "loss.cosine", "optim.warmup_counter", "optim.clip_norm"}
    assert two.loss.motion_language_of == "video_language" and two.input.branch_frames == "shared"
    assert C.released(one, 1) == one


def test_files_are_functions(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from hawk_jax.config import HawkConfig\ndef config(): return HawkConfig()\ndef other(): return 3\n")
    assert C.load(str(file), ["run.seed=7"]).run.seed == 7
    with pytest.raises(C.ConfigError, match="no function 'missing'; there is: config, other"):
        C.load(f"{file}:missing")
    with pytest.raises(C.ConfigError, match="returned int"):
        C.load(f"{file}:other")
    with pytest.raises(C.ConfigError, match="no configuration file"):
        C.load(str(tmp_path / "y.py"))
    file.write_text("def config(:\n")
    with pytest.raises(C.ConfigError, match="line 1"):
        C.load(str(file))
    file.write_text("def config(): return nothing\n")
    with pytest.raises(C.ConfigError, match="x.py:config cannot be run: NameError"):
        C.load(str(file))
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(C.ConfigError, match="no configuration file"):
        C.load(str(tmp_path / "notes.txt"))
