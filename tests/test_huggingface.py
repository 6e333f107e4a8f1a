"""The exported folder's PyTorch side against the authors' goldens, and the whole folder against the JAX model and the input pipeline.

Tolerances: 1e-5 of the largest value, float32 sums in another order (the goldens' own rounding was measured as 2e-6 at magnitude 4);
losses 1e-6, which average over tokens; frames, masks, prompt tokens and generated texts are equal.
"""
import dataclasses
import json
import shutil
import sys
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from golden_weights import GOLDEN, IMAGE, TINY, VIDEO, VIT, golden
from safetensors.numpy import load_file, save_file

from data.batches import WHOLE, Look, empty_pictures, fill_pictures
from data.clips import make_record
from data.datasets import Entry
from data.rows import generation_prompt
from data.text import Tokenizer
from hawk_jax.config import GenerateConfig, HawkConfig, InputConfig, LlamaConfig, ModelConfig, PrepareConfig, to_dict
from hawk_jax.convert import hf_folder, keys
from hawk_jax.convert.vision_graph import check_vision, export_vision
from hawk_jax.inference.generate import Generator
from hawk_jax.models import build, pictures

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("hawk_jax.convert.huggingface.modeling_hawk")
processing = pytest.importorskip("hawk_jax.convert.huggingface.processing_hawk")
torch.set_num_threads(1)        # arrays are tiny, and on a busy machine threads wait for each other
QUESTIONS = [None, "What is it?", "Is there a car in the street, and if there is one, where does it go?"]


def tensors(arrays: dict) -> dict:
    return {key: torch.from_numpy(np.asarray(value)) for key, value in arrays.items()}


def close(ours, theirs, of_largest: float = 1e-5):
    theirs = np.asarray(theirs)
    assert tuple(ours.shape) == theirs.shape
    np.testing.assert_allclose(ours.detach().float().numpy(), theirs, rtol=0, atol=of_largest * np.abs(theirs).max())


# ------------------------------------------------------------------------------------------------ goldens
def load(module, weights: dict, prefix: str = ""):
    """The module with the golden's weights, strictly but for the authors' buffers."""
    own = {k.removeprefix(prefix): v for k, v in tensors(weights).items() if k.startswith(prefix) and not keys.IGNORED.search(k)}
    module.load_state_dict(own)
    return module.eval()


@torch.no_grad()
def test_eva_vit(shared):
    weights, inputs, outputs, _ = golden(shared, "eva_vit")
    vit = load(modeling.EvaVit((56, 56), 14, 64, 3, 4, 279, 1e-6), weights, "visual_encoder.")
    features = vit(torch.from_numpy(inputs["image"]))
    close(features, outputs["features"])
    close(load(modeling.LayerNorm(64, modeling.LN_VISION_EPS), weights, "ln_vision.")(features), outputs["ln_vision"])


@torch.no_grad()
def test_image_qformer(shared):
    weights, inputs, outputs, _ = golden(shared, "qformer")
    qformer = load(modeling.QFormer(to_dict(IMAGE), VIT.width), weights, "Qformer.")
    close(qformer(torch.from_numpy(weights["query_tokens"]), torch.from_numpy(inputs["image_embeds"])), outputs["last_hidden_state"])


@torch.no_grad()
def test_frame_positions_and_video_qformer(shared):
    weights, inputs, outputs, _ = golden(shared, "video_qformer")
    qformer = load(modeling.QFormer(to_dict(VIDEO), IMAGE.width), weights, "video_Qformer.")
    source = torch.from_numpy(outputs["frame_hidden_state"])
    close(qformer(torch.from_numpy(weights["video_query_tokens"]), source), outputs["last_hidden_state"])
    positions = weights["video_frame_position_embedding.weight"][None, :4, None]
    np.testing.assert_allclose(inputs["frame_tokens"].reshape(2, 4, 8, 48) + positions, source.reshape(2, 4, 8, 48), atol=1e-6)


