"""Shared memory: the newest value read and written, segments attached and made, beside what Python's standard library has.

What is compared is not the same promise. multiprocessing's Array takes a lock, which its holder's death takes with it; a bare
copy out of SharedMemory takes none, and may be torn. SharedMemory's attach asks nothing about the file, nor who else is there.
"""

from __future__ import annotations

import multiprocessing
import secrets
from multiprocessing.shared_memory import SharedMemory

import pytest

from ipckit.sync import Latest, Segment

SIZES = [64, 4096]
VALUE = {size: bytes(range(256)) * (size // 256) or bytes(size) for size in SIZES}


@pytest.fixture(autouse=True)
def runtime_dir(monkeypatch):
    """In memory, as it is by default."""
    monkeypatch.delenv("IPCKIT_RUNTIME_DIR", raising=False)


@pytest.fixture
def url():
    return f"shm://bench{secrets.token_hex(4)}"


@pytest.fixture
def plain():
    made = SharedMemory(create=True, size=1 << 16)
    yield made
    made.close()
    made.unlink()


# -- the newest value -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
class TestRead:
    @pytest.mark.benchmark(group="read the newest value")
    def test_latest(self, benchmark, url, size):
        with Latest(url, size) as writer, Latest(url, size) as reader:
            writer.write(VALUE[size])
            assert benchmark(reader.read) == VALUE[size]

    @pytest.mark.benchmark(group="read the newest value")
    def test_latest_into(self, benchmark, url, size):
        """Into memory that is there already."""
        with Latest(url, size) as writer, Latest(url, size) as reader:
            writer.write(VALUE[size])
            target = bytearray(size)
            assert benchmark(reader.read_into, target) == size
            assert target == VALUE[size]

    @pytest.mark.benchmark(group="read the newest value")
    def test_array_with_its_lock(self, benchmark, size):
        array = multiprocessing.Array("c", size)
        array[:] = VALUE[size]

        def read():
            with array.get_lock():
                return array[:]

        assert benchmark(read) == VALUE[size]

    @pytest.mark.benchmark(group="read the newest value")
    def test_bare_copy_that_may_be_torn(self, benchmark, plain, size):
        buffer = plain.buf
        buffer[:size] = VALUE[size]
        assert benchmark(lambda: bytes(buffer[:size])) == VALUE[size]


@pytest.mark.parametrize("size", SIZES)
class TestWrite:
    @pytest.mark.benchmark(group="write the newest value")
    def test_latest(self, benchmark, url, size):
        with Latest(url, size) as writer:
            benchmark(writer.write, VALUE[size])
            assert writer.read() == VALUE[size]

    @pytest.mark.benchmark(group="write the newest value")
    def test_array_with_its_lock(self, benchmark, size):
        array = multiprocessing.Array("c", size)

        def write():
            with array.get_lock():
                array[:] = VALUE[size]

        benchmark(write)
        assert array[:] == VALUE[size]

    @pytest.mark.benchmark(group="write the newest value")
    def test_bare_copy_that_may_be_torn(self, benchmark, plain, size):
        buffer, value = plain.buf, VALUE[size]

        def write():
            buffer[:size] = value

        benchmark(write)
        assert buffer[:size] == value


# -- segments ---------------------------------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="attach to 64 KiB, and close")
def test_attach_segment(benchmark, url):
    def attach():
        Segment(url).close()

    with Segment(url, 1 << 16):
        benchmark(attach)


@pytest.mark.benchmark(group="attach to 64 KiB, and close")
def test_attach_shared_memory(benchmark, plain):
    def attach():
        SharedMemory(plain.name).close()

    benchmark(attach)


@pytest.mark.parametrize("size", ["64KiB", "16MiB"])
class TestMake:
    @pytest.mark.benchmark(group="make, and remove")
    def test_segment(self, benchmark, url, size):
        benchmark(lambda: Segment(url, size, "create").close())

    @pytest.mark.benchmark(group="make, and remove")
    def test_shared_memory(self, benchmark, size):
        """Its pages are not allocated: the first to touch one pays, or dies of it."""
        count = {"64KiB": 1 << 16, "16MiB": 16 << 20}[size]

        def make():
            made = SharedMemory(create=True, size=count)
            made.close()
            made.unlink()

        benchmark(make)


@pytest.mark.benchmark(group="is there a newer generation?")
def test_stale(benchmark, url):
    with Segment(url, 1 << 16) as segment:
        assert not benchmark(lambda: segment.stale)


@pytest.mark.benchmark(group="grow from 16 to 32 MiB and back")
def test_resize(benchmark, url):
    with Segment(url, "16MiB") as segment:

        def resize():
            segment.resize("32MiB")
            segment.resize("16MiB")

        benchmark.pedantic(resize, rounds=5)
