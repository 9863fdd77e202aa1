"""Settings: by flag, else by environment (`OUTBOX_…`), else by `outbox.toml`, else the default.

Pure but for reading the environment and that file. Bad values, and unknown names in the file, are reported all at once.
"""

from __future__ import annotations

import math
import warnings
from enum import StrEnum
from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from outbox.errors import Misconfigured
from outbox.schema import checked_name

FILE = Path("outbox.toml")
PREFIX = "OUTBOX_"
LONGEST_HOURS = 1_000_000.0


class BatchMode(StrEnum):
    """What shares a batch: whole transactions packed together, or one transaction each."""

    PACKED = "packed"
    TRANSACTION = "transaction"


class OnDead(StrEnum):
    """What a dead letter does to those behind it."""

    CONTINUE = "continue"
    HALT = "halt"


class OnUnrouted(StrEnum):
    """What becomes of a transaction whose subject is in no stream."""

    WAIT = "wait"
    DEAD = "dead"


# The setting is called schema everywhere; pydantic warns because a deprecated method has that name.
warnings.filterwarnings("ignore", message='Field name "schema" in "Settings" shadows', category=UserWarning)


class Durability(StrEnum):
    """What must hold a transaction before it is published."""

    LOCAL = "local"
    REPLICAS = "replicas"


class LogFormat(StrEnum):
    """How the relay says what happens, on standard error."""

    HUMAN = "human"
    JSON = "json"


class Settings(BaseSettings):
    """All settings. Their names are the environment's without `OUTBOX_`, and the flags' with dashes."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, toml_file=FILE, extra="forbid")

    database_url: str = Field("postgresql:///", description="Postgres connection URL of the outbox's database.")
    nats_url: str = Field("nats://127.0.0.1:4222", description="NATS URL, or several separated by commas.")
    nats_credentials: Path | None = Field(None, description="NATS credentials file (.creds).")
    schema: str = Field("outbox", description="Postgres schema of the outbox.")  # type: ignore[assignment]  # hides a deprecated method
    batch: BatchMode = Field(BatchMode.PACKED, description="Pack transactions into batches, or one batch each.")
    max_batch_messages: int = Field(
        1000, ge=1, description="Messages in one batch, at most. Not over jetstream.limits.batch.max_msgs."
    )
    max_batch_bytes: int = Field(8_000_000, ge=1, description="Bytes in one batch, but for one larger transaction.")
    window: int = Field(
        8, ge=1, le=40, description="Batches in flight, at most. More helps where the way to NATS is long."
    )
    read_ahead_messages: int = Field(
        16_000, ge=1, description="Messages read but not yet sent, at most: bounds memory."
    )
    read_ahead_bytes: int = Field(64_000_000, ge=1, description="Bytes read but not yet sent, about: bounds memory.")
    ack_timeout: float = Field(10.0, gt=0, description="Seconds without an ack until the stream is read back.")
    on_dead: OnDead = Field(OnDead.CONTINUE, description="After a dead letter: continue, or halt behind it.")
    on_unrouted: OnUnrouted = Field(OnUnrouted.WAIT, description="A subject in no stream: wait, or set aside as dead.")

    retention: float = Field(
        24.0, ge=0, description="Hours that sent transactions are kept; 0 deletes at once, inf never."
    )
    listen: str = Field("", description="HOST:PORT of health and metrics over HTTP; empty: off.")
    log: LogFormat = Field(LogFormat.HUMAN, description="How the relay says what happens, on standard error.")
    traces: bool = Field(False, description="A span for each batch (OpenTelemetry); needs outbox-relay[traces].")
    durability: Durability = Field(
        Durability.LOCAL,
        description="Wait for this server and its synchronous standbys only, or for every streaming standby.",
    )

    @field_validator("retention")
    @classmethod
    def _checked_retention(cls, value: float) -> float:
        if math.isnan(value) or LONGEST_HOURS < value < math.inf:
            raise ValueError(f"is over {LONGEST_HOURS:,.0f} hours; inf keeps for ever")
        return value

    @field_validator("schema")
    @classmethod
    def _checked_schema(cls, value: str) -> str:
        try:
            return checked_name(value)
        except Misconfigured as error:
            raise ValueError(error.message) from error

    @property
    def nats_servers(self) -> list[str]:
        """The NATS URLs, one by one."""
        return [url.strip() for url in self.nats_url.split(",") if url.strip()]

    @property
    def nats_options(self) -> dict[str, str]:
        """Further arguments of nats-py's `connect`."""
        return {"user_credentials": str(self.nats_credentials)} if self.nats_credentials else {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the name is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the name is pydantic's
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then outbox.toml."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)
