"""A Channel over mailboxes: how two parties find each other where the system gives only named one-way queues.

A transport that has mailboxes (a kernel queue, a stream in a broker) supplies a `Post`: how they are made and found. This
module makes the rest, once: the handshake, fragments, flow control, the orderly end and the death of a peer.

    client                                 rendezvous mailbox (the listener's name)
      makes its inbox, puts        HELLO(card, limit)   ->   the listener reads it, makes an inbox for this session,
      reads its inbox      <-   WELCOME(card, limit)         puts WELCOME into the client's
      opens the listener's inbox         READY          ->   and only now `accept` returns the link
      D F M C B ...        <----- session frames ----->      D F M C B ...

A *card* is what a party needs to reach another and to notice its death (queue name, pid, broker's client id): plain JSON,
made by the `Inbox`, read by `Post.open_outbox`. A bad card or a message that is no HELLO costs the one who sent it its
handshake, and nothing else. The bytes are drawn in docs/wire/rendezvous.md and at the constants below.
"""

from __future__ import annotations

import logging
import select
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, overload

import msgspec

from .. import errors
from .._spi import Link, Steps, Wait, Want
from .._url import Url
from ._mail import BYE, Card, Inbox, MailLink, Outbox, Post, Watch, merge

log = logging.getLogger("ipckit.rendezvous")

#: Makes the link of a finished handshake: from the two mailboxes, our limit and the peer's.
Maker: TypeAlias = Callable[[Post, Inbox, Outbox, Watch, int, int], "L"]
L = TypeVar("L", bound=Link)
T = TypeVar("T")

VERSION = 1

# The frames of the handshake: one byte that says what it is, then
HELLO = b"H"  # JSON: Greeting
WELCOME = b"W"  # JSON: Greeting
READY = b"R"  # nothing
NO_ROOM = b"N"  # text: why the listener cannot have another session

#: A greeting above this is nobody's; it also has to fit into the smallest mailbox.
MAX_GREETING = 2048
#: Handshakes that one listener carries on at a time; further HELLOs wait in the mailbox.
MAX_GUESTS = 64
#: Seconds in which a handshake has to be finished. Long, because a paused client is not a dead one; it tries again.
PATIENCE = 10.0
#: How long a connecting side sleeps before it looks for a listener again; no descriptor announces one.
_LOOK_AGAIN = (0.001, 0.05)


class Greeting(msgspec.Struct, frozen=True):
    version: int
    card: Card
    limit: int


# -- connecting -------------------------------------------------------------------------------------------------------


@overload
def connect(post: Post, limit: int) -> Steps[MailLink]: ...
@overload
def connect(post: Post, limit: int, make: Maker[L]) -> Steps[L]: ...
def connect(post: Post, limit: int, make: Maker[Any] = MailLink) -> Steps[Any]:
    """Find the listener, waiting for one until the driver throws Timeout. `make`: the link, once both are ready."""
    return (yield from keep_trying(post.url, post.find, lambda card: _knock(post, card, limit, make)))


def keep_trying(url: Url, find: Callable[[], Steps[T | None]], knock: Callable[[T], Steps[L]]) -> Steps[L]:
    """Look for a listener until there is one and it opens, or the driver throws Timeout: then NothingListening."""
    found = False
    last: errors.IpcError | None = None
    pause = _LOOK_AGAIN[0]
    try:
        while True:
            try:
                place = yield from find()
                if place is not None:
                    found = True
                    return (yield from knock(place))
            except (errors.NothingListening, errors.PeerError) as error:
                log.debug("%s: the listener is gone, or the way to it: %s", url, error)
                last = error
                if isinstance(error, errors.PeerClosed):  # it lives, and has no use for us now
                    pause = _LOOK_AGAIN[1]
            yield Wait((), pause)
            pause = min(pause * 2, _LOOK_AGAIN[1])
    except errors.Timeout as timeout:
        message = "there is a listener, but it did not accept in time" if found else "nobody listens at this address"
        if last is not None:
            message = f"{message}; last: {last.message}"
        hint = None if last is None else last.hint
        raise errors.NothingListening(message, url=url, operation="connect", hint=hint) from last or timeout


