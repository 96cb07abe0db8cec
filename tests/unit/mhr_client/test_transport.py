"""Reading of event streams, however the network cuts them."""

from __future__ import annotations

from itertools import pairwise

import httpx
from hypothesis import given
from hypothesis import strategies as st

from mhr_client.transport import EventDecoder, RetryPolicy, ServerEvent, connection_failed

STREAM = (
    ': comment\r\nid: 7\r\nevent: token\r\ndata: {"text": "é\u2028"}\r\n\r\n'
    'event: note\ndata: {"a":\ndata: 1}\n\n'
    "data: 3\r\revent: unfinished\ndata: 4\n"
).encode()
EVENTS = [
    ServerEvent("token", {"text": "é\u2028"}, "7"),
    ServerEvent("note", {"a": 1}, "7"),
    ServerEvent("message", 3, "7"),
]


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_do_not_depend_on_where_the_bytes_are_cut(cuts: list[int]) -> None:
    decoder = EventDecoder()
    places = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[start:stop] for start, stop in pairwise(places)]
    assert [event for chunk in chunks for event in decoder.feed(chunk)] == EVENTS


def test_one_byte_at_a_time() -> None:
    decoder = EventDecoder()
    assert [event for i in range(len(STREAM)) for event in decoder.feed(STREAM[i : i + 1])] == EVENTS


def test_backoff_is_bounded() -> None:
    policy = RetryPolicy(retries=5, backoff_s=1, max_wait_s=3)
    error = connection_failed("http://x", httpx.ConnectError("no"))
    assert [policy.wait_after(attempt, error) for attempt in range(6)] == [1, 2, 3, 3, 3, None]


def test_no_retries_means_none() -> None:
    error = connection_failed("http://x", httpx.ConnectError("no"))
    assert RetryPolicy(retries=0).wait_after(0, error) is None