@torch.no_grad()
def test_projection_chains(shared):
    weights, inputs, outputs, _ = golden(shared, "projection")
    for mark in ("", "_motion"):
        first = load(torch.nn.Linear(48, 64), weights, f"llama_proj{mark}_0.")(torch.from_numpy(inputs[f"video_hidden{mark}"]))
        visual, compressed = load(modeling.Projection(64, 4), weights, f"llama_proj{mark}_last.")(first)
        close(first, outputs[f"proj_0{mark}"])
        close(visual, outputs[f"inputs_llama{mark}"])
        close(compressed, outputs[f"middle_result{mark}"])


def golden_model(shared):
    """(the whole model with stage 1's weights, stage 1's inputs and outputs)."""
    weights, inputs, outputs, _ = golden(shared, "full_model_stage1")
    options = hf_folder.model_config(GOLDEN)
    return load(modeling.HawkModel(modeling.HawkConfig(**options)), weights), inputs, outputs


def golden_vision(model, inputs):
    """The goldens start behind the picture transform."""
    results = []
    for mark, motion in (("", False), ("_motion", True)):
        pictures_NCHW = torch.from_numpy(inputs[f"image{mark}"]).transpose(1, 2).flatten(0, 1)
        results.append(model.branch(model.image_tokens(pictures_NCHW, motion).unflatten(0, (2, 4)), motion))
    return results


def test_whole_model_and_losses_stage1(shared):
    model, inputs, outputs = golden_model(shared)
    (video, video_z), (motion, motion_z) = golden_vision(model, inputs)
    for ours, name in ((video, "video_embeds"), (motion, "motion_embeds"), (video_z, "middle_result"), (motion_z, "middle_result_motion")):
        close(ours, outputs[name])
    visual, losses = torch.cat([video, motion], 1), []
    for call, first, text in ((0, 0, "text"), (1, 8, "text_motion")):
        ids, slots = torch.from_numpy(inputs[f"{text}_ids"]), torch.arange(first, 16).expand(2, -1)
        text_slots = torch.full_like(ids, -1)
        ids = torch.cat([torch.ones(2, 1, dtype=ids.dtype), torch.zeros_like(slots), ids], 1)
        slots = torch.cat([torch.full((2, 1), -1), slots, text_slots], 1)
        close(model.embed(ids, slots, visual), outputs[f"llama_call{call}_inputs_embeds"])
        out = model(ids, slots, torch.from_numpy(outputs[f"llama_call{call}_attention_mask"]), visual=visual,
                    labels=torch.from_numpy(outputs[f"llama_call{call}_labels"]))
        losses.append(out.loss)
    consistency = 1 - torch.nn.functional.cosine_similarity(video_z.flatten(), motion_z.flatten(), dim=0)
    for ours, name in zip((*losses, consistency), ("loss", "loss_motion", "consistency_loss")):
        assert ours.item() == pytest.approx(outputs[name].item(), rel=1e-6)
    # the gradient of the total reaches every trained parameter as in the authors' code; key biases have none but rounding
    (losses[0] + 0.1 * losses[1] + 0.1 * consistency).backward()
    parameters = dict(model.named_parameters())
    for name, expected in outputs.items():
        if name.startswith("grad/") and not name.endswith("key.bias"):
            close(parameters[name.removeprefix("grad/")].grad, expected, 1e-4)      # measured: 3e-6 of the norm, single entries more


@torch.no_grad()
def test_whole_model_and_loss_stage2(shared):
    model, *_ = golden_model(shared)
    _, inputs, outputs, _ = golden(shared, "full_model_stage2_multi")
    (video, _), (motion, _) = golden_vision(model, inputs)
    ids = torch.from_numpy(inputs["input_ids"])
    visual_RS = ids == 480
    slots = torch.where(visual_RS, visual_RS.cumsum(1) - 1, -1)
    visual, ids = torch.cat([video, motion], 1), torch.where(visual_RS, 0, ids)
    close(model.embed(ids, slots, visual), outputs["llama_call0_inputs_embeds"])
    out = model(ids, slots, torch.from_numpy(inputs["attention_mask"]), torch.arange(ids.shape[1]).expand(2, -1), visual=visual,
                labels=torch.from_numpy(inputs["labels"]))
    assert out.loss.item() == pytest.approx(outputs["loss"].item(), rel=1e-6)


