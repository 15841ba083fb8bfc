"""Abuse a listener in every way that a stranger can, and see what its healthy clients notice, and what it keeps.

    python tests/crash/listener_abuse.py --malformed 10000 --idle 1000 --flood 100000 --seed 1

Three processes: the server; two clients that call without a pause and time each call, one of them an ipckit, the other one of the
seed's; and the strangers. Each abuse is held to:

    every call of the healthy clients is answered, and rightly
    afterwards the server has as many descriptors and threads as before, and as much memory (after a warm-up)

and the table says what it cost the healthy: their p99 beside the p99 of a quiet server. `--most 2` makes that a condition; it
wants a quiet machine with a processor for each of the three.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import random
import resource
import select
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ipckit

URL = "unix://abused"
MIB = 1 << 20
#: What the victim may have grown by, in bytes: a page here and there, whatever the number of strangers.
SLACK = MIB
#: What the server allows each client; the healthy ones stay below.
RATE, BURST = 2000, 200
WORKERS = 8


class Calculator(ipckit.Service):
    def add(self, a: int, b: int) -> int:
        return a + b

    def hold(self) -> None:
        """Until the process ends. Who waits for it is not idle, however long a busy machine keeps it from calling."""
        threading.Event().wait()


def path() -> str:
    return f"{os.environ['IPCKIT_RUNTIME_DIR']}/abused.sock"


def many_descriptors() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


# -- the server --------------------------------------------------------------------------------------------------------


def resident() -> int:
    """In bytes; without pages that the allocator keeps, touched here and there, for the next one: they look like a leak."""
    with contextlib.suppress(AttributeError):  # glibc's
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Rss"))


def victim(timeout: float) -> None:
    """Answers every line with its sizes and statistics."""
    many_descriptors()
    logging.getLogger("ipckit").addHandler(logging.NullHandler())
    logging.lastResort = None
    options: dict[str, Any] = {"workers": WORKERS, "requests_per_second": RATE, "burst_size": BURST}
    options["connection_timeout"] = timeout
    with ipckit.Server(URL, Calculator(), **options) as server:
        say(ready=True)
        for _ in sys.stdin:
            gc.collect()
            fds, threads = (len(os.listdir(f"/proc/self/{each}")) for each in ("fd", "task"))
            say(rss=resident(), fds=fds, threads=threads, stats=dict(server.stats()))


# -- the healthy clients -----------------------------------------------------------------------------------------------


class Seed:
    """A client of the seed."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(60)
        self._sock.connect(path())

    def say(self, a: int, b: int) -> None:
        self.write({"target": "calculator", "message_type": "add", "payload": {"a": a, "b": b}, "expects_reply": True})

    def write(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self._sock.sendall(struct.pack(">I", len(data)) + data)

    def hear(self) -> Any:
        (size,) = struct.unpack(">I", self._sock.recv(4, socket.MSG_WAITALL))
        return json.loads(self._sock.recv(size, socket.MSG_WAITALL))

    def add(self, a: int, b: int) -> int:
        self.say(a, b)
        result: int = self.hear()["payload"]
        return result

    def close(self) -> None:
        self._sock.close()


def healthy() -> None:
    """Calls all the time; a line begins or ends the time that counts."""
    seed = Seed()
    seed.write(
        {"target": "calculator", "message_type": "hold", "payload": {}, "request_id": "hold", "expects_reply": True}
    )
    clients: list[Any] = [ipckit.client(URL, Calculator, timeout=60), seed]
    say(ready=True)
    times: list[float] = []
    wrong = 0
    while True:
        for client in clients:
            a = len(times)
            began = time.perf_counter()
            wrong += client.add(a, 1) != a + 1
            times.append(time.perf_counter() - began)
        if select.select([sys.stdin], [], [], 0.001)[0]:  # below the rate limit
            line = os.read(sys.stdin.fileno(), 100)
            if line == b"stop\n":
                times.sort()
                say(calls=len(times), wrong=wrong, p50=times[len(times) // 2], p99=times[len(times) * 99 // 100])
            elif not line:
                break
            times.clear()
            wrong = 0
    for client in clients:
        client.close()


# -- the strangers -----------------------------------------------------------------------------------------------------


def connected() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    while True:
        try:
            sock.connect(path())
        except BlockingIOError:  # the backlog is full
            time.sleep(0.001)
        else:
            return sock


def first_frame(dice: random.Random) -> bytes:
    noise = dice.randbytes(dice.randrange(1, 200))
    kind = dice.randrange(8)
    if kind == 0:
        return noise
    if kind == 7:
        return b"\0\0\0\0"[: dice.randrange(1, 5)]
    if kind == 1:
        return struct.pack(">I", dice.randrange(1 << 24, 1 << 32)) + noise  # a length above every limit
    if kind == 2:
        return struct.pack(">I", len(noise)) + bytes((dice.choice((0, 3, 9 + 2, 0x41, 0xFF)),)) + noise
    if kind == 3:
        return struct.pack(">I", len(noise) + 1) + b"\xc1" + noise  # ours, by the first byte
    if kind == 4:
        return struct.pack(">I", len(noise)) + bytes((dice.choice((1, 2)), dice.randrange(10, 256))) + noise
    if kind == 5:
        return struct.pack(">I", len(noise) + 1) + dice.choice((b"{", b"\x80", b"\xde")) + noise
    return struct.pack(">I", 1 << 20) + b"{" + noise  # and no more of it


def malformed(count: int, dice: random.Random) -> None:
    for _ in range(count):
        with connected() as sock, contextlib.suppress(OSError):
            sock.sendall(first_frame(dice))
            if dice.random() < 0.5:
                sock.shutdown(socket.SHUT_WR)
                sock.settimeout(0.005)
                sock.recv(1 << 16)


def idle(count: int, dice: random.Random) -> None:
    """All of them at once: they say nothing, or the beginning of something, and wait to be let go."""
    socks = [connected() for _ in range(count)]
    for sock in socks:
        with contextlib.suppress(BrokenPipeError):  # it was let go before the last one came
            sock.sendall(b"\0\0\0\x50{"[: dice.randrange(6)])
    for sock in socks:
        with contextlib.suppress(OSError):
            while sock.recv(1 << 16):
                pass
        sock.close()


def flood(count: int, dice: random.Random) -> None:
    client = Seed()
    refused = 0

    def send() -> None:
        for _ in range(count):
            client.say(1, 1)

    sender = threading.Thread(target=send)
    sender.start()
    for _ in range(count):
        refused += client.hear()["error"] is not None
    sender.join()
    client.close()
    if count > 2 * BURST and not refused:
        raise AssertionError("nothing was refused")


ABUSES: dict[str, Callable[[int, random.Random], None]] = {"malformed": malformed, "idle": idle, "flood": flood}


# -- all together ------------------------------------------------------------------------------------------------------


class Role:
    """This script as another process."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.hear()

    def tell(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        assert line, f"a process ended with {self._process.wait(10)}"
        return json.loads(line)

    def stop(self) -> None:
        self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        self._process.wait(10)


@dataclass
class Report:
    faults: list[str] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([*self.rows, *(f"FAULT: {each}" for each in self.faults)])


@contextlib.contextmanager
def roles(timeout: float) -> Iterator[tuple[Role, Role]]:
    server = Role("--role", "victim", "--timeout", str(timeout))
    try:
        clients = Role("--role", "healthy")
        try:
            yield server, clients
        finally:
            clients.stop()
    finally:
        server.stop()


def sizes(server: Role, fds: int = 1 << 30) -> Any:
    """When the strangers are gone, and no more than `fds` descriptors are left; or after a minute."""
    deadline = time.monotonic() + 60
    while True:
        server.tell("sizes")
        told = server.hear()
        settled = told["stats"]["connections_active"] == 2 and told["fds"] <= fds
        if settled or time.monotonic() > deadline:
            return told
        time.sleep(0.01)


def timed(clients: Role, work: Callable[[], None]) -> Any:
    clients.tell("go")
    work()
    clients.tell("stop")
    return clients.hear()


def run(counts: dict[str, int], seed: int, timeout: float = 1.0) -> Report:
    """Each abuse, so many times. `timeout`: how long the server suffers a client that says nothing, in seconds."""
    many_descriptors()
    report = Report()
    with roles(timeout) as (server, clients):
        quiet = timed(clients, lambda: time.sleep(1))
        report.rows.append(f"{'quiet':10} {'':>7}  p50 {quiet['p50'] * 1e6:7.0f} us  p99 {quiet['p99'] * 1e6:7.0f} us")
        for name, count in counts.items():
            dice = random.Random(f"{seed} {name}")
            # What the first ones cost is not lost: it is used again. Those who come at once all come twice before.
            for _ in range(2 if name == "idle" else 1):
                ABUSES[name](count if name == "idle" else max(count // 4, 1), dice)
            before = sizes(server)
            told = timed(clients, lambda name=name, count=count, dice=dice: ABUSES[name](count, dice))
            after = sizes(server, before["fds"])
            report.ratios[name] = told["p99"] / quiet["p99"]
            report.rows.append(
                f"{name:10} {count:7}  p50 {told['p50'] * 1e6:7.0f} us  p99 {told['p99'] * 1e6:7.0f} us  "
                f"{report.ratios[name]:5.2f} x quiet  rss {(after['rss'] - before['rss']) / 1024:+7.0f} KiB"
            )
            if told["wrong"]:
                report.faults.append(f"{name}: {told['wrong']} of {told['calls']} calls were answered wrongly")
            if after["fds"] > before["fds"]:
                report.faults.append(f"{name}: {before['fds']} descriptors before, {after['fds']} after")
            if after["threads"] > WORKERS + 2:  # the main thread, the watcher
                report.faults.append(f"{name}: {after['threads']} threads")
            if after["rss"] > before["rss"] + SLACK:
                report.faults.append(f"{name}: {after['rss'] - before['rss']} bytes more than before")
            if after["stats"]["connections_active"] != 2:
                report.faults.append(f"{name}: {after['stats']['connections_active']} connections are left")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in (("malformed", 10_000), ("idle", 1000), ("flood", 100_000)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds that an idle client is suffered")
    parser.add_argument("--most", type=float, help="fail if a p99 is more than so many times the quiet one")
    parser.add_argument("--role", choices=["victim", "healthy"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        victim(args.timeout) if args.role == "victim" else healthy()
        return 0
    with tempfile.TemporaryDirectory(prefix="ipckit-") as directory:
        os.environ["IPCKIT_RUNTIME_DIR"] = directory
        report = run({name: getattr(args, name) for name in ABUSES}, args.seed, args.timeout)
    for name, ratio in report.ratios.items():
        if args.most is not None and ratio > args.most:
            report.faults.append(f"{name}: p99 is {ratio:.2f} times the quiet one")
    print(f"seed {args.seed}\n{report}")
    return bool(report.faults)


if __name__ == "__main__":
    sys.exit(main())
