"""A few synthetic clips, as files and as records, for benchmarks that need data."""
import contextlib
import dataclasses
import io
from pathlib import Path

from configs import demo
from data.prepare import prepare
from data.synthetic import render
from hawk_jax.config import DataSource, HawkConfig, PrepareConfig, WorldConfig

DEMO = demo.stage1().prepare                                  # 8 frames of 112 pixels
FULL = PrepareConfig(views=1, shards=2)                       # 32 frames of 224 pixels, as for the 7B model


def videos(folder: Path, clips: int) -> tuple[Path, list[Path]]:
    """Renders `clips` h264 files of 5 s, 320x240, 15 frames per second; returns their root and their paths."""
    world = WorldConfig(train_clips=clips, validation_clips=1, test_clips=1, seconds=(5.0, 5.0))
    render(world, folder, progress=False)
    return folder, sorted((folder / "videos" / "train").glob("*.mp4"))


def prepared(world: Path, out: Path, options: PrepareConfig, workers: int | None = None) -> None:
    """`prepare` on all of a world's clips, without its table."""
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(videos=world, annotations=world, out=out, spacy="embedded", config=HawkConfig(prepare=options), workers=workers,
                progress=False)


def reading(out: Path, options: PrepareConfig, **changes) -> HawkConfig:
    """The demo's first stage on those records, pictures decoded live and cropped, with changes to its input."""
    base = demo.stage1()
    inputs = dataclasses.replace(base.input, datasets=(DataSource(str(out)),), features="live", crop="random", **changes)
    return dataclasses.replace(base, prepare=options, input=inputs)
