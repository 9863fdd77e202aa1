"""What lets the relay into NATS, read from files: TLS certificates and credentials.

Read anew for each connection, so that what was renewed on disk is taken up. Raises `Denied`, and never asks a terminal.
"""

from __future__ import annotations

import re
import ssl
from collections import UserString
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from outbox.config import NKEY_SEED, Settings
from outbox.errors import Denied

PARTS = (r"BEGIN NATS USER JWT-+\n[\w.-]+\n", rf"BEGIN USER NKEY SEED-+\n{NKEY_SEED}\n")


def options(settings: Settings) -> dict[str, Any]:
    """Arguments of `dial`, nats-py's among them. Reads the files that the settings name; raises `Denied`."""
    found: dict[str, Any] = {
        "user": settings.nats_user,
        "password": _plain(settings.nats_password),
        "token": _plain(settings.nats_token),
        "nkeys_seed_str": _plain(settings.nats_nkey_seed),
        "inbox_prefix": settings.nats_inbox_prefix,
        "user_credentials": settings.nats_credentials and credentials(settings.nats_credentials),
    }
    if settings.nats_tls_ca or settings.nats_tls_cert or settings.nats_tls_first:
        found["tls"] = tls_context(settings.nats_tls_ca, settings.nats_tls_cert, settings.nats_tls_key)
        found["tls_handshake_first"] = settings.nats_tls_first
        found["certified"] = settings.nats_tls_cert is not None
    return {name: value for name, value in found.items() if value is not None}


def tls_context(ca: Path | None, cert: Path | None, key: Path | None) -> ssl.SSLContext:
    """TLS 1.2 or later; the server's certificate and its name are always checked. Without `ca` by the system's CAs."""
    try:
        context = ssl.create_default_context(cafile=ca)
    except (OSError, ValueError) as error:
        raise _unusable("nats_tls_ca", ca, error) from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cert is not None:
        try:
            # With a passphrase, for a key that is encrypted: OpenSSL would ask the terminal for it, and wait.
            context.load_cert_chain(cert, key, password=lambda: "")
        except (OSError, ValueError) as error:
            raise _unusable("nats_tls_cert and nats_tls_key", cert, error) from error
    return context


def credentials(path: Path) -> UserString:
    """The content of a credentials file; nats-py would look for ever for a part that is not there."""
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        raise _unusable("nats_credentials", path, error) from error
    if not all(re.search(part, text) for part in PARTS):
        raise Denied(
            f"{path} is no NATS credentials file: a user's JWT or the seed of its nkey is missing",
            remedy="see the setting nats_credentials; nsc generate creds makes such a file",
        )
    return UserString(text)


def _unusable(name: str, path: Path | None, error: Exception) -> Denied:
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or "it is not what it should be"
    return Denied(f"{path or 'the list of authorities'} cannot be used: {reason}", remedy=f"see the setting {name}")


def _plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()
