"""Interceptors, around a call at the client and around a handler at the server: `interceptor(call, proceed)`.

One returns what `proceed()` returns, or something in its place, or raises. Among them may be coroutine functions, from
a loop: then `proceed()` is to be awaited, and the handler runs as a task, or on a thread that a task waits for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from .. import errors

#: The first is the outermost.
Interceptors = Sequence[Callable[[Any, Callable[[], Any]], Any]]


def checked(interceptors: Interceptors) -> Interceptors:
    """Raises BadOption."""
    for each in interceptors:
        if not callable(each):
            raise errors.BadOption(f"{each!r} is no interceptor: it cannot be called")
    return tuple(interceptors)


def to_be_awaited(interceptors: Interceptors) -> bool:
    """A coroutine function is among them."""
    return any(
        inspect.iscoroutinefunction(each) or inspect.iscoroutinefunction(type(each).__call__) for each in interceptors
    )


async def settled(value: Any) -> Any:
    """What a handler or an interceptor returned, once it has been awaited if it is to be."""
    return await value if inspect.isawaitable(value) else value


async def awaited(proceed: Callable[[], Any]) -> Any:
    """`proceed()`, to be awaited whatever it returns: streams are not awaitable by themselves."""
    return await settled(proceed())


def around(interceptors: Interceptors, call: Any, proceed: Callable[[], Any]) -> Callable[[], Any]:
    for each in reversed(interceptors):
        proceed = _one_around(each, call, proceed)
    return proceed


def _one_around(
    interceptor: Callable[[Any, Callable[[], Any]], Any], call: Any, proceed: Callable[[], Any]
) -> Callable[[], Any]:
    return lambda: interceptor(call, proceed)
