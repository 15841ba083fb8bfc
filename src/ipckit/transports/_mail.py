"""Mailboxes, and a Link over two of them.

A mailbox is a named one-way queue of bounded frames: a kernel message queue, a stream or a subject of a broker. A transport
that has some supplies the four protocols below; `_rendezvous` makes two parties meet, and `MailLink` is what they get:
fragments, flow control, the orderly end and the death of the peer, written once.

The bytes of a frame are drawn in docs/wire/rendezvous.md and at the constants.
"""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, Protocol, TypeAlias

from .. import errors
from .._spi import Buffer, Peer, Steps, Wait, Want
from .._url import Url
from ._bell import Bell

#: What a party needs to reach another and to notice its death: plain JSON, made by an Inbox, read by `Post.open_outbox`.
Card: TypeAlias = dict[str, int | str]

# A session frame: one byte that says what it is, then
DATA = b"D"  # the whole message
FIRST = b"F"  # id u32, length of the whole message u64, its beginning
MORE = b"M"  # id u32, the next part; the message is whole when the length is reached
CREDIT = b"C"  # frames u64, bytes u64: D, F and M frames consumed since the session began, and their payloads
BYE = b"B"  # nothing: closed in order, nothing follows

_FIRST = struct.Struct(">cIQ")
_MORE = struct.Struct(">cI")
_CREDIT = struct.Struct(">cQQ")


# -- what a transport supplies --------------------------------------------------------------------------------------


class Inbox(Protocol):
    """A mailbox that we made and read. One thread at a time."""

    #: What the peer needs to reach us through it, and to watch us.
    card: Card
    native: Any

    def try_get(self) -> bytes | None:
        """The next frame, in order (of priority, then of sending). Never waits. Raises PeerError when the mailbox broke."""

    def settled(self) -> bool:
        """Asked once the peer is known to be gone: has `try_get` returned everything that was committed?

        False while that is being found out; `arm` announces the answer.
        """

    def arm(self) -> Wait:
        """Announce that we are about to sleep until there is a frame.

        It holds until the next frame, also when `try_get` takes what came in between: a reader may skip frames that are not
        for him and go to sleep on a Wait that is older.
        """

    def close(self) -> None:
        """Let go of the mailbox, and remove it if its name still exists."""

    def abandon(self) -> None:
        """In a forked child: let go of the descriptors, and of nothing else. So for the others."""


class Outbox(Protocol):
    """The peer's mailbox, which we write. One thread at a time."""

    native: Any
    #: Bytes of the largest frame; larger messages go in fragments. At least MAX_GREETING.
    max_frame: int

    def try_put(self, frame: bytes, priority: int = 0) -> bool:
        """Take the frame whole, or return False when there is no room now.

        Raises PeerClosed or PeerDied when the mailbox is gone.
        """

    def try_flush(self) -> bool:
        """True when nothing that was put is held in this process or unconfirmed by the broker."""

    def arm(self) -> Wait:
        """Ready when more of what is held here can go on; or, if the last `try_put` was refused, when there is room."""

    def close(self, farewell: bytes | None) -> None:
        """Let go of it. Put `farewell` before, even over the limit, if that can be done without waiting."""

    def abandon(self) -> None: ...


class Watch(Protocol):
    """Whether the peer is still there."""

    peer: Peer

    def gone(self) -> errors.PeerError | None:
        """Why nothing more will come (PeerClosed or PeerDied), or None while the peer lives. Cheap, never waits.

        Where there is no Window it has to tell of a close as well: nobody looks for the BYE on behalf of a sender.
        """

    def arm(self) -> Wait:
        """Ready when `gone` may answer otherwise (a pidfd), or `at_most` seconds until it is worth asking again."""

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class Window(NamedTuple):
    """How much may be under way to a peer that does not consume it. For mailboxes that have no bound of their own."""

    frames: int
    bytes: int


