"""tls://: who is let in, who is not, and that nobody keeps others waiting."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time

import pytest
import trustme

import ipckit
from ipckit import aio, errors
from ipckit._spi import Want
from ipckit.transports._frames import FrameDecoder, FrameTooLong, header


class Files:
    """One authority and what it signed, and a second one that nobody trusts."""

    def __init__(self, directory):
        self.directory = directory
        ca, other = trustme.CA(), trustme.CA()
        self.ca = self.write("ca.pem", ca.cert_pem)
        self.other_ca = self.write("other.pem", other.cert_pem)
        self.server = self.issue(ca, "server", "localhost", "127.0.0.1")
        self.client = self.issue(ca, "client", "client@example.org")
        self.stranger = self.issue(other, "stranger", "localhost", "127.0.0.1")

    def write(self, name, blob):
        path = self.directory / name
        path.write_bytes(blob.bytes())
        return str(path)

    def issue(self, ca, name, *identities):
        leaf = ca.issue_cert(*identities)
        return f"cert={self.write(name + '.pem', leaf.cert_chain_pems[0])}&key={self.write(name + '.key', leaf.private_key_pem)}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(tmp_path_factory.mktemp("tls"))


def listening(files, extra="", host="127.0.0.1"):
    return ipckit.listen(f"tls://{host}:0?{files.server}{extra}")


def url_of(listener, query):
    return f"tls://{listener.url.host}?{query}"


def both(listener, url, **options):
    """A client's connect needs the listener's accept to go on: the handshake has two sides."""
    result = []

    def connect():
        try:
            result.append(ipckit.connect(url, timeout=10, **options))
        except errors.IpcError as error:
            result.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    server = None
    deadline = time.monotonic() + 15
    while server is None and time.monotonic() < deadline:
        try:
            server = listener.accept(0.05)
        except errors.Timeout:
            if result and isinstance(result[0], Exception):
                break
    thread.join()
    return result[0], server


@pytest.fixture
def pair(files):
    with listening(files) as listener:
        client, server = both(listener, url_of(listener, f"ca={files.ca}"))
        with client, server:
            yield client, server


def test_round_trips(pair):
    client, server = pair
    assert client.native.version() == "TLSv1.3"
    for size in (0, 1, 16379, 16380, 16381, 100_000, 3 << 20):
        data = os.urandom(size)
        sender = threading.Thread(target=client.send, args=(data, 20))
        sender.start()
        assert server.recv(20) == data
        sender.join()
    server.send(b"back")
    assert client.recv(5) == b"back"
    assert server.peer.address.startswith("127.0.0.1:")


def test_closed_in_order(pair):
    client, server = pair
    server.send(b"never read")
    client.send_many([b"%d" % i for i in range(100)], 5)
    client.close()
    assert [int(m) for m in server] == list(range(100))
    for _ in range(2):
        with pytest.raises(errors.PeerClosed):
            server.recv(5)
    with pytest.raises(errors.PeerClosed):
        server.send(b"x")
    with pytest.raises(errors.Closed):
        client.send(b"x")


def test_an_end_without_close_notify_is_a_death(pair):
    client, server = pair
    client.send(b"last")
    client._link.drop()
    assert server.recv(5) == b"last"
    for _ in range(2):
        with pytest.raises(errors.PeerDied):
            server.recv(5)


def test_killed(files):
    code = """
