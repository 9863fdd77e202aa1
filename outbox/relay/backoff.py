"""Back-off as a value: how long to wait before the next attempt, growing, with jitter, for ever.

Pure: randomness and clock come in as arguments.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Delays in seconds: `first`, then doubled up to `longest`; each is shortened by up to half, by chance."""

    first: float = 0.05
    longest: float = 2.0
    failures: int = 0

    def delay(self, chance: float) -> float:
        """The wait after this failure, in seconds; `chance` is from 0 to 1."""
        if self.failures == 0:
            return 0.0
        full = min(self.longest, self.first * 2.0 ** min(self.failures - 1, 30))
        return full * (1 - chance / 2)

    def failed(self) -> Backoff:
        """After one more failure."""
        return Backoff(first=self.first, longest=self.longest, failures=self.failures + 1)

    def reset(self) -> Backoff:
        """After a success."""
        return Backoff(first=self.first, longest=self.longest)
