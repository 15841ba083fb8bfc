"""What strangers send to a listener costs them their connection, and nobody else anything.

A *victim* listens in a process of its own, with eight threads that accept and receive. Hypothesis makes up what 200 strangers
say. Meanwhile one client that was there before goes on, and new ones come; afterwards the victim has to be as large as before
(less than a MiB more, measured after as many strangers as a warm-up), with as many descriptors and threads, and nothing but
the library's own warnings in its log. The ring's live mutations are in test_ring_corruption.py, frames below the Channel in
test_stream_link.py, test_rendezvous.py and test_nats_wire.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import select
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import pytest
import trustme
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import ipckit
from ipckit import errors
from ipckit.transports import _mail

MIB = 1 << 20
LIMIT = 64 << 10  # of the victims that are sent frames
MANY = 200

VICTIM = r"""
import gc, json, logging, os, sys, threading
import ipckit

def tell(**what):
    with mutex:
        print(json.dumps(what), flush=True)

def serve():
    for channel in listener:
        with channel:
            end = "PeerClosed"
            try:
                for message in channel:
                    if message.startswith(b"echo"):
                        channel.send(message)
            except ipckit.IpcError as error:
                end = type(error).__name__
        tell(end=end)
        del channel

def resident():
    with open("/proc/self/smaps_rollup") as file:  # exact; VmRSS lags behind by up to half a MiB
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("Rss"))

def crash(args):
    sys.__excepthook__(args.exc_type, args.exc_value, args.exc_traceback)
    os._exit(70)

logging.basicConfig(level=logging.WARNING)
threading.excepthook = crash
mutex = threading.Lock()
listener = ipckit.listen(sys.argv[1])
for _ in range(8):
    threading.Thread(target=serve, daemon=True).start()
tell(url=listener.url.reveal())
for line in sys.stdin:
    gc.collect()
    tell(rss=resident(), fds=len(os.listdir("/proc/self/fd")), threads=len(os.listdir("/proc/self/task")))
os._exit(0)
"""


class Victim:
    def __init__(self, url: str, directory: Path, connect: str = "") -> None:
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-X", "dev", "-c", VICTIM, url],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"MALLOC_ARENA_MAX": "1", "PYTHONMALLOC": "pymalloc"},
            )
        self._said: queue.Queue[dict] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.ends: deque[str] = deque()
        self.url = ipckit._url.parse(self._next("url")["url"])
        self.connect_url = f"{self.url.scheme}://{self.url.host}{connect}" if connect else str(self.url)

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self._said.put(json.loads(line))

    def _next(self, key: str) -> dict:
        while True:
            try:
                said = self._said.get(timeout=20)
            except queue.Empty:
                raise AssertionError(
                    f"the victim says nothing; {self.process.poll()}\n{self.log.read_text()}"
                ) from None
            if "end" in said:
                self.ends.append(said["end"])
            if key in said:
                return said

    def end(self) -> str:
        """How the next connection ended for it."""
        if not self.ends:
            self._next("end")
        return self.ends.popleft()

    def look(self) -> dict:
        assert self.process.stdin
        self.process.stdin.write(b"?\n")
        self.process.stdin.flush()
        return self._next("rss")

    def settled(self, before: dict | None = None) -> dict:
        """How it looks once nothing changes any more, and nothing is left that was not there before."""
        deadline = time.monotonic() + 30
        seen: deque[dict] = deque(maxlen=10)
        while True:
            seen.append(self.look())
            now = [seen[-1][what] for what in ("fds", "threads")]
            then = [(before or seen[-1])[what] for what in ("fds", "threads")]
            still = len(seen) == 10 and all([look["fds"], look["threads"]] == now for look in seen)
            if still and now[0] <= then[0] and now[1] <= then[1]:
                return seen[-1]
            assert time.monotonic() < deadline, f"{now} descriptors and threads, and {then} before"
            time.sleep(0.02)

    def client(self) -> ipckit.Channel[bytes]:
        return ipckit.connect(self.connect_url, timeout=20)

    def close(self) -> None:
        assert self.process.stdin
        assert self.process.stdout
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        self._reader.join(10)
        self.process.stdin.close()
        self.process.stdout.close()

    def unharmed(self) -> None:
        assert self.process.poll() is None
        log = self.log.read_text()
        assert "Traceback" not in log, log[-3000:]
        assert "Exception ignored" not in log, log[-3000:]


def echo(channel: ipckit.Channel[bytes], number: int = 0) -> None:
    message = b"echo %d" % number
    channel.send(message, 20)
    assert channel.recv(20) == message


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """What a tls:// URL takes, to listen and to connect."""
    directory = tmp_path_factory.mktemp("tls")
    ca = trustme.CA()
    leaf = ca.issue_cert("127.0.0.1")
    ca.cert_pem.write_to_path(str(directory / "ca.pem"))
    leaf.private_key_and_cert_chain_pem.write_to_path(str(directory / "server.pem"))
    return f"?cert={directory}/server.pem", f"?ca={directory}/ca.pem", str(directory / "ca.pem")


