from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from mhr_client.types import JobInfo
from server.cli_outcome import describe_outcome


def _job(promote: str, **metrics: Any) -> JobInfo:
    return JobInfo(
        id="job-1",
        task_id="tags",
        method="mhr",
        status="succeeded",
        version=2,
        progress={},
        metrics={"accuracy_before": 0.5, "accuracy_after": 0.75, "promoted": False, **metrics},
        error=None,
        attempts=1,
        cancel_requested=False,
        inventory="tiny",
        promote=promote,
        num_examples=8,
        created_at=datetime.now(UTC),
        started_at=None,
        finished_at=None,
    )


@pytest.mark.parametrize(
    ("job", "said"),
    [
        (
            _job("if_better", promoted=True),
            "tags@2 was promoted; 75% of the tokens of held-out answers came out right, 50% before.",
        ),
        (
            _job("always", promoted=True, accuracy_before=None),
            "tags@2 was promoted; 75% of the tokens of held-out answers came out right.",
        ),
        (
            _job("never"),
            "tags@2 was not promoted, as asked; 75% of the tokens of held-out answers came out right, 50% before. "
            "To serve it: mhr tasks promote tags 2",
        ),
        (
            _job("if_better", accuracy_after=0.25),
            "tags@2 was not promoted, as it is no better than the version served so far, or mu where there was none; "
            "25% of the tokens of held-out answers came out right, 50% before. To serve it: mhr tasks promote tags 2",
        ),
        (
            _job("if_better", accuracy_before=None),
            "tags@2 was not promoted: what is served was learnt from every example that this job held out, so nothing "
            "could say which is better. Give --validation examples that it has not seen. "
            "To serve it: mhr tasks promote tags 2",
        ),
    ],
)
def test_the_outcome_says_what_is_served_and_why(job: JobInfo, said: str) -> None:
    assert describe_outcome(job) == said
