"""The ephemeral servers are real, answer at once, keep what they were told to keep, and are gone afterwards."""

import contextlib
import importlib.metadata
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ipckit import errors
from ipckit._url import parse
from ipckit.testing import _natsserver
from ipckit.testing.servers import nats_server, redis_server


@pytest.fixture(autouse=True)
def _no_servers_of_others(monkeypatch):
    monkeypatch.delenv("IPCKIT_REDIS_URL", raising=False)
    monkeypatch.delenv("IPCKIT_NATS_URL", raising=False)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def eventually(true, seconds=15):
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert true()


def redis_ask(server, *lines):
    host = parse(server.url).host
    with socket.create_connection((host.name, host.port), 5) as s, s.makefile("rb") as answers:
        found = []
        for line in lines:
            s.sendall(line.encode() + b"\r\n")
            found.append(answers.readline().strip())
            if found[-1].startswith(b"$") and found[-1] != b"$-1":
                found[-1] = answers.readline().strip()
        return found


@pytest.mark.parametrize("factory", [nats_server, redis_server])
def test_it_runs_while_its_block_does(factory):
    with factory() as server:
        pid, directory = server.pid, server.directory
        assert alive(pid)
        assert parse(server.url).host.name == "127.0.0.1"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert server.version[0].isdigit()
        assert str(server) == f"{server.product} {server.version}"
        assert os.access(server.binary, os.X_OK)
        host = parse(server.url).host
        socket.create_connection((host.name, host.port), 5).close()
    assert not alive(pid)
    assert not directory.exists()


def test_two_at_once_do_not_meet():
    with redis_server() as one, redis_server() as two:
        redis_ask(one, "SET k 1")
        assert redis_ask(two, "GET k") == [b"$-1"]


def test_redis_listens_on_its_unix_socket_too():
    with redis_server() as server, socket.socket(socket.AF_UNIX) as s:
        s.settimeout(5)
        s.connect(str(server.socket))
        s.sendall(b"PING\r\n")
        assert s.recv(64) == b"+PONG\r\n"


def test_killed_and_started_again_it_has_its_port_and_data():
    with redis_server(appendonly=True, appendfsync="always") as server:
        assert redis_ask(server, "SET k kept") == [b"+OK"]
        before = server.pid
        server.kill()
        assert server.pid is None
        with pytest.raises(OSError, match="refused"):
            redis_ask(server, "PING")
        server.start()
        assert server.pid not in (None, before)
        assert redis_ask(server, "GET k") == [b"kept"]
        server.stop()
        server.start()
        assert redis_ask(server, "GET k") == [b"kept"]


def test_a_taken_port_is_waited_for():
    with nats_server() as server:
        server.stop()
        host = parse(server.url).host
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind((host.name, host.port))
            thief.listen()
            timer = threading.Timer(0.3, thief.close)
            timer.start()
            server.start()
            timer.join()
        assert server.pid is not None


@pytest.mark.parametrize("factory", [nats_server, redis_server])
def test_its_port_is_kept_while_it_is_down(factory):
    with factory() as server:
        server.kill()
        host = parse(server.url).host
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind((host.name, host.port))
        server.start()
        assert server.pid is not None


@pytest.mark.parametrize("factory", [nats_server, redis_server])
def test_it_is_gone_when_its_program_is_killed(factory):
    code = (
        f"from ipckit.testing.servers import {factory.__name__} as f\n"
        "import os, time\n"
        "with f() as s:\n"
        "    if os.fork() == 0:\n"  # a child that outlives us must not keep the server alive
        "        os.close(1)\n"
        "        time.sleep(20)\n"
        "        os._exit(0)\n"
        "    print(s.pid, s.directory, flush=True)\n"
        "    time.sleep(60)\n"
    )
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    with program:
        pid, directory = program.stdout.readline().split()
        assert alive(int(pid))
        program.kill()
        program.wait()
        eventually(lambda: not alive(int(pid)) and not Path(directory).exists())
        os.killpg(program.pid, signal.SIGKILL)