def _knock(post: Post, card: Card, limit: int, make: Maker[L]) -> Steps[L]:
    """One handshake with one listener, in a mailbox of its own: what a former attempt left cannot be mistaken."""
    inbox = yield from post.open_inbox()
    try:
        desk, watch = yield from post.open_outbox(card)
        try:
            yield from _put(desk, watch, HELLO + msgspec.json.encode(Greeting(VERSION, inbox.card, limit)))
            welcome = read_greeting(post.url, WELCOME, (yield from _get(inbox, watch)))
        finally:
            desk.close(None)
            watch.close()
        outbox, watch = yield from post.open_outbox(welcome.card)
        try:
            yield from _put(outbox, watch, READY)
        except BaseException:
            outbox.close(BYE)
            watch.close()
            raise
    except BaseException:
        inbox.close()
        raise
    return make(post, inbox, outbox, watch, limit, welcome.limit)


def _put(outbox: Outbox, watch: Watch, frame: bytes) -> Steps[None]:
    while True:
        for _ in range(2):  # the second after arming
            gone = watch.gone()
            if gone is not None:
                raise gone
            if outbox.try_put(frame):
                break
            wait = merge((outbox.arm(), watch.arm()))
        else:
            yield wait
            continue
        break
    while not outbox.try_flush():
        wait = merge((outbox.arm(), watch.arm()))
        if outbox.try_flush():
            return
        yield wait
        gone = watch.gone()
        if gone is not None:
            raise gone


def _get(inbox: Inbox, watch: Watch) -> Steps[bytes]:
    while True:
        frame = inbox.try_get()
        if frame is not None:
            return frame
        wait = merge((inbox.arm(), watch.arm()))
        gone = watch.gone()
        frame = inbox.try_get()
        if frame is not None:
            return frame
        if gone is not None:
            raise gone
        yield wait


def read_greeting(url: Url, kind: bytes, frame: bytes) -> Greeting:
    """Raises PeerClosed for a listener that is about to close, ResourceLimit for one that is full; ProtocolError."""
    if kind == WELCOME and frame == BYE:
        raise errors.PeerClosed("the listener turned us away", url=url, hint="its log says why, unless it has closed")
    if kind == WELCOME and frame[:1] == NO_ROOM:
        why = frame[1:MAX_GREETING].decode(errors="replace")
        raise errors.ResourceLimit(f"the listener has no room: {why}", url=url, operation="connect")
    if frame[:1] != kind or len(frame) > MAX_GREETING:
        raise errors.ProtocolError(f"{frame[:1]!r} where {kind!r} was expected", url=url)
    try:
        greeting = msgspec.json.decode(frame[1:], type=Greeting)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise errors.ProtocolError(f"the greeting cannot be read: {error}", url=url) from error
    if greeting.version != VERSION:
        raise errors.ProtocolError(f"version {greeting.version} of the rendezvous; this is {VERSION}", url=url)
    return greeting


# -- listening ----------------------------------------------------------------------------------------------------------


def listen(post: Post, limit: int, make: Maker[Any] = MailLink) -> Steps[Desk]:
    """Take the name."""
    inbox = yield from post.open_rendezvous()
    return Desk(post.url, inbox, lambda frame: admit(post, frame, limit, make))


@overload
def admit(post: Post, frame: bytes, limit: int) -> Steps[MailLink]: ...
@overload
def admit(post: Post, frame: bytes, limit: int, make: Maker[L]) -> Steps[L]: ...
def admit(post: Post, frame: bytes, limit: int, make: Maker[Any] = MailLink) -> Steps[Any]:
    """The listener's side of one handshake. Whatever it raises, only this guest is turned away."""
    hello = read_greeting(post.url, HELLO, frame)
    outbox, watch = yield from post.open_outbox(hello.card)
    try:
        inbox = yield from post.open_inbox()
        try:
            yield from _put(outbox, watch, WELCOME + msgspec.json.encode(Greeting(VERSION, inbox.card, limit)))
            if (yield from _get(inbox, watch)) != READY:
                raise errors.ProtocolError("the client did not say that it is ready", url=post.url)
        except BaseException:
            inbox.close()
            raise
    except BaseException as error:
        full = isinstance(error, errors.ResourceLimit)
        outbox.close((NO_ROOM + str(error).encode())[:MAX_GREETING] if full else BYE)
        watch.close()
        raise
    return make(post, inbox, outbox, watch, limit, hello.limit)


