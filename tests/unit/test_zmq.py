"""zmq://: what the contract suite does not look at. Strangers, liars, libzmq's own habits, and what is left behind."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import ipckit
from ipckit import aio, errors

zmq = pytest.importorskip("zmq")

HELLO = struct.pack(">cBIQIQ", b"H", 1, 1000, 1 << 20, 1000, 1 << 20)


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(params=["zmq+tcp://127.0.0.1:0", "zmq+ipc://name", "zmq+inproc://name"])
def url(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def stock():
    """A zmq socket that knows nothing of ipckit."""
    context = zmq.Context()
    made = []

    def make(kind, port, rcvhwm=1000):
        made.append(context.socket(kind))
        made[-1].setsockopt(zmq.RCVHWM, rcvhwm)
        made[-1].setsockopt(zmq.LINGER, 0)
        made[-1].setsockopt(zmq.RCVTIMEO, 5000)
        made[-1].connect(f"tcp://127.0.0.1:{port}")
        return made[-1]

    yield make
    for each in made:
        each.close()
    context.term()


def meet(url, options=""):
    with ipckit.listen(url + options) as listener:
        client = ipckit.connect(str(listener.url), timeout=5)
        return client, listener.accept(5)


def open_files():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def settled(count, seconds=5.0):
    """Wait for libzmq's reaper: it closes descriptors in its own time."""
    deadline = time.monotonic() + seconds
    while open_files() > count and time.monotonic() < deadline:
        time.sleep(0.01)
    return open_files()


# -- names --------------------------------------------------------------------------------------------------------


def test_importing_the_transport_does_not_import_the_library():
    program = (
        "import sys, ipckit.transports.zmq, ipckit; ipckit.capabilities('zmq+tcp://h:1'); print('zmq' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "False"


def test_capabilities_differ_by_scheme():
    tcp, ipc, inproc = (ipckit.capabilities(f"zmq+{kind}://x:1".rstrip(":1")) for kind in ("tcp", "ipc", "inproc"))
    assert (tcp.cross_machine, ipc.cross_machine, inproc.cross_process) == (True, False, False)
    assert (tcp.peer_credentials, ipc.peer_credentials) == (False, True)
    assert not tcp.encrypted
    with pytest.raises(errors.Unsupported):
        ipckit.listen("zmq+inproc://x", require={"cross_process"})


@pytest.mark.parametrize("bad", ["zmq+tcp://h", "zmq+tcp://h:1/path", "zmq+ipc://a:1", "zmq+inproc://a/b"])
def test_bad_urls(bad):
    for verb in (ipckit.listen, ipckit.connect):
        with pytest.raises(errors.BadUrl):
            verb(bad, timeout=0.1)


def test_options_that_a_scheme_cannot_honour_are_refused():
    with pytest.raises(errors.BadOption, match="keepalive"):
        ipckit.listen("zmq+ipc://x?keepalive=1s")
    with pytest.raises(errors.BadOption, match="24d"):
        ipckit.listen("zmq+tcp://127.0.0.1:0?linger=30d")
    with pytest.raises(errors.BadOption, match="rcvhwm"):
        ipckit.listen("zmq+ipc://x?rcvhwm=0")


def test_the_socket_is_closed_to_others(runtime):
    with ipckit.listen("zmq+ipc://mine"):
        found = os.stat(runtime / "mine.zmq")
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
    assert os.listdir(runtime) == []


def test_a_live_path_is_not_taken_over(tmp_path):
    """libzmq by itself unlinks whatever is there and binds."""
    path = tmp_path / "theirs"
    context = zmq.Context()
    other = context.socket(zmq.ROUTER)
    other.bind(f"ipc://{path}")
    try:
        with pytest.raises(errors.AddressInUse):
            ipckit.listen(f"zmq+ipc://{path}")
        assert path.exists()
    finally:
        other.close()
        context.term()


def test_a_path_of_any_length(tmp_path):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    client, server = meet(f"zmq+ipc://{deep}/name")
    with client, server:
        client.send(b"far down")
        assert server.recv(5) == b"far down"


def test_ipv6():
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    client, server = meet("zmq+tcp://[::1]:0")
    with client, server:
        client.send(b"six")
        assert server.recv(5) == b"six"


def test_nobody_is_let_in_after_close_while_channels_live(url):
    client, server = meet(url)  # which closes the listener
    with client, server:
        where = str(server.url)
        with pytest.raises(errors.NothingListening):
            ipckit.connect(where, timeout=0.3)
        client.send(b"still here")
        assert server.recv(5) == b"still here"
    ipckit.listen(where).close()  # and now the name is free


def test_a_stock_zmq_server_is_no_listener():
    context = zmq.Context()
    pull = context.socket(zmq.PULL)
    port = pull.bind_to_random_port("tcp://127.0.0.1")
    try:
        with pytest.raises(errors.NothingListening):
            ipckit.connect(f"zmq+tcp://127.0.0.1:{port}", timeout=0.3)
    finally:
        pull.close()
        context.term()


def test_connect_before_anybody_accepts():
    """One thread may do both ends."""
    with ipckit.listen("zmq+ipc://slow") as listener:
        first, second = (ipckit.connect("zmq+ipc://slow", timeout=5) for _ in range(2))
        first.send(b"1")
        second.send(b"2")
        with listener.accept(5) as one, listener.accept(5) as two:
            assert {one.recv(5), two.recv(5)} == {b"1", b"2"}
            one.send(b"back")
        first.close()
        second.close()


def test_a_listener_that_closes_tells_those_it_did_not_accept(url):
    listener = ipckit.listen(url)
    with ipckit.connect(str(listener.url), timeout=5) as client:
        listener.close()
        with pytest.raises(errors.PeerError):
            client.recv(5)


# -- the other end ------------------------------------------------------------------------------------------------


def test_who_is_there():
    client, server = meet("zmq+ipc://who")
    with client, server:
        client.send(b"x")
        server.recv(5)
        server.send(b"y")
        client.recv(5)
        for end in (client, server):
            assert (end.peer.pid, end.peer.uid) == (os.getpid(), os.getuid())


def test_any_dealer_can_talk_to_us(stock):
    with ipckit.listen("zmq+tcp://127.0.0.1:0") as listener:
        dealer = stock(zmq.DEALER, listener.url.host.port)
        dealer.send_multipart([b"", HELLO])
        with listener.accept(5) as server:
            assert dealer.recv_multipart()[1][:1] == b"W"
            dealer.send(b"hello")
            assert server.recv(5) == b"hello"
            server.send(b"world")
            assert dealer.recv_multipart() == [b"world"]
            dealer.send_multipart([b"", b"B"])
            with pytest.raises(errors.PeerClosed):
                server.recv(5)


def test_other_kinds_of_sockets_do_not_get_in(stock):
    with ipckit.listen("zmq+tcp://127.0.0.1:0") as listener:
        for kind in (zmq.PAIR, zmq.PUSH, zmq.SUB):
            stock(kind, listener.url.host.port)
        with pytest.raises(errors.Timeout):
            listener.accept(0.2)


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, os.urandom(4096)])
def test_noise_costs_its_own_connection(noise):
    with ipckit.listen("zmq+tcp://127.0.0.1:0") as listener:
        client = ipckit.connect(str(listener.url), timeout=5)
        with client, listener.accept(5) as server, socket.create_connection(("127.0.0.1", listener.url.host.port)) as s:
            s.sendall(noise)
            client.send(b"undisturbed")
            assert server.recv(5) == b"undisturbed"
            with pytest.raises(errors.Timeout):
                listener.accept(0.1)


