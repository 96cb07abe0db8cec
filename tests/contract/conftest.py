"""One store per test and backend: SQLite always, PostgreSQL when MHR_TEST_POSTGRES_URL names a database."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text

from adapters_store import Store


@dataclass
class Clock:
    """A clock that stands still until it is told to move."""

    now: datetime = field(default_factory=lambda: datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC))

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


@dataclass(frozen=True)
class Place:
    """Where a store lives: what a second process needs to open it too."""

    data_dir: Path
    database_url: str | None


POSTGRES_URL = os.environ.get("MHR_TEST_POSTGRES_URL")


@pytest.fixture(params=["sqlite", "postgresql"] if POSTGRES_URL else ["sqlite"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    data_dir = tmp_path / "data"
    if request.param == "sqlite":
        yield Place(data_dir, None)
        return
    schema = f"test_{secrets.token_hex(8)}"
    url = make_url(POSTGRES_URL).set(drivername="postgresql+psycopg")
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {schema}"))
    own = url.update_query_dict({"options": f"-csearch_path={schema}"})
    yield Place(data_dir, own.render_as_string(hide_password=False))
    with engine.begin() as connection:
        connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))
    engine.dispose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_store(place: Place, clock: Clock) -> Iterator[Callable[[], Store]]:
    """Opens the same store as often as it is called."""
    opened = []

    def open_again() -> Store:
        opened.append(Store.open(place.data_dir, place.database_url, clock=clock))
        return opened[-1]

    yield open_again
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[[], Store]) -> Store:
    return open_store()
