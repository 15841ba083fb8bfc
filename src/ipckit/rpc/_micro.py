"""The NATS service that a server is to stock clients: `$SRV.PING`, `INFO` and `STATS` (NATS ADR-32), and unary calls in JSON.

A request to `NAME.TARGET.METHOD` has the arguments as a JSON object (or the message that the method takes), the answer is
the result in JSON. An error has the headers `Nats-Service-Error` and `Nats-Service-Error-Code`. A request may bring
`Ipckit-Timeout` (seconds) and `traceparent`. To the engine all these clients are one link, whose frames have JSON in them.
"""

from __future__ import annotations

import itertools
import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

from .. import errors
from .._exchange import Came, Exchange
from .._spi import Peer, Wait, Want
from ..transports._bell import Bell
from . import events
from ._exposed import BUILT_IN, Services
from .contract import Shape
from .dialects import Native

_CODES = {
    "UNKNOWN_METHOD": 404,
    "UNKNOWN_TARGET": 404,
    "SCHEMA": 400,
    "CODEC": 400,
    "TOO_LARGE": 413,
    "RATE_LIMITED": 429,
    "TARGET_BUSY": 503,
    "SHUTTING_DOWN": 503,
    "DEADLINE_EXCEEDED": 504,
}
#: What ADR-32 takes for the name of an endpoint, and a client for a word of a subject.
_WORD = re.compile(r"[A-Za-z0-9_-]+")
#: Characters of an error's text: it stands in a header as well as in the body, and an answer has a largest size.
_TEXT = 2000


@runtime_checkable
class Responding(Exchange, Protocol):
    """An exchange that brings `request`s.

    Attributes:
        micro: what their subjects begin with.
        service, key: the names of the service, and of this instance of it.
        largest: bytes of one answer; the broker breaks with who sends more.
    """

    micro: str
    service: str
    key: str

    @property
    def largest(self) -> int: ...

    def respond(self, to: str, body: bytes, headers: bytes = b"") -> None: ...


class _Serving(Protocol):
    services: Services


class _InJson(Native):
    """Our frames, JSON in them."""

    name = "nats micro"
    format: Literal["msgpack", "json"] = "json"
    named = True


class _Count:
    __slots__ = ("errors", "last_error", "requests", "seconds")

    def __init__(self) -> None:
        self.requests = self.errors = 0
        self.seconds = 0.0
        self.last_error = ""


class _Asked(NamedTuple):
    """`tally`: of the endpoint that was asked; None where there is none of this name."""

    reply: str
    tally: _Count | None
    began: float


class Micro:
    """The service. `link` is every stock client together."""

    def __init__(self, exchange: Responding, engine: _Serving) -> None:
        self._exchange, self._engine = exchange, engine
        self._started = datetime.now(UTC)
        self._counts: dict[tuple[str, str], _Count] = {}  # by target and method
        self.link = MicroLink(self)

    def request(self, came: Came) -> None:
        """By who fetches."""
        if came.subject.startswith("$SRV."):
            verb = came.subject.split(".")[1]
            if came.who:
                self._exchange.respond(came.who, msgspec.json.encode(self._about(verb)))
            return
        target, method = came.subject.split(".")[-2:]
        self.link.put(came, target, method)

    # -- what it says about itself ---------------------------------------------------------------------------------------

    def _about(self, verb: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "type": f"io.nats.micro.v1.{verb.lower()}_response",
            "name": self._exchange.service,
            "id": self._exchange.key,
            "version": _semantic(version("ipckit")),
            "metadata": self._engine.services.fingerprints(),
        }
        if verb == "INFO":
            found["description"] = "an ipckit server"
            found["endpoints"] = [{**each, "metadata": {}} for _, each in self._endpoints()]
        elif verb == "STATS":
            found["started"] = self._started.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            found["endpoints"] = [{**each, **self._stats(key)} for key, each in self._endpoints()]
        return found

    def _endpoints(self) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
        """What stock clients can call, by target and method."""
        for target, contract in self._engine.services.contracts.items():
            for method in contract.methods.values():
                if method.shape is Shape.UNARY and target != BUILT_IN and _WORD.fullmatch(f"{target}_{method.name}"):
                    yield (
                        (target, method.name),
                        {
                            "name": f"{target}_{method.name}",
                            "subject": f"{self._exchange.micro}.{target}.{method.name}",
                            "queue_group": "q",
                        },
                    )

    def _stats(self, endpoint: tuple[str, str]) -> dict[str, Any]:
        count = self._counts.get(endpoint) or _Count()
        spent = int(count.seconds * 1e9)
        return {
            "num_requests": count.requests,
            "num_errors": count.errors,
            "last_error": count.last_error,
            "processing_time": spent,
            "average_processing_time": spent // max(count.requests, 1),
            "data": {},
        }

    # -- answers -----------------------------------------------------------------------------------------------------------

    def count_of(self, endpoint: tuple[str, str]) -> _Count:
        return self._counts.setdefault(endpoint, _Count())

    def result(self, asked: _Asked, body: bytes) -> None:
        largest = self._exchange.largest
        if len(body) > largest:
            why = f"the answer is {len(body)} bytes, and the NATS server takes {largest}"
            self.failure(asked, events.Failure(0, "TOO_LARGE", why))
            return
        _took(asked)
        if asked.reply:
            self._exchange.respond(asked.reply, body)

    def failure(self, asked: _Asked, failure: events.Failure) -> None:
        text = " ".join(f"{failure.type}: {failure.message}".removeprefix(": ").split())
        text = "".join(filter(str.isprintable, text))[:_TEXT]
        _took(asked)
        if asked.tally is not None:
            asked.tally.errors += 1
            asked.tally.last_error = f"{failure.code}:{text}"
        if asked.reply:
            code = _CODES.get(failure.code, 500)
            headers = f"NATS/1.0\r\nNats-Service-Error: {text}\r\nNats-Service-Error-Code: {code}\r\n\r\n"
            self._exchange.respond(
                asked.reply, msgspec.json.encode({"error": failure.code, "message": text}), headers.encode()
            )