class Post(Protocol):
    """One transport at one URL: how mailboxes are made and found."""

    url: Url
    #: None: the mailbox itself refuses a frame when it is full.
    window: Window | None
    #: Levels of `try_put(priority=)`.
    priorities: int

    def open_rendezvous(self) -> Steps[Inbox]:
        """Take the listener's name. Raises AddressInUse if a live one has it; the mailbox of a dead one is replaced."""

    def find(self) -> Steps[Card | None]:
        """The card of the live listener's mailbox, or None when there is none."""

    def open_inbox(self) -> Steps[Inbox]:
        """A mailbox of our own for one session, with a name that nobody else has."""

    def open_outbox(self, card: Card) -> Steps[tuple[Outbox, Watch]]:
        """Open the mailbox of a card, which a stranger may have written: check it.

        Raises NothingListening when it is gone, ProtocolError when the card is bad.
        """


# -- a link -----------------------------------------------------------------------------------------------------------


class Natives(NamedTuple):
    inbox: Any
    outbox: Any


class MailLink:
    """A Link over two mailboxes. One mutex guards it: everything below is short and never waits."""

    def __init__(self, post: Post, inbox: Inbox, outbox: Outbox, watch: Watch, limit: int, peer_limit: int) -> None:
        self.peer = watch.peer
        self.native = Natives(inbox.native, outbox.native)
        self._url = post.url
        self._inbox, self._outbox, self._watch = inbox, outbox, watch
        self._limit, self._send_limit = limit, min(limit, peer_limit)
        self._chunk = outbox.max_frame
        self._window, self._levels = post.window, post.priorities
        self._mutex = threading.Lock()
        self._aside = Bell()  # a receiver sleeps here as well: a sender that looked for credit has stashed its frame
        self._news = Bell()  # and a sender here: a receiver has met its credit, or the end
        self._closed = False
        self._end: errors.IpcError | None = None  # why nothing more will come; raised once the stash is empty
        self._stash = deque[bytes]()  # read by a sender that looked for credit, not yet received
        self._partial: dict[int, tuple[bytearray, int]] = {}  # message id -> (what came of it, its whole length)
        self._rest = deque[bytes]()  # fragments of the one message that was accepted and has not all gone out
        self._rest_priority = 0
        self._next_id = 0
        # Frames and bytes of D, F and M: sent, the part of it that the peer consumed, consumed by us, told the peer so.
        self._sent, self._granted, self._taken, self._told = [0, 0], [0, 0], [0, 0], [0, 0]
        self._owing = False  # credit was refused by the outbox, and has to be given before we sleep

    # sending

    def try_send(self, frame: Buffer) -> bool:
        return self.try_send_priority(frame, 0)

    def try_send_priority(self, frame: Buffer, priority: int) -> bool:
        with self._mutex:
            self._check("send")
            size = frame.nbytes if isinstance(frame, memoryview) else len(frame)
            if size > self._send_limit:
                raise errors.MessageTooLarge(
                    f"{size} bytes, and the limit is {self._send_limit}", url=self._url, operation="send"
                )
            if priority and not self._levels:
                raise errors.Unsupported("this transport has no priorities", url=self._url, operation="send")
            if priority and not 0 <= priority < self._levels:
                raise errors.BadOption(f"priority {priority} is not in 0..{self._levels - 1}", url=self._url)
            if self._watch.gone() is not None:
                self._look()
                self._check("send")
            accepted = self._offer(frame, size, priority)
            if self._window is None:
                return accepted
            self._look()  # behind the frame, which is what the peer waits for: it may cost a request
            if not accepted:
                self._check("send")
                return self._offer(frame, size, priority)
            return True  # what `_look` found is news for the next call

    def _offer(self, frame: Buffer, size: int, priority: int) -> bool:
        if not self._push():
            return False
        if size < self._chunk:
            return self._put(b"".join((DATA, frame)), priority)
        fragments = self._fragments(memoryview(frame).cast("B"))
        if not self._put(fragments[0], priority):
            return False
        self._next_id = (self._next_id + 1) & 0xFFFFFFFF
        self._rest.extend(fragments[1:])
        self._rest_priority = priority
        self._push()
        return True

    def try_flush(self) -> bool:
        with self._mutex:
            if self._closed:
                self._check("send")
            if not self._rest and self._outbox.try_flush():
                return True  # it has left us; that the peer has read it and gone since is news for the next call
            self._check("send")
            self._look()
            self._check("send")
            pushed = self._push()
            return self._outbox.try_flush() and pushed

    def _fragments(self, view: memoryview) -> list[bytes]:
        room = self._chunk - _FIRST.size
        fragments = [_FIRST.pack(FIRST, self._next_id, len(view)) + view[:room]]
        head = _MORE.pack(MORE, self._next_id)
        step = self._chunk - _MORE.size
        fragments.extend(head + view[at : at + step] for at in range(room, len(view), step))
        return fragments

    def _put(self, frame: bytes, priority: int) -> bool:
        """Put a D, F or M frame, if the window allows it."""
        if self._window is not None:
            frames, size = self._sent[0] - self._granted[0], self._sent[1] - self._granted[1]
            if frames >= self._window.frames or size >= self._window.bytes:
                return False
        if not self._outbox.try_put(frame, priority):
            return False
        self._sent[0] += 1
        self._sent[1] += len(frame)
        return True

    def _push(self) -> bool:
        """Send on what is held; True when there is nothing more."""
        while self._rest:
            if not self._put(self._rest[0], self._rest_priority):
                return False
            self._rest.popleft()
        return True

    def _look(self) -> None:
        """Look for credit, for a BYE and for a death on behalf of a sender, who may have no receiver beside it.

        What it finds on the way is stashed. The peer's window bounds that; without one, only what a peer left that is gone is
        looked through, for its BYE is behind it.
        """
        bound = 0 if self._window is None else self._window.frames + 2
        while self._end is None and (len(self._stash) < bound or self._watch.gone() is not None):
            frame = self._pull()
            if frame is not None:
                self._stash.append(frame)
            if frame is not None or self._end is not None:
                self._aside.ring()
            if frame is None:
                return

    # receiving

    def try_recv(self) -> bytes | None:
        with self._mutex:
            if self._closed:
                self._check("recv")
            self._drive_out()
            while True:
                frame = self._stash.popleft() if self._stash else self._pull()
                if frame is None:
                    if self._end is not None:
                        self._check("recv")
                    return None
                message = self._take(frame)
                if message is not None:
                    return message

    def _drive_out(self) -> None:
        """What a receiver does for the other direction. Errors there are the sender's; here come first the frames."""
        if self._end is None and (self._rest or self._owing):
            with suppress(errors.IpcError):
                self._push()
                if self._owing and self._window is not None:
                    self._tell(self._window)

    def _pull(self) -> bytes | None:
        """The next D, F or M frame. C and B are dealt with here; None: nothing now, or `_end` says why never."""
        last = False
        while self._end is None:
            try:
                frame = self._inbox.try_get()
                if frame is None:
                    gone = self._watch.gone()
                    if last:
                        self._end = gone
                    elif gone is None or not self._inbox.settled():
                        return None
                    last = True  # what it had committed comes before its end
                    continue
            except errors.IpcError as error:  # the mailbox itself broke
                self._end = error
                break
            kind = frame[:1]
            if kind in (DATA, FIRST, MORE):
                return frame
            if kind == CREDIT and len(frame) == _CREDIT.size:
                self._credit(frame)
            elif kind == BYE:
                self._end = errors.PeerClosed("the peer closed", url=self._url)
            else:
                self._bad(f"a frame of unknown kind {kind!r}")
        self._news.ring()
        return None

    def _credit(self, frame: bytes) -> None:
        _, frames, size = _CREDIT.unpack(frame)
        if not (self._granted[0] <= frames <= self._sent[0] and self._granted[1] <= size <= self._sent[1]):
            self._bad("credit for frames that were never sent")
        self._granted = [frames, size]
        self._news.ring()

    def _take(self, frame: bytes) -> bytes | None:
        """Consume a D, F or M frame; the message, if it is whole with it."""
        self._taken[0] += 1
        self._taken[1] += len(frame)
        if self._window is not None:
            self._tell(self._window)
        kind = frame[:1]
        if kind == DATA:
            if len(frame) - 1 > self._limit:
                self._bad(f"a message of {len(frame) - 1} bytes, above the limit of {self._limit}")
            return frame[1:]
        if kind == FIRST:
            if len(frame) <= _FIRST.size:
                self._bad("a fragment without content")
            _, number, total = _FIRST.unpack_from(frame)
            if total > self._limit:
                self._bad(f"a message of {total} bytes, above the limit of {self._limit}")
            # One message at a time is fragmented, so there is at most one unfinished in each level of priority.
            if number in self._partial or len(self._partial) >= max(self._levels, 1):
                self._bad("a new fragmented message inside another")
            memory, begin = bytearray(), _FIRST.size  # grows with what comes, not with what is announced
        else:
            if len(frame) <= _MORE.size:
                self._bad("a fragment without content")
            _, number = _MORE.unpack_from(frame)
            if number not in self._partial:
                self._bad("a fragment of no message")
            (memory, total), begin = self._partial[number], _MORE.size
        if len(memory) + len(frame) - begin > total:
            self._bad("more fragments than the message has bytes")
        memory += memoryview(frame)[begin:]
        if len(memory) < total:
            self._partial[number] = (memory, total)
            return None
        self._partial.pop(number, None)
        return bytes(memory)

    def _tell(self, window: Window) -> None:
        """Give credit, half a window at a time."""
        frames, size = self._taken[0] - self._told[0], self._taken[1] - self._told[1]
        if (frames * 2 >= window.frames or size * 2 >= window.bytes) and self._end is None:
            with suppress(errors.IpcError):  # whose frame this was still gets it
                self._owing = not self._outbox.try_put(_CREDIT.pack(CREDIT, *self._taken))
                if not self._owing:
                    self._told = list(self._taken)
                    self._outbox.try_flush()  # no sender may come to do it

    # both

    def _check(self, operation: str) -> None:
        if self._closed:
            raise errors.Closed("this link is closed", url=self._url, operation=operation)
        end = self._end
        if end is None:
            return
        if isinstance(end, errors.PeerClosed) and self._partial and not self._stash:
            self._end = end = errors.PeerDied("the peer closed inside a message", url=self._url, pid=self.peer.pid)
        again = type(end)(end.message, url=self._url, operation=operation, hint=end.hint)
        if isinstance(again, errors.PeerDied) and isinstance(end, errors.PeerDied):
            again.pid = end.pid
        raise again from end.__cause__

    def _bad(self, what: str) -> NoReturn:
        self._end = errors.ProtocolError(what, url=self._url)
        self._stash.clear()
        self._partial.clear()
        self._aside.ring()
        self._news.ring()
        raise errors.ProtocolError(what, url=self._url, operation="recv")

    def arm(self, want: Want) -> Wait:
        with self._mutex:
            if self._closed or self._end is not None:
                return Wait((), 0)  # the next try says so
            waits = [self._watch.arm()]
            if want & Want.RECV:
                waits.append(Wait((self._aside.announce(),)))
            if want & Want.SEND:
                waits.append(Wait((self._news.announce(),)))
            if want & Want.RECV or self._window is not None:
                waits.append(self._inbox.arm())
            if want & Want.SEND or self._rest or self._owing:
                waits.append(self._outbox.arm())
            return merge(waits)

    def close(self) -> None:
        with self._mutex:
            if self._closed:
                return
            self._closed = True
            self._aside.close()
            self._news.close()
            try:
                if self._end is None:
                    self._push()
                self._outbox.close(BYE if self._end is None else None)
            except errors.PeerError:
                self._outbox.close(None)
            finally:
                self._inbox.close()
                self._watch.close()

    def abandon(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._aside.close()
        self._news.close()
        self._inbox.abandon()
        self._outbox.abandon()
        self._watch.abandon()


def merge(waits: Sequence[Wait]) -> Wait:
    """Ready when any of them is."""
    fds: dict[int, int] = {}
    at_most: float | None = None
    for wait in waits:
        for fd, events in wait.fds:
            fds[fd] = fds.get(fd, 0) | events
        if wait.at_most is not None:
            at_most = wait.at_most if at_most is None else min(at_most, wait.at_most)
    return Wait(tuple(fds.items()), at_most)
