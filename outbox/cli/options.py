"""What the commands share: options, settings from flags and their sources, and the question before what is final."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from outbox.config import Settings
from outbox.sources import Loaded, load

err = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)

DatabaseURL = Annotated[str | None, typer.Option("--database-url", help="Postgres URL (OUTBOX_DATABASE_URL).")]
NatsURL = Annotated[str | None, typer.Option("--nats-url", help="NATS URL or URLs (OUTBOX_NATS_URL).")]
Schema = Annotated[str | None, typer.Option("--schema", help="Postgres schema of the outbox (OUTBOX_SCHEMA).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def settings(**flags: Any) -> Settings:
    """Settings from the given flags and their sources. Raises `WrongSettings` with every mistake at once."""
    return loaded(**flags).settings


def loaded(**flags: Any) -> Loaded:
    """`settings`, and where each comes from."""
    return load(**flags)


def confirm(question: str, *, yes: bool) -> None:
    """Ask before what cannot be undone; exits with 1 on a no."""
    if not yes and not typer.confirm(question):
        raise typer.Exit(1)