import ipckit, os, sys
ch = ipckit.connect(sys.argv[1], timeout=20); ch.send(b"hello"); ch.recv()
"""
    with listening(files) as listener:
        process = subprocess.Popen([sys.executable, "-c", code, url_of(listener, f"ca={files.ca}")])
        try:
            with listener.accept(20) as server:
                assert server.recv(10) == b"hello"
                process.send_signal(signal.SIGKILL)
                with pytest.raises(errors.PeerDied):
                    server.recv(10)
        finally:
            process.kill()
            process.wait()


def test_a_send_to_a_closed_peer_loses_none_of_its_messages(pair):
    client, server = pair
    server.send_many([b"%d" % i for i in range(50)], 5)
    server.close()
    with pytest.raises(errors.PeerClosed):
        client.send_many([bytes(1000)] * 10_000, 5)
    assert [int(m) for m in client] == list(range(50))


def test_backpressure_and_both_directions(pair):
    client, server = pair
    data = [os.urandom(2 << 20) for _ in range(4)]
    sent = 0
    while client._link.try_send(data[0]):
        sent += 1
        assert sent < 100
    assert not client._link.try_flush()
    got = []
    threads = [
        threading.Thread(target=lambda: [client.send(d, 20) for d in data]),
        threading.Thread(target=lambda: [server.send(d, 20) for d in data]),
        threading.Thread(target=lambda: got.extend(server.recv(20) for _ in range(sent + len(data)))),
    ]
    for thread in threads:
        thread.start()
    assert [client.recv(20) for _ in data] == data
    for thread in threads:
        thread.join()
    assert got == [data[0]] * sent + data


def test_the_buffer_is_the_callers_again(pair):
    client, server = pair
    buffer = bytearray(b"a" * (8 << 20))
    assert client._link.try_send(buffer)
    assert not client._link.try_flush()
    buffer[:] = b"b" * len(buffer)
    thread = threading.Thread(target=lambda: client.send(b"next", 20))
    thread.start()
    assert server.recv(20) == b"a" * (8 << 20)
    thread.join()
    assert server.recv(20) == b"next"


def test_an_unsent_rest_goes_out_while_receiving(pair):
    client, server = pair
    data = os.urandom(8 << 20)
    assert client._link.try_send(data)
    waiting = threading.Thread(target=lambda: client.recv(20))
    waiting.start()
    assert server.recv(20) == data
    server.send(b"enough")
    waiting.join()


def test_limits(files):
    with listening(files, "&limit=1000") as listener:
        client, server = both(listener, url_of(listener, f"ca={files.ca}"))
        with client, server:
            with pytest.raises(errors.MessageTooLarge):
                server.send(bytes(1001))
            server.send(bytes(1000))
            client.send(bytes(1001))
            with pytest.raises(errors.ProtocolError, match="above the limit"):
                server.recv(5)


@pytest.mark.parametrize(
    ("query", "match"),
    [
        ("", "self.signed|unable to get"),
        ("ca={files.other_ca}", "does not verify"),
        ("ca={files.ca}&server_name=x.org", "x.org"),
    ],
)
def test_the_server_is_verified(files, query, match):
    with listening(files) as listener:
        error, server = both(listener, url_of(listener, query.format(files=files)))
        assert server is None
        assert isinstance(error, errors.AccessDenied), error
        with pytest.raises(errors.AccessDenied, match=match):
            raise error


def test_server_name(files):
    with listening(files) as listener:
        client, server = both(listener, url_of(listener, f"ca={files.ca}&server_name=localhost"))
        with client, server:
            client.send(b"x")
            assert server.recv(5) == b"x"


def test_mutual(files):
    with listening(files, f"&client_ca={files.ca}") as listener:
        client, server = both(listener, url_of(listener, f"ca={files.ca}&{files.client}"))
        with client, server:
            client.send(b"x")
            assert server.recv(5) == b"x"
            assert server.native.getpeercert()["subjectAltName"] == (("email", "client@example.org"),)
        for query in (f"ca={files.ca}", f"ca={files.ca}&{files.stranger}"):
            outcome = []
            thread = threading.Thread(target=connect_and_receive, args=(url_of(listener, query), outcome))
            thread.start()
            with pytest.raises(errors.Timeout):
                listener.accept(1)
            thread.join()
            assert isinstance(outcome[0], errors.ProtocolError | errors.PeerDied), outcome


def connect_and_receive(url, outcome):
    """With TLS 1.3 the client is done before the server has judged its certificate."""
    try:
        with ipckit.connect(url, timeout=5) as channel:
            channel.recv(5)
    except errors.IpcError as error:
        outcome.append(error)


def test_old_versions_are_refused(files):
    with listening(files) as listener:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with pytest.warns(DeprecationWarning, match="TLSv1_1"):
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        plain = socket.create_connection((listener.url.host.name, listener.url.host.port), 5)
        with context.wrap_socket(plain, do_handshake_on_connect=False) as sock:
            with pytest.raises(errors.Timeout):
                listener.accept(0.1)
            with pytest.raises(ssl.SSLError):
                sock.do_handshake()


def test_the_slow_and_the_hostile_keep_nobody_waiting(files, caplog):
    with listening(files, "&handshake=300ms&handshakes=8") as listener:
        address = (listener.url.host.name, listener.url.host.port)
        silent = [socket.create_connection(address, 5) for _ in range(20)]
        garbage = socket.create_connection(address, 5)
        garbage.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        reset = socket.create_connection(address, 5)
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reset.close()
        try:
            client, server = both(listener, url_of(listener, f"ca={files.ca}"))
            with client, server:
                client.send(b"x")
                assert server.recv(5) == b"x"
            assert len(listener._listener._pending) <= 8
            with pytest.raises(errors.Timeout):
                listener.accept(1)
            assert not listener._listener._pending
            assert "oldest" in caplog.text
            assert "no handshake within" in caplog.text
        finally:
            for sock in (*silent, garbage):
                sock.close()


def test_a_server_that_does_not_answer(files):
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        with pytest.raises(errors.NothingListening, match="handshake"):
            ipckit.connect(f"tls://127.0.0.1:{mute.getsockname()[1]}?ca={files.ca}", timeout=0.2)
    with ipckit.listen("tcp://127.0.0.1:0") as tcp:
        answers = threading.Thread(target=lambda: tcp.accept(5).close())
        answers.start()
        with pytest.raises((errors.ProtocolError, errors.NothingListening)):
            ipckit.connect(f"tls://{tcp.url.host}?ca={files.ca}", timeout=1)
        answers.join()


def test_options(files, tmp_path):
    bad = tmp_path / "bad.pem"
    bad.write_text("no certificate")
    for query, match in (
        ("", "certificate"),
        (f"cert={bad}", "cannot be used"),
        ("cert=/no/such/file", "cannot be used"),
        (f"{files.server}&client_ca=/no/such", "client_ca"),
    ):
        with pytest.raises(errors.BadOption, match=match):
            ipckit.listen(f"tls://127.0.0.1:0?{query}")
    for query in ("key=x", "ca=/no/such"):
        with pytest.raises(errors.BadOption):
            ipckit.connect(f"tls://127.0.0.1:1?{query}", timeout=1)
    with listening(files) as listener:
        assert "server.key" not in str(listener.url)


def test_encrypted_key_does_not_ask_at_the_terminal(files, tmp_path):
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key((files.directory / "server.key").read_bytes(), None)
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    with pytest.raises(errors.BadOption, match="cannot be used"):
        ipckit.listen(f"tls://127.0.0.1:0?cert={files.directory}/server.pem&key={locked}")


def test_async(files):
    async def main():
        async with await aio.listen(f"tls://127.0.0.1:0?{files.server}") as listener:
            url = url_of(listener, f"ca={files.ca}")
            for _ in range(10):
                client, server = await asyncio.gather(aio.connect(url, timeout=10), listener.accept(10))
                async with client, server:
                    data = os.urandom(3 << 20)
                    _, got = await asyncio.gather(client.send(data, 10), server.recv(10))
                    assert got == data
                    task = asyncio.create_task(client.recv())
                    await asyncio.sleep(0)
                    task.cancel()
                    await server.send(b"not lost")
                    assert await client.recv(10) == b"not lost"

    asyncio.run(main())


def test_arm_names_one_descriptor(pair):
    client, _ = pair
    assert client._link.arm(Want.RECV).fds == ((client._link.fileno(), 1),)
    assert client._link.arm(Want.SEND).fds == ((client._link.fileno(), 4),)


def test_nothing_stays_open(files):
    before = sorted(os.listdir("/proc/self/fd"))
    with listening(files) as listener:
        idle = socket.create_connection((listener.url.host.name, listener.url.host.port), 5)
        for _ in range(3):
            client, server = both(listener, url_of(listener, f"ca={files.ca}"))
            client.close()
            server.close()
    idle.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_frames_by_the_byte():
    decoder = FrameDecoder(1000)
    stream = b"".join(header(n) + bytes([n % 251]) * n for n in range(50))
    got = []
    for i in range(len(stream)):
        decoder.feed(stream[i : i + 1])
        while (frame := decoder.next()) is not None:
            got.append(frame)
    assert got == [bytes([n % 251]) * n for n in range(50)]
    assert not decoder.inside
    decoder.feed(header(1001)[:3])
    assert decoder.next() is None
    assert decoder.inside
    decoder.feed(header(1001)[3:])
    with pytest.raises(FrameTooLong):
        decoder.next()