@pytest.fixture
def victim_of(tmp_path, monkeypatch, authority):
    """Start one for a scheme."""
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))
    victims = []

    def start(scheme: str, options: str = "") -> Victim:
        connect = ""
        if scheme == "tls":
            listen, connect, _ = authority
            options = listen + options.replace("?", "&")
        named = scheme in ("unix", "shm", "fifo", "mq", "zmq+ipc", "grpc+unix")
        victims.append(Victim(f"{scheme}://{'v' if named else '127.0.0.1:0'}{options}", tmp_path, connect))
        return victims[-1]

    yield start
    for victim in victims:
        victim.close()


# -- how a stranger reaches a listener ------------------------------------------------------------------------------


def stream(victim: Victim, directory: Path) -> socket.socket:
    suffix = {"unix": ".sock", "zmq+ipc": ".zmq", "grpc+unix": ".grpc", "shm": ".shm"}.get(victim.url.scheme)
    if suffix is None:
        return socket.create_connection((victim.url.host.name, victim.url.host.port), 20)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if suffix == ".shm" else socket.SOCK_STREAM)
    sock.settimeout(20)
    sock.connect(str(directory / f"v{suffix}"))
    return sock


class Datagrams:
    def __init__(self, victim: Victim, directory: Path) -> None:
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.connect((victim.url.host.name, victim.url.host.port))
        self.send, self.close = self._sock.send, self._sock.close


class Fifo:
    def __init__(self, victim: Victim, directory: Path) -> None:
        self._fd = os.open(directory / "v.fifo", os.O_WRONLY | os.O_NONBLOCK)

    def send(self, chunk: bytes) -> None:
        os.write(self._fd, chunk)

    def close(self) -> None:
        os.close(self._fd)


class Mailbox:
    """The rendezvous mailbox of a mq:// listener."""

    def __init__(self, victim: Victim, directory: Path) -> None:
        import posix_ipc

        from ipckit.transports import _mqueue

        card = json.loads((directory / "v.mq").read_text())
        self._queue = posix_ipc.MessageQueue(_mqueue.path_of(card["queue"]))
        self._queue.block = False
        self._busy = posix_ipc.BusyError

    def send(self, chunk: bytes) -> None:
        with contextlib.suppress(self._busy):
            self._queue.send(chunk[: self._queue.max_message_size])

    def close(self) -> None:
        self._queue.close()


REACH = dict.fromkeys(("unix", "tcp", "tls", "shm", "zmq+tcp", "zmq+ipc", "grpc", "grpc+unix"), stream)
REACH |= {"udp": Datagrams, "fifo": Fifo, "mq": Mailbox}

