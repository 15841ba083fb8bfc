"""Where an object lives, by the scheme of its URL: in our own shared memory, or with somebody else who keeps such things.

    Lock("shm://orders")              here: None
    Lock("redis://host/orders")       a transport that grants leases (`_leasing.Leases`), whichever has this scheme
    Semaphore(2, "posix+sem://pool")  the operating system: a module of the table below

The classes ask here when they are made, and hand the rest over. Nothing is imported before its scheme is used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .. import _registry, errors
from .._leasing import Leases
from .._url import Url, parse
from . import _home

#: Semaphores of the operating system, which are no transport.
_SEMAPHORES = {"posix+sem": (".posix", "posix_ipc", "mq")}  # our module, the module that it needs, the extra with that


def _is_here(url: str | Url | None) -> bool:
    return url is None or parse(url).scheme == _home.SCHEME


def semaphore(url: str | Url | None) -> Any:
    """The module that makes semaphores at this URL; None: we do. Raises UnknownScheme."""
    if _is_here(url):
        return None
    where = parse(url or "")
    if where.scheme not in _SEMAPHORES:
        raise errors.UnknownScheme(
            f"no semaphore lives at {where.scheme}://",
            url=where,
            hint=f"for example {_home.SCHEME}://pool or {next(iter(_SEMAPHORES))}://pool",
        )
    module, needs, extra = _SEMAPHORES[where.scheme]
    if find_spec(needs) is None:
        raise errors.MissingDependency(
            f"{where.scheme}:// needs the module {needs!r}, which is not installed",
            url=where,
            hint=f'from the checkout: pip install ".[{extra}]"',
        )
    return import_module(module, __package__)


def lock(url: str | Url | None, on_owner_died: str, *, tasks: bool = False) -> Any:
    """The class of locks that brokers keep, for threads or for tasks; None: we keep this one.

    Raises: UnknownScheme, Unsupported, BadOption.
    """
    if _is_here(url):
        return None
    where = parse(url or "")
    transport = _registry.find(where)
    if not isinstance(transport, Leases):
        raise errors.Unsupported(
            "this transport keeps no locks", url=where, hint="`ipckit.capabilities(url).locks` says which do"
        )
    _home.check_on_owner_died(on_owner_died, where)  # whichever: a broker grants what a dead holder had
    if tasks:
        from .leasedtasks import AsyncLeasedLock

        return AsyncLeasedLock
    from .leased import LeasedLock

    return LeasedLock
