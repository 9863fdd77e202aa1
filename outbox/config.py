"""What the settings are: their names, types, defaults and bounds, and what goes together. A `Settings` is a value.

Where they come from is `outbox.sources`; files that they name are opened when a connection is made. No mistake quotes
a value, which may be a password.
"""

from __future__ import annotations

import math
import re
import warnings
from enum import StrEnum
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import psycopg.conninfo
from pydantic import BaseModel, ConfigDict, Field, FilePath, PrivateAttr, SecretStr, field_validator
from pydantic import ValidationInfo as Others

from outbox.errors import Misconfigured
from outbox.schema import checked_name
from outbox.text import MASK, masked

LONGEST_HOURS = 1_000_000.0
LAST_PORT = 65535
NKEY_SEED = r"SU[A-D][A-Z2-7]{55}"  # of a user


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


class AcrossStreams(StrEnum):
    """What becomes of a transaction whose subjects belong to several streams."""

    SPLIT = "split"
    DEAD = "dead"


class Durability(StrEnum):
    """What must hold a transaction before it is published."""

    LOCAL = "local"
    REPLICAS = "replicas"


class StreamMode(StrEnum):
    """Whether others write to the streams too: what the relay finds there, never, or always."""

    AUTO = "auto"
    CHAINED = "chained"
    SHARED = "shared"


class LogFormat(StrEnum):
    """How the relay says what happens, on standard error."""

    HUMAN = "human"
    JSON = "json"


# The setting is called schema everywhere; pydantic warns because a deprecated method has that name.
warnings.filterwarnings("ignore", message='Field name "schema" in "Settings" shadows', category=UserWarning)


