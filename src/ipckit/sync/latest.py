"""`Latest`: the newest value, for any number of readers. Nobody waits for anybody, and nobody sees half of it.

    position = Latest("shm://position", Pose)       one writes:  position.write(pose)
                                                    many read:   position.read()

A value goes into one of four slots and is then published by its number (_native/latest.h), so a writer that is killed half-way
leaves the one before it. Who writes is settled by a lock that the kernel takes back from the killed. Where it lives: `_tenancy`.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, Self, TypeVar, cast, overload
from weakref import WeakSet

from .. import _native, codecs, errors
from .._spi import Buffer, Steps
from .._url import Url
from . import _tenancy
from ._files import HEADER, Identity, mapped_errors
from ._tenancy import Tenant
from .segment import checked, path_of, size_of

T = TypeVar("T")
_ROOM = 4096  # bytes for values that are encoded, unless size= says otherwise


class Shape(NamedTuple):
    """How values become bytes.

    Attributes:
        room: bytes of the largest.
        fixed: all have as many.
    """

    room: int
    fixed: bool
    encode: Callable[[Any], Any]
    decode: Callable[[bytes], Any]


def shape_of(of: Any, size: int | str | None) -> Shape:
    """What the second argument of Latest means. Raises BadOption."""
    if isinstance(of, (int, str)):
        if size is not None:
            raise errors.BadOption("size= is for types whose values are encoded")
        return Shape(size_of(of), False, _as_it_is, _as_it_is)
    layout = isinstance(of, type) and hasattr(of, "from_buffer_copy")
    if not layout and not hasattr(of, "itemsize"):
        codec = codecs.choose(None, of)
        return Shape(_ROOM if size is None else size_of(size), False, codec.encode, codec.decode)
    if size is not None:
        raise errors.BadOption("its values have their own size: leave size= out")
    if layout:
        return Shape(size_of(ctypes.sizeof(of)), True, _as_it_is, of.from_buffer_copy)
    import numpy

    dtype = numpy.dtype(of)
    if dtype.hasobject:
        raise errors.BadOption("a dtype with objects cannot be shared: they are addresses in this process")
    base, shape = dtype.subdtype or (dtype, ())  # an array of so many rows and columns is one value
    return Shape(
        size_of(dtype.itemsize),
        True,
        lambda value: numpy.asarray(value, base).tobytes(),
        lambda data: numpy.frombuffer(data, base).reshape(shape)[()],
    )


def _as_it_is(value: Any) -> Any:
    return value


_writing: WeakSet[Latest[Any]] = WeakSet()


def _forked() -> None:
    """The parent writes, not the child: which must not keep the lock from its successor either."""
    for each in tuple(_writing):
        each._give_up_writing()


os.register_at_fork(after_in_child=_forked)


class Latest(_native.Latest, Generic[T]):
    """The newest of a series of values, by name. `read()` and `write(value)` never wait.

    It lives as long as somebody is attached, reader or writer; after the last one nothing is left. One process at a time
    writes: the first to do so, until it closes or ends, however it ends.

    Args:
        url: `shm://name`, `shm:///a/path`.
        of: what the values are. A number ("64KiB"): bytes, up to so many. A ctypes type, a numpy dtype: these, as they lie in
            memory. Any other type that a Channel takes for `type=` (Struct, dataclass, ...): MessagePack, validated on reading.
        size: bytes of the largest value where they are encoded; default 4096. The memory is four times that.

    Raises: BadOption (it is there, for values of another size), AccessDenied, ResourceLimit.
    """

    __slots__ = ("__weakref__", "_identity", "_of", "_shape", "_size", "_tenant", "_writer_fd", "url")
    url: Url
    _tenant: Tenant
    _identity: Identity
    _shape: Shape
    _of: Any
    _size: int | str | None
    _writer_fd: int

    @overload
    def __new__(cls, url: str | Url, of: int | str) -> Latest[bytes]: ...
    @overload
    def __new__(cls, url: str | Url, of: type[T], *, size: int | str | None = None) -> Latest[T]: ...
    @overload
    def __new__(cls, url: str | Url, of: Any, *, size: int | str | None = None) -> Latest[Any]: ...
    def __new__(cls, url: str | Url, of: Any, *, size: int | str | None = None) -> Latest[Any]:
        name = checked(url)
        return _tenancy.drive(opening(name, of, size), name, "open", _tenancy.CONTENTION)

    @classmethod
    def _opening(cls, url: Url, shape: Shape) -> Steps[Self]:
        room = _native.latest_bytes(shape.room)
        if not room:
            raise errors.BadOption("1 TiB is the largest value", url=url)
        with mapped_errors(url, "open"):
            path = path_of(url, ".latest")

            def fill(fd: int) -> None:
                _native.latest_format(_map(fd, room), shape.room)

            tenant, fd, identity = yield from _tenancy.enter(url, path, "create-or-attach", 0, room, fill)
            try:
                if identity.size != room:
                    raise errors.BadOption("it is there, for values of another size", url=url)
                try:
                    self: Self = super().__new__(cls, _map(fd, room))
                except ValueError as error:
                    raise errors.ProtocolError(f"what is there cannot be used: {error}", url=url) from None
            except BaseException:
                tenant.leave()
                raise
            finally:
                os.close(fd)
        self.url, self._tenant, self._shape = url, tenant, shape
        self._identity, self._writer_fd = identity, -1
        return self

    # -- called by the core

    def _claim(self) -> None:
        """Become the one who writes, until close(), exit or death."""
        self._give_up_writing()
        # A descriptor with locks of its own: a copy of the tenant's would share them with forked children. It is ours before it
        # is locked, so that a child that another thread forks meanwhile gives it back.
        _writing.add(self)
        self._writer_fd = os.open(f"/proc/self/fd/{self._tenant.lock}", os.O_RDWR | os.O_CLOEXEC)
        if not _tenancy.try_record(self._writer_fd, _tenancy.WRITER):
            self._give_up_writing()
            who = self._writer()
            raise errors.AddressInUse(
                f"another one writes ({f'process {who}' if who else 'it has just begun'})",
                url=self.url,
                operation="write",
                hint="one at a time: it must close() or end",
            )

    def _give_up_writing(self) -> None:
        fd, self._writer_fd = self._writer_fd, -1
        if fd >= 0:
            os.close(fd)

    def _trouble(self, what: str, detail: int) -> NoReturn:
        if what == "closed":
            raise errors.Closed("this Latest is closed", url=self.url)
        if what == "large":
            raise errors.MessageTooLarge(
                f"the value has {detail} bytes, there is room for {self._shape.room}", url=self.url, operation="write"
            )
        raise errors.ProtocolError("its memory is damaged", url=self.url, operation="read")

    # -- for everybody

    if TYPE_CHECKING:

        def read(self) -> T | None:
            """The newest value, and `seen` is its number; None: there is none yet."""

        def write(self, value: T) -> int:
            """Make this the newest value; its number. Raises AddressInUse (another process writes), MessageTooLarge."""

        def read_into(self, buffer: Buffer) -> int | None:
            """The bytes of the newest value into a buffer; how many they were. Raises ValueError if it is too small."""

    def wait(self, timeout: float | None = None, newer_than: int | None = None) -> T:
        """The newest value as soon as it is newer than what was read last (or than a number). Raises Timeout, Closed.

        Values that came in between are passed over. Ctrl-C ends the wait.
        """
        if not self._await(above(self._seen, newer_than), timeout):
            raise no_news(self.url, timeout)
        return cast("T", self.read())

    @property
    def size(self) -> int:
        """Bytes of the largest value."""
        return self._shape.room

    @property
    def number(self) -> int:
        """Of the newest value, counted from 1; 0: none yet. What this object has not read is `number - seen`."""
        return self._number()

    @property
    def seen(self) -> int:
        """The number of the value that this object read last; 0: none."""
        return self._seen

    def writer(self) -> int | None:
        """The process that may write now: whoever wrote first and has not ended. None: the next to write."""
        self._number()  # raises Closed
        fd = os.open(f"/proc/self/fd/{self._tenant.lock}", os.O_RDWR | os.O_CLOEXEC)
        try:
            return self._writer() if _tenancy.record_is_held(fd, _tenancy.WRITER) else None
        finally:
            os.close(fd)

    def unlink(self) -> None:
        """Remove the name now. Whoever is attached stays so; the next to open the name makes a new one."""
        with mapped_errors(self.url, "unlink"):
            removing = _tenancy.unlink(self.url, self._tenant, self._identity)
            _tenancy.drive(removing, self.url, "unlink", _tenancy.CONTENTION)

    def close(self) -> None:
        """Be attached no more, and let another one write; if nobody else is attached, the values are gone. Idempotent."""
        self._let_go()
        self._give_up_writing()
        self._tenant.leave()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # it never was
            self._give_up_writing()

    def __reduce__(self) -> Any:
        return _reopen, (self.url, self._of, self._size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._tenant.lock < 0 else f"value {self._number()}"
        return f"<{type(self).__name__} {self.url}: {state}>"


class _Typed(Latest[T]):
    """A Latest whose values are not bytes."""

    __slots__ = ()

    def read(self) -> T | None:
        data = _native.Latest.read(self)
        return None if data is None else cast("T", self._shape.decode(data))

    def write(self, value: T) -> int:
        data = self._shape.encode(value)
        if self._shape.fixed and memoryview(data).nbytes != self._shape.room:
            raise errors.CodecError(f"this is no value of {self._shape.room} bytes", url=self.url, operation="write")
        return _native.Latest.write(self, data)


def opening(url: Url, of: Any, size: int | str | None) -> Steps[Latest[Any]]:
    """The steps to an open Latest, of either shell."""
    shape = shape_of(of, size)
    cls: type[Latest[Any]] = Latest if shape.decode is _as_it_is else _Typed
    self: Latest[Any] = yield from cls._opening(url, shape)
    self._of, self._size = of, size
    return self


def above(seen: int, newer_than: int | None) -> int:
    """What the awaited number has to be larger than."""
    if newer_than is None:
        return seen
    if not 0 <= newer_than < 2**64:
        raise ValueError("newer_than is the number of a value, or 0")
    return newer_than


def no_news(url: Url, timeout: float | None) -> errors.Timeout:
    return errors.Timeout(f"no newer value within {timeout or 0:g} s", url=url, operation="wait")


def _reopen(url: Url, of: Any, size: int | str | None) -> Latest[Any]:
    return Latest(url, of, size=size)


def _map(fd: int, size: int) -> memoryview:
    return memoryview(mmap.mmap(fd, size, offset=HEADER))
