"""Locks between processes that `kill -9` does not lose: multiprocessing's classes, and what happens when an owner dies.

    with Lock("shm://orders-lock") as lock:      # by name, for whoever opens it; Lock() is passed to children
        ...

The owner's death is told within milliseconds to everyone who waits and everyone who comes: `OwnerDied`, *without* the lock, until
somebody repairs what it guards (`with lock.recover():`). `ipckit.aio` has the same names for event loops.

    ipckit._native   the robust mutex (lock.h) and all that is built over slots (crowd.h)
    _home.py         where they live: a file in memory by name, or a memfd without; how they reach children
    _verdict.py      what the native core decides, as exceptions
    lock_tasks.py    how tasks of an event loop wait; Lock and RLock for them
    crowd_tasks.py   the others for them

And memory that goes with the last who uses it: `Segment` (bytes by name, growing) and `Latest` (the newest value, never torn).

    _tenancy.py      who is attached, who is the last, who may change what a name leads to
    _files.py        the files they live in
    memory_tasks.py  the same for tasks of an event loop
"""

from .barrier import Barrier
from .condition import Condition
from .event import Event
from .latest import Latest
from .lock import Lock, RLock
from .rwlock import RWLock
from .segment import Segment
from .semaphore import BoundedSemaphore, Semaphore

__all__ = [
    "Barrier",
    "BoundedSemaphore",
    "Condition",
    "Event",
    "Latest",
    "Lock",
    "RLock",
    "RWLock",
    "Segment",
    "Semaphore",
]