class Settings(BaseModel):
    """All settings. Their names are the environment's without `OUTBOX_`, and the flags' with dashes.

    No name may end in `_file`. What depends on another setting is checked at the later one of the two.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    database_url: str = Field(
        "postgresql:///", repr=False, description="PostgreSQL: a URL, or what libpq reads, such as service=shop."
    )
    nats_url: str = Field(
        "nats://127.0.0.1:4222",
        repr=False,
        description="NATS URL, or several separated by commas; tls:// asks for TLS.",
    )
    nats_user: str | None = Field(None, description="User of NATS; with nats_password.")
    nats_password: SecretStr | None = Field(None, validate_default=True, description="Password of nats_user.")
    nats_token: SecretStr | None = Field(None, description="Token of NATS.")
    nats_nkey_seed: SecretStr | None = Field(None, description="Seed of the NATS user's nkey, SU….")
    nats_credentials: FilePath | None = Field(
        None, validate_default=True, description="NATS credentials file (.creds): JWT and seed."
    )
    nats_tls_ca: FilePath | None = Field(None, description="Authorities that may sign the server's certificate, PEM.")
    nats_tls_cert: FilePath | None = Field(None, description="Client certificate, PEM; with nats_tls_key.")
    nats_tls_key: FilePath | None = Field(
        None, validate_default=True, description="Key of the client certificate, PEM, not encrypted."
    )
    nats_tls_first: bool = Field(False, description="Begin with TLS, as nats-server's handshake_first asks for.")
    nats_domain: str | None = Field(None, description="JetStream domain of the streams.")
    nats_inbox_prefix: str | None = Field(
        None, description="Prefix of the subjects on which NATS answers, where permissions ask for one of its own."
    )
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
    ack_timeout: float = Field(
        10.0, gt=0, description="Seconds without an ack of a batch that has arrived, until the stream is read back."
    )
    on_dead: OnDead = Field(OnDead.CONTINUE, description="After a dead letter: continue, or halt behind it.")
    on_unrouted: OnUnrouted = Field(OnUnrouted.WAIT, description="A subject in no stream: wait, or set aside as dead.")
    across_streams: AcrossStreams = Field(
        AcrossStreams.SPLIT, description="Subjects in several streams: each gets its part, or all is set aside as dead."
    )
    stream_mode: StreamMode = Field(
        StreamMode.AUTO,
        description="Fence what is published for streams of one writer (chained), or of several (shared); auto: shared "
        "from the first message of others on.",
    )
    retention: float = Field(
        24.0, ge=0, description="Hours that sent transactions are kept; 0 deletes at once, inf never."
    )
    durability: Durability = Field(
        Durability.LOCAL,
        description="Wait for this server and its synchronous standbys only, or for every streaming standby.",
    )
    listen: str = Field("", description="HOST:PORT for health and metrics over HTTP; empty: off.")
    log: LogFormat = Field(LogFormat.HUMAN, description="What the relay says on standard error: for people, or JSON.")
    traces: bool = Field(False, description="A span for each batch (OpenTelemetry); needs outbox-relay[traces].")
    _files: dict[str, Path] = PrivateAttr(default_factory=dict)

    debug: bool = Field(False, description="Commands show the traceback of a defect, which a relay has in its log.")

    @field_validator("database_url")
    @classmethod
    def _checked_database_url(cls, value: str) -> str:
        try:
            given = psycopg.conninfo.conninfo_to_dict(value)
        except psycopg.ProgrammingError:
            # libpq's own words quote the part that it stumbles over, which may be a part of the password.
            raise ValueError(
                "is neither a URL (postgresql://…) nor what libpq reads (host=db dbname=shop); "
                "are special characters of the password percent-encoded, or quoted?"
            ) from None
        port, host = str(given.get("port") or ""), str(given.get("host") or "")
        if not re.fullmatch(r"[\d,]*", port) or "@" in host[1:] or "@" in str(given.get("dbname") or ""):
            raise ValueError("has a wrong host or port; are special characters of the password percent-encoded?")
        return value

    @field_validator("nats_url")
    @classmethod
    def _checked_nats_url(cls, value: str) -> str:
        try:
            fits = [url.hostname and url.port != 0 and url.scheme in {"nats", "tls"} for url in _split(value)]
        except ValueError:  # its words quote a part of the URL
            fits = []
        if not fits or not all(fits) or any("@" in url.path + url.query + url.fragment for url in _split(value)):
            raise ValueError(
                "is not nats://HOST:PORT or tls://HOST:PORT, or several separated by commas; "
                "are special characters of the password percent-encoded?"
            )
        return value

    @field_validator("nats_password")
    @classmethod
    def _checked_nats_password(cls, value: SecretStr | None, others: Others) -> SecretStr | None:
        if (value is None) != (others.data.get("nats_user") is None):
            raise ValueError("goes together with nats_user")
        return value

    @field_validator("nats_nkey_seed")
    @classmethod
    def _checked_nats_nkey_seed(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not re.fullmatch(NKEY_SEED, value.get_secret_value()):
            raise ValueError("is not the seed of a user's nkey: SU and 56 more characters")
        return value

    @field_validator("nats_credentials")
    @classmethod
    def _only_credentials(cls, value: Path | None, others: Others) -> Path | None:
        given = [name for name in ("nats_user", "nats_token", "nats_nkey_seed") if others.data.get(name) is not None]
        if any("@" in url.netloc for url in _split(others.data.get("nats_url", ""))):
            given.insert(0, "the user in nats_url")
        if value is not None:
            given.append("nats_credentials")
        if len(given) > 1:
            raise ValueError(f"NATS takes one kind of credentials, and these are given: {', '.join(given)}")
        return value

    @field_validator("nats_tls_key")
    @classmethod
    def _checked_nats_tls_key(cls, value: Path | None, others: Others) -> Path | None:
        if "nats_tls_cert" in others.data and (value is None) != (others.data["nats_tls_cert"] is None):
            raise ValueError("goes together with nats_tls_cert")
        return value

    @field_validator("nats_domain")
    @classmethod
    def _checked_nats_domain(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w-]+", value, re.ASCII):
            raise ValueError("may have letters, digits, - and _")
        return value

    @field_validator("nats_inbox_prefix")
    @classmethod
    def _checked_nats_inbox_prefix(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[\w-]+(\.[\w-]+)*", value, re.ASCII):
            raise ValueError("may have letters, digits, - and _, in parts separated by dots; no .> at its end")
        return value

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

    @field_validator("listen")
    @classmethod
    def _checked_listen(cls, value: str) -> str:
        _, colon, port = value.rpartition(":")
        if value and not (colon and port.isascii() and port.isdigit() and int(port) <= LAST_PORT):
            raise ValueError("is not HOST:PORT, such as 0.0.0.0:9464")
        return value

    @property
    def files(self) -> dict[str, Path]:
        """The settings that were read from a file of their own, `OUTBOX_…_FILE`, by name; `outbox.sources.current`."""
        return self._files

    @property
    def nats_servers(self) -> list[str]:
        """The NATS URLs, one by one."""
        return [url.geturl() for url in _split(self.nats_url)]

    def shown(self, name: str) -> str | None:
        """A setting's value as anybody may read it; None if there is none."""
        value = getattr(self, name)
        if isinstance(value, SecretStr):
            return MASK
        if name == "nats_url":
            return ",".join(map(masked, self.nats_servers))
        return None if value is None else masked(str(value))


def _split(urls: str) -> list[SplitResult]:
    """The NATS URLs, one by one; raises `ValueError` for one that is none."""
    given = [url.strip() for url in urls.split(",") if url.strip()]
    return [urlsplit(url if "://" in url else f"nats://{url}") for url in given]
