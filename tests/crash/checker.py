"""What became of every message: the verdict over a queue that was maltreated, whatever its broker.

Senders note what they tried and how it ended, receivers note what they got; both in files that survive a kill (`Journal`). At
the end `judge` sorts each message:

    acknowledged    the sender was told that it is safe
    unknown         the sender was told that nobody knows (OutcomeUnknown): either outcome is right
    delivered       a receiver got it; more than once is a redelivery, which the receiver's id-deduplication takes out
    lost            acknowledged and never delivered; in the prefix, the middle or the end of its sender's messages,
                    for these are different bugs: a late start, a hole, an unsynced tail
    unexpected      delivered, and nobody ever tried to send it, or its sender was told that it did not go out; or its bytes
                    are not what was sent
    doubled         in the log twice under one id: the broker's deduplication failed. Found by the entries' own numbers
    forgotten       tried, and then neither acknowledged, nor raised as unknown: a sender that says nothing
    kept            in the hands of a receiver that was killed, not settled, and not handed out again

It knows no broker, and is itself tested on planted faults (`test_checker.py`).
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path


def body_of(sender: int, number: int, size: int = 24) -> bytes:
    """A message that can be recognised: whose, which one, and a checksum of the rest."""
    head = b"%d:%d:" % (sender, number)
    body = head + bytes((sender * 31 + number * 7 + i) & 0xFF for i in range(size))
    return body + b"%08x" % zlib.crc32(body)


def read_body(body: bytes) -> tuple[int, int] | None:
    """(sender, number), or None where the bytes are not whole."""
    if len(body) < 9 or body[-8:] != b"%08x" % zlib.crc32(body[:-8]):
        return None
    sender, number, _ = body.split(b":", 2)
    return int(sender), int(number)


class Journal:
    """Lines in a file, each written with one call: a kill leaves at most one cut line, at the end, which is not read."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(self, *words: object) -> None:
        os.write(self._fd, (" ".join(map(str, words)) + "\n").encode())

    def note_many(self, rows: Iterable[tuple[object, ...]]) -> None:
        os.write(self._fd, "".join(" ".join(map(str, row)) + "\n" for row in rows).encode())

    def close(self) -> None:
        os.close(self._fd)


def read_journal(path: Path) -> Iterator[list[str]]:
    if path.exists():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                yield line.split()


@dataclass
class Books:
    """What the journals say. Messages are (sender, number)."""

    tried: set[tuple[int, int]] = field(default_factory=set)
    acknowledged: set[tuple[int, int]] = field(default_factory=set)
    unknown: set[tuple[int, int]] = field(default_factory=set)
    refused: set[tuple[int, int]] = field(default_factory=set)
    # message, or None for bytes that are not whole -> how often, and under which entries of the log
    delivered: Counter[tuple[int, int] | None] = field(default_factory=Counter)
    entries: dict[tuple[int, int], set[str]] = field(default_factory=dict)
    abandoned: Counter[tuple[int, int]] = field(
        default_factory=Counter
    )  # how often a receiver got it and did not settle it
    killed: set[int] = field(default_factory=set)  # senders that were killed: their last tries have no outcome

    def delivery(self, message: tuple[int, int] | None, entry: str) -> None:
        self.delivered[message] += 1
        if message is not None:
            self.entries.setdefault(message, set()).add(entry)


@dataclass
class Verdict:
    acknowledged: int = 0
    delivered: int = 0
    redelivered: int = 0
    unknown: int = 0
    unknown_delivered: int = 0
    lost_prefix: list[tuple[int, int]] = field(default_factory=list)
    lost_middle: list[tuple[int, int]] = field(default_factory=list)
    lost_end: list[tuple[int, int]] = field(default_factory=list)
    doubled: list[tuple[int, int]] = field(default_factory=list)
    unexpected: list[object] = field(default_factory=list)
    forgotten: list[tuple[int, int]] = field(default_factory=list)
    kept: list[tuple[int, int]] = field(default_factory=list)

    @property
    def lost(self) -> int:
        return len(self.lost_prefix) + len(self.lost_middle) + len(self.lost_end)

    @property
    def faults(self) -> list[str]:
        named = {
            "lost at the beginning": self.lost_prefix,
            "lost in the middle": self.lost_middle,
            "lost at the end": self.lost_end,
            "doubled": self.doubled,
            "unexpected": self.unexpected,
            "forgotten": self.forgotten,
            "not handed out again": self.kept,
        }
        return [f"{name}: {len(which)}, such as {which[:5]}" for name, which in named.items() if which]

    def __str__(self) -> str:
        return (
            f"acknowledged {self.acknowledged}, delivered {self.delivered} (again: {self.redelivered}), "
            f"unknown {self.unknown} (of them delivered: {self.unknown_delivered}), lost {self.lost} "
            f"(beginning {len(self.lost_prefix)}, middle {len(self.lost_middle)}, end {len(self.lost_end)}), "
            f"doubled {len(self.doubled)}, unexpected {len(self.unexpected)}, forgotten {len(self.forgotten)}, "
            f"kept {len(self.kept)}"
        )


def judge(books: Books) -> Verdict:
    verdict = Verdict(
        acknowledged=len(books.acknowledged),
        delivered=len([message for message in books.delivered if message is not None]),
        redelivered=sum(times - 1 for message, times in books.delivered.items() if message is not None),
        unknown=len(books.unknown),
        unknown_delivered=len(books.unknown & set(books.delivered)),
    )
    got: dict[int, list[int]] = {}
    for message in books.delivered:
        if message is None or message not in books.tried or message in books.refused:
            verdict.unexpected.append(message)
        else:
            got.setdefault(message[0], []).append(message[1])
    for sender, number in sorted(books.acknowledged - set(books.delivered)):
        arrived = got.get(sender, [])
        if not arrived or number > max(arrived):
            verdict.lost_end.append((sender, number))
        elif number < min(arrived):
            verdict.lost_prefix.append((sender, number))
        else:
            verdict.lost_middle.append((sender, number))
    verdict.doubled = sorted(message for message, entries in books.entries.items() if len(entries) > 1)
    silent = books.tried - books.acknowledged - books.unknown - books.refused
    verdict.forgotten = sorted(message for message in silent if message[0] not in books.killed)
    # The last time that it was handed out, somebody must have settled it.
    verdict.kept = sorted(message for message, times in books.abandoned.items() if books.delivered[message] <= times)
    return verdict
