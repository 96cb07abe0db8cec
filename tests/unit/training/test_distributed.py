"""Two processes on the CPU, started as a user would start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from server.adapters.inventory import Inventory
from server.errors import InvalidInput
from server.training.checkpoint import Checkpoint
from server.training.distributed import ALONE, Processes, joined_processes
from server.training.run_folder import read_log

ROOT = Path(__file__).parents[3]
OPTIONS = ["--batch-size", "4", "--accumulate", "2", "--skills", "2", "--heads", "2", "--checkpoint-every", "4"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task, answer in (("say-x", "x"), ("say-y", "yes"), ("say-z", "zebra")):
        rows = [{"input": "n" * (i + 1), "output": answer} for i in range(10)]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _pretrain(launcher: list[str], tiny_folder: Path, data: Path, out: Path) -> None:
    command = ["-m", "server", "pretrain", "--data", str(data), "--out", str(out), "--steps", "8", "--json", *OPTIONS]
    settings = {
        "MHR_BACKBONE": str(tiny_folder),
        "MHR_DATA_DIR": str(out.parent / "cache"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    ended = subprocess.run([*launcher, *command], env=os.environ | settings, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["inventory"] == str(out / "inventory.safetensors")  # from one process alone


def test_two_processes_learn_what_one_does_and_resume(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _pretrain([sys.executable], tiny_folder, data, one)
    _pretrain(torchrun, tiny_folder, data, two)
    _assert_same(one, two)
    # As a kill after step 4 leaves it: the checkpoint of step 4, and a longer log.
    (two / "checkpoint.previous.safetensors").rename(two / "checkpoint.safetensors")
    _pretrain(torchrun, tiny_folder, data, two)
    _assert_same(one, two)


def _assert_same(one: Path, two: Path) -> None:
    states = [Checkpoint.from_bytes((run / "checkpoint.safetensors").read_bytes()) for run in (one, two)]
    assert [state.step for state in states] == [8, 8]
    for name, tensor in states[0].tensors.items():
        if name.startswith("parameter."):
            torch.testing.assert_close(states[1].tensors[name], tensor, rtol=1e-5, atol=1e-5)
    logs = [read_log(run) for run in (one, two)]
    assert [r["step"] for r in logs[0]] == [r["step"] for r in logs[1]]
    for first, second in zip(*logs, strict=True):
        assert second.get("loss") == pytest.approx(first.get("loss"), abs=2e-5)
    after = [
        Inventory.from_bytes((run / "inventory.safetensors").read_bytes()).training["validation_after"]
        for run in (one, two)
    ]
    assert after[1] == pytest.approx(after[0], abs=2e-4)


def test_without_torchrun_a_process_is_alone() -> None:
    with joined_processes("cpu") as (processes, device):
        assert (processes, device) == (ALONE, "cpu")
    assert ALONE.is_first
    assert not Processes(1, 2).is_first


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(InvalidInput, match="there are 2; start torchrun with --nproc-per-node 2"),
        joined_processes("cuda"),
    ):
        pytest.fail("it must not join")