#: Real openings, so that what is made up gets further than the first byte.
SHM = struct.Struct("=8sIIQ")
CARDS = [
    b'{"version":1,"card":{"queue":"1.1.1","records":"/tmp"},"limit":1}',
    b'{"version":1,"card":{},"limit":1}',
    b"{}",
]
OPENINGS = [
    b"\xff\xff\xff\xfe",
    b"\x00\xff\xff\xff" + b"x" * 100,
    b"\x00\x00\x01",
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    bytes.fromhex("16030100c8010000c40303") + bytes(100),  # a ClientHello, cut off
    bytes.fromhex("160301ffff"),
    SHM.pack(b"wrong!!!", 1, 1, 0),
    SHM.pack(b"ipckring", 9, 1, 0),
    SHM.pack(b"ipckring", 1, 7, 1 << 40),
    SHM.pack(b"ipckring", 1, 1, 0),  # right, and then nothing
    *(b"H" + card for card in CARDS),
    *(b"H" + card + b"\n" for card in CARDS),
    b"H" + bytes(24),
    b"D" + bytes(300),
    b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(54, b"\0"),  # ZMTP, and then
    b"\x02" + struct.pack(">Q", 4 << 30),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    b"\xff\xff\xff\x04\x00\x00\x00\x00\x01",
]
CHUNKS = st.lists(st.one_of(st.sampled_from(OPENINGS), st.binary(max_size=3000)), max_size=4)
LEAVES = st.sampled_from(["close", "reset", "stay"])
MADE_UP = {
    "deadline": None,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


def schemes() -> list[str]:
    return [s for s in REACH if importlib.util.find_spec("ipckit.transports." + s.partition("+")[0])]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scheme", schemes())
def test_strangers_at_the_door(scheme, victim_of, tmp_path):
    victim = victim_of(scheme)
    here: deque = deque()  # those who stay for a while

    def leave(keep: int) -> None:
        while len(here) > keep:
            here.popleft().close()

    with victim.client() as healthy:

        def visit(chunks: list[bytes], how: str) -> None:
            stranger = REACH[scheme](victim, tmp_path)
            with contextlib.suppress(OSError):  # it may have been thrown out already
                for chunk in chunks:
                    stranger.send(chunk)
            if how == "stay":
                here.append(stranger)
                leave(4)
            else:
                if how == "reset" and isinstance(stranger, socket.socket):
                    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stranger.close()
            echo(healthy, len(chunks))

        def many() -> None:
            settings(max_examples=MANY, **MADE_UP)(given(CHUNKS, LEAVES)(visit))()
            for opening in OPENINGS:
                visit([opening], "stay")
            with victim.client() as newcomer:
                echo(newcomer)
            leave(0)
            echo(healthy)

        many()  # a warm-up: pools, caches and buffers that stay
        before = victim.settled()
        many()
        after = victim.settled(before)
    assert after["rss"] - before["rss"] < MIB
    victim.unharmed()


# -- frames: what each connection ends with ---------------------------------------------------------------------------

SIZES = st.sampled_from([0, 1, 5, 4091, 4092, 65531, 65532, LIMIT - 1, LIMIT])
FRAMES = st.one_of(
    st.builds(lambda size: struct.pack(">I", size) + b"x" * size, SIZES),
    st.builds(lambda size, part: struct.pack(">I", size) + b"x" * int(size * part), SIZES, st.floats(0, 1)),
    st.builds(lambda size: struct.pack(">I", size), st.integers(LIMIT, 0xFFFFFFFF)),
    st.just(b"\xff\xff\xff\xff"),
    st.binary(max_size=9),
)


def outcome(data: bytes, how: str, scheme: str) -> str:
    """What docs/wire/stream.md says of a stream that ends like this."""
    at, goodbye = 0, scheme != "tls"
    while len(data) - at >= 4:
        (size,) = struct.unpack_from(">I", data, at)
        if size == 0xFFFFFFFF and goodbye:
            return "PeerClosed"
        if size > LIMIT:
            return "ProtocolError"
        if len(data) - at - 4 < size:
            return "PeerDied"
        at += 4 + size
    if at != len(data):
        return "PeerDied"
    orderly = how == "close" if scheme == "tls" else scheme == "unix"  # the process lives; nobody can be asked on tcp
    return "PeerClosed" if orderly else "PeerDied"


@pytest.mark.timeout(180)
@pytest.mark.parametrize("scheme", ["unix", "tcp", "tls"])
def test_any_bytes_end_as_the_wire_format_says(scheme, victim_of, tmp_path, authority):
    victim = victim_of(scheme, f"?limit={LIMIT}")
    context = ssl.create_default_context(cafile=authority[2])

    with victim.client() as healthy:

        def visit(frames: list[bytes], cut: int, how: str) -> None:
            data = b"".join(frames)
            with contextlib.ExitStack() as stack:
                stranger = stack.enter_context(stream(victim, tmp_path))
                if scheme == "tls":
                    stranger = stack.enter_context(context.wrap_socket(stranger, server_hostname="127.0.0.1"))
                with contextlib.suppress(OSError):  # the victim may have hung up
                    for at in range(0, len(data), cut):
                        stranger.sendall(data[at : at + cut])
                    if scheme == "tls" and how == "close":
                        stranger.unwrap()
                if how == "reset":
                    stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end = victim.end()
            assert end == outcome(data, how, scheme) or (how == "reset" and end == "PeerDied")
            echo(healthy, len(data))

        def many() -> None:
            hows = st.sampled_from(["close", "cut", "reset"])
            strategy = given(st.lists(FRAMES, max_size=5), st.integers(1 << 10, 1 << 18), hows)
            settings(max_examples=MANY, **MADE_UP)(
                example([b"\xff\xff\xff\xfe"], 1 << 10, "close")(
                    example([b"\xff" * 4], 1 << 10, "cut")(strategy(visit))
                )
            )()

        many()
        before = victim.settled()
        many()
        after = victim.settled(before)
    assert after["rss"] - before["rss"] < MIB
    victim.unharmed()


@pytest.mark.parametrize("scheme", ["unix", "tcp", "tls"])
def test_what_is_announced_is_not_allocated(scheme, victim_of, tmp_path, authority):
    """Frames that may be as large as they say, and of which nothing comes."""
    victim = victim_of(scheme, "?limit=1GiB")
    context = ssl.create_default_context(cafile=authority[2])
    with victim.client() as healthy, contextlib.ExitStack() as stack:

        def enter() -> socket.socket:
            stranger = stack.enter_context(stream(victim, tmp_path))
            if scheme == "tls":
                stranger = stack.enter_context(context.wrap_socket(stranger, server_hostname="127.0.0.1"))
            return stranger

        strangers = [enter() for _ in range(5)]
        for stranger in strangers:  # the buffers that every connection has
            stranger.sendall(struct.pack(">I", 60_000) + b"x" * 60_000)
        echo(healthy)
        before = victim.look()
        for stranger in strangers:
            stranger.sendall(struct.pack(">I", 1 << 30) + b"x" * 100)
        for number in range(20):
            echo(healthy, number)
        after = victim.look()
    assert after["rss"] - before["rss"] < MIB
    victim.unharmed()


def test_fragments_that_are_announced_are_not_allocated(victim_of):
    """mq:// and redis:// put large messages together from fragments, one in each level of priority."""
    victim = victim_of("mq")
    with victim.client() as healthy, victim.client() as stranger:
        echo(healthy)
        echo(stranger)
        before = victim.look()
        outbox = stranger._link._outbox
        for level in range(8):
            assert outbox.try_put(_mail._FIRST.pack(_mail.FIRST, level, 16 * MIB) + b"x", priority=level)
        for number in range(20):
            echo(healthy, number)
        after = victim.look()
        assert after["rss"] - before["rss"] < MIB
        assert outbox.try_put(_mail._FIRST.pack(_mail.FIRST, 99, 1 << 62) + b"x")
        assert victim.end() == "ProtocolError"
        with pytest.raises(errors.PeerError):
            stranger.recv(20)
        echo(healthy)
    victim.unharmed()


# -- listeners that are none ------------------------------------------------------------------------------------------

ANSWERS = st.one_of(
    st.sampled_from([b"W" + card for card in CARDS] + [b"W", b"R", b"H", b"W" + b"[" * 2000, b"W\xff", *OPENINGS]),
    st.binary(min_size=1, max_size=2000),
)


class Impostor:
    """Stands where a listener should be, and gives everybody the same answer."""

    def __init__(self) -> None:
        self.answer = b""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(20)

    def _serve(self) -> None:
        while not self._over.is_set():
            self.serve_one()

    def serve_one(self) -> None:
        raise NotImplementedError


class FalseServer(Impostor):
    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self._sock = sock
        sock.settimeout(0.05)

    def serve_one(self):
        with contextlib.suppress(OSError):  # nobody came, or has gone already
            client, _ = self._sock.accept()
            with client:
                client.settimeout(1)
                client.sendall(self.answer)
                client.shutdown(socket.SHUT_WR)
                while client.recv(4096):
                    pass

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._sock.close()


class FalseFifo(Impostor):
    def __init__(self, path: Path) -> None:
        super().__init__()
        os.mkfifo(path, 0o600)
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def serve_one(self):
        if not select.select([self._fd], [], [], 0.05)[0]:
            return
        # More than one where the first had given up before we looked; and each begins with an empty line.
        for line in filter(None, os.read(self._fd, 1 << 16).split(b"\n")):
            card = json.loads(line[1:])["card"]
            with contextlib.suppress(OSError):
                down = os.open(f"{card['directory']}/{card['name']}.down", os.O_WRONLY | os.O_NONBLOCK)
                os.write(down, self.answer)
                os.close(down)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        os.close(self._fd)


class FalseMailbox(Impostor):
    def __init__(self, url: ipckit.Url) -> None:
        from ipckit.transports import mq

        super().__init__()
        self._post = mq._Post(url, mq.MqOptions())
        self._inbox = self._done(self._post.open_rendezvous())

    @staticmethod
    def _done(steps):
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
        raise AssertionError("it waits")

    def serve_one(self):
        frame = self._inbox.try_get()
        if frame is None:
            select.select([self._inbox.native.mqd], [], [], 0.05)
            return
        try:
            outbox, watch = self._done(self._post.open_outbox(json.loads(frame[1:])["card"]))
        except errors.NothingListening:  # it has given up
            return
        outbox.try_put(self.answer)
        outbox.close(None)
        watch.close()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._inbox.close()


def impostor_for(scheme: str, directory: Path) -> tuple[Impostor, str]:
    if scheme == "fifo":
        return FalseFifo(directory / "v.fifo"), "fifo://v"
    if scheme == "mq":
        return FalseMailbox(ipckit._url.parse("mq://v")), "mq://v"
    suffix = {"unix": ".sock", "zmq+ipc": ".zmq", "grpc+unix": ".grpc", "shm": ".shm"}.get(scheme)
    if suffix is None:
        sock = socket.create_server(("127.0.0.1", 0))
        return FalseServer(sock), f"{scheme}://127.0.0.1:{sock.getsockname()[1]}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if scheme == "shm" else socket.SOCK_STREAM)
    sock.bind(str(directory / f"v{suffix}"))
    sock.listen()
    return FalseServer(sock), f"{scheme}://v"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("scheme", [scheme for scheme in schemes() if scheme != "udp"])
def test_a_listener_that_is_none(scheme, tmp_path, monkeypatch, authority):
    """Whatever it answers, `connect` or the first `recv` raises an error of ours, and leaves nothing open."""
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path))
    impostor, url = impostor_for(scheme, tmp_path)
    url += authority[1] if scheme == "tls" else ""
    raised = set()

    visits: list[bytes] = []

    def visit(answer: bytes) -> None:
        visits.append(answer)
        impostor.answer = answer
        with pytest.raises(errors.IpcError) as caught:
            talk(url)
        raised.add(type(caught.value))

    strategy = settings(max_examples=20, **MADE_UP)(given(ANSWERS)(visit))
    with impostor:
        strategy()
        before = open_files()
        visits.clear()
        strategy()
        deadline = time.monotonic() + 20
        # zmq and grpc close theirs a little later. gRPC opens some for itself, when it likes; a leak would be one for each visit.
        own = len(visits) // 2 if scheme.startswith("grpc") else 0
        while open_files() > before + own:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert raised & {errors.ProtocolError, errors.NothingListening}


def talk(url: str) -> None:
    with ipckit.connect(url, timeout=0.1) as channel:
        while True:
            channel.recv(10)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


MISTAKEN = """
import ipckit, sys
for _ in range(20):
    try:
        ipckit.connect(sys.argv[1], timeout=0.1).close()
    except ipckit.IpcError:
        pass
"""


def test_a_server_of_another_kind_does_not_end_the_process():
    """Any bytes but 0xff begin an old ZMTP, and libzmq aborts if that comes while the socket is closing."""
    pytest.importorskip("zmq")
    sock = socket.create_server(("127.0.0.1", 0))
    with FalseServer(sock) as server:
        server.answer = b"220 mail.example ESMTP ready, and as long as a banner may be; help yourself\r\n" * 3
        url = f"zmq+tcp://127.0.0.1:{sock.getsockname()[1]}"
        done = subprocess.run([sys.executable, "-c", MISTAKEN, url], capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
