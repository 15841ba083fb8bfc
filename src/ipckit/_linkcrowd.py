"""The links below one endpoint of a queue or topic: accepted or dialled, tried in turn, slept on together, lost one by one.

A member is in one of three states, so that a call costs what is going on and not how many there are:

    hot      may have a frame: to be tried
    tepid    had none, and has not been told that we are about to sleep
    cold     was told (`arm`), and tried once more after that: the watch says when it is ready, and it is hot again

Frames that cannot be understood, and ends of any kind, cost the one link: `lost` is told, and goes on. What was sent before the
end comes before it: a link that takes no more (`deaf`) is read until it says so itself.
A side that connects does so again when its link ends, after a pause that grows and is uneven, so that a restarted listener is not
met by everybody at once. Nothing here waits or locks; the endpoint has the lock.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from . import errors
from ._linkdialer import Dialer
from ._linkwatch import GONE, Watch
from ._spi import Abandoning, Fused, Link, Listener, Wait, Want
from ._url import Url

_log = logging.getLogger("ipckit")
_DOOR = "door"
#: What a link may end with. `Closed`: it was closed under us, by a transport that gave it up.
BROKEN = (errors.PeerError, errors.ProtocolError, errors.Closed)


class Member:
    """One link, and what is known of it. Subclassed by each pattern."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.hailed = False  # it was sent our hello
        self.greeted = False  # it sent us its own
        self.hot = True
        self.armed = False
        self.want = Want.RECV
        self.unsent = False  # the link holds the rest of a frame
        self.deaf = False  # nobody hears what we send; what they had sent is still to be read
        self.lost = False
        self.since = time.monotonic()


M = TypeVar("M", bound=Member)


class OnlyLink:
    """A Listener in front of whom nobody will ever stand: for a link that was taken over, and cannot be had again."""

    def __init__(self, url: Url, link: Link) -> None:
        self.url = url
        self.native = link.native

    def try_accept(self) -> Link | None:
        return None

    def arm(self, want: Want) -> Wait:
        return Wait(())

    def close(self) -> None:
        pass


