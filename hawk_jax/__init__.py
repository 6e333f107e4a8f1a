"""HAWK in JAX: configuration, model, training, evaluation, conversion."""
