from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from adapters_store import CatalogUnavailable, Store
from adapters_store.database import Database, catalog_url
from adapters_store.migrate import HEAD, MIGRATIONS
from adapters_store.models import Base

ROOT = Path(__file__).parents[3]


def test_head_names_the_last_migration():
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [HEAD]


def test_the_migrations_make_the_tables_of_the_models(tmp_path):
    database = Database(catalog_url(tmp_path, None))
    with database.snapshot() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    database.close()


def test_a_catalog_of_a_newer_version_is_refused_and_left_alone(tmp_path):
    Store.open(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    with pytest.raises(CatalogUnavailable, match="revision 9999, which this version does not know"):
        Store.open(tmp_path)
    with closing(sqlite3.connect(tmp_path / "catalog.sqlite3")) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("9999",)]


def test_a_data_directory_may_have_a_percent_sign_and_spaces(tmp_path):
    with Store.open(tmp_path / "100 % mine") as store:
        assert store.count_tasks() == 0


def test_the_second_open_is_fast_and_leaves_alembic_alone(tmp_path):
    Store.open(tmp_path).close()
    begin = time.perf_counter()
    Store.open(tmp_path).close()
    # Measured: 2 ms.
    assert time.perf_counter() - begin < 0.3
    program = (
        "import sys; from pathlib import Path; from adapters_store import Store; "
        "Store.open(Path(sys.argv[1])).close(); "
        "print([name for name in ('alembic', 'torch', 'server') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
