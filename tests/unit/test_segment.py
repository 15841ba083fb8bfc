"""Segments: modes, generations, who is the last, what the dead left, strangers, children, the buffer protocol."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import os
import pickle
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ipckit import aio, errors
from ipckit.sync import Segment, _files, _tenancy

from .test_sync import Child, Threads, runtime_dir  # noqa: F401 - a fixture

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread

URL = "shm://thing"


@pytest.fixture
def there(runtime_dir):  # noqa: F811
    """What lies in the runtime directory."""
    return lambda: sorted(path.name for path in runtime_dir.iterdir())


# -- modes ----------------------------------------------------------------------------------------------------------


def test_one_makes_it_another_attaches():
    with Segment(URL, 100) as made, Segment(URL) as other:
        assert (made.size, len(other), other.generation) == (100, 100, 1)
        made.buf[3] = 7
        assert other.buf[3] == 7
        assert bytes(other.buf[:3]) == b"\0\0\0"


def test_modes():
    with pytest.raises(errors.NotFound) as none:
        Segment(URL)
    assert isinstance(none.value, FileNotFoundError)
    with Segment(URL, 8, "create"):
        with pytest.raises(errors.AddressInUse):
            Segment(URL, 8, "create")
        Segment(URL, 8, "attach").close()
        Segment(URL, 4).close()
        with pytest.raises(errors.BadOption, match="with 8 bytes"):
            Segment(URL, 9)
    Segment(URL, 9, "create").close()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((URL, 0), errors.BadOption),
        ((URL, -1), errors.BadOption),
        ((URL, "12 parsecs"), errors.BadOption),
        ((URL, None, "create"), errors.BadOption),
        ((URL, 1, "creat"), errors.BadOption),
        ((None,), errors.BadOption),
        (("tcp://x", 1), errors.UnknownScheme),
        (("shm://a/b", 1), errors.BadUrl),
        (("shm://a?b=1", 1), errors.BadOption),
        ((URL, 1 << 50), errors.ResourceLimit),
        ((None, 1 << 50), errors.ResourceLimit),
        ((URL, 1.5), errors.BadOption),
    ],
)
def test_what_is_refused(there, arguments, error):
    with pytest.raises(error):
        Segment(*arguments)
    assert there() == []


def test_attach_waits_for_it_to_be_created():
    def later():
        with Segment(URL, 10) as segment:
            segment.buf[0] = 1
            done.wait(20)

    done = threading.Event()
    maker = threading.Timer(0.02, later)
    maker.start()
    with Segment(URL, timeout=20) as segment:
        done.set()
        assert segment.size == 10
    maker.join()


def test_a_path_of_its_own(tmp_path):
    with Segment(f"shm://{tmp_path}/here", 10):
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != "run") == ["here", "here.lock"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_files_are_private(runtime_dir, there):  # noqa: F811
    before = os.umask(0)
    try:
        with Segment(URL, 10):
            assert there() == ["thing.segment", "thing.segment.lock"]
            assert {stat.S_IMODE(path.stat().st_mode) for path in runtime_dir.iterdir()} == {0o600}
    finally:
        os.umask(before)


# -- generations ------------------------------------------------------------------------------------------------------


def test_growing_replaces_it_and_old_views_stay():
    with Segment(URL, 4) as a, Segment(URL) as b:
        a.buf[:] = b"abcd"
        view = b.buf
        a.resize(6)
        assert (a.size, a.generation, bytes(a.buf)) == (6, 2, b"abcd\0\0")
        assert (b.size, b.stale, bytes(view)) == (4, True, b"abcd")
        assert b.refresh()
        assert not b.refresh()
        assert (b.size, b.stale) == (6, False)
        a.buf[5] = 9
        assert b.buf[5] == 9
        assert bytes(view) == b"abcd"
        b.resize(2)
        assert a.refresh()
        assert (bytes(a.buf), a.generation) == (b"ab", 3)
        b.resize(2)
        assert not a.stale
    assert bytes(view) == b"abcd"


def test_a_generation_goes_with_its_last_view(runtime_dir):  # noqa: F811
    def mappings():
        with open("/proc/self/maps") as maps:
            return sum(str(runtime_dir) in line for line in maps)

    with Segment(URL, 1 << 20) as segment:
        view = segment.buf
        segment.resize(2 << 20)
        assert mappings() == 2
        del view
        assert mappings() == 1


def test_arrays_on_the_segment_itself_outlive_resize_and_close():
    segment = Segment(URL, 80)
    wrapped = np.frombuffer(segment, np.float64)
    bare = np.ndarray((10,), np.float64, buffer=segment)  # which gives the buffer back, and goes on using it
    wrapped[3] = 1.5
    segment.resize(8000)
    segment.close()
    del segment
    assert bare[3] == wrapped[3] == 1.5


def test_ctypes_and_alignment():
    class Point(ctypes.Structure):
        _fields_ = (("x", ctypes.c_double), ("n", ctypes.c_long))

    with Segment(URL, ctypes.sizeof(Point)) as segment:
        Point.from_buffer(segment).x = 2.5
        assert Point.from_buffer(Segment(URL)).x == 2.5
        assert np.frombuffer(segment, np.uint8).ctypes.data % 4096 == 0


def test_readonly():
    with Segment(URL, 10), Segment(URL, readonly=True) as looking:
        assert looking.buf.readonly
        with pytest.raises(TypeError):
            looking.buf[0] = 1
        with pytest.raises(errors.Unsupported):
            looking.resize(20)


def test_closed():
    segment = Segment(URL, 10)
    segment.close()
    segment.close()
    with pytest.raises(BufferError):
        memoryview(segment)
    for use in (lambda: segment.resize(20), lambda: segment.buf):
        with pytest.raises(errors.Closed):
            use()
    assert segment.closed
    assert not segment.stale
    segment.unlink()
    unopened = aio.Segment(URL, 10)
    for use in (lambda: unopened.size, lambda: unopened.generation, lambda: unopened.buf):
        with pytest.raises(errors.Closed, match=URL):
            use()


# -- the last one out ---------------------------------------------------------------------------------------------------


def test_the_last_one_out_removes_it(there):
    first, second = Segment(URL, 10), Segment(URL)
    first.resize(100)
    first.close()
    assert there() == ["thing.segment", "thing.segment.lock"]  # though the second has not seen this generation
    assert second.refresh()
    second.close()
    assert there() == []


def test_an_object_that_is_dropped_is_closed(there):
    Segment(URL, 10)
    assert there() == []


def test_a_process_that_ends_closes(there):
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=_open_and_end)
        process.start()
        process.join(30)
        assert process.exitcode == 0
        assert there() == []


_kept = []


def _open_and_end():
    _kept.append(Segment(URL, 10))


def test_what_the_killed_left_is_nobodys(there):
    child = Child(lambda: Segment(URL, 10).buf.__setitem__(0, 1))
    child.kill()
    child = Child(lambda: _kept.append(Segment(URL, 10)))
    _kept.clear()
    with Segment(URL) as segment:
        segment.buf[0] = 5
    child.kill()
    assert there() == ["thing.segment", "thing.segment.lock"]
    with pytest.raises(errors.NotFound):
        Segment(URL)
    assert there() == []
    child = Child(lambda: _kept.append(Segment(URL, 10)))
    child.kill()
    with Segment(URL, 20, "create") as segment:
        assert segment.buf[0] == 0
    child = Child(lambda: _kept.append(Segment(URL, 10)))
    child.kill()
    with Segment("shm://another", 20):  # whoever takes memory removes what is nobody's
        assert there() == ["another.segment", "another.segment.lock"]


def test_a_forked_child_is_attached(there):
    segment = Segment(URL, 10)
    child = Child(lambda: None)
    segment.close()
    with Segment(URL) as again:  # the child holds it
        assert again.size == 10
    assert there() == ["thing.segment", "thing.segment.lock"]
    child.kill()
    with pytest.raises(errors.NotFound):
        Segment(URL)


def test_unlink(there):
    old = Segment(URL, 10)
    old.buf[0] = 1
    old.unlink()
    assert there() == []
    with Segment(URL, 20, "create") as new:
        assert new.buf[0] == 0
        assert old.stale
        assert not old.refresh()
        with pytest.raises(errors.NotFound):
            old.resize(30)
        old.unlink()  # it is not the old one's name any more
        old.close()
        assert there() == ["thing.segment", "thing.segment.lock"]
    assert there() == []


def test_one_who_is_in_the_middle_is_waited_for_and_the_stopped_not_for_ever(monkeypatch, runtime_dir, there):  # noqa: F811
    monkeypatch.setattr(_tenancy, "CONTENTION", 0.05)
    monkeypatch.setattr(_tenancy, "PATIENCE", 0.05)
    segment = Segment(URL, 10)
    fd = os.open(runtime_dir / "thing.segment.lock", os.O_RDWR)
    assert _tenancy.try_record(fd, 0)
    for act in (lambda: Segment(URL), lambda: segment.resize(20, timeout=0.02), lambda: segment.unlink(timeout=0)):
        with pytest.raises(errors.Timeout, match="does not come to an end"):
            act()
    segment.close()
    assert there() == ["thing.segment", "thing.segment.lock"]
    os.close(fd)
    Segment("shm://other", 1).close()
    assert there() == []


# -- strangers --------------------------------------------------------------------------------------------------------


def test_a_strangers_file_is_not_touched(runtime_dir, there):  # noqa: F811
    thing, lock = runtime_dir / "thing.segment", runtime_dir / "thing.segment.lock"
    thing.write_text("mine" * 100)
    thing.chmod(0o600)
    for act in (lambda: Segment(URL, 10), lambda: Segment(URL)):
        with pytest.raises((errors.ProtocolError, errors.NotFound)):
            act()
    assert thing.read_text() == "mine" * 100
    assert there() == ["thing.segment"]
    thing.unlink()
    lock.write_text("mine")
    lock.chmod(0o600)
    with pytest.raises(errors.ProtocolError):
        Segment(URL, 10)
    assert lock.read_text() == "mine"
    lock.unlink()
    for name in (thing, lock):
        name.symlink_to("/etc/passwd")
        with pytest.raises(errors.AccessDenied):
            Segment(URL, 10)
        assert name.is_symlink()
        name.unlink()
        name.touch(0o600)
        name.chmod(0o644)
        with pytest.raises(errors.AccessDenied, match="open to others"):
            Segment(URL, 10)
        name.unlink()
        if os.geteuid() == 0:
            name.touch(0o600)
            os.chown(name, 12345, 12345)
            with pytest.raises(errors.AccessDenied, match="uid 12345"):
                Segment(URL, 10)
            name.unlink()
        os.mkfifo(name, 0o600)
        with pytest.raises(errors.AccessDenied):
            Segment(URL, 10)
        name.unlink()


def test_a_damaged_first_page_is_told(runtime_dir):  # noqa: F811
    with Segment(URL, 10), open(runtime_dir / "thing.segment", "r+b") as file:
        good = file.read(64)
        for at in range(24):
            file.seek(0)
            file.write(good[:at] + bytes([good[at] ^ 0xFF]) + good[at + 1 :])
            file.flush()
            with pytest.raises(errors.ProtocolError):
                Segment(URL)
        file.seek(0)
        file.write(good)


def test_without_nameless_files(monkeypatch, there):
    """As on a file system that has no O_TMPFILE."""
    monkeypatch.setattr(_files.os, "O_TMPFILE", os.O_DIRECTORY | os.O_CREAT)
    with Segment(URL, 10) as a, Segment(URL) as b:
        a.resize(20)
        assert b.refresh()
        assert there() == ["thing.segment", "thing.segment.lock"]
    assert there() == []


# -- children -----------------------------------------------------------------------------------------------------------


def _write(segment, value):
    segment.buf[0] = value
    if segment.url is not None:
        segment.resize(20)


PASSED_ON = """
import multiprocessing
from ipckit.sync import Segment

