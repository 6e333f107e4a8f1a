"""Parameter names and files of the authors' PyTorch code, from and to JAX."""