def test_names_and_shapes_at_real_size(shared):
    """The list was made from the authors' own model class; only its buffers are not here."""
    listed = {name: tuple(shape) for name, shape, kind in json.loads((shared / "specs" / "hawk_state_dict_keys.json").read_text())
              if kind != "buffer"}
    options = hf_folder.model_config(ModelConfig(vit_copies=2, qformer_copies=2))
    with torch.device("meta"):
        model = modeling.HawkModel(modeling.HawkConfig(**options))
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == listed


@pytest.mark.parametrize("overshoot", ["clip", "wrap"])
@pytest.mark.parametrize("antialias", [True, False])
def test_pictures_are_those_of_jax(overshoot, antialias):
    """Masked, resized, scaled.  Wrapping truncates to grey levels first: a value beside an integer may come out one level apart."""
    config = dataclasses.replace(paper("").model, overshoot=overshoot, antialias=antialias, pixels="unit")
    model, draw = modeling.HawkModel(modeling.HawkConfig(**hf_folder.model_config(config)), with_decoder=False), np.random.default_rng(0)
    frames_NHWC, masks_NHW = draw.integers(0, 256, (3, 64, 64, 3), np.uint8), draw.integers(0, 256, (3, 64, 64), np.uint8)
    ours = model.pictures(torch.from_numpy(frames_NHWC), torch.from_numpy(masks_NHW)).permute(0, 2, 3, 1)
    theirs = np.asarray(pictures.prepare(frames_NHWC, np.tile(WHOLE, (3, 1)), config, masks_NHW))
    off = np.abs(ours.numpy() - theirs) > 1e-5
    assert ours.shape == theirs.shape == (3, 42, 56, 3) and off.mean() <= (1e-3 if overshoot == "wrap" else 0)


# ------------------------------------------------------------------------------------------------ a folder
class Phrases:
    """In place of the parser of motion phrases, which nothing here reads."""

    def phrases(self, text):
        return [], []

    def describe(self):
        return {}


def paper(tokenizer: str) -> HawkConfig:
    """One encoder for both branches; wide pictures, shared key-value heads, unequal numbers of queries, a tail layer, odd sizes."""
    model = dataclasses.replace(
        TINY, vit=dataclasses.replace(VIT, image_size=42, image_width=56), pixels="clip_norm", antialias=True,
        image_qformer=dataclasses.replace(IMAGE, queries=6, depth=3), video_qformer=dataclasses.replace(VIDEO, queries=5, dropout=0.1),
        llama=LlamaConfig(vocab=480, width=64, depth=2, heads=4, kv_heads=2, mlp=172, eps=1e-6, rope_theta=500.0, max_positions=512))
    return HawkConfig(model=model, prepare=PrepareConfig(size=64, frames=5, views=1, jpeg_quality=80),
                      input=InputConfig(tokenizer=tokenizer, max_conversation_tokens=256), generate=GenerateConfig(max_new_tokens=32))


def released(tokenizer: str) -> HawkConfig:
    """The authors' random weights with the options of the released code."""
    model = dataclasses.replace(GOLDEN, train_query_tokens_motion=True)
    i = InputConfig(tokenizer=tokenizer, max_conversation_tokens=256, mask="binary", first_motion_index="one", prompt="released",
                    text_mask="not_unk", end_symbol="\n", conversation_share=1.0)
    return HawkConfig(model=model, prepare=PrepareConfig(size=64, frames=4, views=1), input=i, generate=GenerateConfig(max_new_tokens=32))


def parameters(config: HawkConfig) -> dict:
    """Random values; a large head and embedding, so that the likeliest token leads by more than rounding."""
    draw, flat = np.random.default_rng(0), {}
    for path, leaf in build.flatten(build.abstract_params(config.model)).items():
        scale = 1.0 if path[-1] == "embed_tokens" or "lm_head" in path else leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0.1
        flat[path] = np.float32(draw.normal(1.0 if path[-1] == "scale" else 0.0, scale, leaf.shape))
    return build._nest(flat)


