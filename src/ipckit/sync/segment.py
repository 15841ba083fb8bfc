"""`Segment`: named memory that processes share, as large as they like, gone with the last who uses it.

A segment is its bytes and a buffer: numpy, ctypes and memoryview see them where they lie. What has to happen in one step is
for a lock beside it (`Lock`), or for a `Latest`. Names, and who is the last: `_tenancy`.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .. import _native, errors
from .._options import size as read_size
from .._spi import Steps
from .._url import Url
from ..transports._runtime import memory_dir
from . import _home, _tenancy
from ._files import HEADER, Identity, check_memory, mapped_errors, open_thing, read_identity
from ._tenancy import Mode, Tenant

_MODES = ("create", "attach", "create-or-attach")


def checked(url: str | Url | None) -> Url:
    """Raises BadUrl, UnknownScheme, BadOption."""
    name = _home.name_of(url)
    if name is None:
        raise errors.BadUrl("it needs a name", hint="for example shm://frames")
    return name


def path_of(url: Url, suffix: str) -> Path:
    if url.hosts or not url.path:
        return memory_dir() / (url.name + suffix)
    return _home.path_of(url)


class SegmentCore(_native.Exporter):
    """What `Segment` is in both shells: everything that does not wait."""

    __slots__ = ("__weakref__", "_fd", "_file", "_identity", "_tenant", "readonly", "url")
    url: Url | None
    readonly: bool
    _tenant: Tenant | None
    _identity: Identity
    _fd: int  # of an anonymous one; -1
    _file: tuple[int, int]  # device and inode, which are not given to another file while it is mapped

    def _begin(self, readonly: bool) -> None:
        self.url, self.readonly, self._tenant, self._fd = None, readonly, None, -1

    def _adopt(self, fd: int, identity: Identity) -> None:
        """Show what lies there from now on. The descriptor stays the caller's."""
        access = mmap.ACCESS_READ if self.readonly else mmap.ACCESS_WRITE
        memory = mmap.mmap(fd, identity.size, access=access, offset=HEADER)
        found = os.fstat(fd)
        self._file, self._identity = (found.st_dev, found.st_ino), identity
        self._export(memory)

    def _opening(self, url: Url, size: int | str | None, mode: Mode | None, timeout: float | None) -> Steps[None]:
        wanted = None if size is None else size_of(size)
        mode = mode or ("attach" if wanted is None else "create-or-attach")
        if mode not in _MODES:
            raise errors.BadOption(f"mode is one of {', '.join(_MODES)}, not {mode!r}", url=url)
        if wanted is None and mode != "attach":
            raise errors.BadOption("a new segment needs a size", url=url)
        with mapped_errors(url, "open"):
            path = path_of(url, ".segment")
            tenant, fd, identity = yield from _tenancy.enter(url, path, mode, timeout, wanted or 0, lambda _: None)
            try:
                if wanted is not None and identity.size < wanted:
                    raise errors.BadOption(
                        f"the segment is there, with {identity.size} bytes", url=url, hint="attach, and resize() it"
                    )
                self._adopt(fd, identity)
            except BaseException:
                tenant.leave()
                raise
            finally:
                os.close(fd)
        self.url, self._tenant = url, tenant

    def _anonymous(self, size: int | str | None) -> None:
        if size is None:
            raise errors.BadOption("a new segment needs a size")
        with mapped_errors(None, "open"):
            wanted = size_of(size)
            check_memory(wanted)
            self._fd = os.memfd_create("ipckit-segment", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            identity = Identity(wanted, 1, os.urandom(16), time.time(), os.getpid())
            os.posix_fallocate(self._fd, 0, HEADER + wanted)
            os.pwrite(self._fd, identity.page(), 0)
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._adopt(self._fd, identity)

    @property
    def size(self) -> int:
        """Bytes of the generation that this object shows."""
        return self._shown().size

    @property
    def generation(self) -> int:
        """1, and one more with each `resize`: which of them this object shows."""
        return self._shown().generation

    def _shown(self) -> Identity:
        """Raises Closed where nothing was opened yet."""
        try:
            return self._identity
        except AttributeError:
            raise self._closed("look") from None

    @property
    def closed(self) -> bool:
        """Not attached: not yet, or not any more."""
        return self._tenant is None and self._fd < 0

    def _closed(self, operation: str) -> errors.Closed:
        return errors.Closed("this segment is not open", url=self.url, operation=operation)

    @property
    def buf(self) -> memoryview:
        """A view of the bytes. It stays good, also when the segment shows a newer generation or is closed.

        It frees its generation with itself; what was made from the segment directly keeps it until the segment object goes.
        Raises Closed.
        """
        if self.closed:
            raise self._closed("look")
        return self._view()

    @property
    def stale(self) -> bool:
        """Somebody has resized it: `refresh()` shows the newer generation. Also when the name was removed."""
        if self._tenant is None:
            return False
        try:
            found = os.stat(self._tenant.path, follow_symlinks=False)
        except OSError:
            return True
        return (found.st_dev, found.st_ino) != self._file

    def refresh(self) -> bool:
        """Show the newest generation from now on; whether that is another one. Views of the old one stay as they are."""
        if not self.stale or self._tenant is None:
            return False
        with mapped_errors(self.url, "refresh"):
            found = open_thing(self.url, self._tenant.path)
            if found is None:
                return False
            fd, identity = found
            try:
                if identity.series != self._identity.series:
                    return False  # our name was removed, and given to another segment
                self._adopt(fd, identity)
                return True
            finally:
                os.close(fd)

    def _resizing(self, size: int | str) -> Steps[None]:
        wanted = size_of(size)
        if self.closed:
            raise self._closed("resize")
        if self._tenant is None or self.url is None or self.readonly:
            raise errors.Unsupported(
                "this one cannot be resized", url=self.url, operation="resize", hint="named, writable ones can"
            )
        with mapped_errors(self.url, "resize"):
            yield from _tenancy.resize(self.url, self._tenant, self._identity, wanted)
        self.refresh()

    def _unlinking(self) -> Steps[None]:
        if self._tenant is not None and self.url is not None:
            with mapped_errors(self.url, "unlink"):
                yield from _tenancy.unlink(self.url, self._tenant, self._identity)

    def close(self) -> None:
        """Be attached no more; if nobody else is, the segment is gone. Idempotent; views that there are stay good."""
        tenant, self._tenant = self._tenant, None
        self._export(None)
        if tenant is not None:
            tenant.leave()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            os.close(self._fd)
            self._fd = -1

    def __reduce__(self) -> Any:
        if self._fd >= 0:
            return _home.rebuild, (type(self), _home.Passed(self, self._fd), self.readonly)
        if self.url is None:
            raise errors.Closed("this segment is closed", operation="pickle")
        return _attached, (type(self), self.url, self.readonly)

    @classmethod
    def _from_fd(cls, fd: int, readonly: bool) -> Self:
        self = cls.__new__(cls)
        self._begin(readonly)
        identity = read_identity(fd, os.fstat(fd).st_size)
        if identity is None:
            raise errors.ProtocolError("this is no segment", operation="attach")
        self._fd = fd
        self._adopt(fd, identity)
        return self

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.size} bytes, generation {self.generation}"
        return f"<{type(self).__name__} {self.url or 'anonymous'}: {state}>"


