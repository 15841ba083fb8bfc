"""Latest: types, one writer, readers, waiting, the writer's death. What holds between threads: tests/native/test_latest.c."""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import multiprocessing
import os
import pickle
import signal
import threading

import numpy as np
import pytest

from ipckit import aio, errors
from ipckit.sync import Latest

from .test_sync import Child, runtime_dir, until  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread

URL = "shm://newest"


@pytest.fixture
def there(runtime_dir):  # noqa: F811
    return lambda: sorted(path.name for path in runtime_dir.iterdir())


def test_the_newest_value():
    with Latest(URL, 100) as writer, Latest(URL, 100) as reader:
        assert reader.read() is None
        assert (reader.number, reader.seen, reader.size) == (0, 0, 100)
        for n in range(1, 20):
            value = bytes([n]) * (n * 7 % 101)
            assert writer.write(value) == n
            assert reader.read() == value
            assert (reader.number, reader.seen) == (n, n)
        writer.write(bytearray(b"abc"))
        writer.write(memoryview(b"abcd"))
        assert reader.number - reader.seen == 2
        buffer = bytearray(6)
        assert reader.read_into(buffer) == 4
        assert buffer == b"abcd\0\0"
        with pytest.raises(ValueError, match="4 bytes, the buffer 3"):
            reader.read_into(bytearray(3))
        with pytest.raises(errors.MessageTooLarge):
            writer.write(b"x" * 101)
        with pytest.raises(TypeError):
            writer.write("text")
        assert reader.read() == b"abcd"


@pytest.mark.parametrize("make", [Latest, aio.Latest])
def test_it_has_a_name(make):
    with pytest.raises(errors.BadUrl, match="name"):
        make(None, 8)


def test_large_values():
    size = 1 << 20
    with Latest(URL, "1MiB") as latest:
        for n in range(6):
            value = bytes([n]) * (size - n)
            latest.write(value)
            assert latest.read() == value


class Pose(ctypes.Structure):
    _fields_ = (("x", ctypes.c_double), ("n", ctypes.c_int32))


@dataclasses.dataclass
class Order:
    name: str
    quantity: int


DTYPE = np.dtype([("x", "f8"), ("n", "i4")])


@pytest.mark.parametrize(
    ("of", "value", "same"),
    [
        (Pose, Pose(1.5, 3), lambda found: (found.x, found.n) == (1.5, 3)),
        (DTYPE, (1.5, 3), lambda found: (found["x"], found["n"]) == (1.5, 3)),
        (np.dtype("f4"), 2.5, lambda found: found == 2.5),
        (np.float64, 2.5, lambda found: found == 2.5),
        (np.dtype((np.int16, (2, 3))), np.eye(2, 3), lambda found: found.tolist() == [[1, 0, 0], [0, 1, 0]]),
        (Order, Order("a", 1), lambda found: found == Order("a", 1)),
        (dict[str, int], {"a": 1}, lambda found: found == {"a": 1}),
    ],
    ids=["ctypes", "record", "scalar", "scalar type", "array", "dataclass", "dict"],
)
def test_types(of, value, same):
    with Latest(URL, of) as writer, Latest(URL, of) as reader:
        assert reader.read() is None
        writer.write(value)
        assert same(reader.read())
        again = pickle.loads(pickle.dumps(reader))
        assert same(again.read())
        again.close()


def test_values_of_another_type_are_refused():
    with Latest(URL, Pose) as latest, pytest.raises(errors.CodecError):
        latest.write(b"12")
    with Latest(URL, np.dtype(("f8", 3))) as latest, pytest.raises(errors.CodecError):
        latest.write([1.0, 2.0])
    with Latest(URL, Order) as writer, Latest(URL, dict[str, str]) as reader:
        writer.write(Order("a", 1))
        with pytest.raises(errors.SchemaError):
            reader.read()
        with pytest.raises(errors.MessageTooLarge):
            writer.write(Order("a" * 5000, 1))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Latest(URL, 0),
        lambda: Latest(URL, "x"),
        lambda: Latest(URL, 2 << 40),
        lambda: Latest(URL, 8, size=9),
        lambda: Latest(URL, Pose, size=9),
        lambda: Latest(URL, np.dtype("O")),
        lambda: Latest("unix://x", 9),
    ],
)
def test_what_is_refused(make, there):
    with pytest.raises((errors.BadOption, errors.UnknownScheme)):
        make()
    assert there() == []


def test_another_size_is_refused():
    with Latest(URL, 64), pytest.raises(errors.BadOption, match="another size"):
        Latest(URL, 65_000)


# -- who writes -------------------------------------------------------------------------------------------------------


def test_one_writes_until_it_closes():
    first, second = Latest(URL, 8), Latest(URL, 8)
    assert first.writer() is None
    first.write(b"1")
    assert second.writer() == os.getpid()
    with pytest.raises(errors.AddressInUse, match=f"process {os.getpid()}"):
        second.write(b"2")
    first.close()
    assert second.writer() is None
    assert second.write(b"2") == 2
    assert second.read() == b"2"
    second.close()


_kept = []


def _write(value):
    _kept.append(Latest(URL, 8))
    _kept[0].write(value)


