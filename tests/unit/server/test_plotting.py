from __future__ import annotations

import sys
from pathlib import Path

import pytest

from server.errors import InvalidInput
from server.plotting import figure_file


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")])
def test_writes_the_format_that_the_name_asks_for(tmp_path: Path, name: str, begins: bytes) -> None:
    with figure_file(tmp_path / name) as figure:
        figure.subplots().plot([1, 2, 3], label="a line")
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_an_unknown_format_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"\.png, \.svg, \.pdf"), figure_file(tmp_path / "plot.txt"):
        pytest.fail("nothing should be drawn")


def test_without_matplotlib_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(InvalidInput, match=r"mhr-server\[plot\]"), figure_file(tmp_path / "a.png"):
        pytest.fail("nothing should be drawn")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot write the plot"), figure_file(tmp_path / "missing" / "a.png") as f:
        f.subplots()
