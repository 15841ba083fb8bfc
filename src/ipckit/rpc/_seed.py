"""The seed's dialect: JSON, or MessagePack with named maps, behind a length. The kinds of body are told apart by their fields.

A client that gives no `request_id` tells answers apart by their order, so they are sent in the order of the requests, whatever
order they are ready in. The last data frame of a stream says that it is the last: an item waits until the next one, or the
end, is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from ..errors import ProtocolError
from . import events
from .envelope import NAMES, Asked, Envelope, code_of, text_of
from .events import Event

#: What the id of a stream begins with when its client gave none.
_OURS = "stream-"
_JSON_BEGINS = frozenset(b"{ \t\r\n")
_MAP_BEGINS = frozenset((*range(0x80, 0x90), 0xDE, 0xDF))


class _Said(msgspec.Struct):
    """IpcEnvelope, SubscribeRequest and UnsubscribeRequest at once. A field may be null as well as absent."""

    target: str | None = None
    message_type: str | None = None
    payload: msgspec.Raw = msgspec.Raw()
    request_id: str | None = None
    expects_reply: bool | None = None
    expects_stream: bool | None = None
    reply_to: str | None = None
    message_types: list[str] | None = None
    unsubscribe: bool | None = None


class _Named(msgspec.Struct):
    """What can be saved of a body that is wrong: whose it is."""

    request_id: str | None = None


class _Sent(msgspec.Struct):
    """What tells our own frames apart."""

    request_id: str | None = None
    stream_id: str | None = None
    notification_type: str | None = None


class _Response(msgspec.Struct):
    request_id: str | None
    success: bool
    payload: msgspec.Raw | dict[str, msgspec.Raw] | None
    error: str | None


class _StreamFrame(msgspec.Struct):
    stream_id: str
    sequence: int
    payload: msgspec.Raw | None
    is_final: bool


class _Push(msgspec.Struct):
    notification_type: str
    message_type: str
    payload: msgspec.Raw
    timestamp: int


class Seed(Envelope):
    uncounted = (0, 0)
    _ordered = True
    _format: Literal["msgpack", "json"]
    _begins: frozenset[int]
    _said: Callable[[bytes], _Said]
    _whose: Callable[[bytes], _Named]
    _sent: Callable[[bytes], _Sent]
    _written: Callable[[Any], bytes]

    @property
    def format(self) -> Literal["msgpack", "json"]:
        return self._format

    push_format = format

    # -- what comes

    def decode(self, frame: bytes) -> Sequence[Event]:
        if not frame or frame[0] not in self._begins:
            raise ProtocolError(f"a connection of {self.name} sent a frame that is none")
        try:
            said = self._said(frame)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return (self._malformed(self._author(frame), str(error)),)
        if said.target is None and said.message_types is not None:
            return (self._subscription(said, said.message_types),)
        missing = [
            name
            for name, absent in (
                ("target", said.target is None),
                ("message_type", said.message_type is None),
                ("payload", not bytes(said.payload)),
            )
            if absent
        ]
        if missing or said.target is None or said.message_type is None:
            return (self._malformed(said.request_id, f"missing {', '.join(missing)}"),)
        stream = bool(said.expects_stream)
        id = 0
        if stream or said.expects_reply:
            kind: Literal["stream", "call"] = "stream" if stream else "call"
            id = self._questions.new(Asked(said.request_id, said.message_type, kind))
        return (
            events.Call(
                id,
                said.target,
                said.message_type,
                bytes(said.payload),
                reply_to=said.reply_to or "",
                stream=stream,
            ),
        )

    def _author(self, frame: bytes) -> str | None:
        try:
            return self._whose(frame).request_id
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None

    def _malformed(self, correlation: str | None, why: str) -> Event:
        return events.Malformed(self._questions.new(Asked(correlation)), why)

    def _subscription(self, said: _Said, types: list[str]) -> Event:
        id = 0  # the seed's subscribers expect pushes and nothing else, unless they ask by name
        if said.request_id is not None:
            id = self._questions.new(Asked(said.request_id, kind="subscription"))
        return events.Unsubscribe(id, types) if said.unsubscribe else events.Subscribe(id, types)

    # -- what goes

    def encode(self, event: Event) -> Sequence[bytes]:
        if isinstance(event, events.Push):
            stamp = int(self._clock() * 1000)
            return (self._written(_Push("subscription", event.type, msgspec.Raw(event.body), stamp)),)
        if isinstance(event, events.Failure) and not event.id:
            return (self._failure(None, event, ""),)
        if not isinstance(event, events.Result | events.Failure | events.Item | events.End):
            return ()  # there is no word for it
        asked = self._questions.get(event.id)
        if asked is None:
            return ()
        if isinstance(event, events.Item):
            frames = self._items(event.id, asked, final=False)
            asked.held = event.body
            return self._questions.answer(event.id, frames, last=False)
        return self._questions.answer(event.id, self._last(event, asked), last=True)

    def _last(self, event: events.Result | events.Failure | events.End, asked: Asked) -> list[bytes]:
        if isinstance(event, events.End):
            return self._items(event.id, asked, final=True)
        if isinstance(event, events.Failure):
            if event.code == "TOO_LARGE":  # the item before the one that is held has not gone out
                asked.held = None
            return [*self._items(event.id, asked, final=False), self._failure(asked.correlation, event, asked.about)]
        if asked.kind == "stream":  # one value, for who expects a stream
            asked.held = event.body
            return self._items(event.id, asked, final=True)
        body = msgspec.Raw(event.body)
        payload = {"subscribed_types": body} if asked.kind == "subscription" else body
        return [self._written(_Response(asked.correlation, True, payload, None))]

    def _items(self, id: int, asked: Asked, *, final: bool) -> list[bytes]:
        """The item that was held, if there is one; or the end of an empty stream."""
        body, asked.held = asked.held, None
        if body is None and not final:
            return []
        payload = None if body is None else msgspec.Raw(body)
        frame = _StreamFrame(asked.correlation or f"{_OURS}{id}", asked.sequence, payload, final)
        asked.sequence += 1
        return [self._written(frame)]

    def _failure(self, correlation: str | None, failure: events.Failure, about: str) -> bytes:
        text = f"{about} is not registered" if failure.code == "UNKNOWN_METHOD" and about else text_of(failure)
        return self._written(_Response(correlation, False, None, f"{NAMES[code_of(failure)].seed}: {text}"))

    def whose(self, frame: bytes) -> int:
        said = self._sent(frame)
        if said.notification_type is not None:
            return 0
        own = said.stream_id is not None and said.stream_id.startswith(_OURS)  # for a client that gave none
        return self._questions.blamed(None if own else said.stream_id or said.request_id)

    def turn_away(self, limit: int) -> Sequence[bytes]:
        return self.encode(events.Failure(0, "CONNECTION_LIMIT", f"the server has {limit} connections already"))


class SeedJson(Seed):
    name = "seed, JSON"
    _format = "json"
    _begins = _JSON_BEGINS
    _said = msgspec.json.Decoder(_Said).decode
    _whose = msgspec.json.Decoder(_Named).decode
    _sent = msgspec.json.Decoder(_Sent).decode
    _written = msgspec.json.Encoder().encode


class SeedMsgpack(Seed):
    name = "seed, MessagePack"
    _format = "msgpack"
    _begins = _MAP_BEGINS
    _said = msgspec.msgpack.Decoder(_Said).decode
    _whose = msgspec.msgpack.Decoder(_Named).decode
    _sent = msgspec.msgpack.Decoder(_Sent).decode
    _written = msgspec.msgpack.Encoder().encode
