"""A crash at any instant leaves the old state or the new one, and never a damaged or half-made store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SWEEP = Path(__file__).with_name("store_crash_sweep.py")
# Only the process dies, not the machine: memory will do, and spares hundreds of real fsyncs.
MEMORY = Path("/dev/shm")


def test_every_operation_is_all_or_nothing_wherever_it_is_killed():
    place = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as root:
        swept = subprocess.run(
            [sys.executable, str(SWEEP), root],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert swept.returncode == 0, swept.stderr
    results = {line["operation"]: line["found"] for line in map(json.loads, swept.stdout.splitlines())}
    assert len(results) == 11
    for operation, found in results.items():
        assert set(found) <= {"old", "new"}, operation
        assert found == sorted(found, reverse=True), f"{operation} went back after it was done"
        assert found[-1] == "new", operation
        assert len(found) > 5, f"{operation} took no steps on disk"
    assert set(results.pop("open")) == {"new"}
    assert all(found[0] == "old" for found in results.values())
