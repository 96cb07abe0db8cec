from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from server import supervisor as module
from server.supervisor import Supervisor, worker_command, worker_environ


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.05)


def sleeper(marks: Path) -> list[str]:
    return [sys.executable, "-c", f"import time; open({str(marks)!r}, 'a').write('x'); time.sleep(60)"]


def test_a_child_that_dies_is_started_again_and_stopped_at_the_end(tmp_path: Path) -> None:
    marks = tmp_path / "starts"
    supervisor = Supervisor(sleeper(marks), os.environ)
    supervisor.start()
    until(lambda: marks.exists() and marks.read_text() == "x")  # written, not only opened
    first = supervisor.pid
    assert first is not None
    os.kill(first, 9)
    until(lambda: supervisor.pid not in (None, first) and marks.read_text() == "xx")
    second = supervisor.pid
    assert second is not None
    supervisor.stop(5.0)
    assert supervisor.pid is None
    assert not alive(second)


def test_a_child_that_does_not_listen_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    code = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(60)"
    supervisor = Supervisor([sys.executable, "-c", code], os.environ)
    supervisor.start()
    until(ready.exists)
    pid = supervisor.pid
    assert pid is not None
    supervisor.stop(0.2)
    assert not alive(pid)


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    child_pid = tmp_path / "pid"
    child = (
        "import os, time; from server.supervisor import end_with_parent; end_with_parent(); "
        f"open({str(child_pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    parent = (
        "import os, sys, time; from server.supervisor import Supervisor; "
        f"Supervisor([sys.executable, '-c', {child!r}], os.environ).start(); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stderr=subprocess.DEVNULL)
    until(lambda: child_pid.exists() and child_pid.read_text())
    process.kill()
    process.wait()
    until(lambda: not alive(int(child_pid.read_text())))


@pytest.mark.skipif(sys.platform != "linux", reason="the scheduling class is Linux's")
def test_a_child_that_computes_when_idle_leaves_the_processor_to_others() -> None:
    code = (
        "import os; from server.supervisor import compute_when_idle; "
        "compute_when_idle(); print(os.sched_getscheduler(0) == os.SCHED_IDLE)"
    )
    child = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert child.stdout == "True\n"


def test_the_worker_is_this_python_without_the_working_directory_on_its_path() -> None:
    assert worker_command() == [sys.executable, "-P", "-m", "server", "worker", "--with-parent"]


def test_threads_of_the_worker_sleep_while_they_wait_unless_the_environment_says_else() -> None:
    assert worker_environ({"A": "b"}) == {"A": "b", "OMP_WAIT_POLICY": "passive"}
    assert worker_environ({"OMP_WAIT_POLICY": "active"}) == {"OMP_WAIT_POLICY": "active"}
