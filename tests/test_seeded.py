"""The motion Q-Former drawn anew, against torch modules that are built one after another from one seed.

What this proves: the draws repeat what torch's modules and initialisers of this construction draw, bit for bit.  What it cannot prove: that
the authors' files were made in this order (convert/seeded.py: unverified).
"""
import dataclasses
import math
import sys

import numpy as np
import pytest
from golden_weights import GOLDEN

from hawk_jax.config import HawkError
from hawk_jax.convert.keys import table
from hawk_jax.convert.seeded import POSITIONS, SEED, VOCABULARY, seeded

torch = pytest.importorskip("torch")
nn = torch.nn
WORDS = 50          # small; the real vocabulary is drawn in one test
PREFIXES = ("Qformer_motion.", "query_tokens_motion")


# ------------------------------------------------------------------------------------------------ the construction, as modules
def module(**children) -> nn.Module:
    """A module of these children, registered in the order given."""
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


class Vit(nn.Module):
    """EVA: patches, learned tokens, pre-norm blocks; its own initialisation goes over pos_embed, cls_token, then every Linear."""

    def __init__(self, config, initialise=True):
        super().__init__()
        c = config.vit
        self.patch_embed = module(proj=nn.Conv2d(3, c.width, c.patch_size, c.patch_size))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (c.image_size // c.patch_size) ** 2 + 1, c.width))
        self.blocks = nn.ModuleList(module(
            norm1=nn.LayerNorm(c.width), attn=module(qkv=nn.Linear(c.width, 3 * c.width, bias=False), proj=nn.Linear(c.width, c.width)),
            norm2=nn.LayerNorm(c.width), mlp=module(fc1=nn.Linear(c.width, c.mlp), act=nn.GELU(), fc2=nn.Linear(c.mlp, c.width)))
            for _ in range(c.depth))
        if initialise:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            nn.init.trunc_normal_(self.cls_token, std=0.02)
            self.apply(self.initialise)
            for depth, block in enumerate(self.blocks, 1):
                block.attn.proj.weight.data.div_(math.sqrt(2 * depth))
                block.mlp.fc2.weight.data.div_(math.sqrt(2 * depth))

    @staticmethod
    def initialise(part):
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def attention(width: int, source: int) -> nn.Module:
    return module(self=module(query=nn.Linear(width, width), key=nn.Linear(source, width), value=nn.Linear(source, width)),
                  output=module(dense=nn.Linear(width, width), LayerNorm=nn.LayerNorm(width)))


def bert_layer(c, number: int, source: int) -> nn.Module:
    parts = {"attention": attention(c.width, c.width)}
    if number % c.cross_attention_freq == 0:
        parts["crossattention"] = attention(c.width, source)
    for suffix in ("", "_query"):
        parts[f"intermediate{suffix}"] = module(dense=nn.Linear(c.width, c.mlp))
        parts[f"output{suffix}"] = module(dense=nn.Linear(c.mlp, c.width), LayerNorm=nn.LayerNorm(c.width))
    return module(**parts)


class QFormer(nn.Module):
    """BERT with a language-model head.  transformers initialises the body when it is made, and the head when that is: each module once.

    twice: a transformers that goes over the body again with the head (before 4.27).
    """

    def __init__(self, config, words, twice=False):
        super().__init__()
        c = config.image_qformer
        self.bert = module(
            embeddings=module(word_embeddings=nn.Embedding(words, c.width, padding_idx=0),
                              position_embeddings=nn.Embedding(POSITIONS, c.width), LayerNorm=nn.LayerNorm(c.width)),
            encoder=module(layer=nn.ModuleList(bert_layer(c, i, config.vit.width) for i in range(c.depth))))
        done = set()
        self.bert.apply(lambda part: self.initialise(part, done))
        self.cls = module(predictions=module(transform=module(dense=nn.Linear(c.width, c.width), LayerNorm=nn.LayerNorm(c.width)),
                                             decoder=nn.Linear(c.width, words, bias=False)))
        self.apply(lambda part: self.initialise(part, set() if twice else done))

    @staticmethod
    def initialise(part, done):
        if part not in done and isinstance(part, (nn.Linear, nn.Embedding)):
            part.weight.data.normal_(mean=0.0, std=0.02)
            if isinstance(part, nn.Linear) and part.bias is not None:
                part.bias.data.zero_()
        done.add(part)


def queries(config):
    return torch.zeros(1, config.image_qformer.queries, config.image_qformer.width).normal_(0.0, 0.02)


def built(config, words=WORDS, seed=SEED, vits=2, initialise=True, twice=False) -> dict[str, np.ndarray]:
    """{state-dict name: values} of the motion branch's Q-Former; the options are wrong orders."""
    torch.manual_seed(seed)
    for _ in range(vits):
        Vit(config, initialise)
    QFormer(config, words, twice)
    queries(config)
    motion = QFormer(config, words, twice)
    tokens = queries(config)
    state = {f"Qformer_motion.{name}": value.numpy() for name, value in motion.state_dict().items()}
    return state | {"query_tokens_motion": tokens.numpy()}


def equal(found, expected) -> bool:
    return all(np.array_equal(lazy.read(), expected[name]) for name, lazy in found.items())


# ------------------------------------------------------------------------------------------------ tests
@pytest.mark.parametrize("words, seed, changes", [
    (WORDS, SEED, {}), (VOCABULARY, SEED, {}), (WORDS, 7, {}),
    (WORDS, SEED, {"depth": 3, "cross_attention_freq": 1}), (WORDS, SEED, {"depth": 5, "cross_attention_freq": 3}),
    (7, SEED, {"queries": 1, "width": 12, "mlp": 5, "heads": 3})])     # torch draws less than 16 values, and rests of 16, otherwise
def test_equals_torchs_modules_bit_for_bit(words, seed, changes):
    config = dataclasses.replace(GOLDEN, image_qformer=dataclasses.replace(GOLDEN.image_qformer, **changes))
    found, expected = seeded(config, seed, words), built(config, words, seed)
    names = {entry.key for entry in table(config) if entry.key.startswith(PREFIXES)}
    assert found.keys() == names
    for name, lazy in found.items():
        assert lazy.dtype == np.float32 and lazy.shape == expected[name].shape
        assert lazy.read().tobytes() == expected[name].tobytes(), name


def test_draws_are_those_of_a_normal_of_deviation_0_02():
    """Matrices, none of them zero or equal to another: 5 standard errors of a deviation, 0.02 / sqrt(2 n)."""
    weights = [lazy.read() for name, lazy in seeded(GOLDEN, vocabulary=WORDS).items() if lazy.read().ndim == 2 and "LayerNorm" not in name]
    for value in weights:
        assert abs(value.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * value.size)
    assert len({value.tobytes() for value in weights}) == len(weights)


@pytest.mark.parametrize("wrong", [{"vits": 1}, {"vits": 3}, {"initialise": False}, {"twice": True}, {"words": WORDS + 1},
                                   {"seed": 43}], ids=str)
def test_another_order_gives_other_values(wrong):
    """So that equality above means that every draw was counted."""
    found = seeded(GOLDEN, vocabulary=WORDS)
    assert equal(found, built(GOLDEN)) and not equal(found, built(GOLDEN, **wrong))


def test_torchs_own_generator_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = seeded(GOLDEN, vocabulary=WORDS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert equal(seeded(GOLDEN, vocabulary=WORDS), {name: lazy.read() for name, lazy in first.items()})


def test_without_torch_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(HawkError, match="--motion-qformer seeded needs torch's random generator .*install torch, or give a file"):
        seeded(GOLDEN)