@dataclass(slots=True)
class _Guest:
    steps: Steps[Link]
    until: float
    wait: Wait


class Desk:
    """A Listener: reads the rendezvous mailbox and carries on the handshakes side by side.

    `admit` makes the steps of one handshake from one message; a transport with sessions of another kind brings its own.
    """

    def __init__(self, url: Url, inbox: Inbox, admit: Callable[[bytes], Steps[Link]]) -> None:
        self.url = url
        self.native = inbox.native
        self._inbox = inbox
        self._admit = admit
        self._guests: list[_Guest] = []
        self._ready = deque[Link]()
        self._closed = False
        # One descriptor to sleep on, whatever the handshakes wait for. Their own come, go, and pass to the link while others
        # sleep on an older Wait: the kernel keeps that in order in an epoll, an event loop does not.
        self._epoll = select.epoll()
        self._watched: dict[int, int] = {}
        self._inbox_wait = Wait(())

    def try_accept(self) -> Link | None:
        if self._closed:
            raise errors.Closed("this listener is closed", url=self.url, operation="accept")
        for _ in range(MAX_GUESTS):
            if len(self._guests) + len(self._ready) >= MAX_GUESTS:
                break
            frame = self._inbox.try_get()
            if frame is None:
                break
            self._guests.append(_Guest(self._admit(frame), time.monotonic() + PATIENCE, Wait(())))
        self._guests = [guest for guest in self._guests if not self._settled(guest)]
        self._watch()  # now and not in `arm`: who sleeps already has to hear of a handshake that goes on, or ends
        return self._ready.popleft() if self._ready else None

    def _settled(self, guest: _Guest) -> bool:
        try:
            if time.monotonic() > guest.until:
                guest.steps.throw(errors.Timeout(f"no handshake within {PATIENCE:g} s", url=self.url))
            guest.wait = next(guest.steps)
        except StopIteration as stop:
            self._ready.append(stop.value)
        except (errors.IpcError, OSError) as error:
            log.warning("%s: a peer was turned away: %s: %s", self.url, type(error).__name__, error)
        else:
            return False
        return True

    def arm(self, want: Want) -> Wait:
        waits = [guest.wait for guest in self._guests]
        if len(self._guests) + len(self._ready) < MAX_GUESTS:
            self._inbox_wait = self._inbox.arm()
            waits.append(self._inbox_wait)
        else:
            self._inbox_wait = Wait(())
        if self._guests:
            waits.append(Wait((), max(min(guest.until for guest in self._guests) - time.monotonic(), 0)))
        self._watch()
        return Wait(((self._epoll.fileno(), select.POLLIN),), merge(waits).at_most)

    def _watch(self) -> None:
        wanted = dict(merge([self._inbox_wait, *(guest.wait for guest in self._guests)]).fds)
        for fd in self._watched.keys() - wanted.keys():
            with suppress(OSError):  # closed, and so forgotten already
                self._epoll.unregister(fd)
        for fd, events in wanted.items():
            try:
                self._epoll.modify(fd, events)
            except FileNotFoundError:  # a new one, perhaps with an old number
                self._epoll.register(fd, events)
        self._watched = wanted

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._epoll.close()
        self._inbox.close()
        for guest in self._guests:
            guest.steps.close()
        for link in self._ready:
            link.close()

    def abandon(self) -> None:
        """The guests' descriptors stay open in the child: their generators cannot be told to let go of them alone."""
        if self._closed:
            return
        self._closed = True
        self._epoll.close()
        self._inbox.abandon()
