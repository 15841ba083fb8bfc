"""The bridge: on the caller's loop or turned by whoever waits, never by a thread that a message would have to pass."""

import asyncio
import gc
import os
import select
import signal
import socket
import threading
import time
import warnings

import pytest

from ipckit import _wait, errors
from ipckit.transports import _bridge
from ipckit.transports._bridge import Bell, Driven, Resident, find_home

URL = "test://bridge"


def lane():
    return _wait.Lane(_wait.Gate(URL, lambda: None), "test")


async def nothing():
    pass


def end(home):
    home.close(nothing, lambda: None)


@pytest.fixture
def driven():
    home = Driven()
    yield home
    end(home)


def readable(fd):
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def test_a_thread_gets_a_home_of_its_own():
    home = _wait.run(find_home(), lane(), 5)
    assert isinstance(home, Driven)
    end(home)


def test_a_home_that_was_closed_leaves_nothing_to_a_forked_child():
    mine, theirs = socket.socketpair()
    home = Driven()
    number = home._epoll
    end(home)
    os.dup2(theirs.fileno(), number)  # somebody else has the number now
    with mine, theirs, socket.socket(fileno=number) as stranger:
        home.abandon()
        mine.send(b"here")
        assert stranger.recv(4) == b"here"


def test_a_task_stays_on_its_loop():
    async def main():
        home = await _wait.arun(find_home(), lane(), 5)
        assert isinstance(home, Resident)
        assert home.loop is asyncio.get_running_loop()

    asyncio.run(main())


def test_a_blocking_call_inside_a_running_loop_gets_a_home_that_turns():
    """In a notebook there is a running loop, which stands still while a cell blocks."""

    async def answer():
        await asyncio.sleep(0.01)
        return 42

    async def main():
        home = _wait.run(find_home(), lane(), 5)
        assert isinstance(home, Driven)
        assert _wait.run(home.steps(answer), lane(), 5) == 42
        end(home)

    asyncio.run(main())


def test_steps_return_what_the_coroutine_returns(driven):
    async def slow():
        await asyncio.sleep(0.02)
        return "done"

    async def fail():
        raise KeyError("why")

    assert _wait.run(driven.steps(slow), lane(), 5) == "done"
    with pytest.raises(KeyError, match="why"):
        _wait.run(driven.steps(fail), lane(), 5)


def test_a_timeout_cancels_the_coroutine(driven):
    seen = []

    async def forever():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    with pytest.raises(errors.Timeout):
        _wait.run(driven.steps(forever), lane(), 0.05)
    assert seen == ["cancelled"]


def test_do_happens_before_it_returns_with_its_consequences(driven):
    seen = []
    driven.do(lambda: driven.loop.call_soon(driven.loop.call_soon, seen.append, 1))
    assert seen == [1]
    driven.do(lambda: driven.do(lambda: seen.append(2)))  # from inside, too
    assert seen == [1, 2]


def test_turn_reads_what_has_come_and_never_waits(driven):
    here, there = socket.socketpair()
    seen = []
    with here, there:
        here.setblocking(False)
        driven.do(lambda: driven.loop.add_reader(here, lambda: seen.append(here.recv(100))))
        driven.turn()
        assert seen == []
        there.send(b"x")
        wait = driven.wait(there.fileno())
        assert readable(wait.fds[0][0])  # the loop's own descriptor says so
        driven.turn()
        assert seen == [b"x"]
        driven.do(lambda: driven.loop.remove_reader(here))


def test_a_loop_that_is_never_done_does_not_hold_its_caller(driven):
    count = 0

    def again():
        nonlocal count
        count += 1
        if count < 100_000:
            driven.loop.call_soon(again)

    driven.do(again)
    before = count
    assert 0 < before < 100_000
    assert readable(driven.wait(0).fds[0][0])  # and says that there is more to do
    driven.turn()
    assert count > before
    count = 100_000


def test_the_caretaker_turns_a_loop_that_nobody_turns(driven):
    fired = threading.Event()
    driven.do(lambda: driven.loop.call_later(0.05, fired.set))
    assert fired.wait(10)


def test_the_caretakers_thread_ends_with_the_last_home():
    one, two = Driven(), Driven()
    assert any(thread.name == "ipckit-caretaker" for thread in threading.enumerate())
    end(one)
    end(two)
    assert not any(thread.name == "ipckit-caretaker" for thread in threading.enumerate())


def test_a_bell_is_written_only_while_somebody_listens(driven):
    bell = Bell(driven)
    fd = bell.arm().fds[1][0]
    bell.disarm()
    bell.ring()
    assert not readable(fd)
    bell.arm()
    bell.ring()
    bell.ring()
    assert readable(fd)
    bell.arm()
    assert not readable(fd)
    bell.close()
    bell.ring()
    bell.close()


