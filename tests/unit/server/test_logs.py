from __future__ import annotations

import json
import logging

import pytest
import structlog

from server.logs import configure_logging, get_logger


def records(capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_record_is_one_json_object_with_its_context(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        get_logger("x").info("done", action="task.done", task="ü")
    [record] = records(capsys)
    assert {key: record[key] for key in ("message", "action", "task", "request_id", "level")} == {
        "message": "done",
        "action": "task.done",
        "task": "ü",
        "request_id": "r1",
        "level": "info",
    }


def test_a_librarys_record_takes_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    logging.getLogger("some.library").warning("careful: %s", 5)
    [record] = records(capsys)
    assert (record["message"], record["action"]) == ("careful: 5", "log.some.library")


def test_an_exception_is_part_of_its_record(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging()
    try:
        raise ValueError("inside")
    except ValueError:
        get_logger("x").exception("failed", action="x.failed")
    [record] = records(capsys)
    assert "ValueError: inside" in str(record["exception"])


def test_what_is_below_the_level_is_not_written(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("error")
    get_logger("x").warning("quiet", action="x")
    logging.getLogger("y").warning("quiet")
    assert records(capsys) == []
