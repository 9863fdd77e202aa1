"""What nobody may read in a log, on a screen or in an error: passwords and tokens within URLs and connection strings.

Pure. For text that a setting or a server gave; where it cannot tell, it hides too much.
"""

from __future__ import annotations

import re

MASK = "***"
_SECRETS = "password|sslpassword|oauth_client_secret|scram_client_key|scram_server_key"
_USER_INFO = re.compile(r"(?P<scheme>\w+)://(?P<info>[^\s/]*)@")
_IN_QUERY = re.compile(rf"([?&](?:{_SECRETS})=)[^&\s]*", re.IGNORECASE)
_IN_WORDS = re.compile(rf"(?<![?&\w])((?:{_SECRETS})\s*=\s*)(?:'(?:\\.|[^'\\])*'?|(?:\\.|[^\s\\])+)", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with every password in it replaced; a user without a password is a token, but in a PostgreSQL URL."""
    text = _USER_INFO.sub(_without_password, text)
    return _IN_WORDS.sub(rf"\1{MASK}", _IN_QUERY.sub(rf"\1{MASK}", text))


def _without_password(found: re.Match[str]) -> str:
    user, colon, _ = found["info"].partition(":")
    if colon:
        return f"{found['scheme']}://{user}:{MASK}@"
    return found[0] if found["scheme"].startswith("postgres") else f"{found['scheme']}://{MASK}@"