def write_weights(folder, params: dict, config: HawkConfig) -> None:
    """What the exporter writes: an encoder that serves both branches under one name."""
    named = keys.to_torch(params, config.model)
    llama = {k.removeprefix("llama_model."): named.pop(k) for k in list(named) if k.startswith("llama_model.")}
    shared = {"visual_encoder_motion": config.model.vit_copies, "ln_vision_motion": config.model.qformer_copies,
              "Qformer_motion": config.model.qformer_copies, "query_tokens_motion": config.model.qformer_copies}
    for place, part in ((folder, {k: v for k, v in named.items() if shared.get(k.split(".")[0]) != 1}), (folder / "llama", llama)):
        save_file({k: np.ascontiguousarray(v) for k, v in part.items()}, place / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module", autouse=True)
def code_goes_elsewhere(tmp_path_factory):
    """transformers copies the code of opened folders; here not into the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", list(sys.path))
        yield


@pytest.fixture(scope="module", params=[paper, released])
def made(request, shared, tmp_path_factory, write_mp4):
    """A folder, the model that transformers opens from it, and the JAX side: configuration, parameters, tokenizer, two records."""
    config = request.param(str(shared / "goldens" / "hawk" / "toy_tokenizer" / "tokenizer.model"))
    folder = tmp_path_factory.mktemp("hf") / "out"
    folder.mkdir()
    hf_folder.write_folder(folder, config)
    params = parameters(config) if request.param is paper else keys.from_torch(golden(shared, "full_model_stage1")[0], config.model)
    write_weights(folder, params, config)
    videos = [write_mp4(folder.parent / "a.mp4", frames=21), write_mp4(folder.parent / "b.mp4", frames=33, width=96, height=80)]
    records = [make_record(Entry(v.name, "", split="train", clip=v.name), folder.parent, config.prepare, Phrases()) for v in videos]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return SimpleNamespace(folder=folder, config=config, params=params, videos=videos, records=records, model=model,
                           tokenizer=Tokenizer(config.input.tokenizer))


def jax_batch(made) -> dict:
    batch = empty_pictures(made.config, len(made.records), cropped=False)
    for row, record in enumerate(made.records):
        fill_pictures(batch, row, record, Look(0, WHOLE, WHOLE), made.config.input)
    return batch


def jax_prompts(made, clips=(0, 0, 0)) -> list[dict]:
    queries = made.config.model.video_qformer.queries
    return [generation_prompt(made.tokenizer, made.config.input, queries, q, times=times(made.records[c]))
            for q, c in zip(QUESTIONS, clips)]


def times(record) -> list[float]:
    return [round(float(t), 4) for t in record.times_T(0)]


def test_processor_gives_the_arrays_of_training(made):
    processor = transformers.AutoProcessor.from_pretrained(made.folder, trust_remote_code=True)
    batch, seen = jax_batch(made), processor(made.videos, ["a?", None])
    assert seen["frames"].dtype == torch.uint8 and batch["mask_BTHW"].any()
    np.testing.assert_array_equal(seen["frames"], batch["frames_BTHWC"])
    np.testing.assert_array_equal(seen["masks"], batch["mask_BTHW"])
    assert ("motion_frames" in seen) == ("motion_frames_BTHWC" in batch)
    if "motion_frames" in seen:
        np.testing.assert_array_equal(seen["motion_frames"], batch["motion_frames_BTHWC"])
    for video, record in zip(made.videos, made.records):
        np.testing.assert_array_equal(processor.clip(video).times_T, record.times_T(0))


def processor_of(config: HawkConfig):
    settings = hf_folder.processor_config(config)
    return processing.HawkProcessor(settings["pictures"], settings["text"])


@pytest.mark.parametrize("preset", [paper, released])
def test_odd_videos_as_in_training(preset, tmp_path, write_mp4):
    """Files that end early, of one frame, with uneven times, shorter than a view; a folder of pictures with a damaged one."""
    import cv2
    config = preset("")
    processor, draw = processor_of(config), np.random.default_rng(0)
    write_mp4(tmp_path / "one.mp4", frames=1)
    write_mp4(tmp_path / "three.mp4", frames=3, width=40, height=30)        # smaller than the square: the other kernel
    write_mp4(tmp_path / "uneven.mp4", frames=9, milliseconds=[0, 40, 90, 200, 210, 300, 500, 900, 1000])
    whole = write_mp4(tmp_path / "whole.mp4", frames=60, faststart=True).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:len(whole) * 2 // 3])
    (tmp_path / "pictures").mkdir()
    for n in range(12):
        cv2.imwrite(str(tmp_path / "pictures" / f"{n}.png"), draw.integers(0, 255, (70, 90, 3), np.uint8))
    (tmp_path / "pictures" / "3.png").write_bytes(b"damaged")
    for name in ("one.mp4", "three.mp4", "uneven.mp4", "cut.mp4", "pictures"):
        record = make_record(Entry(name, "", split="train", fps=5.0, clip=name), tmp_path, config.prepare, Phrases())
        i = config.input
        expected, shown = record.decode(0, mask=i.mask, first_motion_index=i.first_motion_index), processor.clip(tmp_path / name, 5.0)
        np.testing.assert_array_equal(shown.frames_THWC, expected.frames_THWC)
        np.testing.assert_array_equal(shown.masks_THW, expected.mask_THW)
        np.testing.assert_array_equal(shown.times_T, record.times_T(0))
        motion_THWC = expected.frames_THWC if expected.motion_frames_THWC is None else expected.motion_frames_THWC
        np.testing.assert_array_equal(shown.motion_frames_THWC, motion_THWC)
    assert record.raw_frames == 11 and len(whole) > 2000


def test_decoded_frames_are_a_video(tmp_path, write_mp4):
    """Arrays and lists of pictures give what the file gives; a list of them is several videos."""
    from data.video import open_source
    path, processor = write_mp4(tmp_path / "a.mp4", frames=12), processor_of(paper(""))
    frames = [frame.pixels() for frame in open_source(path, None, 10**9).frames()]
    expected = processor.clip(path)
    for given in (frames, np.stack(frames), torch.from_numpy(np.stack(frames))):
        shown = processor.clip(given, fps=10.0)
        for ours, theirs in zip(shown, expected):
            np.testing.assert_array_equal(ours, theirs)
        assert len(processing._videos(given)) == 1 and len(processing._videos([given, path])) == 2
    with pytest.raises(processing.HawkVideoError, match=r"decoded frames: .* not float64 \[64, 64, 3\]"):
        processor.clip(np.zeros((3, 64, 64, 3)))


def test_processor_gives_the_tokens_of_training(made):
    """Rows of data/rows.py, with and without history and times, padded on the left."""
    processor, queries = made.model.processor, made.config.model.video_qformer.queries
    histories = [(), (("Who is there?", "A man {in} red."), ("Why?", ""))]
    for history in histories:
        for question in [*QUESTIONS, "Is 𝄞 {video} </s> <unk> a word ⁇"]:
            for shown in (times(made.records[0]), None):
                expected = generation_prompt(made.tokenizer, made.config.input, queries, question, history=history, times=shown)
                row = processor.prompt(question, history, shown)
                for ours, theirs in (("input_ids", "tokens"), ("slots", "slot"), ("position_ids", "position")):
                    np.testing.assert_array_equal(row[ours], expected[theirs])
                np.testing.assert_array_equal(row["attention_mask"], expected["segment"])
    batch = processor(made.videos[0], QUESTIONS)
    for row, expected in enumerate(jax_prompts(made)):
        seen = batch["input_ids"].shape[1] - len(expected["tokens"])
        np.testing.assert_array_equal(batch["input_ids"][row, seen:], expected["tokens"])
        assert not batch["attention_mask"][row, :seen].any()


@pytest.mark.parametrize("preset", [paper, released])
def test_the_synthetic_worlds_tokenizer(preset, tmp_path):
    """A unigram model, which transformers would misread: it comes without settings, and the processor reads it itself."""
    config = preset("embedded")
    hf_folder.write_folder(tmp_path, config)
    assert not list(tmp_path.rglob("tokenizer_config.json")) and (tmp_path / "llama" / "tokenizer.model").is_file()
    processor = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    for question in QUESTIONS:
        expected = generation_prompt(Tokenizer("embedded"), config.input, config.model.video_qformer.queries, question, times=[0.0, 0.5])
        np.testing.assert_array_equal(processor.prompt(question, times=[0.0, 0.5])["input_ids"], expected["tokens"])
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="no tokenizer.model"):
        transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True).prompt("Who?")


def test_visual_tokens_prompts_logits_and_answers_are_those_of_jax(made):
    generator = Generator(made.config, made.params, made.tokenizer)
    visual_BQD, clips = generator.encode(jax_batch(made)), (0, 1, 0)
    inputs = made.model.processor(made.videos, ["x", "x"])
    close(made.model.visual_tokens(inputs["frames"], inputs["masks"], inputs.get("motion_frames")), visual_BQD)
    close(made.model.visual_tokens(inputs["frames"], inputs["masks"], inputs.get("motion_frames"), chunk=3), visual_BQD)

    prompts = jax_prompts(made)
    expected = generator.texts(visual_BQD, prompts, (0, 0, 0))
    assert len(set(expected)) > 1 and all(expected), "answers that never differ would prove nothing"
    assert made.model.generate(made.videos[0], QUESTIONS, max_new_tokens=32) == expected
    assert made.model.generate(made.videos[0]) == expected[:1]                  # alone, without padding
    assert made.model.generate(made.videos[0], QUESTIONS[1]) == expected[1:2]
    pair = generator.texts(visual_BQD, [jax_prompts(made, clips)[1], prompts[1]], (1, 0), rows=3, width=len(prompts[2]["tokens"]))
    assert made.model.generate(made.videos[::-1], QUESTIONS[1]) == pair         # one question, two clips

    @jax.jit
    def forward(params, tokens, visual_BQD):
        model = build.bind(made.config.model, params)
        x_RSD = model.embed_rows(tokens | {"clip_RS": 0 * tokens["tokens_RS"]}, visual_BQD)
        return x_RSD, model.llama.logits(model.llama.hidden(x_RSD, tokens["segment_RS"], tokens["position_RS"]))
    tokens = {f"{key}_RS": prompts[2][key][None] for key in ("tokens", "slot", "segment", "position")}
    x_RSD, logits = forward(made.params, tokens, visual_BQD)
    inputs = made.model.processor(made.videos[0], QUESTIONS)
    embeds, mask = made.model.prompt_embeds(inputs)
    width = x_RSD.shape[1]
    close(embeds[2, -width:], x_RSD[0])
    with torch.no_grad():
        ours = made.model(**inputs).logits[2, -width:][mask[2, -width:].bool()]
    close(ours, logits[0][np.asarray(tokens["segment_RS"][0]) > 0])


def test_beams_are_those_of_jax(made):
    config = dataclasses.replace(made.config, generate=dataclasses.replace(made.config.generate, beams=3, max_new_tokens=8))
    generator = Generator(config, made.params, made.tokenizer)
    expected = generator.texts(generator.encode(jax_batch(made)), jax_prompts(made), (0, 0, 0))
    assert made.model.generate(made.videos[0], QUESTIONS, num_beams=3, max_new_tokens=8) == expected


def test_decoder_alone_answers_from_prompt_embeddings(made):
    decoder = transformers.AutoModelForCausalLM.from_pretrained(made.folder / "llama", dtype=torch.float32)
    assert type(decoder) is transformers.LlamaForCausalLM
    inputs = made.model.processor(made.videos[0], QUESTIONS)
    embeds, mask = made.model.prompt_embeds(inputs)
    for row, text in enumerate(made.model.generate(inputs=inputs, max_new_tokens=16)):
        alone = embeds[row][mask[row].bool()][None]       # what a server gets: one prompt, no padding
        ids = decoder.generate(inputs_embeds=alone, attention_mask=torch.ones(alone.shape[:2], dtype=torch.long), max_new_tokens=16)
        assert made.model.processor.decode(ids[0].tolist()) == text


def test_bfloat16_runs_and_stays_near(made):
    """8 bits of mantissa over some ten layers: measured 0.6 % of the largest visual token, as JAX's own bfloat16; norms stay float32."""
    model = transformers.AutoModel.from_pretrained(made.folder, trust_remote_code=True, dtype=torch.bfloat16)
    assert model.llama_model.dtype == torch.bfloat16 and model.visual_encoder.blocks[0].norm1.weight.dtype == torch.float32
    narrow = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert not any("LayerNorm" in name or "ln_vision" in name or "norm2" in name for name in narrow)
    assert model.visual_encoder.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    inputs = model.processor(made.videos, QUESTIONS[1])
    near = model.visual_tokens(inputs["frames"], inputs["masks"], inputs.get("motion_frames"))
    exact = made.model.visual_tokens(inputs["frames"], inputs["masks"], inputs.get("motion_frames"))
    assert near.dtype == torch.bfloat16
    close(near, exact, 0.02)
    assert all(isinstance(text, str) for text in model.generate(made.videos, max_new_tokens=4))
    # sampling options go to transformers
    model.generate(made.videos[0], do_sample=True, top_p=0.9, temperature=0.7, max_new_tokens=2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_a_gpu_it_answers_as_on_the_cpu(made):
    """1e-4 of the largest value: another order of sums, float32 products (TF32 is off by default)."""
    model = transformers.AutoModel.from_pretrained(made.folder, trust_remote_code=True, dtype=torch.float32).to("cuda")
    inputs = model.processor(made.videos, QUESTIONS[1])
    there = [inputs[name].to("cuda") for name in ("frames", "masks", "motion_frames") if name in inputs]
    close(model.visual_tokens(*there).cpu(), made.model.visual_tokens(*(x.cpu() for x in there)), 1e-4)
    assert model.generate(made.videos, max_new_tokens=8) == made.model.generate(made.videos, max_new_tokens=8)
    narrow = transformers.AutoModel.from_pretrained(made.folder, trust_remote_code=True, dtype=torch.bfloat16).to("cuda")
    assert len(narrow.generate(made.videos, max_new_tokens=4)) == len(made.videos)


def test_saved_again_it_is_the_same(made, tmp_path):
    made.model.save_pretrained(tmp_path)
    names = {str(p.relative_to(made.folder)) for p in made.folder.rglob("*") if p.is_file()}
    again = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert names - again <= {"README.md", "generation_config.json", "vision.pt2"}
    model = transformers.AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    state = made.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items()) and len(state) == len(model.state_dict())
    assert model.generate(made.videos[0], max_new_tokens=4) == made.model.generate(made.videos[0], max_new_tokens=4)


def test_missing_weights_are_an_error(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(file)
    del weights["video_query_tokens_motion"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(OSError, match="lacks weights: video_query_tokens_motion"):
        transformers.AutoModel.from_pretrained(tmp_path / "copy", trust_remote_code=True)


@pytest.mark.parametrize("made", [released], indirect=True)
def test_vision_graph(made):
    """The reloaded program equals the model to float32 rounding for other numbers of clips than it was made with."""
    assert export_vision(made.folder).name == "vision.pt2"
    assert check_vision(made.folder) < 1e-5


def test_broken_videos_are_named(made, tmp_path, write_mp4):
    error = type(made.model.processor).clip.__globals__["HawkVideoError"]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    for path, words in ((broken, "cannot be opened"), (empty, "empty file"), (tmp_path / "none.mp4", "missing file"),
                        (tmp_path, "picture too large|no picture|folder without")):
        with pytest.raises(error, match=f"{path.name}: .*({words})"):
            made.model.generate(path)
    short = type(made.model.processor)(made.model.processor.pictures | {"max_frames": 5, "max_pixels": 10**9}, made.model.processor.text)
    with pytest.raises(error, match="too long: more than 5 frames"):
        short.clip(made.videos[0])
    small = type(made.model.processor)(made.model.processor.pictures | {"max_pixels": 100}, made.model.processor.text)
    with pytest.raises(error, match="64x48 is more than 100 pixels"):
        small.clip(made.videos[0])
