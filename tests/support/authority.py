"""Certificates of an authority made for the tests, and NATS credentials of an operator made for the tests."""

from __future__ import annotations

import base64
import json
import os
import pwd
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import nkeys
import trustme

from outbox.embedded import UNPRIVILEGED_USER


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, as files that PostgreSQL's user can read."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; `ca` is its own, as a file."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._ca = folder, trustme.CA()
        self.ca = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(str(self.ca))

    def issue(self, *names: str, user: str | None = None, expired: bool = False, into: Pair | None = None) -> Pair:
        """A certificate for these names and addresses, or for a user; `into` writes over another one."""
        not_after = datetime.now(UTC) - timedelta(days=1) if expired else None
        made = self._ca.issue_cert(*names or ["client"], common_name=user, not_after=not_after)
        stem = self._folder / secrets.token_hex(4)
        pair = into or Pair(stem.with_suffix(".crt"), stem.with_suffix(".key"))
        made.cert_chain_pems[0].write_to_path(str(pair.cert))
        made.private_key_pem.write_to_path(str(pair.key))
        pair.key.chmod(0o600)
        if os.geteuid() == 0:
            os.chown(pair.key, pwd.getpwnam(UNPRIVILEGED_USER).pw_uid, -1)
        return pair


def new_key(prefix: int) -> Any:
    """A key pair of nkeys, of an operator, an account or a user."""
    return nkeys.from_seed(nkeys.encode_seed(secrets.token_bytes(32), prefix))


def seed_of(key: Any) -> str:
    return bytes(key.seed).decode()


def public_of(key: Any) -> str:
    return bytes(key.public_key).decode()


class Operator:
    """An operator with one account, whose users are known by their credentials files."""

    def __init__(self) -> None:
        self._operator, self._account, self._system = (
            new_key(prefix) for prefix in (nkeys.PREFIX_BYTE_OPERATOR, *[nkeys.PREFIX_BYTE_ACCOUNT] * 2)
        )

    @property
    def config(self) -> str:
        """What nats-server must know."""
        limits = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
        store = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
        account = _signed(self._operator, self._account, "account", {"limits": {**limits, **store, "wildcards": True}})
        system = _signed(self._operator, self._system, "account", {"limits": {**limits, "wildcards": True}})
        operator = _signed(self._operator, self._operator, "operator", {"system_account": public_of(self._system)})
        return (
            f"operator: {operator}\nsystem_account: {public_of(self._system)}\nresolver: MEMORY\n"
            f"resolver_preload: {{ {public_of(self._account)}: {account}, {public_of(self._system)}: {system} }}\n"
        )

    def credentials(self, path: Path, *, lifetime: float = 3600) -> Path:
        """The credentials file of a new user, good for so many seconds from now."""
        user = new_key(nkeys.PREFIX_BYTE_USER)
        end = int(datetime.now(UTC).timestamp() + lifetime)
        jwt = _signed(self._account, user, "user", {"subs": -1, "data": -1, "payload": -1}, exp=end)
        path.write_text(
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed_of(user)}\n------END USER NKEY SEED------\n"
        )
        return path


def _signed(signer: Any, subject: Any, kind: str, claims: Mapping[str, object], **further: object) -> str:
    body = {
        "jti": secrets.token_hex(16),
        "iat": int(datetime.now(UTC).timestamp()) - 60,
        "iss": public_of(signer),
        "name": kind,
        "sub": public_of(subject),
        "nats": {**claims, "type": kind, "version": 2},
        **further,
    }
    text = ".".join(_encoded(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, body))
    return f"{text}.{_encoded(signer.sign(text.encode()))}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
