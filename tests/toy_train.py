"""A run on the toy input as a process of its own: FOLDER SIGNAL STEP [OPTION=VALUE ...].

When the batch of step STEP is asked for, the process sends itself the signal, at the earliest after a first checkpoint is on disk.
"""
import os
import signal
import sys
import time
from pathlib import Path

from toy_run import ToyInput, one_device, toy_config, toy_frozen

from hawk_jax.training.loop import train


def main(folder: str, name: str, step: int, *options: str) -> None:
    def hit(batch):
        while not any(path.name.isdigit() for path in Path(folder, "checkpoints").iterdir()):
            time.sleep(0.01)
        os.kill(os.getpid(), getattr(signal, name))
        return batch
    config, mesh = toy_config(folder, *options), one_device()
    train(config, input=ToyInput(config, spoil={step: hit}), frozen=toy_frozen(config, mesh), mesh=mesh)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
