"""Errors, sorted by whose fault they are: the application's event, the operator's configuration, the weather.

Every error says what is wrong and where, and carries its remedy. No IO, no imports from the package.
"""

from __future__ import annotations


class OutboxError(Exception):
    """Base of all errors of this package. `remedy` is the command or setting that settles it, or empty."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  remedy: {self.remedy}" if self.remedy else self.message

    @property
    def line(self) -> str:
        """The message and the remedy on one line, for what is told while the relay goes on."""
        return f"{self.message}; remedy: {self.remedy}" if self.remedy else self.message


def told(words: str) -> tuple[str, str]:
    """Message and remedy of an error that was written down as its `str`."""
    message, _, remedy = words.partition("\n  remedy: ")
    return message, remedy


class InvalidEvent(OutboxError, ValueError):
    """The application's event cannot be published as it is. Nothing was sent to the database."""


class Misconfigured(OutboxError):
    """The operator's configuration, or one of the two servers, does not fit. Retrying does not help."""


class Halt(OutboxError):
    """What was found contradicts what is known, and going on could lose or double events. A human must look."""


class Weather(OutboxError):
    """A server cannot be reached or cannot work now. Waited out for ever; spends no attempt."""


class Locked(Weather):
    """Somebody else holds a lock that is needed, for longer than may be waited: everybody behind would wait too."""


class Unusable(Weather):
    """A stream as it is now is in the way. It holds what is for it, loudly; only a new one is refused at the start."""


class Unsuited(Misconfigured):
    """The schema is of a version that this relay cannot work with. It stands by until a migration settles that."""


class Denied(Weather):
    """A server that is there does not take us as we are set up: credentials, TLS, names, grants, tables that are gone.

    At the start of a process it is refused; later, when something was renewed or taken away, it is waited out, loudly.
    """


class Deposed(OutboxError):
    """Another relay has taken the lead, or the session that held it is gone. Stand by again."""
