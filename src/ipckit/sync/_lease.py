"""What one object knows of the lock that it has for the time of a lease, and the steps by which it gets and keeps it.

`Lease` is the knowledge, without I/O: it goes by our own clock, and counts from *before* each request was sent, so it ends here
before it ends at the broker. Once lost it stays lost: who was stopped for longer than the lease learns it from its own clock,
whatever the broker would say. `Holding` are the verbs, as steps over a transport's `Leasing`; the shells are in `leased`.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import _options, _registry, errors
from .._leasing import Grant, Leases, LeaseTerms, Leasing
from .._options import flag, option
from .._spi import Steps
from .._url import Url

#: Our clock may run slower than the broker's by this much of a lease.
DRIFT = 0.01
#: Of the lease, after which it is renewed, and then again if that failed.
RENEW_AFTER, RETRY_AFTER = 1 / 3, 1 / 12
_MESSAGES_ONLY = {"limit", "window"}


def _lease(text: str) -> float:
    seconds = _options.duration(text)
    if not 0.1 <= seconds <= 86400:
        raise ValueError("a duration from 100ms to 1d")
    return seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseOptions:
    """What the URL of every such lock takes."""

    lease: float = option(10.0, _lease, "how long a holder that says nothing more keeps the lock")
    renew: bool = option(True, flag, "renewed in the background while it is held; 0: by lock.renew() only")


def read(url: Url) -> tuple[Leases[Any], LeaseOptions, Any]:
    """The transport and both kinds of options. Raises BadOption, MissingDependency."""
    transport = _registry.open_transport(url, frozenset({"locks"}))
    assert isinstance(transport, Leases)
    for name, _ in url.options:
        if name in _MESSAGES_ONLY:
            raise errors.BadOption(f"{name!r} is for messages, and a lock has none", url=url)
    return transport, *_options.read_both(LeaseOptions, transport.lease_options, url)


def clock() -> float:
    """Seconds, also those that the machine slept: the broker's went on."""
    return time.clock_gettime(_CLOCK)


_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def new_object() -> str:
    """The half of the ids that an object keeps."""
    return os.urandom(8).hex()


class Lease:
    """See the module. `id` is set while it is held, lost or not."""

    __slots__ = ("_clock", "_ends", "_lost", "due", "id", "inherited", "seconds", "token")

    def __init__(self, seconds: float, clock: Callable[[], float] = clock) -> None:
        self.seconds = seconds
        self._clock = clock
        self._ends = 0.0
        self._lost = False
        self.due = 0.0  # when it should be renewed
        self.id: str | None = None
        self.token: int | None = None
        self.inherited = False

    def granted(self, id: str, grant: Grant) -> bool:
        """Whether it came in time: an answer may be on its way for longer than the lease."""
        if self._clock() >= self._end(grant.since):
            return False
        self.id, self.token, self.inherited, self._lost = id, grant.token, grant.inherited, False
        self._prolong(grant.since)
        return True

    def renewed(self, since: float | None) -> None:
        """`since`: as of `Leasing.renew`."""
        if since is None:
            self._lost = True
        elif not self.lost:
            self._prolong(since)

    def not_renewed(self) -> None:
        """Nobody knows: it is due again soon."""
        self.due = self._clock() + self.seconds * RETRY_AFTER

    def _prolong(self, since: float) -> None:
        self._ends = max(self._ends, self._end(since))
        self.due = since + self.seconds * RENEW_AFTER

    def _end(self, since: float) -> float:
        return since + self.seconds * (1 - DRIFT)

    @property
    def remaining(self) -> float:
        """Seconds that are certain; 0 when it is lost, or not held."""
        return 0.0 if self.id is None or self.lost else max(self._ends - self._clock(), 0.0)

    @property
    def lost(self) -> bool:
        """The last hold came to an end before it was given back."""
        if self.id is not None and not self._lost and self._clock() >= self._ends:
            self._lost = True
        return self._lost

    def ended(self) -> None:
        self.id = None
        self.token = None
        self._ends = 0.0


class Holding:
    """The verbs of a lock object. One caller at a time."""

    def __init__(self, leasing: Leasing, lease: Lease, url: Url, object_id: str) -> None:
        self.leasing, self.lease = leasing, lease
        self._url, self._object = url, object_id

    def acquire(self, wait: bool) -> Steps[bool]:
        while True:
            id = self._object + os.urandom(8).hex()
            try:
                grant = yield from self.leasing.take(id, wait)
            except errors.Timeout:
                return False
            if grant is None:
                return False
            if self.lease.granted(id, grant):
                return True
            self.leasing.withdraw(id)

    def renew(self) -> Steps[bool]:
        """Whether it is held for another lease now. Raises Timeout: nobody knows yet."""
        lease = self.lease
        if lease.id is None or lease.lost:
            return False
        try:
            lease.renewed((yield from self.leasing.renew(lease.id)))
        except errors.IpcError:
            lease.not_renewed()
            raise
        return not lease.lost

    def release(self) -> Steps[None]:
        """Give it back. Raises LeaseLost unless the broker says that it was ours until now."""
        lease = self.lease
        id, token, lost = lease.id, lease.token, lease.lost
        assert id is not None
        lease.ended()
        if lost:
            self.leasing.withdraw(id)  # perhaps the broker has not noticed yet
            raise self.lost_error(token, "release")
        try:
            ours = yield from self.leasing.give_back(id)
        except errors.Timeout as timeout:
            lease.renewed(None)
            raise errors.LeaseLost(
                "the broker could not be reached before the lease ran out: nobody can say whether it was kept until then",
                url=self._url,
                operation="release",
                token=token,
            ) from timeout
        if not ours:
            lease.renewed(None)
            raise self.lost_error(token, "release")

    def lost_error(self, token: int | None, operation: str) -> errors.LeaseLost:
        return errors.LeaseLost(
            f"the lease (token {token}) was lost while the lock was held; somebody else may have it since",
            url=self._url,
            operation=operation,
            hint="what was done since then may collide, unless what it touched checks lock.token",
            token=token,
        )


def terms(options: LeaseOptions) -> LeaseTerms:
    return LeaseTerms(lease=options.lease, who=f"{socket.gethostname()[:60]}-{os.getpid()}", clock=clock)