def _attached(cls: Any, url: Url, readonly: bool) -> Any:
    self = cls.__new__(cls)
    self._begin(readonly)
    _tenancy.drive(self._opening(url, None, "attach", 0), url, "attach", _tenancy.CONTENTION)
    return self


def size_of(size: int | str) -> int:
    if isinstance(size, str):
        try:
            size = read_size(size)
        except ValueError as error:
            raise errors.BadOption(f"size= is {error}") from None
    if not isinstance(size, int):
        raise errors.BadOption(f"a size is a number of bytes, or text as '64MiB', not {size!r}")
    if not 0 < size < 1 << 62:
        raise errors.BadOption("a segment has one byte or more")
    return size


class Segment(SegmentCore):
    """Shared memory by name, or anonymous, with the buffer protocol: `numpy.frombuffer(segment, ...)`, `T.from_buffer(segment)`.

    It lives as long as somebody is attached: after the last `close()`, exit or `kill -9` nothing is there any more, and the next
    to create it begins with zeros. Nothing needs a server or multiprocessing's resource tracker. The file is 0600, its first byte
    lies at the start of a page, and memory is allocated before anybody sees it (no SIGBUS).

    Args:
        url: `shm://name`, `shm:///a/path`; None: anonymous, passed to children as an argument of Process.
        size: bytes, or "64MiB". One that is there may be larger.
        mode: "create" (AddressInUse if it is there), "attach" (NotFound if not), "create-or-attach".
            Default: "attach" without a size, else "create-or-attach".
        timeout: seconds to wait for somebody to create it (attach). None: for ever.
        readonly: this object's views cannot be written.

    Raises: AddressInUse, NotFound, BadOption, AccessDenied, ResourceLimit (not enough memory).
    """

    __slots__ = ()

    def __init__(
        self,
        url: str | Url | None = None,
        size: int | str | None = None,
        mode: Mode | None = None,
        *,
        timeout: float | None = 0,
        readonly: bool = False,
    ) -> None:
        self._begin(readonly)
        if url is None:
            self._anonymous(size)
            return
        name = checked(url)
        _tenancy.drive(self._opening(name, size, mode, timeout), name, "open", _tenancy.patience(timeout))

    def resize(self, size: int | str, timeout: float | None = None) -> None:
        """Replace it by a generation of this size that begins with the same bytes (what is new is zero), and show that.

        The others see it when they ask (`stale`, `refresh()`). What somebody writes into the old generation from now on
        is not in the new one: hold the lock that guards the segment. Waits `timeout` seconds for others who are
        resizing. Raises: Timeout, NotFound (the name was removed), Unsupported (anonymous), ResourceLimit.
        """
        _tenancy.drive(self._resizing(size), self.url, "resize", timeout)

    def unlink(self, timeout: float | None = None) -> None:
        """Remove the name now. Whoever is attached stays so; the next to open the name makes a new segment."""
        _tenancy.drive(self._unlinking(), self.url, "unlink", timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()
