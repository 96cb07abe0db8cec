"""The client's types have exactly the fields of the server's wire models."""

from __future__ import annotations

import dataclasses
import typing

import pytest
from pydantic import BaseModel

from mhr_client import types
from server.api import schemas, views


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (types.Generation, views.GenerateAnswer),
        (types.Output, views.OutputView),
        (types.Usage, views.UsageView),
        (types.Timing, views.TimingView),
        (types.Logprob, views.LogprobView),
        (types.TokenLogprob, views.TokenView),
        (types.Score, views.ScoreView),
        (types.JobInfo, views.JobView),
        (types.JobEvent, views.EventView),
        (types.Task, views.TaskDetail),
        (types.Version, views.VersionView),
        (types.Inventory, views.InventoryDetail),
        (types.Info, views.Info),
        (types.Backbone, views.BackboneView),
    ],
)
def test_answers(ours: type, theirs: type[BaseModel]) -> None:
    assert {field.name for field in dataclasses.fields(ours)} == theirs.model_fields.keys()


@pytest.mark.parametrize(
    ("ours", "theirs", "apart"),
    [
        (types.Parameters, schemas.Parameters, set()),
        (types.Defaults, schemas.GenerationDefaults, set()),
        (types.TaskOptions, schemas.TaskPut, set()),
        (types.TaskChange, schemas.TaskPatch, set()),
        (types.AdaptOptions, schemas.AdaptRequest, {"task_id", "examples"}),
    ],
)
def test_requests(ours: type, theirs: type[BaseModel], apart: set[str]) -> None:
    assert set(typing.get_type_hints(ours)) - {"idempotency_key"} == theirs.model_fields.keys() - apart


def test_names_of_methods_and_states() -> None:
    assert set(typing.get_args(types.Method)) == set(typing.get_args(schemas.Method))
    assert set(typing.get_args(types.JobStatus)) == set(typing.get_args(schemas.JobStatus))
    assert set(typing.get_args(types.JobStatus)) > types.FINISHED
