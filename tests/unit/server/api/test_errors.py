from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

import adapters_store.errors as store_errors
from server.api.errors import body, param_of, response, to_error
from server.errors import MHRError, TooLarge, Unauthorized, Unavailable


@pytest.mark.parametrize(
    ("loc", "param"),
    [
        (("body",), None),
        (("body", "inputs"), "inputs"),
        (("body", "examples", 3, "output"), "examples[3].output"),
        (("query", "limit"), "limit"),
        (("body", "routing", 0, 1, 2), "routing[0][1][2]"),
    ],
)
def test_places_are_written_as_in_a_programme(loc: tuple[str | int, ...], param: str | None) -> None:
    assert param_of(loc) == param


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (store_errors.NotFound("n"), 404, "not_found"),
        (store_errors.Conflict("c"), 409, "conflict"),
        (store_errors.InvalidValue("limit", "v"), 422, "invalid_request"),
        (store_errors.BlobMissing("d", Path("p")), 424, "blob_damaged"),
        (store_errors.BlobDamaged("d", Path("p")), 424, "blob_damaged"),
        (store_errors.CatalogUnavailable("u"), 503, "catalog_unavailable"),
        (store_errors.LeaseLost("l"), 500, "server_error"),
        (HTTPException(404), 404, "unknown_route"),
        (HTTPException(405), 405, "method_not_allowed"),
        (HTTPException(418, "teapot"), 418, "server_error"),
        (ValueError("a secret inside"), 500, "server_error"),
    ],
)
def test_every_error_has_its_status(error: Exception, status: int, code: str) -> None:
    known = to_error(error)
    assert (known.status, known.code) == (status, code)
    assert "secret" not in known.message


def test_an_error_while_the_body_is_read_keeps_its_own_status() -> None:
    wrapped = HTTPException(400, "There was an error parsing the body")
    wrapped.__cause__ = TooLarge("big")
    assert to_error(wrapped).status == 413


def test_the_first_problem_is_named_and_the_others_listed() -> None:
    problems = [
        {"type": "missing", "loc": ("body", "task_id"), "msg": "Field required"},
        {"type": "extra_forbidden", "loc": ("body", "task"), "msg": "Extra inputs are not permitted"},
    ]
    known = to_error(RequestValidationError(problems))
    assert (known.param, known.code) == ("task_id", "missing")
    assert known.message == "task_id: it is missing (also wrong: task)"


def test_the_wire_form_and_its_headers() -> None:
    assert body(MHRError("m", param="p")) == {
        "error": {"type": "server_error", "message": "m", "param": "p", "code": "server_error"}
    }
    assert response(Unavailable("u", retry_after_s=7)).headers["Retry-After"] == "7"
    assert response(Unauthorized("k")).headers["WWW-Authenticate"] == "Bearer"
