"""One hash per step of the input, to show that it does not depend on hosts, workers or restarts."""
import dataclasses
import hashlib
from collections.abc import Iterator

import numpy as np

from data.stream import Input
from hawk_jax.config import HawkConfig


def batch_hash(batch: dict[str, np.ndarray]) -> str:
    """sha256 hex over names, types, shapes and bytes of a batch."""
    whole = hashlib.sha256()
    for name in sorted(batch):
        value = np.ascontiguousarray(batch[name])
        whole.update(f"{name} {value.dtype} {value.shape}\n".encode())
        whole.update(value)
    return whole.hexdigest()


def data_digest(config: HawkConfig, steps: range, hosts: int) -> Iterator[str]:
    """Hash of each global batch of `steps` (consecutive), joined from `hosts` separate pipelines of which each reads its rows only.

    With input.features=memory it is the hash of the pictures whose features are kept.  Raises as `Input` does.
    """
    config = dataclasses.replace(config, input=dataclasses.replace(config.input, features="live"))
    streams = [Input(config).train_batches(steps.start * config.input.clips, host, hosts) for host in range(hosts)]
    try:
        for _ in steps:
            parts = [next(stream) for stream in streams]
            yield batch_hash({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
    finally:
        for stream in streams:
            stream.close()
