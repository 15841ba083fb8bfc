"""The C floors: every mechanism measures, and leaves nothing behind."""

import gc
import os
import signal

import pytest

from ipckit import _native

CORES = sorted(os.sched_getaffinity(0))
MECHANISMS = ("pipe", "fifo", "unix", "unix-spin", "tcp", "udp", "mq", "shm-spin", "shm-futex", "sem")

pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="a floor is between two cores")


def children(pid: int) -> list[str]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


def possessions() -> object:
    gc.collect()  # what other tests have dropped
    return set(os.listdir("/proc/self/fd")), children(os.getpid()), os.sched_getaffinity(0)


def test_names() -> None:
    assert set(_native.floor_mechanisms()) == set(MECHANISMS)


@pytest.mark.parametrize("size", [1, 64, 8192, 60000, 1 << 20])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_it_measures(mechanism: str, size: int) -> None:
    cpus = (CORES[0], CORES[1])
    before = possessions()
    if (mechanism == "mq" and size > 8192) or (mechanism == "udp" and size > 65507):
        with pytest.raises(ValueError, match=mechanism):
            _native.floor(mechanism, size, 1, cpus)
        with pytest.raises(ValueError, match=mechanism):
            _native.floor_throughput(mechanism, size, 1, cpus)
    else:
        times = _native.floor(mechanism, size, 20, cpus)
        assert len(times) == 20
        assert min(times) > 0
        assert _native.floor_throughput(mechanism, size, 50, cpus) > 0
    assert possessions() == before


def test_what_cannot_be_measured_is_an_error() -> None:
    cpus = (CORES[0], CORES[1])
    with pytest.raises(ValueError, match="carrier pigeon"):
        _native.floor("carrier pigeon", 64, 10, cpus)
    with pytest.raises(OSError, match="range"):
        _native.floor("pipe", 64, 10, (CORES[0], 100000))
    with pytest.raises(OSError, match="range"):
        _native.floor("shm-spin", 64, 10, (CORES[0], CORES[0]))
    for size, rounds in ((0, 1), (1, 0), ((1 << 20) + 1, 1)):
        with pytest.raises(ValueError, match="size"):
            _native.floor("pipe", size, rounds, cpus)


def test_the_child_ends_with_its_parent() -> None:
    parent = os.fork()
    if parent == 0:
        _native.floor("unix", 64, 10_000_000, (CORES[0], CORES[1]))
        os._exit(0)
    while not (measured := children(parent)):
        pass
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(10_000_000):
        try:
            with open(f"/proc/{measured[0]}/stat") as file:
                if file.read().split()[2] in "ZX":
                    break
        except OSError:
            break
    else:
        pytest.fail("the measured child outlived its parent")