def test_a_flood_of_noise_does_not_stop_the_library():
    """A monitor that nobody reads blocks libzmq's one thread as soon as its pipe is full, at about a thousand events."""
    with ipckit.listen("zmq+tcp://127.0.0.1:0") as listener:
        for _ in range(1500):
            with socket.create_connection(("127.0.0.1", listener.url.host.port)) as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client, server = meet("zmq+ipc://elsewhere")
        with client, server:
            client.send(b"alive")
            assert server.recv(10) == b"alive"


LIES = {
    "credit for what was never sent": [b"", struct.pack(">cQQ", b"A", 5, 5)],
    "a credit cut short": [b"", b"A"],
    "a second greeting": [b"", HELLO],
    "a kind that does not exist": [b"", b"?"],
    "an empty control message": [b"", b""],
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_its_own_link(stock, lie):
    with ipckit.listen("zmq+tcp://127.0.0.1:0") as listener:
        client = ipckit.connect(str(listener.url), timeout=5)
        with client, listener.accept(5) as honest:
            dealer = stock(zmq.DEALER, listener.url.host.port)
            dealer.send_multipart([b"", HELLO])
            with listener.accept(5) as server:
                dealer.send(b"before")
                dealer.send_multipart(LIES[lie])
                assert server.recv(5) == b"before"
                for _ in range(2):
                    with pytest.raises(errors.ProtocolError):
                        server.recv(5)
                assert dealer.recv_multipart()[1][:1] == b"W"
                assert dealer.recv_multipart()[1][:1] == b"R"
            client.send(b"undisturbed")
            assert honest.recv(5) == b"undisturbed"


def test_a_listener_that_sends_surplus_parts_garbles_nothing_but_its_own():
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.RCVTIMEO, 5000)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    try:
        with ipckit.connect(f"zmq+tcp://127.0.0.1:{port}", timeout=5) as client:
            name = router.recv_multipart()[0]
            router.send_multipart([name, b"first", b"surplus"])
            assert client.recv(5) == b"first"
            with pytest.raises(errors.Timeout):
                client.recv(0.1)
            router.send_multipart([name, b"second"])
            assert client.recv(5) == b"second"
    finally:
        router.close(linger=0)
        context.term()


