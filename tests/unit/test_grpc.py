"""grpc://: what the contract suite does not look at. Stock clients, TLS, names, gRPC's own habits."""

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import ipckit
from ipckit import aio, errors

grpc = pytest.importorskip("grpc")
trustme = pytest.importorskip("trustme")

METHOD = "/ipckit.v1.Channel/Open"


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("IPCKIT_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture(params=["grpc://127.0.0.1:0", "grpc+unix://name"])
def url(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pki")
    ours, others = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(directory / "ca.pem")
    others.cert_pem.write_to_path(directory / "other.pem")
    ours.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(directory / "server.pem")
    ours.issue_cert("elsewhere.example").private_key_and_cert_chain_pem.write_to_path(directory / "elsewhere.pem")
    ours.issue_cert("client@example.org").private_key_and_cert_chain_pem.write_to_path(directory / "client.pem")
    return directory


def meet(url, theirs=""):
    with ipckit.listen(url) as listener:
        client = ipckit.connect(str(listener.url.reveal()) + theirs, timeout=10)
        return client, listener.accept(10)


# -- the wire -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 300_000])
def test_frames_are_bytes_values(size):
    wrappers = pytest.importorskip("google.protobuf.wrappers_pb2")
    from ipckit.transports._grpc_link import unwrap, wrap

    frame = os.urandom(size)
    assert wrap(frame) == wrappers.BytesValue(value=frame).SerializeToString()
    assert unwrap(wrap(memoryview(frame))) == frame


@pytest.mark.parametrize(
    "bad", [b"\x0a", b"\x0a\x05abc", b"\x0a\x01abc", b"\x12\x01a", b"\x0a\xff\xff\xff\xff\xff\xff\x01"]
)
def test_other_messages_are_refused(bad):
    from ipckit.transports._grpc_link import unwrap

    with pytest.raises(ValueError, match="BytesValue"):
        unwrap(bad)


def test_any_client_can_talk_to_us():
    wrappers = pytest.importorskip("google.protobuf.wrappers_pb2")
    with (
        ipckit.listen("grpc://127.0.0.1:0") as listener,
        grpc.insecure_channel(str(listener.url.host)) as channel,
    ):
        going = threading.Event()

        def requests():
            yield wrappers.BytesValue(value=b"hello")
            going.wait(10)

        method = channel.stream_stream(
            METHOD,
            request_serializer=wrappers.BytesValue.SerializeToString,
            response_deserializer=wrappers.BytesValue.FromString,
        )
        answers = method(requests())
        with listener.accept(10) as server:
            assert server.recv(10) == b"hello"
            server.send(b"world")
            assert next(answers).value == b"world"
            going.set()
            with pytest.raises(errors.PeerClosed):
                server.recv(10)
        assert list(answers) == []
        assert answers.code() is grpc.StatusCode.OK


def test_what_is_no_frame_costs_its_own_stream():
    with ipckit.listen("grpc://127.0.0.1:0") as listener:
        client = ipckit.connect(str(listener.url), timeout=10)
        with client, listener.accept(10) as honest, grpc.insecure_channel(str(listener.url.host)) as channel:
            answers = channel.stream_stream(METHOD)(iter([b"\x0a\x01x", b"nonsense"]))
            with listener.accept(10) as server:
                assert server.recv(10) == b"x"
                for _ in range(2):
                    with pytest.raises(errors.ProtocolError):
                        server.recv(10)
            with pytest.raises(grpc.RpcError) as caught:
                list(answers)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            client.send(b"undisturbed")
            assert honest.recv(10) == b"undisturbed"


def test_other_methods_are_not_there():
    with (
        ipckit.listen("grpc://127.0.0.1:0") as listener,
        grpc.insecure_channel(str(listener.url.host)) as channel,
    ):
        call = channel.unary_unary("/ipckit.v1.Channel/Other").future(b"")
        with pytest.raises(errors.Timeout):
            listener.accept(0.5)
        with pytest.raises(grpc.RpcError) as caught:
            call.result(10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("noise", [b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096)])
def test_noise_costs_its_own_connection(noise):
    with ipckit.listen("grpc://127.0.0.1:0") as listener:
        client = ipckit.connect(str(listener.url), timeout=10)
        with (
            client,
            listener.accept(10) as server,
            socket.create_connection(("127.0.0.1", listener.url.host.port)) as s,
        ):
            s.sendall(noise)
            client.send(b"undisturbed")
            assert server.recv(10) == b"undisturbed"


def test_somebody_else_is_no_listener():
    from concurrent.futures import ThreadPoolExecutor

    other = grpc.server(ThreadPoolExecutor(1))
    port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    try:
        with pytest.raises(errors.NothingListening, match="somebody else"):
            ipckit.connect(f"grpc://127.0.0.1:{port}", timeout=0.5)
    finally:
        other.stop(None).wait()


def test_limits_are_exchanged():
    with ipckit.listen("grpc+unix://size?limit=1000") as listener:
        client = ipckit.connect("grpc+unix://size", timeout=10)
        with client, listener.accept(10) as server:
            client.send(bytes(1000))
            assert len(server.recv(10)) == 1000
            server.send(b"")
            assert client.recv(10) == b""
            with pytest.raises(errors.MessageTooLarge, match="1000"):
                client.send(bytes(1001))
            client.send(b"still good")
            assert server.recv(10) == b"still good"


# -- names --------------------------------------------------------------------------------------------------------


def test_importing_the_transport_does_not_import_the_library():
    program = (
        "import sys, ipckit.transports.grpc, ipckit; ipckit.capabilities('grpcs://h:1'); print('grpc' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "False"


def test_capabilities_differ_by_scheme():
    assert ipckit.capabilities("grpcs://h:1").encrypted
    assert not ipckit.capabilities("grpc://h:1").encrypted
    assert not ipckit.capabilities("grpc+unix://x").cross_machine


@pytest.mark.parametrize("bad", ["grpc://h", "grpc://h:1/path", "grpc+unix://a:1", "grpcs://a:1,b:2"])
def test_bad_urls(bad):
    for verb in (ipckit.listen, ipckit.connect):
        with pytest.raises(errors.BadUrl):
            verb(bad, timeout=0.1)


def test_a_port_that_is_taken():
    """gRPC by itself shares a port with whoever asks (SO_REUSEPORT)."""
    with (
        ipckit.listen("grpc://127.0.0.1:0") as listener,
        pytest.raises(errors.AddressInUse),
    ):
        ipckit.listen(str(listener.url))


def test_the_socket_is_closed_to_others(runtime):
    with ipckit.listen("grpc+unix://mine"):
        found = os.stat(runtime / "mine.grpc")
        assert stat.S_ISSOCK(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
    assert os.listdir(runtime) == []


def test_a_live_path_is_not_taken_over(tmp_path):
    """gRPC by itself unlinks whatever is there and binds."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "theirs"))
        other.listen()
        with pytest.raises(errors.AddressInUse):
            ipckit.listen(f"grpc+unix://{tmp_path}/theirs")


def test_what_a_killed_listener_left_in_the_midst_of_binding_is_removed(runtime):
    runtime.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(runtime / "name.grpc.0123abcd.new"))
    with ipckit.listen("grpc+unix://name"):
        assert sorted(os.listdir(runtime)) == ["name.grpc", "name.grpc.lock"]


def test_closing_one_listener_does_not_remove_the_next_ones_name(runtime):
    """gRPC by itself unlinks its path when the server has stopped, whoever has it by then."""
    first = ipckit.listen("grpc+unix://name")
    client = ipckit.connect("grpc+unix://name", timeout=10)
    server = first.accept(10)
    first.close()
    with ipckit.listen("grpc+unix://name") as second:
        client.close()
        server.close()
        time.sleep(0.3)
        with ipckit.connect("grpc+unix://name", timeout=10), second.accept(10):
            pass


def test_a_path_of_any_length(tmp_path):
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    client, server = meet(f"grpc+unix://{deep}/name")
    with client, server:
        client.send(b"far down")
        assert server.recv(10) == b"far down"


# -- TLS ----------------------------------------------------------------------------------------------------------


def tls(pki, theirs):
    """A client and a server that trust each other as the options say."""
    with ipckit.listen(f"grpcs://127.0.0.1:0?cert={pki}/server.pem") as listener:
        where = str(listener.url.host)
        client = ipckit.connect(f"grpcs://{where}?{theirs}", timeout=10)
        return client, listener.accept(10)


def test_tls(pki):
    client, server = tls(pki, f"ca={pki}/ca.pem")
    with client, server:
        client.send(b"secret")
        assert server.recv(10) == b"secret"


def test_tls_checks_the_authority(pki):
    with pytest.raises(errors.AccessDenied, match="certificate"):
        tls(pki, f"ca={pki}/other.pem")


def test_tls_checks_the_name(pki):
    with (
        ipckit.listen(f"grpcs://127.0.0.1:0?cert={pki}/elsewhere.pem") as listener,
    ):
        where = f"grpcs://{listener.url.host}?ca={pki}/ca.pem"
        with pytest.raises((errors.AddressError, errors.AccessDenied)):
            ipckit.connect(where, timeout=1)
        with ipckit.connect(where + "&server_name=elsewhere.example", timeout=10), listener.accept(10):
            pass


def test_mutual_tls(pki):
    options = f"cert={pki}/server.pem&client_ca={pki}/ca.pem"
    with ipckit.listen(f"grpcs://127.0.0.1:0?{options}") as listener:
        where = f"grpcs://{listener.url.host}?ca={pki}/ca.pem"
        with pytest.raises(errors.AddressError):
            ipckit.connect(where, timeout=0.5)
        with ipckit.connect(f"{where}&cert={pki}/client.pem", timeout=10) as client, listener.accept(10) as server:
            client.send(b"known")
            assert server.recv(10) == b"known"


def test_tls_options_are_checked(pki):
    with pytest.raises(errors.BadOption, match="certificate"):
        ipckit.listen("grpcs://127.0.0.1:0")
    with pytest.raises(errors.BadOption, match="ca="):
        ipckit.connect(f"grpcs://127.0.0.1:1?ca={pki}/absent.pem", timeout=0.1)
    with pytest.raises(errors.BadOption, match="grpcs"):
        ipckit.connect(f"grpc://127.0.0.1:1?ca={pki}/ca.pem", timeout=0.1)


# -- messages -----------------------------------------------------------------------------------------------------


def test_what_was_sent_before_close_arrives(url):
    client, server = meet(url)
    count = client.send_many([bytes(1000)] * 300, timeout=10)
    client.close()
    with server:
        assert sum(len(server.recv(10)) for _ in range(count)) == 1000 * count
        with pytest.raises(errors.PeerClosed):
            server.recv(10)


@pytest.mark.parametrize("way", ["asyncio.run(main())", "sync()"])
def test_what_was_sent_before_exit_arrives(way):
    program = f"""
import asyncio, ipckit
from ipckit import aio
async def main():
    c = await aio.connect('grpc+unix://exit', timeout=9)
    await c.send_many([bytes(100000)] * 20)
    await c.close()
def sync():
    c = ipckit.connect('grpc+unix://exit', timeout=9)
    c.send_many([bytes(100000)] * 20)
    c.close()
{way}
"""
    with ipckit.listen("grpc+unix://exit") as listener:
        child = subprocess.Popen([sys.executable, "-W", "error", "-c", program], stderr=subprocess.PIPE)
        with listener.accept(10) as server:
            assert sum(len(server.recv(10)) for _ in range(20)) == 2_000_000
            with pytest.raises(errors.PeerClosed):
                server.recv(10)
        _, complaints = child.communicate(timeout=20)
        assert child.returncode == 0
        assert complaints == b""


def test_what_a_killed_peer_had_sent_is_read_ahead(url):
    """gRPC's core drops it at the reset, if nobody has asked; nobody is in recv here."""
    with ipckit.listen(url) as listener:
        program = f"""
import ipckit, time
c = ipckit.connect({str(listener.url)!r}, timeout=9)
for n in range(50): c.send(b'%d' % n)
print('sent', flush=True); time.sleep(60)
"""
        child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE)
        with listener.accept(10) as server:
            assert child.stdout.readline() == b"sent\n"
            time.sleep(0.2)
            child.kill()
            child.wait()
            child.stdout.close()
            time.sleep(0.2)
            assert [server.recv(5) for _ in range(50)] == [b"%d" % n for n in range(50)]
            with pytest.raises(errors.PeerDied):
                server.recv(5)


def test_the_buffer_holds_the_sender_back(url):
    client, server = meet(url, "?buffer=100KiB" if "?" not in url else "")
    with client, server:
        chunk = bytes(100_000)
        sent = client.send_many([chunk] * 1000, timeout=1)
        assert sent < 1000
        for _ in range(sent):
            assert len(server.recv(10)) == 100_000


def test_exit_with_open_endpoints_does_not_hang():
    program = """
import sys, threading, ipckit
sys.unraisablehook = lambda *_: None
L = ipckit.listen('grpc+unix://left')
a = ipckit.connect('grpc+unix://left', timeout=9)
x = L.accept(5)
threading.Thread(target=a.recv, daemon=True).start()
"""
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=30).returncode == 0


# -- loops, threads, forks ----------------------------------------------------------------------------------------


def test_synchronous_and_asynchronous_ends():
    with ipckit.listen("grpc+unix://mixed") as listener:

        async def main():
            async with await aio.connect("grpc+unix://mixed", timeout=10) as channel:
                for number in range(100):
                    await channel.send(b"%d" % number)
                    assert await channel.recv(10) == b"%d" % number

        def echo():
            with listener.accept(10) as server:
                for message in server:
                    server.send(message)

        thread = threading.Thread(target=echo)
        thread.start()
        asyncio.run(main())
        thread.join(10)
        assert not thread.is_alive()


def test_both_directions_at_once(url):
    client, server = meet(url)
    with client, server:
        got = {}

        def pump(name, mine):
            sender = threading.Thread(target=lambda: [mine.send(b"%d" % n, 20) for n in range(500)])
            sender.start()
            got[name] = [mine.recv(20) for _ in range(500)]
            sender.join()

        threads = [threading.Thread(target=pump, args=pair) for pair in (("client", client), ("server", server))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(40)
        assert got["client"] == got["server"] == [b"%d" % n for n in range(500)]


def test_a_listener_outlives_the_loop_that_opened_it():
    """asyncio.run() ends with the listener open: it has the name until it is closed, as on the other transports."""

    async def forgetful():
        return await aio.listen("grpc+unix://forgotten")

    listener = asyncio.run(forgetful())
    with pytest.raises(errors.AddressInUse):
        ipckit.listen("grpc+unix://forgotten", timeout=10)
    asyncio.run(listener.close())
    ipckit.listen("grpc+unix://forgotten", timeout=10).close()


def test_a_forked_child_is_told_that_it_cannot():
    program = """
import os, ipckit
from ipckit import errors
with ipckit.listen('grpc+unix://parent') as listener:
    client = ipckit.connect('grpc+unix://parent', timeout=9)
    server = listener.accept(9)
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        try:
            ipckit.connect('grpc+unix://parent', timeout=1)
        except errors.ForkedError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
client.send(b'undisturbed')
assert server.recv(9) == b'undisturbed'
client.close()
server.close()
"""
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, timeout=40)


def test_ctrl_c_ends_a_recv_and_leaves_the_channel_good():
    client, server = meet("grpc+unix://interrupt")
    with client, server:
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            client.recv(10)
        server.send(b"after")
        assert client.recv(10) == b"after"


def test_a_result_that_comes_after_the_cancellation_is_closed():
    """A connection that was made while its connect was given up would be a ghost: its listener accepts it, and nobody ends it."""
    from ipckit.transports._grpc_home import grpc_home

    begun, closed = threading.Event(), threading.Event()

    class Made:
        def close(self) -> None:
            closed.set()

    async def stubborn() -> Made:
        begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return Made()
        raise AssertionError("not cancelled")

    steps = grpc_home("grpc://test", "connect").steps(stubborn)
    next(steps)
    assert begun.wait(20)
    steps.close()
    assert closed.wait(20)
