"""Processes that work on a list of tasks, and outlive the death of one of them: a decoder that crashes takes only its task with it.

`concurrent.futures` gives up as a whole when a process dies; here the parent knows who had what, starts another process and tries the
task once more, since the cause may have been the machine (out of memory) and not the task.
"""
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from hawk_jax.config import HawkError

ATTEMPTS = 2


class Crash(NamedTuple):
    """In place of a result: the process died at this task, ATTEMPTS times."""
    cause: str


class _Worker:
    def __init__(self, factory: Callable, arguments: tuple):
        context = multiprocessing.get_context("spawn")      # fork would copy the threads' locks of FFmpeg, OpenCV and tfds
        self.connection, far = context.Pipe()
        self.process = context.Process(target=_serve, args=(far, factory, arguments), daemon=True)
        self.process.start()
        far.close()             # else its death could not be seen as the end of the pipe
        self.task, self.ready = None, False

    def receive(self) -> tuple[str, Any]:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode
            return "died", signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def give(self, task) -> None:
        self.task = task
        try:
            self.connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            pass                # it died while idle: `receive` will tell

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join()


def _serve(connection: Connection, factory: Callable, arguments: tuple) -> None:
    """A process: makes its function once, then answers until the parent closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)            # Ctrl-C reaches every process of the terminal; the parent decides
    try:
        function = factory(*arguments)
        connection.send(("ready", None))
        while True:
            connection.send(("result", function(connection.recv())))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except HawkError as error:
        connection.send(("failed", str(error)))


def work(tasks: deque, workers: int, factory: Callable, arguments: tuple) -> Iterator[tuple[Any, Any]]:
    """Yields (task, result or Crash) as they come.  `factory(*arguments)` gives each process its function of a task.

    The caller may add tasks while it iterates.  A HawkError in a process ends all of it and is raised here.
    """
    crew = [_Worker(factory, arguments) for _ in range(workers)]
    crashes: dict[Any, int] = {}
    try:
        while tasks or any(w.task is not None for w in crew):
            for worker in crew:
                if worker.ready and worker.task is None and tasks:
                    worker.give(tasks.popleft())
            for connection in wait([w.connection for w in crew if w.task is not None or not w.ready]):
                worker = next(w for w in crew if w.connection is connection)
                kind, value = worker.receive()
                if kind == "failed":
                    raise HawkError(value)
                if kind == "ready":
                    worker.ready = True
                    continue
                task, worker.task = worker.task, None
                if kind == "died":
                    crew[crew.index(worker)] = _replacement(worker, value, factory, arguments)
                    crashes[task] = crashes.get(task, 0) + 1
                    if crashes[task] < ATTEMPTS:
                        tasks.appendleft(task)
                        continue
                    value = Crash(value)
                yield task, value
    finally:
        for worker in crew:
            worker.stop()


def _replacement(worker: _Worker, cause: str, factory: Callable, arguments: tuple) -> _Worker:
    if not worker.ready:
        raise HawkError(f"a worker process could not start: {cause}; see its message above")
    worker.stop()
    return _Worker(factory, arguments)