@pytest.mark.parametrize("surplus", [[b"x"], [b"x", b"y"], [b"", b"", b"z"], [b"a"] * 50])
def test_surplus_parts_never_reach_another_link(stock, surplus):
    with ipckit.listen("zmq+tcp://127.0.0.1:0") as listener:
        client = ipckit.connect(str(listener.url), timeout=5)
        with client, listener.accept(5) as honest:
            dealer = stock(zmq.DEALER, listener.url.host.port)
            dealer.send_multipart([b"", HELLO])
            with listener.accept(5) as server:
                for number in range(20):
                    dealer.send_multipart([b"first", *surplus])
                    client.send(b"%d" % number)
                    assert honest.recv(5) == b"%d" % number
                with pytest.raises(errors.ProtocolError, match="parts"):
                    server.recv(5)


def test_who_ignores_the_window_is_stopped(stock):
    with ipckit.listen("zmq+tcp://127.0.0.1:0?rcvhwm=20") as listener:
        dealer = stock(zmq.DEALER, listener.url.host.port)
        dealer.send_multipart([b"", HELLO])
        with listener.accept(5) as server:
            for _ in range(40):
                dealer.send(b"more")
            with pytest.raises(errors.Timeout):
                listener.accept(0.2)  # reads what is there, for everybody
            received = []
            with pytest.raises(errors.ProtocolError, match="more than"):
                received.extend(server.recv(5) for _ in range(40))
            assert len(received) <= 20


def test_a_length_of_4_gib_is_refused_before_memory_is_taken():
    with ipckit.listen("zmq+tcp://127.0.0.1:0?limit=64KiB") as listener:
        with socket.create_connection(("127.0.0.1", listener.url.host.port)) as s:
            s.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(54, b"\0")[: 64 - 10].ljust(54, b"\0"))
            ready = b"\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x00"
            s.sendall(b"\x04" + bytes([len(ready)]) + ready)
            s.sendall(b"\x02" + struct.pack(">Q", 4 << 30))
            s.settimeout(5)
            while s.recv(4096):  # it says hello itself, and hangs up
                pass
        client = ipckit.connect(str(listener.url), timeout=5)
        with client, listener.accept(5) as server:
            client.send(b"next")
            assert server.recv(5) == b"next"


# -- messages -----------------------------------------------------------------------------------------------------


def test_too_large_for_either_end():
    with ipckit.listen("zmq+ipc://size?limit=1000") as listener:
        client = ipckit.connect("zmq+ipc://size", timeout=5)
        with client, listener.accept(5) as server:
            client.send(bytes(1000))
            assert len(server.recv(5)) == 1000
            server.send(b"")
            client.recv(5)
            with pytest.raises(errors.MessageTooLarge, match="1000"):
                client.send(bytes(1001))
            client.send(b"still good")
            assert server.recv(5) == b"still good"


@pytest.mark.parametrize("options", ["?rcvhwm=1", "?sndhwm=1", "?window=1", "?sndhwm=3&rcvhwm=7&window=1000"])
def test_small_windows_move_everything(url, options):
    client, server = meet(url, options)
    with client, server:
        received = []
        thread = threading.Thread(target=lambda: received.extend(server.recv(10) for _ in range(300)))
        thread.start()
        for number in range(300):
            client.send(number.to_bytes(2, "big") * (number % 50), 10)
        thread.join(20)
        assert received == [number.to_bytes(2, "big") * (number % 50) for number in range(300)]


def test_the_window_counts_bytes(url):
    client, server = meet(url, "?window=2MiB")
    with client, server:
        sent = client.send_many([bytes(500_000)] * 20, timeout=0.5)
        assert 3 <= sent <= 6
        assert [len(server.recv(5)) for _ in range(sent)] == [500_000] * sent