def test_it_is_gone_when_its_guardian_is_killed():
    with nats_server() as server:
        pid = server.pid
        server._process._guardian.kill()
        eventually(lambda: not alive(pid))
        with pytest.raises(errors.IpcError, match="guardian"):
            server.stop()
        directory = server.directory
    for child in sorted(directory.rglob("*"), reverse=True):  # the guardian could not
        child.rmdir() if child.is_dir() else child.unlink()
    directory.rmdir()


def test_a_paused_server_can_be_ended():
    with redis_server() as server:
        server.pause()
        pid = server.pid
    assert not alive(pid)


@pytest.mark.parametrize(
    ("factory", "variable"), [(nats_server, "IPCKIT_NATS_URL"), (redis_server, "IPCKIT_REDIS_URL")]
)
def test_the_environment_variable_names_a_running_server(factory, variable, monkeypatch):
    with factory() as running:
        monkeypatch.setenv(variable, running.url)
        with factory() as found, factory(private=True) as own:
            assert (found.url, found.version, found.pid) == (running.url, running.version, None)
            assert own.url != running.url
            with pytest.raises(errors.Unsupported):
                found.kill()
        with factory(running.url) as found:
            assert found.version == running.version


def test_a_missing_binary_names_the_extra(monkeypatch):
    def nothing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "files", nothing)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    with pytest.raises(errors.MissingDependency, match="servers") as caught, nats_server():
        pass
    assert "IPCKIT_NATS_URL" in str(caught.value)


def test_a_server_that_cannot_start_says_why():
    with pytest.raises(errors.IpcError, match="cert"), nats_server(tls=("/nonexistent/cert", "/nonexistent/key")):
        pass


def test_a_half_written_ports_file_is_not_there_yet(tmp_path):
    file = tmp_path / "ports"
    file.write_text('{"nats": ["nats://127.0.')
    with pytest.raises(FileNotFoundError):
        _natsserver._port_from_file(file)
    file.write_text(json.dumps({"nats": ["nats://127.0.0.1:4321"]}))
    assert _natsserver._port_from_file(file) == 4321


def nats_ask(server, **connect):
    host = parse(server.url).host
    with socket.create_connection((host.name, host.port), 5) as s, s.makefile("rb") as answers:
        info = json.loads(answers.readline()[5:])
        s.sendall(b"CONNECT " + json.dumps({"verbose": False, **connect}).encode() + b"\r\nPING\r\n")
        return info, answers.readline().strip()


def test_nats_options_reach_the_server():
    with nats_server(max_payload=3 << 20, user="a$b", password='p:w"') as server:
        info, answer = nats_ask(server, user="a$b", **{"pass": 'p:w"'})
        assert (info["max_payload"], info["jetstream"], answer) == (3 << 20, True, b"PONG")
        assert b"Authorization" in nats_ask(server, user="a$b", **{"pass": "x"})[1]
        assert "p:w" not in repr(server)
        assert parse(server.url).password == 'p:w"'
    with nats_server(jetstream=False, token="t o/k") as server:
        info, answer = nats_ask(server, auth_token="t o/k")
        assert (info.get("jetstream", False), answer) == (False, b"PONG")


def test_redis_options_reach_the_server():
    with redis_server(password='x y"z', maxmemory=1 << 20) as server:
        assert redis_ask(server, "PING")[0].startswith(b"-NOAUTH")
        assert redis_ask(server, r'AUTH "x y\"z"', "PING") == [b"+OK", b"+PONG"]
        assert b'x y"z' not in Path(f"/proc/{server.pid}/cmdline").read_bytes()


def test_address_adds_path_and_options():
    with redis_server(password="s/e") as server:
        url = parse(server.address("/0/jobs", limit="1MiB"))
        assert (url.path, url.options, url.password) == ("/0/jobs", (("limit", "1MiB"),), "s/e")


def test_no_descriptor_is_left_open():
    with contextlib.suppress(FileNotFoundError):
        before = len(os.listdir("/proc/self/fd"))
        with nats_server():
            pass
        assert len(os.listdir("/proc/self/fd")) == before
