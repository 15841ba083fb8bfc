"""A slow subscriber must cost nobody anything: `python benchmarks/slow_subscriber.py [URL] [--messages N]`.

One publisher with `on_full="drop_old"`, a subscriber that is fast, and one beside it that rests after each message. Told in a
small table:

    publisher   what its process grows by (RSS), from when the first 5 % are out
    messages/s  that the fast one takes: alone, with another fast one beside it, with a slow one in place of that
    accounts    for each subscriber: received + dropped = published, and every gap is just what is missing there

All are processes of their own. The publisher goes as fast as the fast subscriber takes it, `--ahead` messages before it at most,
so that nothing of the fast one's is dropped; the slow one falls behind by all the rest. Ends with status 1 if the accounts
do not balance. Nothing passes or fails by time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ipckit

SIZE = 64
SLOW = 0.001  # seconds that the slow one rests after each message
OPEN = 20.0  # seconds
QUIET = 300.0  # seconds without an answer: something is wrong
_LOOK = 100  # messages between two looks at how far the others are
_END = b"end"


@dataclass(frozen=True)
class Account:
    """What one subscriber got, and what it was told that it did not get. `wrong`: messages whose gap is not what is missing."""

    received: int
    dropped: int
    wrong: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """One run. `rss`: bytes of the publisher's process, when the first 5 % were out, and the most from then on."""

    published: int
    dropped: int
    rss: tuple[int, int]
    fast: Account
    other: Account | None

    @property
    def growth(self) -> float:
        return self.rss[1] / self.rss[0] - 1

    @property
    def rate(self) -> float:
        """Messages a second that the fast one took."""
        return self.fast.received / self.fast.seconds

    def accounts(self) -> list[Account]:
        return [self.fast] if self.other is None else [self.fast, self.other]

    def balances(self) -> bool:
        """Each subscriber has received or been told of every message, and the publisher has counted the same drops."""
        exact = all(each.received + each.dropped == self.published and not each.wrong for each in self.accounts())
        return exact and sum(each.dropped for each in self.accounts()) == self.dropped


def measure(url: str, messages: int, *, other: float | None, ahead: int = 500) -> Run:
    """Publish so many, to a fast subscriber and, unless it is None, another that takes `other` seconds over each."""
    context = multiprocessing.get_context("spawn")
    taken: Any = context.Value("q", 0, lock=False)
    pauses = [0.0] if other is None else [0.0, other]
    with ExitStack() as stack:

        def start(target: Callable[..., None], *arguments: object) -> Connection:
            ours, theirs = context.Pipe()
            process = context.Process(target=target, args=(*arguments, theirs, taken), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join, OPEN)
            stack.enter_context(ours)
            return ours

        publisher = start(_publish, url, messages, ahead, len(pauses))
        where = _answer(publisher)
        subscribers = [start(_subscribe, where, each, number == 0) for number, each in enumerate(pauses)]
        rss = _answer(publisher)  # everything is out; the fast one is `ahead` behind, the slow one by what fits
        for each in subscribers:
            with suppress(BrokenPipeError):  # it has everything already, and has said so
                each.send("hurry")
        accounts = [_answer(each) for each in subscribers]
        publisher.send("close")
        return Run(messages, _answer(publisher), rss, accounts[0], accounts[1] if len(accounts) > 1 else None)


def _answer(process: Connection) -> Any:
    if not process.poll(QUIET):
        raise TimeoutError("a process of the run says nothing")
    return process.recv()


def _publish(url: str, messages: int, ahead: int, subscribers: int, parent: Connection, taken: Any) -> None:
    least, most = 0, 0
    with ipckit.publisher(url, on_full="drop_old", timeout=OPEN) as publisher:
        parent.send(publisher.url.reveal())
        publisher.wait_for_subscribers(subscribers, timeout=OPEN)
        for number in range(messages):
            if number % _LOOK == 0:
                while number - taken.value > ahead:
                    time.sleep(0.0001)
                if number >= messages // 20:
                    rss = _rss()
                    least, most = least or rss, max(most, rss)
            publisher.publish(number.to_bytes(SIZE, "big"))
        publisher.publish(_END)
        parent.send((least, max(most, _rss())))
        parent.recv()
        parent.send(publisher.stats()["dropped"])


def _subscribe(url: str, pause: float, leads: bool, parent: Connection, taken: Any) -> None:
    received = dropped = wrong = 0
    next_number = 0
    started = ended = 0.0
    with ipckit.subscriber(url, timeout=OPEN) as subscriber:
        while True:
            message = subscriber.recv(timeout=QUIET)
            dropped += message.gap
            if message.value == _END:
                break
            started = started or time.perf_counter()
            number = int.from_bytes(message.value, "big")
            wrong += number != next_number + message.gap
            next_number = number + 1
            received += 1
            if leads and received % _LOOK == 0:
                taken.value = next_number
            if pause and parent.poll(pause):
                pause = 0.0  # everything is out: what waits is taken without a rest
        ended = time.perf_counter()
    parent.send(Account(received, dropped, wrong, max(ended - started, 1e-9)))


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a slow subscriber costs the publisher and a fast one beside it.")
    parser.add_argument("url", nargs="?", default="unix://slow-subscriber", help="default: unix://slow-subscriber")
    parser.add_argument("--messages", type=int, default=1_000_000, help="default: 1,000,000")
    parser.add_argument("--ahead", type=int, default=500, help="messages that the fast one may be behind; default: 500")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="ipckit-") as runtime:
        os.environ.setdefault("IPCKIT_RUNTIME_DIR", runtime)
        print(f"{args.url}: {args.messages:,} messages of {SIZE} bytes, on_full=drop_old", flush=True)
        alone, equal, both = (
            measure(args.url, args.messages, other=other, ahead=args.ahead) for other in (None, 0.0, SLOW)
        )
    print(f"{'':14}{'fast, alone':>16}{'beside a fast':>16}{'beside a slow':>16}{'the slow one':>16}")
    rows: list[tuple[str, Callable[[Account], str]]] = [
        ("received", lambda account: f"{account.received:,}"),
        ("dropped", lambda account: f"{account.dropped:,}"),
        ("messages/s", lambda account: f"{account.received / account.seconds:,.0f}"),
    ]
    for name, show in rows:
        print(f"{name:14}" + "".join(f"{show(each):>16}" for each in (alone.fast, equal.fast, *both.accounts())))
    print(f"publisher     {alone.rss[0] / 2**20:.1f} MiB, grew by {alone.growth:+.1%} alone, {both.growth:+.1%} beside")
    print(
        f"the fast one  keeps {both.rate / equal.rate:.0%} of its rate when the other one is slow instead of fast, "
        f"{both.rate / alone.rate:.0%} of the one that it has alone"
    )
    exact = alone.balances() and equal.balances() and both.balances()
    print(f"accounts      {'exact: received + dropped = published' if exact else 'DO NOT BALANCE'}")
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
