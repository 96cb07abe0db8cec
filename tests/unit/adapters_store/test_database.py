from __future__ import annotations

import sqlite3
import threading

import pytest
from sqlalchemy import text

from adapters_store import CatalogUnavailable, InvalidValue, NotFound, Store
from adapters_store import database as database_module
from adapters_store.database import Database, catalog_url


@pytest.fixture
def database(tmp_path):
    database = Database(catalog_url(tmp_path, None))
    yield database
    database.close()


def pragma(database, name):
    with database.read() as session:
        return session.scalar(text(f"PRAGMA {name}"))


def test_sqlite_is_set_up_to_be_shared_and_to_last(database, tmp_path):
    assert pragma(database, "journal_mode") == "wal"
    assert pragma(database, "foreign_keys") == 1
    assert pragma(database, "synchronous") == 2
    assert pragma(database, "busy_timeout") == 30_000
    assert (tmp_path / "catalog.sqlite3").exists()


def test_a_write_that_raises_changes_nothing(database):
    def write():
        with database.write() as session:
            session.execute(text("INSERT INTO alembic_version VALUES ('x')"))
            raise NotFound("changed my mind")

    with pytest.raises(NotFound, match="changed my mind"):
        write()
    with database.read() as session:
        assert session.scalars(text("SELECT version_num FROM alembic_version")).all() == ["0001"]


def test_writers_wait_for_each_other(database):
    order = []
    inside = threading.Event()

    def second():
        inside.wait()
        with database.write() as session:
            session.connection()
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with database.write() as session:
        session.connection()
        inside.set()
        thread.join(0.05)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_a_file_that_is_no_catalog_is_told(tmp_path):
    (tmp_path / "catalog.sqlite3").write_bytes(b"this is not a database, whatever its name says" * 100)
    with pytest.raises(CatalogUnavailable, match="The file is damaged; restore it from a backup"):
        Store.open(tmp_path)


def test_verify_names_a_corrupt_catalog(tmp_path):
    with Store.open(tmp_path) as store:
        for number in range(200):
            store.put_task(f"t{number}", instruction="x" * 500, defaults={}, inventory=None, metadata={})
    path = tmp_path / "catalog.sqlite3"
    with sqlite3.connect(path, isolation_level=None) as connection:
        (page,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'ix_jobs_status_seq'").fetchone()
    connection.close()
    content = bytearray(path.read_bytes())
    content[(page - 1) * 4096 : (page - 1) * 4096 + 64] = b"\xff" * 64
    path.write_bytes(content)
    with Store.open(tmp_path) as store:
        damage = store.verify()[0]
    assert (damage.digest, damage.path, damage.problem) == ("", path, "corrupt catalog")


def test_a_data_directory_that_is_a_file_is_told(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(Exception, match=f"the data directory {path} cannot be used") as caught:
        Store.open(path)
    assert type(caught.value).__module__ == "adapters_store.errors"


def test_a_url_may_name_another_sqlite_file(tmp_path):
    other = tmp_path / "other.sqlite3"
    with Store.open(tmp_path / "data", f"sqlite:///{other}") as store:
        store.put_task("t", instruction="", defaults={}, inventory=None, metadata={})
    assert other.exists()
    assert not (tmp_path / "data" / "catalog.sqlite3").exists()


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_postgresql_urls_mean_psycopg(tmp_path, scheme):
    url = catalog_url(tmp_path, f"{scheme}://user:secret@host:5432/name")
    assert url.drivername == "postgresql+psycopg"
    assert url.password == "secret"


@pytest.mark.parametrize(
    "url",
    ["", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://u:secret@h/n", "postgresql+asyncpg://u:secret@h/n"],
)
def test_other_urls_are_refused_with_the_forms_that_work_and_without_the_password(tmp_path, url):
    with pytest.raises(InvalidValue, match="use sqlite:////absolute") as caught:
        catalog_url(tmp_path, url)
    assert caught.value.field == "database_url"
    assert "secret" not in str(caught.value)


def test_an_unreachable_catalog_is_told_without_the_password(tmp_path):
    pytest.importorskip("psycopg", reason="pip install 'psycopg[binary]' to test PostgreSQL")
    with pytest.raises(CatalogUnavailable, match="Check that the database is reachable") as caught:
        Store.open(tmp_path, "postgresql://user:secret@127.0.0.1:1/name")
    assert "secret" not in str(caught.value)


def test_a_missing_driver_is_told_with_the_command_that_installs_it(tmp_path, monkeypatch):
    def without_driver(*_arguments, **_options):
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setattr(database_module, "create_engine", without_driver)
    with pytest.raises(CatalogUnavailable, match="pip install 'psycopg"):
        Store.open(tmp_path, "postgresql://user@host/name")
