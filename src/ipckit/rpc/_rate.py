"""How much a client may ask for: a bucket of tokens, filled at a steady rate. The clock is the caller's."""

from __future__ import annotations


class Bucket:
    """`burst` requests at once, `rate` a second in the long run."""

    __slots__ = ("_burst", "_rate", "_since", "_tokens")

    def __init__(self, rate: float, burst: float) -> None:
        self._rate = rate
        self._burst = self._tokens = burst
        self._since: float | None = None

    def take(self, now: float) -> float:
        """Take a token: 0. Or there is none: the seconds until there is."""
        if self._since is not None:
            self._tokens = min(self._burst, self._tokens + (now - self._since) * self._rate)
        self._since = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return (1 - self._tokens) / self._rate
