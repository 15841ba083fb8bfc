"""The contract between the transports whose brokers keep locks, and `ipckit.sync`: what `_spi` is to messages.

A lock is granted for the time of a *lease*, and with a *token* that is larger than those of all grants before. Steps, closing and
threads are as in `_spi`. It stands by itself because `import ipckit` needs none of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Protocol

from ._spi import OptionsT, Steps
from ._url import Url


class Grant(NamedTuple):
    """A lock, for the time of a lease.

    Attributes:
        token: larger than that of every grant before it.
        since: `LeaseTerms.clock()` before the request was sent that got it: the lease ends `lease` seconds later, or after that.
        inherited: the one before did not give it back.
    """

    token: int
    since: float
    inherited: bool


class Holder(NamedTuple):
    """Who has a lock, as the broker tells it.

    Attributes:
        who: machine and process, as that process wrote it (HOST-PID).
        token: of its grant.
        remaining: seconds until its lease ends unless it renews it; None where the broker does not say.
    """

    who: str
    token: int
    remaining: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseTerms:
    """What every lease of a lock object has: seconds, whose it is, and the clock (seconds) that it is measured by."""

    lease: float
    who: str
    clock: Callable[[], float]


class Leasing(Protocol):
    """One lock at a broker. Who asks for it goes by an id that nobody else has: 32 hexadecimal digits, of which the first 16
    are the same at every call, and the others are new for every `take`.

    One caller at a time. Steps that are closed or timed out leave nothing behind: what was granted to the id, or still will be,
    is given back as soon as the broker can be reached; at the latest its lease runs out.
    """

    @property
    def native(self) -> Any: ...

    def take(self, id: str, wait: bool) -> Steps[Grant | None]:
        """The lock. None: somebody else has it, and `wait` is false. Raises NothingListening without a broker in time."""

    def renew(self, id: str) -> Steps[float | None]:
        """A new lease from now on: the clock before the request was sent. None: it is not ours any more."""

    def give_back(self, id: str) -> Steps[bool]:
        """Whether it was ours until now."""

    def withdraw(self, id: str) -> None:
        """`give_back` that never waits, for whoever does not want to hear of it."""

    def holder(self) -> Steps[Holder | None]: ...

    def close(self) -> None: ...

    def abandon(self) -> None:
        """As `Abandoning.abandon`."""


class Leases(ABC, Generic[OptionsT]):
    """Mixed into a Transport whose broker keeps locks. Capability `locks`."""

    lease_options: ClassVar[type[Any]]

    @abstractmethod
    def leasing(self, url: Url, options: OptionsT, terms: LeaseTerms) -> Steps[Leasing]: ...
