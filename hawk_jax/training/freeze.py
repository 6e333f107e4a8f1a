"""Which parameters train.  The tree is split in two before differentiation; gradients still flow *through* the frozen decoder.

Rules are per leaf and written down in one list; each parameter must be matched by exactly one of them.
"""
import re

from hawk_jax.config import HawkError, ModelConfig
from hawk_jax.models.build import flatten


class FreezeError(HawkError):
    """A parameter that no rule, or more than one, speaks of."""


def rules(config: ModelConfig) -> list[tuple[str, bool]]:
    """(pattern of a whole path, whether it trains)."""
    return [
        (r"encoder/(vit|ln_vision|qformer)/.+", False),
        (r"encoder/query_tokens", False),
        (r"encoder/query_tokens_motion", config.train_query_tokens_motion),    # a naming slip of the released code trains them
        (r"(video|motion)/.+", True),
        (r"llama/.+", False),
    ]


def trains(path: tuple[str, ...], config: ModelConfig) -> bool:
    """Whether the parameter at this path trains.  Raises FreezeError unless exactly one rule matches."""
    name = "/".join(path)
    matched = [(pattern, trains) for pattern, trains in rules(config) if re.fullmatch(pattern, name)]
    if len(matched) != 1:
        raise FreezeError(f"parameter {name} is matched by {len(matched)} freeze rules, not one {[p for p, _ in matched]}; "
                          "mend `rules` in hawk_jax/training/freeze.py")
    return matched[0][1]


def split(tree: dict, config: ModelConfig) -> tuple[dict, dict]:
    """(trainable, frozen) parts of a tree of parameters, or of anything with the same paths (shapes, axes, shardings)."""
    parts = {True: {}, False: {}}
    for path, leaf in flatten(tree).items():
        node = parts[trains(path, config)]
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return parts[True], parts[False]


def join(trainable: dict, frozen: dict) -> dict:
    """The inverse of `split`."""
    tree = dict(frozen)
    for key, value in trainable.items():
        tree[key] = join(value, tree[key]) if isinstance(value, dict) and key in tree else value
    return tree
