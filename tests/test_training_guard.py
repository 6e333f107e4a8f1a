"""A run folder belongs to one process at a time."""
import fcntl
import subprocess
import sys
import threading
import time

import pytest

from hawk_jax.config import HawkError
from hawk_jax.training.guard import alone

HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); time.sleep(60)"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_refused(holder, tmp_path):
    with pytest.raises(HawkError, match="another process trains in"), alone(tmp_path, patience=0.3):
        raise AssertionError("entered a folder that another process holds")


def test_one_that_is_about_to_end_is_waited_for(holder, tmp_path):
    threading.Timer(0.5, holder.kill).start()       # killed, not asked: the kernel gives the lock back all the same
    start = time.monotonic()
    with alone(tmp_path, patience=30):
        assert time.monotonic() - start >= 0.4
        with open(tmp_path / "lock") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)       # held meanwhile
    with open(tmp_path / "lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)           # and given back


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HawkError, match="cannot be written"), alone(tmp_path / "file" / "run"):
        raise AssertionError("entered a folder that cannot exist")
