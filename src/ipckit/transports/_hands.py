"""Where a message is while a receiver works on it: in a file, so that `kill -9` leaves it there and somebody else finds it.

The kernel forgets a message in the instant in which it is received. So it is received *into* a file: each receiver maps its
`hand`, and the kernel's copy lands in a free slot of it. Who dies or closes with something in hand leaves the file behind,
without the `flock` that said it was held; whoever finds it takes it over, messages and all. To acknowledge is to write one zero.

    NAME.d/        0700, of one queue
      lock         everybody holds it shared; who gets it alone is the first or the last one here
      queue        fifo only: the FIFO itself
      *.hand       held messages. Without a lock: anybody's; with @NS in its name: from that time on (a delayed nack)
      *.body       one large message, on its way: the kernel's queue holds its name. Unsent, its maker dead: becomes a hand
      *.draft      being written; its maker dead: refuse

A file is a page of header and slots of one size. No file is written by two at once. docs/wire/kernel-queues.md draws it.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .. import _native, errors
from .._spi import Steps, Wait
from .._url import Url
from . import _kernelwire as wire
from . import _owner

MAGIC, VERSION = b"IPKH", 1
_FILE = struct.Struct(">4sBBHI")  # magic, version, sent (of a body), 0, bytes of a slot
_SENT_AT = 5
_SLOT = struct.Struct(">II")  # turn in which it was taken, times it was handed out; then the record
_FIRST = 4096  # where slots begin
_CHUNK = 8  # slots by which a hand grows
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC
_POLLED = 0.1  # seconds between looks where no watch over the directory is to be had
_SOON, _TRIES = 0.005, 20  # seconds, until a lock is free whose holder has just been heard to go


class Place:
    """The directory of one queue, and our presence in it. One for each endpoint."""

    def __init__(self, path: Path, lock: int, alone: bool) -> None:
        self.path = path
        self.alone = alone  # when we came
        self._lock = lock
        self._prefix = _owner.fresh_name()
        self._count = itertools.count(1)

    def fresh(self) -> str:
        return f"{self._prefix}.{next(self._count)}"

    def files(self, suffix: str) -> Iterator[str]:
        with os.scandir(self.path) as entries:
            names = sorted(entry.name for entry in entries if entry.name.endswith(suffix))
        return iter(names)

    def write(self, record: bytes, again: int, due: int | None, suffix: str) -> str:
        """One message as a file of its own, which appears whole. Returns its name."""
        stem = self.fresh()
        name = (stem if due is None else f"{stem}@{due}") + suffix
        draft = self.path / f"{stem}.draft"
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
        try:
            head = _FILE.pack(MAGIC, VERSION, 0, 0, _SLOT.size + len(record)).ljust(_FIRST, b"\0")
            data = memoryview(b"".join((head, _SLOT.pack(0, again), record)))
            while data:
                data = data[os.write(fd, data) :]
            os.rename(draft, self.path / name)
        except BaseException:
            self.remove(draft.name)
            raise
        finally:
            os.close(fd)
        return name

    def mark_sent(self, name: str) -> None:
        """Its name is in the kernel's queue. It may have been received, and renamed or removed, already."""
        with suppress(FileNotFoundError):
            fd = os.open(self.path / name, os.O_WRONLY | _FLAGS)
            try:
                os.pwrite(fd, b"\1", _SENT_AT)
            finally:
                os.close(fd)

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.path / name)

    def sweep(self, emptied: bool) -> None:
        """See to what the dead left. `emptied`: the kernel's queue was made anew, so it holds no names of bodies."""
        for name in self.files(".draft"):
            if _dead(name):
                self.remove(name)
        for name in self.files(".body"):
            if emptied or (_dead(name) and not self._sent(name)):
                with suppress(FileNotFoundError):
                    os.rename(self.path / name, self.path / f"{name.removesuffix('.body')}.hand")

    def _sent(self, name: str) -> bool:
        try:
            fd = os.open(self.path / name, os.O_RDONLY | _FLAGS)
        except FileNotFoundError:
            return True
        try:
            return os.pread(fd, 1, _SENT_AT) == b"\1"
        finally:
            os.close(fd)

    @property
    def holds_messages(self) -> bool:
        return any(name.endswith((".hand", ".body")) for name in os.listdir(self.path))

    def last_one(self) -> bool:
        """Whether nobody else is here; then nobody comes in until `leave`. Our presence may end with the question."""
        return _try_lock(self._lock, fcntl.LOCK_EX)

    def clear(self) -> None:
        """Remove it all. For the last one."""
        with suppress(OSError):  # a stranger's file: then it stays
            for name in os.listdir(self.path):
                if name != "lock":
                    self.remove(name)
            self.remove("lock")
            os.rmdir(self.path)

    def leave(self) -> None:
        os.close(self._lock)


