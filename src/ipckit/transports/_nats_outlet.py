"""The sending side of queues and durable topics on JetStream: a message is ours until the server has confirmed it.

Each message has its id in `Nats-Msg-Id` and a reply subject of its own, where the server says that it is stored. What is not
confirmed in time, or was under way when the connection broke, is sent again: the server stores an id once, as long as
it remembers it (`dedup=`). After that long nobody can tell, and it is raised as `OutcomeUnknown`.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import errors
from .._spi import OnFull, Wait, Want
from .._url import Url
from ..message import Parcel
from ._bridge import Bell
from ._jetstream import PASSING, ApiError, Jet, command, refusal

MSG_ID = "Nats-Msg-Id"
_WINDOW = 1024  # messages under way to the server
_WINDOW_BYTES = 8 << 20
_HELD = 64 << 10  # bytes that are written together
_TICK = 0.25  # seconds between two looks at what is unconfirmed
_RESEND = 1.0  # seconds without an answer before it is said again; then twice as long
_RESEND_MOST = 4.0


def header_block(url: Url, id: str, headers: Mapping[str, str], extra: str = "") -> bytes:
    for name, value in headers.items():
        if value[:1] == " " or value[-1:] == " ":
            raise errors.Unsupported(f"header {name!r} begins or ends with a space, which NATS drops", url=url)
    lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
    return f"NATS/1.0\r\n{MSG_ID}: {id}\r\n{extra}{''.join(lines)}\r\n".encode()


class _Sent:
    __slots__ = ("first", "frame", "parcel", "pause", "repeat")

    def __init__(self, parcel: Parcel, frame: bytes, now: float) -> None:
        self.parcel, self.frame, self.first = parcel, frame, now
        self.pause = _RESEND
        self.repeat = now + _RESEND  # when, unless it is confirmed before


class JetOutlet:
    """An Outlet. A message is ours until the server has confirmed it."""

    _verb = "send"  # what errors say that was called

    def __init__(
        self,
        jet: Jet,
        subject: Callable[[Parcel], tuple[str, str]],
        limit: int,
        dedup: float,
        on_full: OnFull = "error",
    ) -> None:
        self._jet = jet
        self._subject = subject  # of a parcel, and further header lines
        self._limit = limit
        self._repeat_for = dedup * 0.9
        self._on_full = on_full
        self._bell = Bell(jet.home)
        self._reply = f"{jet.inbox}.p."
        self._number = 0
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._pending: dict[int, _Sent] = {}
        self._bytes_put = self._bytes_over = 0  # by the sender, on the loop; the difference is pending
        self._counters = {"sent": 0, "bytes_sent": 0, "repeated": 0, "duplicates": 0, "dropped": 0}
        self._watching = False  # somebody wants room, or the end
        self._stream = ""
        self._unheard = False  # the server has said that nobody there stores what we send
        jet.connection.connected = self._resend_all
        jet.connection.mailboxes.add(self)

    async def start(self) -> None:
        await self._jet.connection.tap(self._reply + "*", self._confirmed)
        await self._jet.connection.round_trip()  # messages overtake what the client has not written yet
        self._jet.spawn(self._keep())

    @property
    def native(self) -> Any:
        return self._jet.native

    def ring(self) -> None:
        self._bell.ring()

    def try_put(self, parcel: Parcel) -> bool:
        if len(parcel.body) > self._limit:
            raise errors.MessageTooLarge(
                f"{len(parcel.body)} bytes, and the limit is {self._limit}",
                url=self._jet.url,
                operation=self._verb,
                hint="raise limit=",
            )
        if not self._room():
            self._jet.home.do(self._write)
            self._jet.check(self._verb)
            if not self._room():
                return False
        subject, extra = self._subject(parcel)
        self._stream = subject.partition(".")[0]
        headers = header_block(self._jet.url, parcel.id, parcel.headers, extra)
        most = self._jet.client.max_payload
        if len(headers) + len(parcel.body) > most:
            raise errors.MessageTooLarge(
                f"{len(parcel.body)} bytes and headers, and the server takes {most}",
                url=self._jet.url,
                operation=self._verb,
                hint="see its max_payload",
            )
        self._number += 1
        frame = command(subject, f"{self._reply}{self._number}", parcel.body, headers)
        self._pending[self._number] = _Sent(parcel, frame, time.monotonic())
        self._bytes_put += len(frame)
        self._held.append(frame)
        self._held_bytes += len(frame)
        self._counters["sent"] += 1
        self._counters["bytes_sent"] += len(parcel.body)
        if self._held_bytes > _HELD:
            self._jet.home.poke(self._write)
        return True

    def _room(self) -> bool:
        return len(self._pending) < _WINDOW and self._bytes_put - self._bytes_over < _WINDOW_BYTES and self._jet.up

    def try_flush(self) -> bool:
        if self._held:
            self._jet.home.poke(self._write)
        elif self._pending:
            self._jet.home.turn()
        if self._pending:
            self._jet.check(self._verb)
            return False
        return True

    def arm(self, want: Want) -> Wait:
        self._watching = True
        return self._bell.arm()

    # on the loop

    def _write(self) -> None:
        self._held_bytes = 0
        count = len(self._held)  # further ones may be appended by another thread
        if count:
            self._jet.connection.write(b"".join(self._held[:count]))  # if not: they are pending, and sent when we can
            del self._held[:count]

    def _resend_all(self) -> None:
        self._held.clear()
        self._resend(list(self._pending.values()))

    def _resend(self, several: list[_Sent]) -> None:
        if several and self._jet.connection.write(b"".join(sent.frame for sent in several)):
            now = time.monotonic()
            for sent in several:
                sent.repeat = now + sent.pause
                sent.pause = min(sent.pause * 2, _RESEND_MOST) * random.uniform(0.7, 1.0)
            self._counters["repeated"] += len(several)

    def _confirmed(self, message: Any) -> None:
        number = int(message.subject.rpartition(".")[2])
        sent = self._pending.get(number)
        if sent is None:
            return
        if (message.headers or {}).get("Status") == "503":
            self._unheard = True
            return  # nobody there who could store it: said again later
        data: bytes = message.data
        if b'"error"' in data or b'"duplicate"' in data:
            answer = json.loads(data)
            if "error" in answer and not self._refused(sent, ApiError(answer["error"])):
                return
            self._counters["duplicates"] += bool(answer.get("duplicate"))
        self._forget(number, sent)

    def _refused(self, sent: _Sent, refused: ApiError) -> bool:
        """True when that is the end of it."""
        error = refusal(refused, self._jet.url, self._verb)
        if isinstance(error, errors.QueueFull) and self._on_full == "drop_new":
            self._counters["dropped"] += 1
            return True
        passing = refused.status == 503 or refused.code in PASSING
        if passing and not isinstance(error, errors.QueueFull | errors.ResourceLimit):
            return False  # said again later
        if isinstance(error, errors.QueueFull) and self._on_full == "block":
            sent.first = time.monotonic()  # it was not stored, so its id is of no account yet
            return False
        sent.parcel.failure = error
        return True

    def _forget(self, number: int, sent: _Sent) -> None:
        del self._pending[number]
        self._bytes_over += len(sent.frame)
        if self._watching and (not self._pending or len(self._pending) == _WINDOW // 2):
            self._watching = False
            self._bell.ring()

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            if not self._pending:
                continue
            if self._unheard:
                self._unheard = False
                if await self._is_gone():
                    self._give_up("sent, and the stream was deleted", "open it again, which makes it anew")
            now = time.monotonic()
            # Once the server has forgotten the id, saying it again could store it twice.
            for number, sent in list(self._pending.items()):
                if now - sent.first > self._repeat_for:
                    sent.parcel.failure = errors.OutcomeUnknown(
                        "sent, and not confirmed for so long that the server may have forgotten its id",
                        url=self._jet.url,
                        operation=self._verb,
                        message_id=sent.parcel.id,
                        hint="look whether it is there before you send it again; dedup= says how long ids are remembered",
                    )
                    self._forget(number, sent)
            self._resend([sent for sent in self._pending.values() if now > sent.repeat])
            self._bell.ring()

    async def _is_gone(self) -> bool:
        """Whether there is no such stream. Whoever cannot tell now says no."""
        try:
            await asyncio.wait_for(self._jet.api(f"STREAM.INFO.{self._stream}"), _RESEND)
        except ApiError as error:
            return error.status == 404
        except (TimeoutError, ConnectionError, errors.IpcError):
            pass
        return False

    def _give_up(self, why: str, hint: str) -> None:
        for number, sent in list(self._pending.items()):
            sent.parcel.failure = errors.OutcomeUnknown(
                why, url=self._jet.url, operation=self._verb, message_id=sent.parcel.id, hint=hint
            )
            self._forget(number, sent)

    def counters(self) -> Mapping[str, int]:
        sent = self._counters["sent"] - self._counters["dropped"]
        return self._counters | {"sent": sent, "reconnects": self._jet.connection.reconnects}

    def close(self) -> None:
        self._jet.connection.mailboxes.discard(self)
        self._jet.close()
        self._bell.close()

    def abandon(self) -> None:
        self._jet.connection.abandon()
        self._bell.close()
