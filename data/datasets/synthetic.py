"""The folder that `python -m hawk_jax render` writes: annotations_SPLIT.json beside videos and labels.  Same form as the authors'."""
from pathlib import Path


def files(folder: Path) -> list[Path]:
    """The annotation files of a rendered world; [] if the folder is something else."""
    return sorted(folder.glob("annotations_*.json")) if folder.is_dir() else []
