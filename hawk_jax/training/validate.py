"""Losses on a held-out split: what keeps the best checkpoint."""
import itertools

import jax
import jax.numpy as jnp

from hawk_jax.config import HawkConfig, HawkError
from hawk_jax.models import build
from hawk_jax.training import freeze
from hawk_jax.training.losses import hawk_losses, mean, total_loss
from hawk_jax.training.step import put_batch


def make_eval_step(config: HawkConfig):
    """The jitted losses(params, frozen, batch) -> {name: (sum, weight)}, without dropout.  Call it within `mesh.use`."""
    def losses(params: dict, frozen: dict, batch: dict):
        tree = freeze.join(params, frozen)
        return hawk_losses(build.bind(config.model, tree)(batch), batch, tree["llama"]["lm_head"]["kernel"], config.loss)
    return jax.jit(losses)


def validation_loss(config: HawkConfig, eval_step, params: dict, frozen: dict, input, mesh) -> dict[str, float]:
    """Mean of each loss, and their total `loss`, over the first run.validation_batches batches of the validation split.

    Batches are the same each time (no crop, view 0).  Raises HawkError if the split has no clips.
    """
    split, sums = config.input.validation_split, None
    batches = input.eval_batches(split, host=jax.process_index(), hosts=jax.process_count())
    try:
        for batch in itertools.islice(batches, config.run.validation_batches):
            losses = eval_step(params, frozen, put_batch(batch, mesh))
            sums = losses if sums is None else jax.tree.map(jnp.add, sums, losses)
    finally:
        batches.close()
    if sums is None:
        raise HawkError(f"split {split!r} has no clips to validate on; set input.validation_split, or run.validate_every=0")
    sums = jax.device_get(sums)
    means = {name: float(mean(pair)) for name, pair in sums.items()}
    return {"loss": float(total_loss(sums, config.loss))} | means
