"""Commands that train and evaluate without a server: pretrain, evaluate."""

from __future__ import annotations

import typer


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
