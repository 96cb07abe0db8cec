from __future__ import annotations

import pytest

from adapters_store import InvalidValue
from adapters_store.checkpoints import CheckpointFiles

JOB = "job-0123456789abcdef"


@pytest.fixture
def checkpoints(tmp_path):
    return CheckpointFiles(tmp_path)


def test_the_last_checkpoint_is_loaded(checkpoints):
    checkpoints.save(JOB, b"one")
    checkpoints.save(JOB, b"two")
    assert checkpoints.load(JOB) == b"two"
    assert list(checkpoints.job_ids()) == [JOB]


@pytest.mark.parametrize(
    "harm", [lambda data: data[:-1], lambda data: data + b"?", lambda data: b"", lambda data: b"x"]
)
def test_a_damaged_checkpoint_counts_as_none(checkpoints, tmp_path, harm):
    checkpoints.save(JOB, b"content")
    path = tmp_path / f"{JOB}.ckpt"
    path.write_bytes(harm(path.read_bytes()))
    assert checkpoints.load(JOB) is None


def test_deleting_tells_what_it_freed(checkpoints):
    checkpoints.save(JOB, b"12345")
    assert checkpoints.delete(JOB) == 32 + 5
    assert checkpoints.delete(JOB) == 0
    assert list(checkpoints.job_ids()) == []


@pytest.mark.parametrize("job_id", ["", "../escape", "job-1", f"{JOB}/x", JOB.upper()])
def test_what_is_no_job_id_reaches_no_file(checkpoints, job_id):
    with pytest.raises(InvalidValue, match="not a job id"):
        checkpoints.save(job_id, b"x")
