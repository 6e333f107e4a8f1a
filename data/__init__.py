"""Videos to records to batches: numpy, OpenCV, PyAV, spaCy, sentencepiece, Grain; never a jax device."""
