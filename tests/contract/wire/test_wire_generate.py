"""POST /generate on the wire."""

from __future__ import annotations

import httpx


def test_answers_a_task(client: httpx.Client) -> None:
    answer = client.post(
        "/generate", json={"task_id": "capital", "inputs": "France", "parameters": {"max_new_tokens": 5}}
    )
    assert answer.status_code == 200, answer.text
    print(answer.json())