def write(segment):
    segment.buf[0] = 7

if __name__ == "__main__":
    with Segment("shm://thing", 10) as segment:
        process = multiprocessing.get_context("forkserver").Process(target=write, args=(segment,))
        process.start()
        process.join(30)
        assert (process.exitcode, segment.buf[0]) == (0, 7)
"""


def test_passed_on_by_a_forkserver(tmp_path, there):
    """In a program of its own: a forkserver that another test started knows another runtime directory."""
    script = tmp_path / "passed_on.py"
    script.write_text(PASSED_ON)
    subprocess.run([sys.executable, str(script)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("method", "url"), [("fork", URL), ("spawn", URL), ("fork", None), ("spawn", None), ("forkserver", None)]
)
def test_passed_to_a_child(method, url, there):
    with Segment(url, 10) as segment:
        process = multiprocessing.get_context(method).Process(target=_write, args=(segment, 7))
        process.start()
        process.join(30)
        assert process.exitcode == 0
        assert segment.buf[0] == 7
        assert segment.refresh() == (url is not None)
        if url is None:
            with pytest.raises(RuntimeError):
                pickle.dumps(segment)
            with pytest.raises(errors.Unsupported):
                segment.resize(20)
        else:
            assert pickle.loads(pickle.dumps(segment)).size == 20
    assert there() == []


def test_many_come_and_go_at_once(there):
    """Each finds a whole segment, and the last of them leaves nothing."""

    def act():
        for _ in range(40):
            with Segment(URL, 64) as segment:
                assert segment.buf[1] in (0, 3)
                segment.buf[1] = 3

    children = [Child(act) for _ in range(2)]
    threads = Threads(act, act)
    assert threads.join() == [None, None]
    for child in children:
        child.kill()
    with pytest.raises(errors.NotFound):
        Segment(URL)
    assert there() == []


# -- event loops ----------------------------------------------------------------------------------------------------------


def test_for_tasks(there, monkeypatch, runtime_dir):  # noqa: F811
    async def main():
        async with aio.Segment(URL, 10) as a:
            b = await aio.Segment(URL)
            await a.resize(20)
            assert b.refresh()
            assert len(memoryview(b)) == 20
            b.close()
            with pytest.raises(errors.NotFound):
                await aio.Segment("shm://nothing", timeout=0.01)
            fd = os.open(runtime_dir / "thing.segment.lock", os.O_RDWR)
            assert _tenancy.try_record(fd, 0)
            waiting = asyncio.create_task(a.resize(30))
            await asyncio.sleep(0)
            assert not waiting.done()
            os.close(fd)
            await waiting
            assert a.size == 30
            await a.unlink()
            assert there() == []
        anonymous = await aio.Segment(None, 5)
        assert anonymous.size == 5
        anonymous.close()

    asyncio.run(main())


# -- any order ------------------------------------------------------------------------------------------------------------


class Names(RuleBasedStateMachine):
    """Objects that come, go, resize and refresh in any order, held to a model."""

    def __init__(self):
        super().__init__()
        self.open = []  # [object, its series, what it shows]
        self.series = 0
        self.name = None  # the series that has the name
        self.newest = {}  # series: (generation, size)

    def attached(self):
        return [each for each in self.open if each[1] == self.name]

    @rule(size=st.integers(1, 9000), mode=st.sampled_from(["create", "attach", "create-or-attach"]))
    def come(self, size, mode):
        try:
            segment = Segment(URL, size, mode)
        except errors.AddressInUse:
            assert mode == "create"
            assert self.name is not None
            return
        except errors.NotFound:
            assert mode == "attach"
            assert self.name is None
            return
        except errors.BadOption:
            assert self.newest[self.name][1] < size
            return
        if self.name is None:
            self.series += 1
            self.name = self.series
            self.newest[self.name] = (1, size)
        assert (segment.generation, segment.size) == self.newest[self.name]
        self.open.append([segment, self.name, self.newest[self.name]])

    @rule(which=st.integers(0, 9), size=st.integers(1, 9000))
    def resize(self, which, size):
        if not self.open:
            return
        each = self.open[which % len(self.open)]
        try:
            each[0].resize(size)
        except errors.NotFound:
            assert each[1] != self.name
            return
        assert each[1] == self.name
        generation, before = self.newest[self.name]
        if before != size:
            self.newest[self.name] = (generation + 1, size)
        each[2] = self.newest[self.name]

    @rule(which=st.integers(0, 9))
    def refresh(self, which):
        if self.open:
            each = self.open[which % len(self.open)]
            newer = each[1] == self.name and each[2] != self.newest[self.name]
            assert each[0].refresh() == newer
            if newer:
                each[2] = self.newest[self.name]

    @rule(which=st.integers(0, 9))
    def go(self, which):
        if self.open:
            each = self.open.pop(which % len(self.open))
            each[0].close()
            if not self.attached():
                self.name = None

    @rule(which=st.integers(0, 9))
    def unlink(self, which):
        if self.open:
            each = self.open[which % len(self.open)]
            each[0].unlink()
            if each[1] == self.name:
                self.name = None

    @invariant()
    def each_shows_its_own(self):
        for segment, _, shows in self.open:
            assert (segment.generation, segment.size) == shows

    def teardown(self):
        for each in self.open:
            each[0].close()
        with pytest.raises(errors.NotFound):
            Segment(URL)


def test_any_order(runtime_dir, there):  # noqa: F811
    from hypothesis.stateful import run_state_machine_as_test

    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    run_state_machine_as_test(
        Names, settings=settings(max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=checks)
    )
    assert there() == []
