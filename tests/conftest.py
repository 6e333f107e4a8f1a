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