def test_what_was_sent_before_close_arrives(url):
    """Also when the receiver has not begun to read: libzmq alone would drop what its pipe does not hold (ipc)."""
    with ipckit.listen(url) as listener:
        client = ipckit.connect(str(listener.url), timeout=5)
        server = listener.accept(5)
    count = client.send_many([bytes(5000)] * 1000, timeout=1)
    client.close()
    time.sleep(0.3)
    with server:
        assert sum(len(server.recv(5)) for _ in range(count)) == 5000 * count
        with pytest.raises(errors.PeerClosed):
            server.recv(5)


@pytest.mark.parametrize("side", ["listener", "client"])
def test_what_was_sent_before_close_arrives_though_the_peer_still_sends(url, side):
    """A port that is unbound drops it; so does a kernel that answers with a reset what nobody will read."""
    for _ in range(3):
        client, server = meet(url)
        leaves, stays = (server, client) if side == "listener" else (client, server)

        def chatter(end=stays):
            with contextlib.suppress(errors.IpcError):
                while True:
                    end.send(bytes(60_000), 5)

        def talk(end=leaves):
            for _ in range(200):
                end.send(bytes(50_000), 20)
            end.close()

        threads = [threading.Thread(target=each) for each in (chatter, talk)]
        for thread in threads:
            thread.start()
        assert sum(len(stays.recv(20)) for _ in range(200)) == 200 * 50_000
        with pytest.raises(errors.PeerClosed):
            stays.recv(20)
        for thread in threads:
            thread.join(30)
        stays.close()


def test_a_peer_that_sends_and_is_slow_to_read_gets_everything(stock):
    """What the kernel still holds for it survives what it sent and nobody read."""
    with ipckit.listen("zmq+tcp://127.0.0.1:0") as listener:
        dealer = stock(zmq.DEALER, listener.url.host.port, rcvhwm=1)
        dealer.send_multipart([b"", struct.pack(">cBIQIQ", b"H", 1, 1000, 1 << 30, 1000, 1 << 20)])
        server = listener.accept(5)
        assert dealer.recv_multipart()[1][:1] == b"W"
    assert server.send_many([bytes(50_000)] * 400, 5) == 400
    server.close()
    for _ in range(200):
        dealer.send(bytes(60_000))
    assert sum(len(dealer.recv()) for _ in range(400)) == 400 * 50_000
    assert dealer.recv_multipart() == [b"", b"B"]


def test_a_port_is_free_when_its_last_channel_is_closed():
    """Though the connection is still being ended in good order."""
    client, server = meet("zmq+tcp://127.0.0.1:0")
    with client:
        server.send_many([bytes(50_000)] * 100, 5)
        server.close()
        ipckit.listen(str(server.url)).close()
        assert sum(len(client.recv(5)) for _ in range(100)) == 100 * 50_000


def test_what_was_sent_before_exit_arrives():
    with ipckit.listen("zmq+ipc://exit") as listener:
        program = "import ipckit\nc = ipckit.connect('zmq+ipc://exit', timeout=9)\nc.send_many([bytes(100000)] * 50)\nc.close()"
        child = subprocess.Popen([sys.executable, "-W", "error", "-c", program])
        with listener.accept(10) as server:
            assert sum(len(server.recv(10)) for _ in range(50)) == 5_000_000
            with pytest.raises(errors.PeerClosed):
                server.recv(10)
        assert child.wait(10) == 0


