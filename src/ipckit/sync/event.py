"""`Event`: a flag that processes wait for."""

from __future__ import annotations

from typing import Any, Self

from .. import _native
from .._url import Url
from . import _home
from ._verdict import make_fail


class Event(_native.Crowd):
    """A flag between threads and processes. Who waits when it is set is let go, even if it is cleared at once.

    Args:
        url: `shm://name`, or None: passed to children.
    """

    __slots__ = ("__weakref__", "url")
    url: Url | None

    def __new__(cls, url: str | Url | None = None) -> Self:
        name = _home.name_of(url)
        return cls._from_fd(_home.opened(name, _home.EVENT), name)

    @classmethod
    def _from_fd(cls, fd: int, url: Url | None) -> Self:
        make, fail = super().__new__, make_fail(url, "Event")
        self: Self = _home.build(lambda fd: make(cls, fd, _home.EVENT, fail), fd, url)
        self.url = url
        return self

    def is_set(self) -> bool:
        return self._event_is_set()

    def set(self) -> None:
        self._event_set()

    def clear(self) -> None:
        self._event_clear()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it was set within `timeout` seconds (None: wait for it)."""
        return self._event_wait(timeout)

    def unlink(self) -> None:
        """Remove the name; see `Lock.unlink`."""
        _home.unlink(self.url)

    def __reduce__(self) -> Any:
        if self.url is not None:
            return type(self), (self.url.reveal(),)
        return _home.rebuild, (type(self), _home.Passed(self, self._fd), None)

    def __repr__(self) -> str:
        return f"<Event {self.url or 'anonymous'}: {'set' if self.is_set() else 'clear'}>"
