"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest
import torch

from tests.unit.engine.driver import Driver, make_model


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def driver() -> Driver:
    return Driver(make_model())
