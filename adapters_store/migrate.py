"""Brings the catalog's schema to the head revision.

alembic takes a third of a second to import, so it is left alone when the catalog already is at the head.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, Engine, inspect, text

from adapters_store.errors import CatalogUnavailable

MIGRATIONS = Path(__file__).parent / "migrations"
HEAD = "0001"


def migrate(write_engine: Engine) -> None:
    """Create or upgrade the schema in one transaction; several processes may try at once.

    Raises CatalogUnavailable for a catalog of a newer version of this software.
    """
    with write_engine.begin() as connection:
        found = _revision(connection)
        if found != HEAD:
            _upgrade(connection, found)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def _upgrade(connection: Connection, found: str | None) -> None:
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    if found is not None:
        try:
            ScriptDirectory.from_config(config).get_revision(found)
        except CommandError:
            raise CatalogUnavailable(
                f"the catalog's schema has revision {found}, which this version does not know (its own is {HEAD}). "
                "Use the newer version of the software that wrote it, or restore an older backup."
            ) from None
    command.upgrade(config, "head")
