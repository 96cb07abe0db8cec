"""The adaptation worker's process: started beside the server, started again when it dies, stopped in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from server.logs import get_logger

_LEAST_PRIORITY = 19
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0
# A worker that lived this long was well: the next pause is the first one again.
_HEALTHY_S = 60.0

log = get_logger(__name__)


class Supervisor:
    """Keeps one child process running. The child reads its end of a pipe: when we die, it ends too."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._command = list(command)
        self._environ = dict(environ)
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._run, name="worker-supervisor", daemon=True)

    @property
    def pid(self) -> int | None:
        """The child's process id while it runs."""
        child = self._child
        return None if child is None or child.poll() is not None else child.pid

    def start(self) -> None:
        """Start the child and watch it."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ask the child to end, and end it after `timeout_s`."""
        self._stopping.set()
        child = self._child
        if child is not None:
            child.terminate()
            try:
                child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                log.warning("the worker did not stop in time", action="worker.kill", pid=child.pid)
                child.kill()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stopping.is_set():
            started_s = time.monotonic()
            child = self._spawn()
            status = child.wait()
            assert child.stdin is not None
            child.stdin.close()
            if self._stopping.is_set():
                return
            if time.monotonic() - started_s > _HEALTHY_S:
                pause_s = _FIRST_PAUSE_S
            log.error("the worker ended", action="worker.restart", pid=child.pid, status=status, pause_s=pause_s)
            self._stopping.wait(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _spawn(self) -> subprocess.Popen[bytes]:
        self._child = child = subprocess.Popen(self._command, stdin=subprocess.PIPE, env=self._environ)
        log.info("started the worker", action="worker.start", pid=child.pid)
        # `stop` may have looked for the child a moment before it existed.
        if self._stopping.is_set():
            child.terminate()
        return child


def worker_command() -> list[str]:
    """The command of the adaptation worker as our child."""
    # Without the working directory on the path, which may hold another `server`.
    return [sys.executable, "-P", "-m", "server", "worker", "--with-parent"]


def worker_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """What the worker is started with: its threads sleep while they wait for each other, unless `environ` says else.

    Threads that spin keep a core from the one they wait for, once the machine has fewer cores to spare than threads: a
    step then takes many times as long (docs/operations.md, "A job beside the server").
    """
    return {"OMP_WAIT_POLICY": "passive", **environ}


def compute_when_idle() -> None:
    """In the child: take only the processor time that nobody else wants; all threads to come do the same.

    Niceness is not enough on Linux: a nice process still keeps waking threads of the server waiting for some
    milliseconds each time, and a step of the engine waits for all its threads many times.
    """
    if sys.platform == "linux":
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    else:
        os.nice(_LEAST_PRIORITY)


def end_with_parent() -> None:
    """In the child: ask ourselves to stop once the parent's end of our standard input is closed."""

    def watch() -> None:
        # Unbuffered: a thread blocked in sys.stdin would hold its lock when the interpreter ends.
        while os.read(0, 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
