from __future__ import annotations

import json

import pytest

from server.errors import InvalidInput
from server.training.report import Spread, as_document, as_markdown, make_tables, short_names
from server.training.scores import Metric, RunSettings, Score


def _score(
    method: str, task: str, seed: int, score: float, examples: int = 8, metric: Metric = "rouge_l", shown: float = 0.0
) -> Score:
    adaptation = {"trained_parameters": 1234, "seconds": 2.0 + seed} if method == "mhr" else {}
    return Score(task, method, seed, examples, metric, score, score / 2, 10, shown, adaptation, "cpu")


SCORES = [
    *[_score("mu", task, seed, 10.0 * seed, examples=0) for task in ("task1_a", "task2_b") for seed in (0, 1)],
    *[
        _score("mhr", task, seed, value, examples)
        for examples, base in ((8, 40.0), (32, 60.0))
        for task, seed, value in [
            ("task1_a", 0, base),
            ("task1_a", 1, base + 10),
            ("task2_b", 0, base + 20),
            ("task2_b", 1, base + 30),
        ]
    ],
]


def test_one_table_for_each_number_of_examples_with_the_methods_that_use_none() -> None:
    few, many = make_tables(SCORES)
    assert (few.examples, many.examples) == (8, 32)
    assert [row.method for row in few.rows] == [row.method for row in many.rows] == ["mu", "mhr"]
    mu, mhr = many.rows
    assert mhr.tasks["task1_a"] == Spread(65.0, pytest.approx(50**0.5), 2)
    assert mhr.overall == Spread(75.0, pytest.approx(50**0.5), 2)
    assert mhr.exact_match == Spread(37.5, pytest.approx(50**0.5 / 2), 2)
    assert (mhr.trained_parameters, mhr.seconds) == (1234, 2.5)
    assert mu.overall == Spread(5.0, pytest.approx(50**0.5), 2)
    assert (mu.trained_parameters, mu.seconds) == (None, None)


def test_as_markdown() -> None:
    assert as_markdown(make_tables(SCORES[:8])).splitlines() == [
        "ROUGE-L in percent after 8 examples: mean over seeds ± standard deviation (cpu)",
        "",
        "| method | task1 | task2 | mean | exact match | tuned | seconds |",
        "|---|---|---|---|---|---|---|",
        "| mu | 5.0 ± 7.1 | 5.0 ± 7.1 | 5.0 ± 7.1 | 2.5 ± 3.5 | – | – |",  # noqa: RUF001
        "| mhr | 45.0 ± 7.1 | 65.0 ± 7.1 | 55.0 ± 7.1 | 27.5 ± 3.5 | 1,234 | 2.5 |",
        "",
        "task1 is task1_a; task2 is task2_b.",
    ]


def test_the_lead_over_a_method_is_shown_beside_every_other() -> None:
    assert as_markdown(make_tables(SCORES[:8], against="mu")).splitlines()[2:7] == [
        "| method | task1 | task2 | mean | exact match | ahead of mu | tuned | seconds |",
        "|---|---|---|---|---|---|---|---|",
        "| mu | 5.0 ± 7.1 | 5.0 ± 7.1 | 5.0 ± 7.1 | 2.5 ± 3.5 | – | – | – |",  # noqa: RUF001
        "| mhr | 45.0 ± 7.1 | 65.0 ± 7.1 | 55.0 ± 7.1 | 27.5 ± 3.5 | +50.0 ± 5.8 (2 of 2) | 1,234 | 2.5 |",
        "",
    ]


def test_a_method_without_scores_cannot_be_compared_with() -> None:
    with pytest.raises(InvalidInput, match="no scores of 'lora' to compare with; there are of mhr, mu"):
        make_tables(SCORES, against="lora")


def test_where_the_method_compared_with_has_other_numbers_of_examples_there_is_no_lead() -> None:
    few, many = make_tables([*SCORES, _score("lora", "task1_a", 0, 1.0, examples=32)], against="lora")
    assert [row.lead for row in few.rows] == [None, None]
    assert [row.lead is not None for row in many.rows] == [True, True, False]


def test_a_seed_that_lacks_a_task_is_not_in_the_mean_over_tasks() -> None:
    scores = [_score("mhr", "a", 0, 10.0), _score("mhr", "b", 0, 30.0), _score("mhr", "a", 1, 90.0)]
    [row] = make_tables(scores)[0].rows
    assert row.overall == Spread(20.0, None, 1)
    assert row.tasks["a"] is not None
    assert row.tasks["a"].mean == 50.0


def test_what_is_not_there_yet_is_a_dash() -> None:
    table = as_markdown(make_tables([_score("mu", "a", 0, 1.0), _score("mhr", "b", 0, 2.0)]))
    assert "| mhr | – | 2.0 | – | – | 1,234 | 2.0 |" in table  # noqa: RUF001


def test_demonstrations_and_mixed_metrics_are_named() -> None:
    text = as_markdown(
        make_tables([_score("demos", "RTE", 0, 50.0, metric="accuracy", shown=6.25), _score("demos", "a", 0, 40.0)])
    )
    assert "| demos (3.1 in the prompt) |" in text
    assert "| RTE (accuracy) | a (ROUGE-L) |" in text


def test_ranking_alone_shows_its_accuracy_once() -> None:
    lines = as_markdown(make_tables([_score("mhr", "RTE", 0, 50.0, metric="accuracy")])).splitlines()
    assert lines[2] == "| method | RTE | mean | tuned | seconds |"
    assert lines[4] == "| mhr | 50.0 | 50.0 | 1,234 | 2.0 |"


def test_methods_without_examples_alone_have_a_table() -> None:
    [table] = make_tables([_score("mu", "a", 0, 10.0, examples=0)])
    assert table.examples == 0


def test_rows_and_columns_stand_in_one_order_whatever_was_done_first() -> None:
    names = ["lora", "poly-mu@soup", "mhr", "poly-mu@a", "base"]
    [table] = make_tables([_score(method, task, 0, 1.0) for method in names for task in ("b", "a")])
    assert [row.method for row in table.rows] == ["base", "mhr", "poly-mu@a", "poly-mu@soup", "lora"]
    assert list(table.tasks) == ["a", "b"]


def test_short_names_stay_unambiguous() -> None:
    assert short_names(["task1_a", "task2_b", "x_1", "x_2"]) == {
        "task1_a": "task1",
        "task2_b": "task2",
        "x_1": "x_1",
        "x_2": "x_2",
    }


def test_the_document_is_json() -> None:
    tables = make_tables(SCORES, against="mu")
    document = json.loads(json.dumps(as_document(RunSettings({"instances": 10}, {}, {}), SCORES, tables)))
    assert document["settings"]["protocol"] == {"instances": 10}
    assert document["tables"][0]["rows"][1]["overall"]["mean"] == 55.0
    assert document["tables"][0]["rows"][1]["lead"]["mean"] == 50.0
    assert len(document["scores"]) == len(SCORES)
