"""The benchmarks run and print what they promise; nothing here looks at a time."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from server.settings import Settings
from server.training.batches import EncodedExample, collate
from tests.support.tiny_server import LiveServer, write_tiny_model

BENCHMARKS = Path(__file__).resolve().parents[3] / "benchmarks"
SMALL = ["--tasks=3", "--skills=2", "--heads=2", "--rank=2", "--warmup=0", "--repeats=1"]

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., dict[str, Any]]]:
    """Runs a benchmark's script and returns its last line."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run_script(name: str, *arguments: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(BENCHMARKS / name), run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    yield run_script
    sys.modules.pop("common", None)


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
    sys.modules.pop("common", None)


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
    sys.modules.pop("common", None)
    sequences = [(2, (7, 8, 1), (5, 6)), (0, (3, 4), (9,)), (2, (7, 8, 2, 3), (4,)), (2, (7, 8, 5), (1, 2, 3))]
    padded = pad(collate([EncodedExample(task, prompt, (answer,)) for task, prompt, answer in sequences]))
    found = [
        (task, tuple(t for t, label in zip(row, labels, strict=True) if t and label < 0), tuple(labels[labels > 0]))
        for task, row, labels in zip(padded.tasks.tolist(), padded.tokens.tolist(), padded.labels.numpy(), strict=True)
    ]
    assert sorted(found) == sorted(sequences)


def test_http_asks_every_task_of_a_running_server(
    run: Callable[..., dict[str, Any]], tiny_model: Path, tmp_path: Path
) -> None:
    settings = Settings(backbone=str(tiny_model), data_dir=tmp_path / "data", port=0, worker=False, max_context=256)
    server = LiveServer(settings, tasks=True)
    try:
        server.wait_ready()
        times = ["--warmup-s=0.1", "--window-s=0.2", "--repeats=2"]
        sizes = ["--users", "1", "3", "--prompt-words=4", "--new-tokens=3"]
        document = run("bench_http.py", f"--url={server.url}", *times, *sizes)
    finally:
        server.stop()
    assert document["results"]["tasks"] == 2
    levels = document["results"]["levels"]
    assert [level["users"] for level in levels] == [1, 3]
    assert all(level["errors"] == 0 and level["tokens_per_s"] > 0 for level in levels)
