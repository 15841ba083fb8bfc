"""pipe://: an end passes to a child in every way there is, and each end has exactly one owner."""

from __future__ import annotations

import asyncio
import fcntl
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass

import pytest

import ipckit
from ipckit import aio, errors


@dataclass
class Job:
    n: int


def echo(channel):
    with channel:
        for message in channel:
            channel.send(message)


def adder(channel):
    with channel:
        for job in channel:
            channel.send(Job(job.n + 1))


def die(channel):
    channel.send(b"last words")
    os.kill(os.getpid(), signal.SIGKILL)


def listen_only(channel):
    """Ends with 0 if the parent closed in order, 7 if it seems to have died."""
    with channel:
        try:
            for _ in channel:
                pass
        except errors.PeerDied:
            os._exit(7)


def aecho(channel):
    async def main():
        async for message in channel:
            await channel.send(message)
        await channel.close()

    asyncio.run(main())


METHODS = ["fork", "spawn", "forkserver"]


def start(method, target, *args):
    process = multiprocessing.get_context(method).Process(target=target, args=args)
    process.start()
    return process


def finish(process):
    process.join(20)
    code = process.exitcode
    process.kill()
    process.join()
    process.close()
    return code


@pytest.mark.parametrize("method", METHODS)
def test_multiprocessing(method):
    ours, theirs = ipckit.pair("pipe://")
    process = start(method, echo, theirs)
    theirs.close()
    with ours:
        for size in (0, 1, 4096, 300_000):
            ours.send(b"x" * size, 20)
            assert ours.recv(20) == b"x" * size
    assert finish(process) == 0


@pytest.mark.parametrize("method", METHODS)
def test_typed(method):
    ours, theirs = ipckit.pair("pipe://", type=Job)
    process = start(method, adder, theirs)
    theirs.close()
    with ours:
        ours.send(Job(1), 20)
        assert ours.recv(20) == Job(2)
    assert finish(process) == 0


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_async_end(method):
    async def main():
        ours, theirs = await aio.pair("pipe://")
        process = start(method, aecho, theirs)
        await theirs.close()
        async with ours:
            await ours.send(b"x", 20)
            assert await ours.recv(20) == b"x"
        assert finish(process) == 0

    asyncio.run(main())


@pytest.mark.parametrize("method", METHODS)
def test_the_death_of_the_child_is_heard(method):
    ours, theirs = ipckit.pair("pipe://")
    process = start(method, die, theirs)
    theirs.close()
    with ours:
        assert ours.recv(20) == b"last words"
        with pytest.raises(errors.PeerDied):
            ours.recv(20)
    assert finish(process) == -9


@pytest.mark.parametrize("method", METHODS)
def test_a_silent_parent_still_says_goodbye(method):
    """It never used its end; closing theirs first told which is which."""
    ours, theirs = ipckit.pair("pipe://")
    process = start(method, listen_only, theirs)
    theirs.close()
    ours.close()
    assert finish(process) == 0


_PARENT = """
import ipckit, os, signal, sys
ours, theirs = ipckit.pair("pipe://")
if not os.fork():
    theirs.send(b"up")
    try:
        theirs.recv(20)
    except ipckit.errors.PeerDied:
        print("died", flush=True)
    os._exit(0)
theirs.close()
ours.recv(20)
if not os.fork():
    sys.stdin.read()      # another child, which has nothing to do with it and must not hold the pipe
    os._exit(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_death_of_the_parent_is_heard_by_a_fork():
    with subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"died\n"
        process.stdin.close()


_CHILD = """
import ipckit, sys
with ipckit.connect(sys.argv[1]) as channel:
    for message in channel:
        channel.send(message[::-1])