def test_a_killed_writer_is_followed(there):
    with Latest(URL, 8) as latest:
        child = Child(lambda: _write(b"child"))
        assert latest.wait(20) == b"child"
        assert latest.writer() == child.pid
        with pytest.raises(errors.AddressInUse, match=f"process {child.pid}"):
            latest.write(b"ours")
        child.kill()
        assert latest.read() == b"child"
        assert latest.write(b"ours") == 2
    assert there() == []


def test_a_forked_child_reads_and_does_not_write():
    latest = Latest(URL, 8)
    latest.write(b"1")

    def act():
        assert latest.read() == b"1"
        with pytest.raises(errors.AddressInUse):
            latest.write(b"2")

    child = Child(act)
    # The child has copies of our descriptors, but the right to write is not among them.
    with Latest(URL, 8) as other:
        latest.close()
        assert other.write(b"3") == 2
    child.kill()


def test_the_writers_death_frees_it_though_its_child_lives():
    """The killed one had forked, and the child still has what it inherited."""
    ready, tell = os.pipe()

    def act():
        _write(b"1")
        pid = os.fork()
        if pid == 0:  # it tells, not its parent: which is to live until fork() has returned here
            signal.alarm(30)
            os.write(tell, os.getpid().to_bytes(4, "little"))
            signal.pause()

    with Latest(URL, 8) as latest:
        child = Child(act)
        grandchild = int.from_bytes(os.read(ready, 4), "little")
        child.kill()
        assert latest.write(b"2") == 2
        os.kill(grandchild, signal.SIGKILL)
    os.close(ready)
    os.close(tell)


def _child(latest):
    assert latest.read() == b"there"
    _kept.append(Latest("shm://back", 8))
    _kept[0].write(b"back")


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_passed_to_a_child(method):
    with Latest(URL, 8) as latest, Latest("shm://back", 8) as back:
        latest.write(b"there")
        process = multiprocessing.get_context(method).Process(target=_child, args=(latest,))
        process.start()
        assert back.wait(30) == b"back"
        process.join(30)
        assert process.exitcode == 0


# -- waiting ------------------------------------------------------------------------------------------------------------


def test_wait():
    with Latest(URL, 8) as writer, Latest(URL, 8) as reader:
        with pytest.raises(errors.Timeout):
            reader.wait(0)
        with pytest.raises(ValueError):
            reader.wait(-1)
        writer.write(b"1")
        assert reader.wait(20) == b"1"
        with pytest.raises(errors.Timeout, match=r"no newer value within 0\.01 s"):
            reader.wait(0.01)
        assert reader.wait(newer_than=0) == b"1"
        with pytest.raises(ValueError, match="newer_than"):
            reader.wait(newer_than=-1)
        timer = threading.Timer(0.02, writer.write, (b"2",))
        timer.start()
        assert reader.wait() == b"2"
        timer.join()


def test_ctrl_c_ends_a_wait():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with Latest(URL, 8) as latest:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                latest.wait()
    finally:
        signal.signal(signal.SIGALRM, before)


def test_closing_ends_the_waits_and_everything_else():
    latest = Latest(URL, 8)
    raised = []

    def wait():
        try:
            latest.wait()
        except errors.Closed as error:
            raised.append(error)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: latest._writer() == 0)
    latest.close()
    latest.close()
    for thread in threads:
        thread.join(20)
    assert len(raised) == 2
    for act in (latest.read, lambda: latest.write(b""), lambda: latest.number, lambda: latest.read_into(bytearray(9))):
        with pytest.raises(errors.Closed):
            act()


def test_for_tasks(there):
    async def main():
        async with aio.Latest(URL, 8) as a, aio.Latest(URL, 8) as b:
            with pytest.raises(errors.Timeout, match="no newer value"):
                await a.wait(0.01)
            waiting = [asyncio.create_task(a.wait()) for _ in range(3)]
            await asyncio.sleep(0)
            waiting[0].cancel()
            await asyncio.sleep(0)
            assert b.write(b"1") == 1
            assert await asyncio.gather(*waiting[1:]) == [b"1", b"1"]
            assert (a.number, a.seen, a.size, a.read()) == (1, 1, 8, b"1")
            assert a.writer() == os.getpid()
            assert await a.wait(newer_than=0) == b"1"
            last = asyncio.create_task(a.wait())
            await asyncio.sleep(0)
            a.close()
            with pytest.raises(errors.Closed):
                await last
            buffer = bytearray(8)
            assert b.read_into(buffer) == 1
            b.unlink()
            assert there() == []
        with pytest.raises(errors.Closed):
            aio.Latest(URL, 8).read()

    asyncio.run(main())


# -- damage ---------------------------------------------------------------------------------------------------------------


def test_damaged_memory_is_told(runtime_dir):  # noqa: F811
    with Latest(URL, 8) as latest, open(runtime_dir / "newest.latest", "r+b", buffering=0) as file:
        latest.write(b"x")
        file.seek(4096 + 64)
        file.write((7).to_bytes(8, "little"))
        with pytest.raises(errors.ProtocolError, match="damaged"):
            latest.read()
        file.seek(4096)
        file.write(b"nonsense")
        with pytest.raises(errors.ProtocolError):
            Latest(URL, 8)