def enter(url: Url, path: Path) -> Steps[Place]:
    """Be present. Waits while the last one is leaving."""
    while True:
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
        found = os.lstat(path)
        if found.st_uid != os.geteuid() or found.st_mode & 0o170077 != 0o040000:
            raise errors.AccessDenied(f"{path} is no directory of ours alone", url=url)
        try:
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
        except FileNotFoundError:
            continue  # removed between two lines of ours
        try:
            alone = _try_lock(lock, fcntl.LOCK_EX)
            if (alone or _try_lock(lock, fcntl.LOCK_SH)) and _is_at(lock, path / "lock"):
                return Place(path, lock, alone)
            os.close(lock)
        except BaseException:
            os.close(lock)
            raise
        yield Wait((), 0.001)


def share(place: Place) -> bool:
    """Let others in, if we were alone. False: somebody who leaves was quicker; enter again."""
    return not place.alone or _try_lock(place._lock, fcntl.LOCK_SH)


class Watch:
    """Hears which hands were let go, or appeared."""

    def __init__(self, place: Place) -> None:
        self._place = place
        try:
            self.fd = _native.watch_directory(place.path)
        except OSError:  # the user's inotify instances are used up
            self.fd = -1
        self._suspects: dict[str, int] = {}  # hands that were heard of, and how often they were locked all the same
        self._due: dict[str, int] = {}  # hands for later
        self._next_look = 0.0
        self._note(place.files(".hand"), _TRIES - 2)

    def _note(self, names: Iterator[str], tried: int = 0) -> None:
        for name in names:
            due = _due(name)
            if due is None:
                self._suspects[name] = tried
            else:
                self._due[name] = due

    def orphans(self, own: str) -> Iterator[Sheaf]:
        """Take over what nobody holds. For one who has nothing else to do."""
        if self.fd >= 0:
            with suppress(BlockingIOError):
                self._note(name for name in _names(os.read(self.fd, 65536)) if name.endswith(".hand"))
        elif time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + _POLLED
            self._note(self._place.files(".hand"))
        if self._due:
            now = time.time_ns()
            for name in [name for name, due in self._due.items() if due <= now]:
                del self._due[name]
                self._suspects[name] = 0
        for name in tuple(self._suspects):
            found = None if name == own else adopt(self._place, name)
            if found is not None:
                yield found
            self._suspects[name] += 1
            if (
                found is not None
                or name == own
                or self._suspects[name] > _TRIES
                or not (self._place.path / name).exists()
            ):
                del self._suspects[name]  # its next holder's end will be heard as well

    def wait(self) -> Wait:
        at_most: float | None = None
        if self._due:
            at_most = max(min(self._due.values()) - time.time_ns(), 0) / 1e9
        if self._suspects:
            at_most = _SOON
        if self.fd < 0:
            at_most = _POLLED if at_most is None else min(at_most, _POLLED)
            return Wait((), at_most)
        return Wait(((self.fd, 1),), at_most)

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Hand:
    """Our own, mapped: slots that the kernel writes into."""

    def __init__(self, place: Place, frame: int) -> None:
        self._place = place
        self._stride = -(-(_SLOT.size + frame) // 512) * 512
        self._frame = frame
        self._turn = 0
        self._maps: list[mmap.mmap] = []
        self._slots: list[tuple[memoryview, memoryview]] = []  # the whole slot, and the part for the record
        self._free: list[int] = []
        while True:
            self.name = f"{place.fresh()}.hand"
            path = place.path / self.name
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _FLAGS, 0o600)
            try:
                # Between the open and the lock somebody may have taken it for an orphan: then it is theirs to remove.
                if _try_lock(self._fd, fcntl.LOCK_EX) and _is_at(self._fd, path):
                    os.pwrite(self._fd, _FILE.pack(MAGIC, VERSION, 0, 0, self._stride), 0)
                    os.ftruncate(self._fd, _FIRST)
                    break
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)

    def _grow(self) -> None:
        at = _FIRST + len(self._slots) * self._stride
        size = _CHUNK * self._stride
        os.posix_fallocate(self._fd, at, size)  # a full file system is an error here, and no SIGBUS later
        area = mmap.mmap(self._fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=at)
        self._maps.append(area)
        view = memoryview(area)
        for start in range(0, size, self._stride):
            self._free.append(len(self._slots))
            slot = view[start : start + self._stride]
            self._slots.append((slot, slot[_SLOT.size : _SLOT.size + self._frame]))
        self._free.sort(reverse=True)

    def take(self, handed_out: int = 1) -> tuple[int, memoryview]:
        """A free slot, and where its record goes. `handed_out`: how often it was, with this time."""
        if not self._free:
            self._grow()
        number = self._free.pop()
        self._turn += 1
        slot, record = self._slots[number]
        _SLOT.pack_into(slot, 0, self._turn & 0xFFFFFFFF, handed_out)
        return number, record

    def record(self, number: int, size: int) -> bytes:
        return bytes(self._slots[number][1][:size])

    def settle(self, number: int) -> None:
        self._slots[number][1][0] = 0
        self._free.append(number)

    def close(self) -> None:
        """What is not settled is anybody's from now on."""
        if len(self._free) == len(self._slots):
            self._place.remove(self.name)
        self.abandon()

    def abandon(self) -> None:
        for pair in self._slots:
            for view in pair:
                view.release()
        self._slots.clear()
        for area in self._maps:
            with suppress(BufferError):
                area.close()
        os.close(self._fd)


