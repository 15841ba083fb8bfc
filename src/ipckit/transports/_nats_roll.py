"""What both kinds of topics share: which subjects a subscriber needs, what it has missed, and who is there.

What was missed is counted by the number that each publisher gives its messages on each subject (header `Ipckit-From`). Who is
there is asked aloud: the publisher calls on `ipckit.who.<stream>`, and each subscriber answers; one that comes says so on
`ipckit.here.<stream>`.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ..message import matches
from ._jetstream import Jet, command

FROM = "Ipckit-From"
ASK_EVERY = 0.2  # seconds between two roll calls while somebody waits for subscribers
_PRESENT = 2.5  # seconds for which an answer counts; an idle subscriber's loop is turned once a second
_NUMBERS = 100_000  # subjects whose numbers are remembered


def _covers(pattern: str, other: str) -> bool:
    """Whether all that the other pattern brings comes with this one."""
    return matches(pattern, other) and (pattern.endswith(">") or not other.endswith(">"))


def _overlap(one: str, other: str) -> bool:
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if ">" in (a, b):
            return True
        if "*" not in (a, b) and a != b:
            return False
    return one.count(".") == other.count(".")


def subjects_of(stream: str, topics: tuple[str, ...]) -> tuple[list[str], bool]:
    """Subjects that bring each wanted message once, and whether they bring others as well. Nothing: the whole stream."""
    wanted: list[str] = []
    for topic in sorted(set(topics), key=lambda topic: (">" not in topic, "*" not in topic)):
        if not any(_covers(other, topic) for other in wanted):
            wanted = [other for other in wanted if not _covers(topic, other)] + [topic]
    if ">" in wanted:
        return [], False
    # For us eu.> has eu itself as well.
    wanted += [topic[:-2] for topic in wanted if topic.endswith(".>")]
    if any(_overlap(a, b) for i, a in enumerate(wanted) for b in wanted[:i]):
        return [], True
    return [f"{stream}.{topic}" for topic in wanted], False


class Numbers:
    """The publisher's side of `Ipckit-From`: <publisher> <number on this subject>."""

    def __init__(self) -> None:
        self._publisher = ""
        self._numbers: dict[str, int] = {}

    def line(self, subject: str) -> str:
        """For the next message on this subject."""
        if not self._publisher or len(self._numbers) >= _NUMBERS:
            # Begin again as another publisher, rather than grow for ever.
            self._publisher, self._numbers = secrets.token_hex(6), {}
        return f"{FROM}: {self._publisher} {self._numbers.get(subject, 0) + 1}\r\n"

    def used(self, subject: str) -> None:
        """That message is on its way. One that was refused has used no number: nobody has missed it."""
        self._numbers[subject] = self._numbers.get(subject, 0) + 1


class Gaps:
    """The subscriber's side."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], int] = {}
        self.dropped = 0

    def before(self, message: Any) -> int:
        """How many were missed right before this one."""
        publisher, _, text = (message.headers or {}).get(FROM, "").partition(" ")
        if not text.isdecimal():
            return 0
        if len(self._last) >= _NUMBERS:
            self._last.clear()
        key, number = (publisher, message.subject), int(text)
        last = self._last.get(key)
        self._last[key] = number
        gap = 0 if last is None else max(number - last - 1, 0)
        self.dropped += gap
        return gap


class Roll:
    """The publisher calls; who answers is there."""

    def __init__(self, jet: Jet, stream: str) -> None:
        self._jet = jet
        self._news = f"ipckit.here.{stream}"
        self._call = command(f"ipckit.who.{stream}", f"{jet.inbox}.w", b"")
        self._asked = 0.0
        self._seen: dict[bytes, float] = {}
        self.changed: Callable[[], None] = lambda: None

    async def start(self) -> None:
        await self._jet.connection.tap(f"{self._jet.inbox}.w", self._answer)
        await self._jet.connection.tap(self._news, self._answer)
        await self._jet.connection.round_trip()

    def _answer(self, message: Any) -> None:
        name: bytes = message.data
        if name[:1] == b"-":
            self._seen.pop(name[1:], None)
        elif 0 < len(name) <= 64:  # nothing: the server says that nobody is there
            self._seen[name] = time.monotonic()
        self.changed()

    def count(self) -> int:
        now = time.monotonic()
        if now - self._asked > ASK_EVERY:
            self._asked = now
            self._jet.home.do(lambda: self._jet.connection.write(self._call))
        self._jet.home.turn()  # who has left since we looked last has said so
        return self.present()

    def present(self) -> int:
        now = time.monotonic()
        return sum(now - seen < _PRESENT for seen in tuple(self._seen.values()))


class Here:
    """The subscriber's announcement, its answers, and its goodbye to those who have called."""

    def __init__(self, jet: Jet, stream: str) -> None:
        self._jet = jet
        self._stream = stream
        self._name = secrets.token_hex(8).encode()
        self._callers = deque[str](maxlen=16)
        self._gone = False

    async def start(self) -> None:
        await self._jet.connection.tap(f"ipckit.who.{self._stream}", self._called)
        await self._jet.connection.round_trip()
        self._jet.connection.write(command(f"ipckit.here.{self._stream}", "", self._name))

    def _called(self, message: Any) -> None:
        if message.reply and not self._gone:  # a call that we read after our goodbye would count us again
            self._jet.connection.write(command(message.reply, "", self._name))
            if message.reply not in self._callers:
                self._callers.append(message.reply)

    def goodbye(self) -> None:
        self._gone = True
        self._jet.connection.write(b"".join(command(caller, "", b"-" + self._name) for caller in self._callers))
