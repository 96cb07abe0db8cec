"""docs/refresh.py: which blocks are run, and how outputs are shown."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "docs" / "refresh.py"


@pytest.fixture(scope="module")
def refresh() -> ModuleType:
    spec = importlib.util.spec_from_file_location("refresh", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_only_blocks_with_an_output_block_are_run(refresh: ModuleType) -> None:
    page = "```bash\nfalse\n```\ntext\n```bash\necho '{\"a\": 1}'\n```\n```json\nold\n```\n"
    assert refresh.refresh(page) == page.replace("old", '{\n  "a": 1\n}')


def test_failing_command_is_named(refresh: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="exit code 3 of:\nexit 3"):
        refresh.refresh("```bash\nexit 3\n```\n```text\n```\n")


def test_long_outputs_are_cut(refresh: ModuleType) -> None:
    assert refresh.show("[1, 2, 3, 4, 5]", "json") == '[\n  1,\n  2,\n  3,\n  4,\n  "…"\n]\n'
    shown = refresh.show("".join(f"{number}\n" for number in range(99)), "text").splitlines()
    assert (shown[0], shown.count("…"), shown[-1]) == ("0", 1, "98")
    assert len(shown) == refresh.MAX_LINES + 1
    assert refresh.show("x" * 500, "text") == "x" * refresh.MAX_TEXT + "…\n"
