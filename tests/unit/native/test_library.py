"""The library of compiled operators, and the server without it."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.native import library
from server.native.library import Library, load_library
from tests.unit.native.libraries import LIBRARIES

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def forget_library() -> Iterator[None]:
    load_library.cache_clear()
    yield
    load_library.cache_clear()


def test_a_compiler_is_enough_to_have_the_operators() -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    assert LIBRARIES, "the package was installed with a compiler at hand and without the operators: `make install`"


@pytest.mark.skipif(not LIBRARIES, reason="the compiled operators were not built")
def test_unknown_instructions_are_refused() -> None:
    with pytest.raises(OSError, match="this processor has no mmx"):
        Library("mmx")


def test_without_the_library_there_are_no_operators_and_one_line_in_the_log(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forget_library: None
) -> None:
    monkeypatch.setattr(library, "_LIBRARY", "server.native._not_built")
    with caplog.at_level(logging.WARNING):
        assert load_library() is None
        assert load_library() is None
    assert len(caplog.records) == 1
    assert "they were not built" in caplog.text
    assert "install a C++ compiler" in caplog.text


def test_a_library_that_does_not_load_is_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, forget_library: None, tmp_path: Path
) -> None:
    (tmp_path / "damaged_operators.so").write_bytes(b"no library")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(library, "_LIBRARY", "damaged_operators")
    with caplog.at_level(logging.WARNING):
        assert load_library() is None
    assert "damaged_operators.so" in caplog.text


@pytest.mark.parametrize("compiler", ["false", "missing-compiler"])
def test_a_build_without_a_compiler_succeeds_without_the_operators(tmp_path: Path, compiler: str) -> None:
    shutil.copytree(ROOT / "server" / "native", tmp_path / "server" / "native")
    for built in tmp_path.rglob("*.so"):
        built.unlink()
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    environment = os.environ | {"CC": compiler, "CXX": compiler}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert not list(tmp_path.rglob("*.so"))
