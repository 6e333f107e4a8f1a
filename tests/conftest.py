"""Shared pieces of the tests: where reference data lies, and a CPU with eight devices where a test asks for a mesh."""
import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference data (goldens, real clips): `$HAWK_SHARED`, or `shared` beside the checkout.

    Absent: the test is skipped with this reason; under CI=true it fails, so that a green CI means it ran.
    """
    folder = Path(os.environ.get("HAWK_SHARED", Path(__file__).parents[2] / "shared"))
    if folder.is_dir():
        return folder
    reason = f"no reference data at {folder}; set HAWK_SHARED to run this test"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def no_torch(tmp_path_factory):
    """Processes find no torch, as where only requirements.txt is installed: spaCy would import it, two seconds in each of them."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ImportError('hidden by the tests')")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)           # of multiprocessing's processes; those of subprocess read the variable
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
        yield


@pytest.fixture(scope="session")
def write_mp4():
    """Writes a small h264 file: a red square moves right by two pixels a frame over a still, random background.

    `milliseconds`: time stamps of a variable frame rate; `faststart`: index in front, so that a truncated file can still be opened.
    """
    from fractions import Fraction

    import av
    import numpy as np

    def write(path: Path, frames: int = 20, width: int = 64, height: int = 48, milliseconds=None, faststart: bool = False) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        background_HWC = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
        with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            if milliseconds:
                stream.codec_context.time_base = Fraction(1, 1000)
            for t in range(frames):
                picture_HWC = background_HWC.copy()
                picture_HWC[10:22, (left := 2 * t % (width - 12)):left + 12] = [255, 0, 0]
                frame = av.VideoFrame.from_ndarray(picture_HWC, format="rgb24")
                if milliseconds:
                    frame.pts, frame.time_base = milliseconds[t], Fraction(1, 1000)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        return path
    return write
