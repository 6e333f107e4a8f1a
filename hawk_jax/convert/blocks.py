"""Values of one layer on their way from a file to a leaf: cast, transposed, checked, made ready before they are asked for.

Large matrices go through XLA on the CPU, which does the three in one pass with all cores; a small one would not pay for its compilation.
"""
import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from hawk_jax.convert.keys import FROM_TORCH

LARGE = 1 << 20     # values from which XLA is used
AHEAD = 2           # blocks being made while one is written; each may be as large as a layer's largest matrix


@functools.lru_cache(maxsize=64)
def _program(kind: str, dtype: str):
    def convert(x):
        y = FROM_TORCH[kind](x).astype(dtype)
        return y, jnp.isfinite(y).all()
    return jax.jit(convert)


def converted(x: np.ndarray, kind: str, dtype: np.dtype) -> tuple[np.ndarray, bool]:
    """(a torch tensor in our layout and dtype, in C order; whether all of it is finite there)."""
    if x.size >= LARGE and x.dtype.itemsize <= 4:       # float64 would become float32 on its way
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            y, sound = _program(kind, dtype.name)(x)
            return np.asarray(y), bool(sound)
    with np.errstate(over="ignore", invalid="ignore"):
        y = x.astype(dtype, copy=False)
    return np.ascontiguousarray(FROM_TORCH[kind](y)), finite(y)


def finite(x: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    if x.dtype.name == "bfloat16":      # its exponent tells; numpy would go through float32
        return not (np.bitwise_and(x.view(np.uint16), 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(x).all())


def ahead(make: Callable, arguments: Iterable) -> Iterator:
    """make(a) of each argument, in order; the next ones are made meanwhile (reading and copying leave Python free)."""
    with ThreadPoolExecutor(AHEAD) as pool:
        pending = collections.deque()
        try:
            for argument in arguments:
                pending.append(pool.submit(make, argument))
                if len(pending) > AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for job in pending:
                job.cancel()
