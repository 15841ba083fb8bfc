"""What the native core decides, as words and exceptions: the numbers are those of lock.h and crowd.h."""

from __future__ import annotations

from collections.abc import Callable

from .. import errors
from .._url import Url

DONE, WAIT, DIED, BROKEN, NOT_MINE, SELF, FULL, OVER, NO_KERNEL, CORRUPT, INHERITED, OUT = range(12)
PLAIN, TAKE, RECOVER = range(3)  # claims
UNIT, READ, WRITE, REPAIR, PARTY, LISTENER = range(1, 7)  # roles in a crowd
SLOTS = 1019

Fail = Callable[[int, str, int], BaseException]


def make_fail(url: Url | None, what: str) -> Fail:
    """The `fail` of one object: (verdict, operation, pid of the last owner) to the exception."""

    def fail(verdict: int, operation: str, pid: int) -> BaseException:
        match verdict:
            case 2:
                who = f"process {pid}" if pid else "its owner"
                return errors.OwnerDied(
                    f"the {what} is abandoned: {who} died while it held it",
                    url=url,
                    operation=operation,
                    hint="repair what it guards inside `with lock.recover():`",
                    pid=pid or None,
                )
            case 3:
                return errors.BrokenBarrier(
                    "a party died, gave up or aborted", url=url, operation=operation, hint="reset() makes it whole"
                )
            case 4:
                return errors.NotOwner(
                    f"this thread does not hold the {what}",
                    url=url,
                    operation=operation,
                    hint="who acquired it releases it",
                )
            case 5:
                return errors.Deadlock(
                    f"this thread holds the {what} itself, so it would wait for ever", url=url, operation=operation
                )
            case 6:
                return errors.ResourceLimit(
                    f"more than {SLOTS} at one {what}, or more than 250 held by one thread",
                    url=url,
                    operation=operation,
                )
            case 7:
                return ValueError(f"{what} released too many times")
            case 8:
                return errors.Unsupported(
                    "robust futexes are not to be had here",
                    url=url,
                    operation=operation,
                    hint="Linux with glibc has them",
                )
            case _:
                return errors.ProtocolError(f"the memory of the {what} is damaged", url=url, operation=operation)

    return fail
