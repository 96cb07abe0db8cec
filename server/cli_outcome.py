"""What became of the version that a job made, in a sentence or two for the terminal."""

from __future__ import annotations

from mhr_client.types import JobInfo


def describe_outcome(job: JobInfo) -> str:
    """Whether the version of a job that succeeded was promoted, and if not, why not and what to do."""
    made, metrics = f"{job.task_id}@{job.version}", job.metrics
    if metrics["promoted"]:
        return f"{made} was promoted; {_compared(job)}."
    by_hand = f"To serve it: mhr tasks promote {job.task_id} {job.version}"
    if job.promote == "never":
        return f"{made} was not promoted, as asked; {_compared(job)}. {by_hand}"
    if metrics["accuracy_before"] is None:
        return (
            f"{made} was not promoted: what is served was learnt from every example that this job held out, so nothing "
            f"could say which is better. Give --validation examples that it has not seen. {by_hand}"
        )
    return (
        f"{made} was not promoted, as it is no better than the version served so far, or mu where there was none; "
        f"{_compared(job)}. {by_hand}"
    )


def _compared(job: JobInfo) -> str:
    before, after = job.metrics["accuracy_before"], job.metrics["accuracy_after"]
    came_out = f"{after:.0%} of the tokens of held-out answers came out right"
    return came_out if before is None else f"{came_out}, {before:.0%} before"
