from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_store import InvalidValue
from adapters_store.values import JOB_ID, canonical_json, check_key, check_task_id, check_text, new_job_id, plain_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=4)


@given(OBJECTS)
def test_plain_json_is_what_it_stays(value):
    plain = plain_json("value", value)
    assert plain_json("value", plain) == plain
    assert plain.keys() == value.keys()


@given(OBJECTS)
def test_equal_objects_have_one_canonical_text(value):
    turned = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(turned) == canonical_json(plain_json("value", value))


@pytest.mark.parametrize("value", [{"x": b"bytes"}, {"x": {1, 2}}, {("a",): 1}, [1], "text"])
def test_what_is_no_json_object_is_refused(value):
    with pytest.raises(InvalidValue) as caught:
        plain_json("metadata", value)
    assert caught.value.field == "metadata"
    assert "metadata" in str(caught.value)


def test_a_circle_is_refused():
    circle = {}
    circle["self"] = circle
    with pytest.raises(InvalidValue):
        plain_json("metadata", circle)


@pytest.mark.parametrize("task_id", ["a", "0", "task1217_atomic_answer_generation", "a.b-c_d", "a" * 128, "mu2"])
def test_designed_task_ids_pass(task_id):
    check_task_id(task_id)


def test_job_ids_have_their_form_and_differ():
    ids = {new_job_id() for _ in range(100)}
    assert len(ids) == 100
    assert all(JOB_ID.fullmatch(job_id) for job_id in ids)


def test_texts_may_hold_all_of_unicode_but_nul_and_halves():
    check_text("t", "line\nbreak \U0001f600 \uffff")
    check_text("t", None)
    with pytest.raises(InvalidValue, match="NUL"):
        check_text("t", "\x00")
    with pytest.raises(InvalidValue, match="character 1"):
        check_text("t", "a\udfff")


def test_keys_have_a_length():
    check_key("k", None)
    check_key("k", "k" * 255)
    with pytest.raises(InvalidValue, match="has 256 characters"):
        check_key("k", "k" * 256)