class Crowd(Generic[M]):
    def __init__(
        self,
        url: Url,
        door: Listener | Dialer[Link],
        hello: bytes,
        member: Callable[[Link], M],
        lost: Callable[[M, errors.IpcError], None],
        *,
        ends: bool = False,
        reads: bool = True,
    ) -> None:
        """`hello` is what every member is sent first; `ends`: `quiet` hears of ends, for who reads them at once.

        `reads`: what a link still has to say matters when it takes nothing more.
        """
        self.url = door.url if not isinstance(door, Dialer) else url
        self.members: list[M] = []
        self.watch = Watch()
        self.quiet = Watch()  # hears of arrivals and ends, and of nothing that flows
        self._hello, self._ends, self._reads = hello, ends, reads
        self._unhailed: list[M] = []
        self.reconnects = 0
        self.refusal: errors.IpcError | None = None  # the other side of a side that connects does not want us
        self.over: errors.IpcError | None = None  # the only link ended: nobody is there any more, and nobody will be
        self._door: Listener | Dialer[Link] | None = door
        self._make, self._lost = member, lost
        self._hot: deque[M] = deque()
        self._tepid: deque[M] = deque()
        self._knocked = True
        self._door_armed = False
        self._sleepers = False
        self._closed = False

    @property
    def native(self) -> Any:
        if self._door is not None and not isinstance(self._door, Dialer):
            return self._door.native
        return self.members[0].link.native if self.members else None

    @property
    def connects(self) -> bool:
        return isinstance(self._door, Dialer)

    def check(self) -> None:
        if self._closed:
            raise errors.Closed("this endpoint is closed", url=self.url)
        if self.refusal is not None:
            raise type(self.refusal)(self.refusal.message, url=self.url, hint=self.refusal.hint)

    # -- coming and going --------------------------------------------------------------------------------------------

    def admit(self, link: Link) -> M:
        member = self._make(link)
        self.members.append(member)
        self._hot.append(member)
        self._unhailed.append(member)
        self._hail()
        return member

    def _hail(self) -> None:
        for member in tuple(self._unhailed):
            member.hailed = not self._hello or self.send(member, self._hello)
            if member.hailed or member.deaf or member.lost:
                self._unhailed.remove(member)

    def lose(self, member: M, error: errors.IpcError) -> None:
        """This link is over. Tells `lost`."""
        if member.lost:
            return
        self._forget(member)
        level = logging.INFO if isinstance(error, errors.PeerClosed) else logging.WARNING
        _log.log(level, "%s: lost a connection: %s", self.url, error.message)
        if self.connects and isinstance(error, errors.ProtocolError):
            self.refusal = error
        if isinstance(self._door, OnlyLink):
            self.over = error
        member.link.close()
        if isinstance(self._door, Dialer) and not self._closed:
            self._door.later(time.monotonic() - member.since)
            self._knocked = True
            self.wake()  # also ourselves: what we are about to sleep on does not know yet when to dial
        self._lost(member, error)

    def _broken(self, member: M, error: errors.IpcError) -> None:
        """The link does not take frames any more. The other side of a goodbye, or of a death, may have sent some before."""
        if member.deaf or not self._reads or not isinstance(error, errors.PeerError):
            self.lose(member, error)
            return
        member.deaf, member.unsent, member.want = True, False, Want.RECV
        self.heat(member)

    def dismiss(self, member: M) -> None:
        """We are done with this one."""
        if not member.lost:
            self._forget(member)
            member.link.close()

    def _forget(self, member: M) -> None:
        member.lost = True
        self.members.remove(member)
        self.watch.drop(member)
        self.quiet.drop(member)
        for queue in (self._hot, self._tepid):
            if member in queue:
                queue.remove(member)

    def stir(self) -> bool:
        """Find out who is ready; let in who is at the door. True if anybody new came."""
        came = False
        for key in self.watch.ready():
            if key == _DOOR:
                self._knocked, self._door_armed = True, False
            elif isinstance(key, Member) and not key.lost:
                key.armed = False
                if (
                    not key.unsent
                ):  # there is room: who waited for it tries again, and says so again if it is not enough
                    key.want = Want.RECV
                self.heat(key)  # type: ignore[arg-type]
        if self._unhailed:
            self._hail()
        if self._knocked:
            came = self._open_door()
        return came

    def _open_door(self) -> bool:
        came, self._knocked = False, False
        if isinstance(self._door, Dialer):
            while not self.members and self.refusal is None:
                self.watch.drop(_DOOR)  # its descriptors are passed on, or closed, by the next step
                self.quiet.drop(_DOOR)
                found = self._door.try_dial()
                if isinstance(found, Wait):
                    self.watch.put(_DOOR, found)
                    self.quiet.put(_DOOR, found)
                    break
                self.reconnects += 1
                _log.warning("%s: connected again", self.url)
                self.admit(found)
                came = True
        elif self._door is not None:
            while (link := self._door.try_accept()) is not None:
                self.admit(link)
                came = True
        return came

    # -- trying ------------------------------------------------------------------------------------------------------

    def heat(self, member: M) -> None:
        if not member.hot:
            member.hot = True
            if member in self._tepid:
                self._tepid.remove(member)
            self._hot.append(member)

    def next_frame(self) -> tuple[M, bytes] | None:
        """One frame of the next member that has one; members take turns."""
        hot = self._hot
        while hot:
            member = hot[0]
            try:
                frame = member.link.try_recv()
            except BROKEN as error:
                self.lose(member, error)
                continue
            if frame is not None:
                if len(hot) > 1:
                    hot.rotate(-1)
                return member, frame
            hot.popleft()
            member.hot = False
            if not member.armed:
                self._tepid.append(member)
        return None

    def send(self, member: M, frame: bytes) -> bool:
        """Give a frame to this member's link. False: no room, or it is lost. Raises MessageTooLarge."""
        if member.lost or member.deaf:
            return False
        try:
            taken = member.link.try_send(frame)
            member.unsent = not member.link.try_flush()
        except errors.MessageTooLarge:
            raise
        except BROKEN as error:
            self._broken(member, error)
            return False
        self.wants(member, member.unsent or not taken)
        return taken

    def send_many(self, member: M, frames: Sequence[bytes]) -> int:
        """How many of them, from the first on, this member's link took. 0 if it broke, or one of them is too large."""
        if member.lost or member.deaf:
            return 0
        link, taken = member.link, 0
        try:
            if isinstance(link, Fused):
                with suppress(errors.Timeout):
                    taken = link.send_many(frames, 0)
            else:
                while taken < len(frames) and link.try_send(frames[taken]):
                    taken += 1
            member.unsent = not link.try_flush()
        except errors.MessageTooLarge:
            return taken
        except BROKEN as error:
            self._broken(member, error)
            return 0
        self.wants(member, member.unsent or taken < len(frames))
        return taken

    def flush(self, member: M) -> bool:
        """Whether nothing that this member's link took is still here."""
        if member.unsent and not member.lost:
            try:
                member.unsent = not member.link.try_flush()
            except BROKEN as error:
                self._broken(member, error)
                return True
            self.wants(member, member.unsent)
        return not member.unsent

    def wants(self, member: M, room: bool) -> None:
        """Whether room at this member's link is waited for."""
        want = Want.RECV | Want.SEND if room else Want.RECV
        if want != member.want:
            member.want = want
            member.armed = False
            if not member.hot and not member.lost and member not in self._tepid:
                self._tepid.append(member)

    # -- sleeping ----------------------------------------------------------------------------------------------------

    @property
    def restless(self) -> bool:
        """Somebody has not been told that we are about to sleep: whoever came, or was ready, since the last `arm`; or somebody
        was lost since the last `stir`, and is to be dialled.
        """
        if isinstance(self._door, Dialer):
            return self._knocked or bool(self._hot or self._tepid)
        return bool(self._hot or self._tepid) or (self._door is not None and not self._door_armed)

    def arm(self) -> None:
        """Tell everybody who has not been told that we are about to sleep. Try once more after this."""
        if not self._door_armed and self._door is not None and not isinstance(self._door, Dialer):
            wait = self._door.arm(Want.RECV)
            self.watch.put(_DOOR, wait)
            self.quiet.put(_DOOR, wait)
            self._door_armed = self._knocked = True
        for member in (*self._tepid, *self._hot):
            if member.armed:
                continue
            try:
                wait = member.link.arm(member.want)
            except BROKEN as error:
                self._broken(member, error)
                continue
            self.watch.put(member, wait)
            if self._ends:
                self.quiet.put(member, Wait(tuple((fd, GONE) for fd, _ in wait.fds)))
            member.armed = True
            self.heat(member)
        self._tepid.clear()

    def rounds(self) -> Iterator[None]:
        """For a `tend`: once, then until all were told that we are about to sleep; but not for ever, it has the lock."""
        yield
        for _ in range(8):
            if not self.restless:
                break
            self.arm()
            yield

    def sleep(self, lane: Want, until: float | None = None) -> Wait:
        """What a caller in this lane sleeps on, after `arm`. Raises what the only link ended with."""
        if self.over is not None:
            raise type(self.over)(self.over.message, url=self.url, hint=self.over.hint)
        self._sleepers = True
        return self.watch.sleep(until, lane)

    def leave(self) -> None:
        """A call ends, whatever came of it. Wake who sleeps, or is about to, if there may be something for them."""
        if self._sleepers and self.restless:
            self.wake()

    def wake(self) -> None:
        if self._sleepers:
            self._sleepers = False
            self.watch.ring()

    # -- the end -----------------------------------------------------------------------------------------------------

    def shut_door(self) -> None:
        door, self._door = self._door, None
        if door is not None:
            self.watch.drop(_DOOR)
            self.quiet.drop(_DOOR)
            door.close()

    def close(self) -> None:
        self._closed = True
        self.shut_door()
        for member in self.members:
            self.watch.drop(member)
            member.lost = True
            member.link.close()
        self.members.clear()
        self._hot.clear()
        self._tepid.clear()
        self.watch.close()
        self.quiet.close()

    def abandon(self) -> None:
        """In a forked child."""
        for part in (self._door, *(member.link for member in self.members)):
            if isinstance(part, Abandoning):
                part.abandon()
        self.watch.close()
        self.quiet.close()
