"""Runs the migrations on the connection that `adapters_store.migrate` hands over.

The transaction is the caller's: it holds the catalog's write lock, and a crash leaves the old schema whole.
"""

from __future__ import annotations

from alembic import context

from adapters_store.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
