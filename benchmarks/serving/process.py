"""Processes under test: started with a command, waited for over HTTP, measured, and ended."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from common import ROOT

READY_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 60.0


class ServerProcess:
    """A server on a free port of this machine, ready when constructed. `command` may hold `{port}`."""

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        ready_path: str,
        log: Path,
    ) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [part.replace("{port}", str(port)) for part in command]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **environ}, stdout=output, stderr=output, process_group=0
            )
        try:
            self._wait_until_ready(shlex.join(command), ready_path)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """End the server, and whatever it started."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _wait_until_ready(self, command: str, path: str) -> None:
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline_s:
            if self._process.poll() is not None:
                raise SystemExit(f"{command} ended with status {self._process.returncode}; see {self._log}")
            if is_ready(self.url + path):
                return
            time.sleep(0.2)
        raise SystemExit(f"{command} was not ready within {READY_TIMEOUT_S:.0f} s; see {self._log}")


def start_ours(data_dir: Path, settings: Mapping[str, str], log: Path) -> ServerProcess:
    """Our server on a data directory; `settings` are further `MHR_*` variables."""
    environ = {"MHR_DATA_DIR": str(data_dir), "MHR_LOG_LEVEL": "warning", **settings}
    return ServerProcess([sys.executable, "-m", "server", "serve", "--port", "{port}"], environ, "/readyz", log)


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def resident_bytes(pid: int) -> int:
    """The resident set of a process, in bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """Processor time that a process and its threads have used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
