"""`mq://name`: POSIX message queues, the kernel's own mailboxes, with priorities.

Each side of a channel makes one queue and reads it; the other writes it. Messages above the queue's frame size go in fragments,
so the only limit is `limit=`. `send(value, priority=n)`, 0 to 31, higher first; the same priority keeps its order.

A queue says nothing about who holds it, so three things stand beside it:

    NAME.mq, NAME.mq.lock     in the runtime directory: the listener's card (JSON), and the lock that says that it lives
    mq/PID.START.N            one for each queue: a FIFO, made before the queue of the same name and removed after it. In the
                              user's default directory, whatever IPCKIT_RUNTIME_DIR says: the kernel's queues are the user's

The FIFO is the *lifeline*: its maker writes one byte into it when it closes, because the queue may be full just then; its
death is heard by a pidfd. And it is the record of the queue: whoever starts next finds those of the dead and removes
both. Once both ends hold a session's queue, its names are gone: after a `kill -9` nothing is left.

Kernel limits: fs.mqueue.{msg_max,msgsize_max,queues_max}, and RLIMIT_MSGQUEUE bytes for all queues of a user. When
the last one is short, smaller queues are made before giving up.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from .. import errors
from .._capabilities import Capabilities
from .._spi import Intake, Link, Listener, Outlet, Peer, Queues, QueueTerms, Steps, Transport, Wait
from .._url import Url
from . import _mq_queue, _owner, _rendezvous, _runtime
from ._kernelqueue import KernelOutlet, open_intake
from ._mail import Card, Inbox, Outbox, Watch, Window
from ._mqueue import LEVELS, MqOptions, choose_sizes, make, mapped, open_queue, path_of, unlink
from ._unixsock import Name, take

if TYPE_CHECKING:
    import posix_ipc

_POLLIN, _POLLOUT = select.POLLIN, select.POLLOUT


class _Post:
    """Mailboxes of this transport. See `_mail.Post`."""

    window: Window | None = None
    priorities = LEVELS

    def __init__(self, url: Url, options: MqOptions) -> None:
        self.url = url
        self._file = _runtime.path_for(url, ".mq")
        self._records = _runtime.default_dir() / "mq"
        self._sizes = choose_sizes(url, options)

    # the listener's name

    def open_rendezvous(self) -> Steps[Inbox]:
        with mapped(self.url, "listen"):
            name = take(self.url, self._file)
            try:
                queue = self._make((10, _rendezvous.MAX_GREETING))
                try:
                    text = json.dumps(queue.card | {"desk": 1}).encode()
                    draft = self._file.with_name(self._file.name + ".new")
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(draft)
                    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                    with open(fd, "wb") as file:
                        file.write(text)
                    os.rename(draft, self._file)
                    name.bound()
                except BaseException:
                    queue.close()
                    raise
            except BaseException:
                name.release()
                raise
        queue.name = name
        return queue
        yield  # pragma: no cover

    def find(self) -> Steps[Card | None]:
        with mapped(self.url, "connect"):
            try:
                fd = os.open(self._file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                return None
            with open(fd, "rb") as file:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                    raise errors.AccessDenied(f"{self._file} is not ours", url=self.url, operation="connect")
                text = file.read(_rendezvous.MAX_GREETING)
            try:
                card = json.loads(text)
                owner = _owner.owner_of(card["queue"])
            except (ValueError, TypeError, KeyError) as error:
                raise errors.ProtocolError(f"{self._file} is no card", url=self.url, operation="connect") from error
            return card if owner is not None and owner.alive() else None
        yield  # pragma: no cover

    # sessions

    def open_inbox(self) -> Steps[Inbox]:
        with mapped(self.url, "open"):
            return self._make(*self._sizes)
        yield  # pragma: no cover

    def open_outbox(self, card: Card) -> Steps[tuple[Outbox, Watch]]:
        with mapped(self.url, "open"):
            queue, records = card.get("queue"), card.get("records")
            if not isinstance(queue, str) or not _owner.NAME.fullmatch(queue) or not isinstance(records, str):
                raise errors.ProtocolError("the card names no queue", url=self.url)
            record = Path(records) / queue
            watch = _MqWatch(self.url, queue, record)
            try:
                outbox = _MqOutbox(open_queue(self.url, path_of(queue)))
            except BaseException:
                watch.close()
                raise
            if not card.get("desk"):
                _remove(record)  # both ends hold it now; nothing is left after a kill
            return outbox, watch
        yield  # pragma: no cover

    def _make(self, *sizes: tuple[int, int]) -> _MqInbox:
        """A queue, as large as the user's budget allows, with its record made before it."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(self._records, 0o700)
        _owner.sweep(self._records, lambda name: _remove(self._records / name))
        name = _owner.fresh_name()
        record = self._records / name
        os.mkfifo(record, 0o600)
        lifeline = -1
        try:
            lifeline = os.open(record, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            return _MqInbox(make(self.url, path_of(name), *sizes), record, lifeline)
        except BaseException:
            if lifeline >= 0:
                os.close(lifeline)
            os.unlink(record)
            raise


def _remove(record: Path) -> None:
    """The queue first: as long as it exists, its record does."""
    unlink(path_of(record.name))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(record)


# -- the mailboxes --------------------------------------------------------------------------------------------------


class _MqInbox:
    def __init__(self, queue: posix_ipc.MessageQueue, record: Path, lifeline: int) -> None:
        import posix_ipc

        self.native = queue
        self.card: Card = {"queue": record.name, "records": str(record.parent)}
        self.name: Name | None = None  # of the listener
        self._busy = posix_ipc.BusyError
        self._record = record
        self._lifeline = lifeline
        queue.block = False
        self._receive = queue.receive
        self._wait = Wait(((queue.mqd, _POLLIN),))

    def try_get(self) -> bytes | None:
        try:
            frame: bytes = self._receive()[0]
        except self._busy:
            return None
        return frame

    def settled(self) -> bool:
        return True

    def arm(self) -> Wait:
        return self._wait

    def close(self) -> None:
        if self.name is not None:
            self.name.release()  # first, so that nobody finds a queue that is about to go
        with contextlib.suppress(OSError):  # full: it holds a byte already
            os.write(self._lifeline, b".")
        _remove(self._record)
        self.abandon()

    def abandon(self) -> None:
        self.native.close()
        os.close(self._lifeline)


class _MqOutbox:
    def __init__(self, queue: posix_ipc.MessageQueue) -> None:
        import posix_ipc

        self.native = queue
        self.max_frame = queue.max_message_size
        self._busy = posix_ipc.BusyError
        queue.block = False
        self._send = queue.send
        self._full = False
        self._room = Wait(((queue.mqd, _POLLOUT),))

    def try_put(self, frame: bytes, priority: int = 0) -> bool:
        try:
            self._send(frame, priority=priority)
        except self._busy:
            self._full = True
            return False
        self._full = False
        return True

    def try_flush(self) -> bool:
        return True

    def arm(self) -> Wait:
        return self._room if self._full else Wait(())

    def close(self, farewell: bytes | None) -> None:
        if farewell is not None:
            self.try_put(farewell)  # if there is no room, the lifeline says it
        self.abandon()

    def abandon(self) -> None:
        self.native.close()


class _MqWatch:
    """The maker of a queue: its lifeline for a close, its pidfd for a death."""

    def __init__(self, url: Url, name: str, lifeline: Path) -> None:
        owner = _owner.owner_of(name)
        assert owner is not None
        self._url = url
        pidfd = owner.pidfd()
        if pidfd is None:
            raise errors.NothingListening("the peer is dead", url=url)
        try:
            self._lifeline = os.open(lifeline, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as error:
            os.close(pidfd)
            raise errors.NothingListening("the peer closed", url=url) from error
        except BaseException:
            os.close(pidfd)
            raise
        self._pidfd = pidfd
        found = os.fstat(self._lifeline)
        if not stat.S_ISFIFO(found.st_mode) or found.st_uid != os.geteuid():
            self.close()
            raise errors.AccessDenied(f"{lifeline} is not ours", url=url)
        self.peer = Peer(pid=owner.pid, uid=found.st_uid, gid=found.st_gid)
        self._poll = select.poll()
        self._poll.register(self._lifeline, _POLLIN)
        self._poll.register(pidfd, _POLLIN)
        self._wait = Wait(((self._lifeline, _POLLIN), (pidfd, _POLLIN)))

    def gone(self) -> errors.PeerError | None:
        events = dict(self._poll.poll(0))
        if not events:
            return None
        if events.get(self._lifeline, 0) & _POLLIN:
            return errors.PeerClosed("the peer closed", url=self._url)
        return errors.PeerDied("the peer's process ended", url=self._url, pid=self.peer.pid)

    def arm(self) -> Wait:
        return self._wait

    def close(self) -> None:
        os.close(self._pidfd)
        os.close(self._lifeline)

    abandon = close


# -- the transport --------------------------------------------------------------------------------------------------


class MqTransport(Transport[MqOptions], Queues[_mq_queue.MqQueueOptions]):
    capabilities = Capabilities(
        patterns=frozenset({"channel", "queue", "pubsub", "rpc"}),
        headers=True,
        redelivery=True,
        priorities=LEVELS,
        model="messages that the kernel keeps in queues by priority",
        synchronisation="no",
        data="discrete messages with a priority",
        decoupled=True,
        use_case="jobs and commands between the processes of one machine, the urgent ones first",
    )
    options = MqOptions
    queue_options = _mq_queue.MqQueueOptions
    requires = ("posix_ipc",)
    extra = "mq"

    def listen(self, url: Url, options: MqOptions) -> Steps[Listener]:
        return (yield from _rendezvous.listen(_Post(url, options), options.limit))

    def connect(self, url: Url, options: MqOptions) -> Steps[Link]:
        return (yield from _rendezvous.connect(_Post(url, options), options.limit))

    def sender(self, url: Url, options: _mq_queue.MqQueueOptions) -> Steps[Outlet]:
        place, kernel = yield from _mq_queue.enter(url, options)
        return KernelOutlet(url, place, kernel, options.limit)

    def receiver(self, url: Url, options: _mq_queue.MqQueueOptions, terms: QueueTerms) -> Steps[Intake]:
        return (
            yield from open_intake(lambda at: _mq_queue.enter(at, options), url, options.limit, options.max_deliver)
        )


TRANSPORT = MqTransport()