def test_ringing_wakes_a_sleeping_thread(driven):
    bell = Bell(driven)
    rung = []

    def steps():
        while not rung:
            wait = bell.arm()
            if not rung:
                yield wait

    def ring():
        rung.append(True)
        driven.do(bell.ring)

    timer = threading.Timer(0.05, ring)
    timer.start()
    start = time.monotonic()
    _wait.run(steps(), lane(), 10)
    timer.join()
    bell.close()
    assert rung
    assert time.monotonic() - start < 5


def test_an_interrupt_in_the_midst_of_the_client_breaks_the_home(driven):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        driven.do(interrupt)
    assert driven.broken
    driven.turn()
    with pytest.raises(errors.ConfigError):
        _wait.run(driven.steps(nothing), lane(), 1)


def test_close_lets_the_client_say_goodbye_and_no_longer_than_a_moment():
    said, cut = [], []

    async def goodbye():
        await asyncio.sleep(0.01)
        said.append(True)

    async def endless():
        await asyncio.sleep(600)

    one, two = Driven(), Driven()
    one.close(goodbye, lambda: cut.append(1))
    start = time.monotonic()
    two.close(endless, lambda: cut.append(2))
    assert (said, cut) == ([True], [2])
    assert time.monotonic() - start < 5
    one.close(goodbye, lambda: cut.append(3))  # idempotent
    assert cut == [2]


def test_a_home_that_is_closed_in_its_own_turn_closes_after_it():
    """As the garbage collector may do it, wherever it strikes."""
    said = []

    async def goodbye():
        said.append(True)

    home = Driven()
    home.do(lambda: home.close(goodbye, lambda: None))
    assert said == [True]
    assert home.loop.is_closed()


def test_a_resident_says_goodbye_even_if_the_loop_ends_at_once():
    said = []

    async def goodbye():
        await asyncio.sleep(0)
        said.append("at once")
        await asyncio.sleep(600)

    async def main():
        home = await _wait.arun(find_home(), lane(), 5)
        home.close(goodbye, lambda: said.append("cut"))
        assert said == ["at once"]

    asyncio.run(main())
    assert said == ["at once", "cut"]


def test_a_resident_whose_loop_has_ended_is_cut():
    async def main():
        return await _wait.arun(find_home(), lane(), 5)

    home = asyncio.run(main())
    cut = []
    home.do(lambda: cut.append("never"))
    home.close(nothing, lambda: cut.append("cut"))
    assert cut == ["cut"]


def test_steps_at_a_dead_loop_are_an_error():
    async def main():
        return await _wait.arun(find_home(), lane(), 5)

    home = asyncio.run(main())
    with pytest.raises(errors.ConfigError):
        _wait.run(home.steps(nothing), lane(), 1)


@pytest.mark.parametrize("now", [True, False])
def test_a_residents_bell_wakes_a_task_without_being_written(now):
    async def main():
        home = Resident(asyncio.get_running_loop())
        bell = Bell(home)
        news = []

        def steps():
            while not news:
                wait = bell.arm()
                if not news:
                    yield wait
            return news.pop()

        getting = asyncio.create_task(_wait.arun(steps(), lane(), 20))
        await asyncio.sleep(0)

        def tell():
            news.append("it")
            bell.ring()
            assert not readable(bell._fd)
            if now:
                home.roused()
                assert not news  # it was taken before this returned
            bell.ring()  # nobody listens

        home.loop.call_soon(tell)
        assert await getting == "it"
        assert not readable(bell._fd)
        bell.close()

    asyncio.run(main())


def test_a_bell_is_written_for_those_who_sleep_otherwise():
    async def main():
        home = Resident(asyncio.get_running_loop())
        bell = Bell(home)
        bell.arm()  # by a thread, or somebody's epoll
        bell.ring()
        assert readable(bell._fd)
        bell.close()

    asyncio.run(main())


def test_other_threads_reach_a_resident():
    async def main():
        home = await _wait.arun(find_home(), lane(), 5)
        done = asyncio.Event()
        thread = threading.Thread(target=lambda: home.do(done.set))
        thread.start()
        await asyncio.wait_for(done.wait(), 5)
        thread.join()

    asyncio.run(main())


def test_a_childs_copy_does_not_keep_a_connection_open(driven):
    here, there = socket.socketpair()
    here.setblocking(False)
    driven.do(lambda: driven.loop.add_reader(here, lambda: None))
    pid = os.fork()
    if pid == 0:
        driven.abandon()
        here.close()
        time.sleep(20)
        os._exit(0)
    try:
        driven.do(lambda: driven.loop.remove_reader(here))
        here.close()
        there.settimeout(10)
        assert there.recv(1) == b""  # the child still lives, and holds nothing
        driven.do(lambda: None)  # nor has it disturbed the parent's loop
        assert not driven.broken
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        there.close()


def test_forgotten_descriptors_lead_nowhere():
    here, there = socket.socketpair()
    with here, there:
        _bridge.forget([here.fileno()])
        there.settimeout(5)
        assert there.recv(1) == b""


def test_nothing_is_left():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            home = Driven()
            _wait.run(home.steps(nothing), lane(), 5)
            end(home)
        del home
        gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
