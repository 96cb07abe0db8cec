"""The benchmarks run and print what they promise; nothing here looks at a time."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from server.training.batches import EncodedExample, collate
from tests.support.int8 import needs_int8
from tests.support.tiny_server import write_tiny_model

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
SMALL = ["--tasks=3", "--skills=2", "--heads=2", "--rank=2", "--warmup=0", "--repeats=1"]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


def forget_benchmarks() -> None:
    """The scripts' modules lie beside them and have plain names."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("common", "serving")]:
        del sys.modules[name]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a benchmark's script and returns its last line."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run_script(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    yield run_script
    forget_benchmarks()


def test_engine_offline_compares_the_same_tokens(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    sizes = ["--prompt-tokens=7", "--new-tokens=5"]
    document = run("bench_engine_offline.py", f"--backbone={tiny_model}", f"--cache-dir={tmp_path}", *SMALL, *sizes)
    assert document["benchmark"] == "engine_offline"
    assert set(document["results"]) == {"engine", "engine bare", "peft poly", "transformers"}
    assert document["same_tokens_as_peft_poly"]
    assert document["options"]["tasks"] == 3
    assert {"date", "commit", "cores", "threads", "torch"} <= set(document["conditions"])


@needs_int8
def test_engine_offline_compares_paths_and_quantizations(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    where = [f"--backbone={tiny_model}", f"--cache-dir={tmp_path}", "--prompt-tokens=7", "--new-tokens=5"]
    paths = ["--no-poly", "--no-transformers", "--path", "slots", "bare", "one-task", "merged"]
    document = run("bench_engine_offline.py", *where, *SMALL, *paths, "--quantization", "none", "int8")
    fp32 = {"engine", "engine bare", "engine one task"}
    assert set(document["results"]) == fp32 | {"engine merged"} | {f"{name}, int8" for name in fp32}


def test_quality_of_int8_is_skipped_without_data(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MHR_TEST_DATA", raising=False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["bench_quality_int8.py"])
    runpy.run_path(str(BENCHMARKS / "bench_quality_int8.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("skipped:")
    forget_benchmarks()


def test_prefix_counts_what_is_computed_again(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    sizes = ["--instruction-tokens=20", "--input-tokens=16", "--long-tokens=40", "--new-tokens=4", "--streams=2"]
    common = [option for option in SMALL if not option.startswith("--warmup")]
    document = run("bench_prefix.py", f"--backbone={tiny_model}", f"--cache-dir={tmp_path}", *common, *sizes)
    assert document["benchmark"] == "prefix"
    default, plain = (document["results"][name] for name in ("default", "plain"))
    assert default["rounds"] == [3 * 20, 0, 0]
    assert default["computed_again"] == [0, 0]
    assert plain["computed_again"] == [1, 1]
    for scenario in ("first_token", "long_prompt", "burst"):
        assert default[scenario].keys() == plain[scenario].keys()


def test_training_step_times_both_trainers(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    sizes = ["--batch-size=4", "--batches=2", "--min-tokens=16", "--max-tokens=24"]
    document = run("bench_training_step.py", f"--backbone={tiny_model}", f"--cache-dir={tmp_path}", *SMALL, *sizes)
    assert set(document["results"]) == {"ours", "peft poly"}
    assert document["speed_over_peft_poly"] > 0


def test_training_step_draws_batches_from_task_files(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    for task in ("a", "b", "c"):
        rows = [{"input": f"{task}{i}", "output": task, "instruction": "Say the letter."} for i in range(4)]
        (tmp_path / f"{task}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sizes = ["--batch-size=4", "--batches=2", f"--data={tmp_path}", "--rows-per-task=2"]
    document = run("bench_training_step.py", f"--backbone={tiny_model}", f"--cache-dir={tmp_path}", *SMALL, *sizes)
    assert all(ours < padded for ours, padded in zip(document["our_tokens"], document["padded_tokens"], strict=True))
    assert all(0 < result["loaded_mib"] <= result["peak_mib"] for result in document["results"].values())


def test_training_step_gives_both_trainers_the_same_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    pad = runpy.run_path(str(BENCHMARKS / "bench_training_step.py"))["pad"]
    forget_benchmarks()
    sequences = [(2, (7, 8, 1), (5, 6)), (0, (3, 4), (9,)), (2, (7, 8, 2, 3), (4,)), (2, (7, 8, 5), (1, 2, 3))]
    padded = pad(collate([EncodedExample(task, prompt, (answer,)) for task, prompt, answer in sequences]))
    found = [
        (task, tuple(t for t, label in zip(row, labels, strict=True) if t and label < 0), tuple(labels[labels > 0]))
        for task, row, labels in zip(padded.tasks.tolist(), padded.tokens.tolist(), padded.labels.numpy(), strict=True)
    ]
    assert sorted(found) == sorted(sequences)


HTTP_SIZES = [
    *("--skills=2", "--heads=2", "--rank=2", "--clients=3", "--tasks=5", "--prompt-tokens=9", "--new-tokens=4"),
    *("--repeats=1", "--warmup=0", "--quantization=none"),
]


def test_http_compares_tasks_with_no_adapter_and_with_the_engine_alone(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    where = [f"--backbone={tiny_model}", f"--cache-dir={tmp_path}"]
    results = run("bench_http.py", "mixed", "overhead", *where, *HTTP_SIZES)["results"]
    assert set(results["mixed"]["contenders"]) == {"no adapter", "3 tasks"}
    assert set(results["overhead"]["ratios"]) == {"HTTP / engine offline", "HTTP, streamed / engine offline"}
    assert all(ratio["median"] > 0 for result in results.values() for ratio in result["ratios"].values())


def test_http_waits_for_a_cold_task_and_beside_a_long_prompt(
    run: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    write_tiny_model(tmp_path / "model", context=1024)  # streams that outlast the long prompt by far
    where = [f"--backbone={tmp_path / 'model'}", f"--cache-dir={tmp_path}"]
    sizes = ["--streams=2", "--stream-tokens=900", "--long-tokens=100", "--arrival-tokens=9"]
    results = run("bench_http.py", "cold", "long-prompt", *where, *HTTP_SIZES, *sizes)["results"]
    assert results["cold"]["cold"].keys() == {"cold_ms", "warm_ms", "extra_ms", "extra_p95_ms"}
    (ratio,) = results["long-prompt"].values()
    assert ratio["at_most"] == 2.0


def test_http_says_which_peers_are_left_out(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    where = [f"--backbone={tiny_model}", f"--cache-dir={tmp_path}", "--offline-peers"]
    document = run("bench_http.py", *HTTP_SIZES, *where, "--", "peers")
    assert document["results"]["peers"] == {"skipped": "no peer was given"}


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the package `serving`."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield lambda name: importlib.import_module(f"serving.{name}")
    forget_benchmarks()


def test_waves_of_one_number_are_the_same_and_of_another_differ(serving: Callable[[str], ModuleType]) -> None:
    workload = serving("workload").Workload(clients=8, tasks=1000, popularity="uniform", rate_per_s=2.0)
    assert workload.draw_tasks(1) == workload.draw_tasks(1) != workload.draw_tasks(2)
    arrivals = workload.draw_arrivals(1)
    assert arrivals == sorted(workload.draw_arrivals(1))
    assert len(arrivals) == 8


def test_zipf_asks_the_first_task_most(serving: Callable[[str], ModuleType]) -> None:
    workload = serving("workload").Workload(clients=2000, tasks=50, popularity="zipf")
    counts = Counter(workload.draw_tasks(0))
    assert counts.most_common(1)[0][0] == 0
    assert counts[0] > 3 * counts[9]


def test_an_answer_of_another_length_than_asked_is_refused(serving: Callable[[str], ModuleType]) -> None:
    answer = serving("client").Answer(0.0, 1.0, 200, {"usage": {"prompt_tokens": 9, "completion_tokens": 3}}, [])
    with pytest.raises(SystemExit, match=r"\(9, 3\)"):
        serving("waves").wave_of([answer], 9, 4)


def test_a_ratio_is_the_median_over_neighbouring_runs(serving: Callable[[str], ModuleType]) -> None:
    ratio = serving("waves").ratio_of([2.0, 30.0, 9.0], [1.0, 10.0, 9.0])
    assert ratio == {"median": 2.0, "least": 1.0, "most": 3.0}


def test_roofline_says_what_a_step_takes_at_least(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    document = run(
        "bench_roofline.py", f"--backbone={tiny_model}", f"--cache-dir={tmp_path}", "--repeats=1", "--buffer-mib=1"
    )
    assert set(document["linears"]) == {"1", "32", "1024"}
    assert all(value > 0 for value in document["floor_ms"].values())