def test_exit_with_open_endpoints_does_not_hang():
    program = """
import threading, ipckit
L = ipckit.listen('zmq+ipc://left')
a, b = [ipckit.connect('zmq+ipc://left', timeout=9) for _ in range(2)]
x, y = L.accept(5), L.accept(5)
threading.Thread(target=a.recv, daemon=True).start()
threading.Thread(target=x.recv, daemon=True).start()
import os, sys; sys.unraisablehook = lambda *_: None
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=20).returncode == 0


# -- threads, tasks, processes ------------------------------------------------------------------------------------


def test_both_directions_at_once(url):
    client, server = meet(url)
    with client, server:
        got = {}

        def pump(name, mine):
            sender = threading.Thread(target=lambda: [mine.send(b"%d" % n, 20) for n in range(2000)])
            sender.start()
            got[name] = [mine.recv(20) for _ in range(2000)]
            sender.join()

        threads = [threading.Thread(target=pump, args=pair) for pair in (("client", client), ("server", server))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert got["client"] == got["server"] == [b"%d" % n for n in range(2000)]


def test_many_links_of_one_listener(url):
    with ipckit.listen(url) as listener:
        clients = [ipckit.connect(str(listener.url), timeout=10) for _ in range(10)]
        servers = [listener.accept(10) for _ in clients]

        def echo(channel):
            for message in channel:
                channel.send(message)

        threads = [threading.Thread(target=echo, args=(server,)) for server in servers]
        for thread in threads:
            thread.start()
        for round_ in range(30):
            for number, client in enumerate(clients):
                client.send(b"%d %d" % (round_, number))
            for number, client in enumerate(clients):
                assert client.recv(10) == b"%d %d" % (round_, number)
        for client in clients:
            client.close()
        for thread, server in zip(threads, servers, strict=True):
            thread.join(10)
            server.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ipckit-zmq"]


def test_a_link_that_waits_does_not_hide_newcomers(url):
    """It waits inside libzmq, and takes from the socket what is for others."""
    with ipckit.listen(url) as listener:
        first = ipckit.connect(str(listener.url), timeout=5)
        server = listener.accept(5)
        waiting = threading.Thread(target=lambda: server.recv(10))
        waiting.start()
        time.sleep(0.05)
        second = ipckit.connect(str(listener.url), timeout=5)
        with listener.accept(5) as other, second:
            second.send(b"me too")
            assert other.recv(5) == b"me too"
            other.send(b"yes")
            assert second.recv(5) == b"yes"
        first.send(b"done")
        waiting.join(5)
        assert not waiting.is_alive()
        first.close()
        server.close()


def test_tasks_on_one_loop(url):
    async def main():
        async with await aio.listen(url) as listener:
            clients = [await aio.connect(str(listener.url), timeout=5) for _ in range(3)]
            servers = [await listener.accept(5) for _ in clients]

            async def echo(channel):
                async for message in channel:
                    await channel.send(message)

            tasks = [asyncio.create_task(echo(server)) for server in servers]
            for number in range(50):
                for client in clients:
                    await client.send(b"%d" % number)
                for client in clients:
                    assert await client.recv(5) == b"%d" % number
            for client in clients:
                await client.close()
            await asyncio.wait_for(asyncio.gather(*tasks), 5)
            for server in servers:
                await server.close()

    asyncio.run(main())


def test_timeouts_change_from_call_to_call():
    client, server = meet("zmq+ipc://times")
    with client, server:
        for timeout in (0.2, 0, 0.05):
            begin = time.monotonic()
            with pytest.raises(errors.Timeout):
                client.recv(timeout)
            assert time.monotonic() - begin >= timeout
        server.send(b"x")
        assert client.recv() == b"x"


def test_ctrl_c_ends_a_recv_and_leaves_the_channel_good():
    client, server = meet("zmq+ipc://interrupt")
    with client, server:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            client.recv(10)
        server.send(b"after")
        assert client.recv(5) == b"after"


def test_nothing_is_left_behind(url):
    client, server = meet(url)  # libzmq's threads and their descriptors stay for the process; so once before
    client.close()
    server.close()
    before = settled(0, 0.5)
    threads = threading.active_count()
    for _ in range(5):
        with ipckit.listen(url) as listener:
            clients = [ipckit.connect(str(listener.url), timeout=5) for _ in range(3)]
            servers = [listener.accept(5) for _ in clients]
            with pytest.raises(errors.Timeout):
                servers[0].recv(0.01)
            for end in clients + servers:
                end.close()
        with pytest.raises(errors.NothingListening):
            ipckit.connect(str(listener.url), timeout=0.05)
    assert settled(before) <= before
    assert threading.active_count() == threads


def test_a_forked_child_opens_its_own():
    client, server = meet("zmq+ipc://parent")
    with client, server:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                try:
                    client.send(b"x")
                except errors.ForkedError:
                    mine, theirs = meet("zmq+ipc://child")
                    mine.send(b"ours")
                    code = 0 if theirs.recv(5) == b"ours" else 2
                    mine.close()
                    theirs.close()
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        client.send(b"undisturbed")
        assert server.recv(5) == b"undisturbed"


def test_a_forked_child_does_not_keep_the_connection_alive():
    """The parent is killed; its child still has copies of every descriptor."""
    program = """
import os, sys, time, ipckit
c = ipckit.connect('zmq+ipc://family', timeout=9)
c.send(b'%d' % os.getpid())
time.sleep(.1)
if os.fork() == 0:
    c.peer
    sys.stdout.write('forked'); sys.stdout.flush(); os.close(1); time.sleep(30); os._exit(0)
time.sleep(30)
"""
    with ipckit.listen("zmq+ipc://family") as listener:
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, process_group=0
        )
        try:
            with listener.accept(10) as server:
                assert server.recv(10) == b"%d" % child.pid
                assert child.stdout.read(6) == b"forked"
                child.kill()
                with pytest.raises(errors.PeerDied) as caught:
                    server.recv(5)
                assert caught.value.pid == child.pid
        finally:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            child.stdout.close()