"""


def test_subprocess():
    ours, theirs = ipckit.pair("pipe://?limit=1MiB")
    url, fds = theirs.native.hand_over()
    with subprocess.Popen([sys.executable, "-c", _CHILD, url], pass_fds=fds) as process:
        theirs.close()
        with ours:
            ours.send(b"abc", 20)
            assert ours.recv(20) == b"cba"
            with pytest.raises(errors.MessageTooLarge):
                ours.send(bytes(2 << 20))
        assert process.wait(20) == 0


def test_an_end_that_was_used_stays():
    ours, theirs = ipckit.pair("pipe://")
    with ours, theirs:
        ours.send(b"x")
        theirs.recv(5)
        with pytest.raises(errors.ConfigError, match="used"):
            theirs.native.hand_over()
        with pytest.raises(errors.ConfigError, match="used"):
            pickle.dumps(theirs)


def test_used_ends_are_not_the_childs():
    ours, theirs = ipckit.pair("pipe://")
    with ours, theirs:
        ours.send(b"x")
        assert theirs.recv(5) == b"x"
        pid = os.fork()
        if not pid:
            code = 1
            try:
                theirs.send(b"from the child")
            except errors.ForkedError:
                code = 0
            finally:
                ours.close()
                theirs.close()
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        ours.send(b"y")
        assert theirs.recv(5) == b"y"


def test_a_child_that_does_nothing_harms_nobody():
    ours, theirs = ipckit.pair("pipe://")
    with ours, theirs:
        pid = os.fork()
        if not pid:
            ours.close()
            theirs.close()
            os._exit(0)
        os.waitpid(pid, 0)
        ours.send(b"x")
        assert theirs.recv(5) == b"x"
        ours.close()
        with pytest.raises(errors.PeerClosed):
            theirs.recv(5)


def test_a_child_adopts_one_end_only():
    ours, theirs = ipckit.pair("pipe://")
    pid = os.fork()
    if not pid:
        code = 1
        try:
            theirs.send(b"hello")
            ours.send(b"x")
        except errors.ForkedError:
            theirs.close()
            code = 0
        finally:
            os._exit(code)
    theirs.close()
    with ours:
        assert list(ours) == [b"hello"]
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_closing_a_copy_after_a_fork_says_no_goodbye():
    """The parent closes the child's end while the child is still using it: that is not the child's goodbye."""
    ours, theirs = ipckit.pair("pipe://")
    go_in, go_out = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(go_out)
        os.read(go_in, 1)
        theirs.send(b"late")
        theirs.close()
        os._exit(0)
    os.close(go_in)
    theirs.close()
    os.close(go_out)
    with ours:
        assert ours.recv(20) == b"late"
        with pytest.raises(errors.PeerClosed):
            ours.recv(20)
    os.waitpid(pid, 0)


def test_a_fork_forgets_closed_ends():
    """Their numbers may belong to something else by now."""
    ours, theirs = ipckit.pair("pipe://")
    ours.send(b"x")
    numbers = {ours.native.read, ours.native.write}
    ours.close()
    reused = [os.open("/proc/self/stat", os.O_RDONLY) for _ in numbers]
    assert set(reused) == numbers
    pid = os.fork()
    if not pid:
        os._exit(0 if all(os.read(fd, 1) for fd in reused) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for fd in reused:
        os.close(fd)
    theirs.close()


def test_size():
    ours, theirs = ipckit.pair("pipe://?size=256KiB")
    with ours, theirs:
        assert fcntl.fcntl(ours.native.write, fcntl.F_GETPIPE_SZ) == 256 << 10
        assert fcntl.fcntl(theirs.native.write, fcntl.F_GETPIPE_SZ) == 256 << 10


def test_refusals():
    with pytest.raises(errors.Unsupported, match="no name"):
        ipckit.connect("pipe://")
    with pytest.raises(errors.Unsupported):
        ipckit.listen("pipe://")
    with pytest.raises(errors.BadUrl):
        ipckit.pair("pipe://name")
    with open("/dev/null") as file, pytest.raises(errors.BadOption, match="not that end"):
        ipckit.connect(f"pipe://?rfd={file.fileno()}&wfd={file.fileno()}")
    read, write = os.pipe()
    with pytest.raises(errors.BadOption, match="not that end"):
        ipckit.connect(f"pipe://?rfd={write}&wfd={read}")
    os.close(read)
    os.close(write)
    left, right = ipckit.pair("unix://")
    with left, right, pytest.raises(errors.Unsupported, match="another process"):
        pickle.dumps(left)


def test_both_directions_at_once():
    ours, theirs = ipckit.pair("pipe://")
    data = [os.urandom(3 << 20) for _ in range(4)]
    got = []
    with ours, theirs:
        threads = [
            threading.Thread(target=lambda: [ours.send(d, 20) for d in data]),
            threading.Thread(target=lambda: [theirs.send(d, 20) for d in data]),
            threading.Thread(target=lambda: got.extend(theirs.recv(20) for _ in data)),
        ]
        for thread in threads:
            thread.start()
        back = [ours.recv(20) for _ in data]
        for thread in threads:
            thread.join()
    assert got == back == data


def test_nothing_stays_open():
    before = sorted(os.listdir("/proc/self/fd"))
    for _ in range(3):
        ours, theirs = ipckit.pair("pipe://")
        ours.send(b"x")
        theirs.recv(5)
        ours.close()
        theirs.close()
    assert sorted(os.listdir("/proc/self/fd")) == before