class Sheaf:
    """Somebody else's hand, taken over. Its records stay where they are until they are settled."""

    def __init__(self, place: Place, name: str, lock: int, fd: int, numbers: list[int], stride: int) -> None:
        self._place, self._name, self._lock, self._fd = place, name, lock, fd
        self._stride = stride
        self.numbers = numbers  # of the slots with a message, in the order in which they were taken
        self._open = set(numbers)

    @property
    def held(self) -> bool:
        return bool(self._open)

    def _at(self, number: int) -> int:
        return _FIRST + number * self._stride

    def size(self, number: int) -> int:
        """Bytes of the record. Raises ProtocolError."""
        size = wire.length(os.pread(self._fd, wire.HEAD.size, self._at(number) + _SLOT.size))
        if size > self._stride - _SLOT.size:
            raise errors.ProtocolError("a record that is longer than its slot")
        return size

    def record(self, number: int) -> bytes:
        return os.pread(self._fd, self.size(number), self._at(number) + _SLOT.size)

    def handed_out(self, number: int) -> int:
        """Note it; how often it was before."""
        turn, again = _SLOT.unpack(os.pread(self._fd, _SLOT.size, self._at(number)))
        os.pwrite(self._fd, _SLOT.pack(turn, min(again + 1, 0xFFFFFFFF)), self._at(number))
        return int(again)

    def settle(self, number: int) -> None:
        os.pwrite(self._fd, b"\0", self._at(number) + _SLOT.size)
        self._open.discard(number)
        if not self._open:
            self._place.remove(self._name)
            self.close()

    def close(self) -> None:
        """What is not settled is anybody's from now on."""
        if self._fd >= 0:
            os.close(self._lock)  # before the other, which is what the others hear
            os.close(self._fd)
            self._fd = -1

    abandon = close


def adopt(place: Place, name: str) -> Sheaf | None:
    """Take over a hand, or a body; None if somebody has it, or it is gone."""
    if "/" in name:
        raise errors.ProtocolError(f"{name!r} is no name of a message")
    path = place.path / name
    try:
        # For reading: to look must not be heard as "closed after writing" by those who watch, or they would wake for ever.
        lock = os.open(path, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return None
    fd = -1
    try:
        if not _try_lock(lock, fcntl.LOCK_EX) or not _is_at(lock, path):
            os.close(lock)
            return None
        magic, version, _, _, stride = _FILE.unpack(os.pread(lock, _FILE.size, 0).ljust(_FILE.size, b"\0"))
        whole = (magic, version) == (MAGIC, VERSION) and stride > _SLOT.size + wire.HEAD.size
        taken = _taken(lock, stride) if whole else []  # else its maker died before it had a slot
        if not taken:
            place.remove(name)
            os.close(lock)
            return None
        fd = os.open(path, os.O_RDWR | _FLAGS)
        if name.endswith(".body"):
            name = f"{name.removesuffix('.body')}.hand"
            with suppress(FileNotFoundError):  # a sweep was quicker
                os.rename(path, place.path / name)
        return Sheaf(place, name, lock, fd, taken, stride)
    except FileNotFoundError:  # a sweep renamed it under our hands: found again by its new name
        os.close(lock)
        return None
    except BaseException:
        if fd >= 0:
            os.close(fd)
        os.close(lock)
        raise


def _taken(fd: int, stride: int) -> list[int]:
    slots = max(os.fstat(fd).st_size - _FIRST, 0) // stride
    found = []
    for number in range(slots):
        head = os.pread(fd, _SLOT.size + 1, _FIRST + number * stride)
        if len(head) > _SLOT.size and head[_SLOT.size]:
            found.append((_SLOT.unpack_from(head)[0], number))
    return [number for _, number in sorted(found)]


def _names(events: bytes) -> Iterator[str]:
    at = 0
    while at + 16 <= len(events):
        size = int.from_bytes(events[at + 12 : at + 16], "little" if _LITTLE else "big")
        yield os.fsdecode(events[at + 16 : at + 16 + size].rstrip(b"\0"))
        at += 16 + size


_LITTLE = struct.pack("=H", 1) == b"\1\0"


def _due(name: str) -> int | None:
    """Nanoseconds since the epoch."""
    _, found, rest = name.removesuffix(".hand").partition("@")
    return int(rest) if found and rest.isdigit() and len(rest) < 20 else None


def _dead(name: str) -> bool:
    owner = _owner.owner_of(name)
    return owner is not None and not owner.alive()


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(fd: int, path: Path) -> bool:
    ours = os.fstat(fd)
    try:
        there = os.lstat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino) and ours.st_nlink > 0