def _took(asked: _Asked) -> None:
    if asked.tally is not None:
        asked.tally.requests += 1
        asked.tally.seconds += time.monotonic() - asked.began


def _semantic(version: str) -> str:
    """A version as ADR-32 wants it, without what Python adds to one: 1.2.dev3+local is 1.2.0."""
    release = re.match(r"\d+(?:\.\d+)*", version)
    numbers = [*(release[0].split(".") if release else ()), "0", "0", "0"]
    return ".".join(numbers[:3])


class MicroLink:
    """A Link."""

    def __init__(self, micro: Micro) -> None:
        self.dialect = _InJson()
        self.peer = Peer(address="NATS clients")
        self.native = None
        self._micro = micro
        self._ids = itertools.count(1)
        self._asked: dict[int, _Asked] = {}
        self._inbox: deque[bytes] = deque()
        self._bell = Bell()
        self._closed = False

    def put(self, came: Came, target: str, method: str) -> None:
        id = next(self._ids) & 0xFFFFFFFF or next(self._ids)
        exposed = self._micro._engine.services.find(target, method)
        fit = target != BUILT_IN and (exposed is None or exposed.method.shape is Shape.UNARY)
        count = self._micro.count_of((target, exposed.method.name)) if exposed is not None and fit else None
        asked = _Asked(came.who, count, time.monotonic())
        if not fit:
            why = f"{target}.{method} is not for one request"
            self._micro.failure(asked, events.Failure(id, "UNKNOWN_METHOD", why))
            return
        metadata, ttl = _read_headers(came.head or {})
        try:
            frames = self.dialect.encode(events.Call(id, target, method, came.body or b"null", ttl, metadata))
        except errors.ProtocolError as error:
            self._micro.failure(asked, events.Failure(id, "TOO_LARGE", error.message))
            return
        self._asked[id] = asked
        self._inbox.extend(frames)
        self._bell.ring()

    def try_send(self, frame: Any) -> bool:
        event = self.dialect.decode(bytes(frame))[0]
        if isinstance(event, events.Result | events.Failure):
            asked = self._asked.pop(event.id, None)
            if asked is not None and isinstance(event, events.Result):
                self._micro.result(asked, event.body)
            elif asked is not None and isinstance(event, events.Failure):
                self._micro.failure(asked, event)
        return True

    def try_flush(self) -> bool:
        return self._micro._exchange.try_flush()

    def try_recv(self) -> bytes | None:
        if self._closed:
            raise errors.Closed("this connection is closed")
        return self._inbox.popleft() if self._inbox else None

    def arm(self, want: Want) -> Wait:
        wait = Wait((self._bell.announce(),))
        return wait._replace(at_most=0.005) if want & Want.SEND else wait

    def close(self) -> None:
        self._closed = True

    def abandon(self) -> None:
        pass


def _read_headers(head: Mapping[str, str]) -> tuple[dict[str, str], float | None]:
    """Metadata and the time that the call may take."""
    metadata = {name.lower(): value for name, value in head.items()}
    try:
        ttl = float(metadata.pop("ipckit-timeout", ""))
    except ValueError:
        return metadata, None
    return metadata, ttl if ttl > 0 else None
