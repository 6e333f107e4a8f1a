"""The motion branch's image Q-Former as the released code draws it: random, frozen, saved nowhere, and so only to be drawn again.

Its values follow from seed 42 of torch's CPU generator and from everything the authors' code draws before: both ViTs, the video branch's
Q-Former and its queries.  Those draws are repeated here and thrown away, tensor by tensor; nothing but torch's generator is needed.
Unverified: no file of the authors holds these values, their order is read from code, and another torch may draw otherwise.  It is that
of the versions they pin: transformers 4.28 initialises every module once, where earlier ones went over BERT's body a second time.
"""
from collections.abc import Iterator

import numpy as np

from hawk_jax.config import ModelConfig, QFormerConfig
from hawk_jax.convert.keys import KeyTableError
from hawk_jax.convert.lazy import Lazy

SEED = 42               # of rank 0, whose values all processes of the authors' training get
VOCABULARY = 30_522     # of bert-base-uncased: word embeddings and output matrix are drawn before they are removed
POSITIONS = 512
DEVIATION = 0.02


class _Generator:
    """Draws as torch's initialisers do; each is one call, as their number of random bits depends on the size of a call."""

    def __init__(self, seed: int):
        try:
            import torch
        except ImportError as error:
            raise KeyTableError(f"--motion-qformer seeded needs torch's random generator ({error}); install torch, or give a file"
                                ) from error
        self.torch, self.state = torch, torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> None:
        self.torch.empty(shape).uniform_(generator=self.state)

    def normal(self, *shape: int):
        return self.torch.empty(shape).normal_(0.0, DEVIATION, generator=self.state)

    def linear(self, width: int, out: int, bias: bool = True) -> None:
        """What constructing a Linear draws."""
        self.uniform(out, width)
        if bias:
            self.uniform(out)


def _vit(draw: _Generator, config: ModelConfig) -> None:
    """A ViT: its constructor's draws, then those of its own initialisation (truncated normals: one uniform each)."""
    c = config.vit
    tokens = c.grid[0] * c.grid[1] + 1
    draw.uniform(c.width, 3, c.patch_size, c.patch_size)
    draw.uniform(c.width)
    for _ in range(c.depth):
        draw.linear(c.width, 3 * c.width, bias=False)
        draw.linear(c.width, c.width)
        draw.linear(c.width, c.mlp)
        draw.linear(c.mlp, c.width)
    draw.uniform(1, tokens, c.width)
    draw.uniform(1, 1, c.width)
    for _ in range(c.depth):
        for out, width in ((3 * c.width, c.width), (c.width, c.width), (c.mlp, c.width), (c.width, c.mlp)):
            draw.uniform(out, width)


def _dense(config: QFormerConfig, encoder: int) -> Iterator[tuple[str, int, int]]:
    """(name, in, out) of the matrices of every layer, in the order of construction, text side included."""
    d, wide = config.width, config.mlp
    for layer in range(config.depth):
        for name, source in (("attention", d), *([("crossattention", encoder)] if layer % config.cross_attention_freq == 0 else [])):
            for part, width in (("self.query", d), ("self.key", source), ("self.value", source), ("output.dense", d)):
                yield f"encoder.layer.{layer}.{name}.{part}", width, d
        for name in ("", "_query"):
            yield f"encoder.layer.{layer}.intermediate{name}.dense", d, wide
            yield f"encoder.layer.{layer}.output{name}.dense", wide, d


def _qformer(draw: _Generator, config: QFormerConfig, encoder: int, vocabulary: int) -> Iterator[tuple[str, object]]:
    """(name below `bert.`, values) of the matrices a Q-Former keeps; drives all its draws, so it must be read to its end."""
    d = config.width
    draw.normal(vocabulary, d)
    draw.normal(POSITIONS, d)
    for _, width, out in _dense(config, encoder):
        draw.linear(width, out)
    draw.normal(vocabulary, d)
    draw.normal(POSITIONS, d)
    for name, width, out in _dense(config, encoder):
        yield f"{name}.weight", draw.normal(out, width)
    draw.linear(d, d)                               # the head of the language model
    draw.linear(d, vocabulary, bias=False)
    draw.normal(d, d)
    draw.normal(vocabulary, d)


def seeded(config: ModelConfig, seed: int = SEED, vocabulary: int = VOCABULARY) -> dict[str, Lazy]:
    """{state-dict name: tensor} of Qformer_motion and query_tokens_motion.  KeyTableError without torch.

    Biases are 0, norms 1 and 0, as BERT's initialisation leaves them.
    """
    draw, c = _Generator(seed), config.image_qformer
    for _ in range(2):
        _vit(draw, config)
    for _ in _qformer(draw, c, config.vit.width, vocabulary):
        pass
    draw.normal(1, c.queries, c.width)
    kept, encoder = {}, config.vit.width
    for name, values in _qformer(draw, c, encoder, vocabulary):
        if "intermediate.dense" not in name and ".output.dense" not in name.replace("attention.output", ""):
            kept[f"Qformer_motion.bert.{name}"] = values.numpy()
            kept[f"Qformer_motion.bert.{name.removesuffix('weight')}bias"] = np.zeros(len(values), np.float32)
    kept["query_tokens_motion"] = draw.normal(1, c.queries, c.width).numpy()
    norms = ["embeddings.LayerNorm"]
    for layer in range(c.depth):
        parts = ["attention.output", *(["crossattention.output"] if layer % c.cross_attention_freq == 0 else []), "output_query"]
        norms += [f"encoder.layer.{layer}.{part}.LayerNorm" for part in parts]
    for name in norms:
        kept[f"Qformer_motion.bert.{name}.weight"] = np.ones(c.width, np.float32)
        kept[f"Qformer_motion.bert.{name}.bias"] = np.zeros(c.width, np.float32)

    def lazy(values: np.ndarray) -> Lazy:
        return Lazy(values.dtype, values.shape, lambda: values)
    return {name: lazy(values) for name, values in kept.items()}
