"""What lets the relay into NATS, read from files: TLS certificates and credentials.

Read anew for each connection, so that what was renewed on disk is taken up. Raises `Denied`, and never asks a terminal.
"""

from __future__ import annotations

import re
import ssl
from collections import UserString
from pathlib import Path

from outbox.errors import Denied

SEED = r"SU[A-D][A-Z2-7]{55}"  # of a user's nkey
PARTS = (r"BEGIN NATS USER JWT-+\n[\w.-]+\n", rf"BEGIN USER NKEY SEED-+\n{SEED}\n")


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
