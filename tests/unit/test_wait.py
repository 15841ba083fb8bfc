"""The two drivers, on steps made by hand over an eventfd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from ipckit import errors
from ipckit._spi import Steps, Wait
from ipckit._wait import Gate, Lane, arun, run

POLLIN, POLLOUT = select.POLLIN, select.POLLOUT


class Mailbox:
    """Numbers, and an eventfd that is readable while there are some."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self.put = 0
        self.got = 0
        self.log: list[str] = []
        self.closed = 0
        self.gate = Gate("toy://x", self.release)
        self.lane = Lane(self.gate, "recv")

    def release(self) -> None:
        self.closed += 1
        os.close(self.fd)

    def add(self) -> None:
        self.put += 1
        os.eventfd_write(self.fd, 1)

    def try_get(self) -> int | None:
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return None
        self.got += 1
        return self.got

    def get(self) -> Steps[int]:
        self.log.append("begin")
        try:
            while (number := self.try_get()) is None:
                yield Wait(((self.fd, POLLIN),))
            return number
        except errors.Timeout:
            self.log.append("timeout")
            raise
        except GeneratorExit:
            self.log.append("closed")
            raise
        finally:
            self.log.append("end")

    def run(self, timeout: float | None = 10) -> int:
        return run(self.get(), self.lane, timeout)

    async def arun(self, timeout: float | None = 10) -> int:
        return await arun(self.get(), self.lane, timeout)


@pytest.fixture
def box() -> Iterator[Mailbox]:
    mailbox = Mailbox()
    yield mailbox
    mailbox.gate.close()
    assert mailbox.closed == 1


def later(seconds: float, action: Callable[[], object]) -> threading.Thread:
    timer = threading.Timer(seconds, action)
    timer.start()
    return timer


# -- run ----------------------------------------------------------------------------------------------------------


def test_run_returns(box: Mailbox) -> None:
    box.add()
    assert box.run() == 1
    assert box.log == ["begin", "end"]


def test_run_waits(box: Mailbox) -> None:
    timer = later(0.05, box.add)
    assert box.run() == 1
    timer.join()


@pytest.mark.parametrize("timeout", [0, 0.0001, 0.05])
def test_run_timeout_is_never_early(box: Mailbox, timeout: float) -> None:
    start = time.monotonic()
    with pytest.raises(errors.Timeout) as caught:
        box.run(timeout)
    assert time.monotonic() - start >= timeout
    assert box.log == ["begin", "timeout", "end"]
    assert (caught.value.operation, caught.value.url) == ("recv", "toy://x")


def test_run_zero_tries(box: Mailbox) -> None:
    box.add()
    assert box.run(0) == 1


def test_run_takes_what_came_at_the_last_moment(box: Mailbox) -> None:
    """The descriptor never told, but at the deadline it is there: it counts."""

    def steps() -> Steps[str]:
        yield Wait(())
        return "at the last moment"

    assert run(steps(), box.lane, 0.02) == "at the last moment"


def test_a_task_that_sleeps_hears_of_what_another_has_read(box: Mailbox) -> None:
    """A link reads several frames at once: whoever takes the first of them lets the one who sleeps look at the rest."""
    read: list[int] = []

    def get() -> Steps[int]:
        while not read:
            while (number := box.try_get()) is not None:
                read.append(number)
            if not read:
                yield Wait(((box.fd, POLLIN),))
        return read.pop(0)

    async def both() -> list[int]:
        first = asyncio.create_task(arun(get(), box.lane, 10))
        await asyncio.sleep(0)
        assert box.lane.asleep
        box.add()
        box.add()
        second = await arun(get(), box.lane, 10)  # at once: the loop has not looked at the descriptor since
        return [second, await asyncio.wait_for(first, 5)]

    assert asyncio.run(both()) == [1, 2]


@pytest.mark.parametrize("driver", ["run", "arun"])
def test_steps_may_turn_a_timeout_into_something_else(box: Mailbox, driver: str) -> None:
    def translated() -> Steps[int]:
        try:
            while True:
                yield Wait(())
        except errors.Timeout as timeout:
            raise errors.NothingListening("nobody", operation="connect") from timeout

    def swallowed() -> Steps[int]:
        try:
            while True:
                yield Wait(())
        except errors.Timeout:
            return 7

    def ignored() -> Steps[int]:
        while True:
            with contextlib.suppress(errors.Timeout):
                yield Wait(())

    def drive(steps: Steps[int]) -> int:
        return run(steps, box.lane, 0.01) if driver == "run" else asyncio.run(arun(steps, box.lane, 0.01))

    with pytest.raises(errors.NothingListening):
        drive(translated())
    assert drive(swallowed()) == 7
    with pytest.raises(RuntimeError, match="ignored"):
        drive(ignored())


@pytest.mark.parametrize("driver", ["run", "arun"])
def test_at_most(box: Mailbox, driver: str) -> None:
    """A Wait without descriptors ends by itself."""

    def steps() -> Steps[str]:
        for _ in range(3):
            yield Wait((), 0.01)
        return "done"

    start = time.monotonic()
    result = run(steps(), box.lane, None) if driver == "run" else asyncio.run(arun(steps(), box.lane, None))
    assert result == "done"
    assert time.monotonic() - start >= 0.03


@pytest.mark.parametrize("timeout", [1e6, 1e10, float("inf")])
def test_run_very_long(box: Mailbox, timeout: float) -> None:
    timer = later(0.03, box.add)
    assert box.run(timeout) == 1
    timer.join()
    timer = later(0.03, box.add)
    assert asyncio.run(box.arun(timeout)) == 2
    timer.join()


def test_run_close_wakes_all(box: Mailbox) -> None:
    """Who sleeps and who waits in line; the resource is released when the last has left, once."""
    caught: list[BaseException] = []
    threads = [threading.Thread(target=lambda: caught.append(catch(box.run))) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    assert box.closed == 0
    box.gate.close()
    for thread in threads:
        thread.join(10)
    assert [type(error) for error in caught] == [errors.Closed] * 3
    assert box.closed == 1
    assert box.log.count("begin") == 1, "only one was inside, the others in line"
    with pytest.raises(errors.Closed):
        box.run(0)


def catch(action: Callable[[], object]) -> BaseException:
    try:
        action()
    except BaseException as error:
        return error
    raise AssertionError("nothing was raised")


def test_run_lane_serialises(box: Mailbox) -> None:
    inside = 0
    most = 0

    def steps() -> Steps[None]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        yield Wait((), 0.002)
        inside -= 1

    threads = [threading.Thread(target=lambda: run(steps(), box.lane, 20)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (inside, most) == (0, 1)


def test_run_timeout_in_line(box: Mailbox) -> None:
    holder = threading.Thread(target=lambda: catch(box.run))
    holder.start()
    while not box.lane.mutex.locked():
        time.sleep(0.001)
    for timeout in (0, 0.05):
        start = time.monotonic()
        with pytest.raises(errors.Timeout):
            box.run(timeout)
        assert time.monotonic() - start >= timeout
    assert box.log == ["begin"], "who only stood in line has not begun"
    box.gate.close()
    holder.join(10)


def test_run_lets_a_steps_error_out(box: Mailbox) -> None:
    def steps() -> Steps[None]:
        yield Wait((), 0)
        raise errors.PeerDied("gone", pid=5)

    with pytest.raises(errors.PeerDied):
        run(steps(), box.lane, None)
    box.add()
    assert box.run() == 1, "the lane is free again"


def test_run_answers_ctrl_c(box: Mailbox) -> None:
    """A signal handler that raises ends the wait; steps are closed, the lane is free."""

    class Interrupt(Exception):
        pass

    def handler(*_: object) -> None:
        raise Interrupt

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        timer = later(0.05, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1))
        with pytest.raises(Interrupt):
            box.run(20)
        timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert box.log == ["begin", "closed", "end"]
    box.add()
    assert box.run() == 1


def test_run_goes_on_after_a_signal_that_does_not_raise(box: Mailbox) -> None:
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(1))
    try:
        timers = [
            later(0.03, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)),
            later(0.08, box.add),
        ]
        assert box.run(20) == 1
        for timer in timers:
            timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [1]


# -- the gate -----------------------------------------------------------------------------------------------------


def test_gate_closes_once(box: Mailbox) -> None:
    box.gate.close()
    box.gate.close()
    assert box.closed == 1
    with pytest.raises(errors.Closed):
        box.gate.enter("recv")


def test_gate_bell_rings_for_who_comes_late(box: Mailbox) -> None:
    box.gate.enter("recv")
    box.gate.close()
    poll = select.poll()
    poll.register(box.gate.bell, POLLIN)
    assert poll.poll(0)
    assert box.closed == 0
    box.gate.leave()
    assert box.closed == 1


def in_child(action: Callable[[], object]) -> str:
    """What happens to `action` in a forked child."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(20)  # a child that hangs is no answer
        try:
            action()
            os.write(write, b"nothing")
        except BaseException as error:
            os.write(write, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    return answer


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork_guard(box: Mailbox) -> None:
    """Refused in the child, even where a thread that it does not have holds the locks; closing there releases nothing."""
    holder = threading.Thread(target=lambda: catch(box.run))
    holder.start()
    while not box.lane.mutex.locked():
        time.sleep(0.001)
    assert in_child(box.run) == "ForkedError"
    assert in_child(lambda: asyncio.run(box.arun())) == "ForkedError"
    with box.gate._mutex:
        assert in_child(box.run) == "ForkedError"
        assert in_child(box.gate.close) == "nothing"
        assert in_child(lambda: (box.gate.close(), box.closed == 0 or 1 / 0)) == "nothing"
    box.gate.close()
    holder.join(10)


# -- arun ---------------------------------------------------------------------------------------------------------


class Flat(asyncio.SelectorEventLoop):
    """Counts what is registered."""

    added = 0
    removed = 0

    def add_reader(self, *args: object) -> None:  # type: ignore[override]
        self.added += 1
        super().add_reader(*args)  # type: ignore[arg-type]

    def remove_reader(self, fd: int) -> bool:  # type: ignore[override]
        self.removed += 1
        return super().remove_reader(fd)


def on(loop: asyncio.AbstractEventLoop, coroutine: object) -> object:
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(coroutine)  # type: ignore[arg-type]
    finally:
        asyncio.set_event_loop(None)
        loop.close()


def kinds() -> list[object]:
    found: list[object] = ["c", "python", "debug"]
    if hasattr(asyncio, "eager_task_factory"):
        found.append("eager")
    return found


@pytest.fixture(params=kinds())
def loop(request: pytest.FixtureRequest) -> Iterator[Flat]:
    """Loops whose tasks are asyncio's C and pure-Python ones, eager ones, and with debug mode on."""
    made = Flat()
    caught: list[object] = []
    made.set_exception_handler(lambda _loop, context: caught.append(context))
    if request.param == "python":
        made.set_task_factory(lambda at, coro, **named: asyncio.tasks._PyTask(coro, loop=at, **named))  # type: ignore[attr-defined]
    if request.param == "eager":
        made.set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
    made.set_debug(request.param == "debug")
    yield made
    assert made.is_closed()
    assert caught == []


def test_arun_waits(box: Mailbox, loop: Flat) -> None:
    async def main() -> None:
        box.add()
        assert await box.arun() == 1
        asyncio.get_running_loop().call_later(0.02, box.add)
        assert await box.arun() == 2
        box.gate.close()

    on(loop, main())


@pytest.mark.parametrize("timeout", [0, 0.0001, 0.05])
def test_arun_timeout_is_never_early(box: Mailbox, loop: Flat, timeout: float) -> None:
    async def main() -> None:
        start = time.monotonic()
        with pytest.raises(errors.Timeout):
            await box.arun(timeout)
        assert time.monotonic() - start >= timeout
        box.gate.close()

    on(loop, main())
    assert box.log == ["begin", "timeout", "end"]


def test_arun_keeps_its_readers(box: Mailbox, loop: Flat) -> None:
    """Registered at the first sleep, kept from then on, gone when the gate closes."""

    async def main() -> None:
        at = asyncio.get_running_loop()
        for number in range(20):
            at.call_soon(box.add)
            assert await box.arun() == number + 1
        assert loop.added == 1
        assert loop.removed == 0
        box.gate.close()
        assert loop.removed == 1

    on(loop, main())


def test_arun_gives_up_a_reader_that_nobody_waits_for(box: Mailbox, loop: Flat) -> None:
    """A descriptor that is ready while nobody reads it would spin the loop."""

    async def main() -> None:
        asyncio.get_running_loop().call_soon(box.add)
        await box.arun()
        box.add()
        for _ in range(50):
            await asyncio.sleep(0)
        assert loop.removed == 1
        assert await box.arun() == 2
        asyncio.get_running_loop().call_soon(box.add)
        assert await box.arun() == 3, "and comes back when somebody waits again"
        assert loop.added == 2
        box.gate.close()

    on(loop, main())


def test_arun_passing_lane_keeps_nothing(box: Mailbox, loop: Flat) -> None:
    async def main() -> None:
        lane = Lane(box.gate, "accept", passing=True)
        asyncio.get_running_loop().call_later(0.01, box.add)
        assert await arun(box.get(), lane, 10) == 1
        assert (loop.added, loop.removed) == (1, 1)
        box.gate.close()

    on(loop, main())


def test_arun_cancelled_at_every_point(box: Mailbox, loop: Flat) -> None:
    """After any number of turns of the loop: the steps are closed, and the number is there for the next."""

    async def main() -> None:
        taken = 0
        for turns in range(8):
            for ready in (False, True):
                task = asyncio.ensure_future(box.arun())
                if ready:
                    box.add()
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel("why not")
                try:
                    assert await task == taken + 1
                    taken += 1
                except asyncio.CancelledError:
                    assert box.log[-1:] in (["end"], [])
                while taken < box.put:
                    assert await box.arun() == taken + 1
                    taken += 1
        assert box.got == box.put
        box.gate.close()

    on(loop, main())


def test_arun_cancel_message(box: Mailbox, loop: Flat) -> None:
    async def main() -> None:
        task = asyncio.ensure_future(box.arun())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel("because")
        with pytest.raises(asyncio.CancelledError, match="because"):
            await task
        assert task.cancelled()
        box.gate.close()

    on(loop, main())
    assert box.log == ["begin", "closed", "end"]


def test_arun_two_tasks(box: Mailbox, loop: Flat) -> None:
    """Both wait at one endpoint; each gets one; one that is cancelled does not take the other with it."""

    async def main() -> None:
        tasks = [asyncio.ensure_future(box.arun()) for _ in range(3)]
        await asyncio.sleep(0.01)
        tasks[1].cancel()
        box.add()
        box.add()
        assert sorted(await asyncio.gather(tasks[0], tasks[2])) == [1, 2]
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]
        box.gate.close()

    on(loop, main())


def test_arun_with_the_standard_tools(box: Mailbox, loop: Flat) -> None:
    async def main() -> None:
        at = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await box.arun(None)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(box.arun(None), 0.01)
        at.call_later(0.01, box.add)
        assert await asyncio.wait_for(box.arun(None), 10) == 1
        async with asyncio.TaskGroup() as group:
            first = group.create_task(box.arun())
            second = group.create_task(box.arun())
            at.call_later(0.01, box.add)
            at.call_later(0.02, box.add)
        assert {first.result(), second.result()} == {2, 3}
        done, pending = await asyncio.wait([asyncio.ensure_future(box.arun())], timeout=0.01)
        assert not done
        shielded = asyncio.shield(pending.pop())
        at.call_later(0.01, box.add)
        assert await shielded == 4
        at.call_later(0.01, box.add)
        assert await asyncio.gather(box.arun(), asyncio.sleep(0, "x")) == [5, "x"]
        box.gate.close()

    on(loop, main())


def test_arun_task_group_that_fails(box: Mailbox, loop: Flat) -> None:
    async def fail() -> None:
        await asyncio.sleep(0.01)
        raise LookupError

    async def main() -> None:
        async def together() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(box.arun(None))
                group.create_task(fail())

        with pytest.raises(ExceptionGroup) as caught:
            await together()
        assert [type(error) for error in caught.value.exceptions] == [LookupError]
        assert box.log == ["begin", "closed", "end"]
        box.gate.close()

    on(loop, main())


def test_arun_close_wakes_all(box: Mailbox, loop: Flat) -> None:
    async def main() -> None:
        tasks = [asyncio.ensure_future(box.arun(None)) for _ in range(3)]
        await asyncio.sleep(0.01)
        box.gate.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [errors.Closed] * 3
        assert box.closed == 1
        with pytest.raises(errors.Closed):
            await box.arun(0)

    on(loop, main())


def test_arun_in_context(box: Mailbox, loop: Flat) -> None:
    """The task goes on in its own context, though a callback of the loop has woken it; and it is the current task."""
    import contextvars

    name: contextvars.ContextVar[str] = contextvars.ContextVar("name", default="nobody")

    async def waiter(who: str) -> None:
        name.set(who)
        me = asyncio.current_task()
        for _ in range(3):
            await box.arun()
            assert name.get() == who
            assert asyncio.current_task() is me

    async def main() -> None:
        tasks = [asyncio.ensure_future(waiter("one")), asyncio.ensure_future(waiter("two"))]
        for _ in range(6):
            await asyncio.sleep(0.002)
            box.add()
        await asyncio.gather(*tasks)
        assert name.get() == "nobody"
        box.gate.close()

    on(loop, main())


def test_arun_error_after_the_wake(box: Mailbox, loop: Flat) -> None:
    """What the woken task raises is its own: not the loop's, and not the callback's that woke it."""

    async def main() -> None:
        async def fails() -> None:
            await box.arun()
            raise LookupError("mine")

        task = asyncio.ensure_future(fails())
        await asyncio.sleep(0.01)
        box.add()
        with pytest.raises(LookupError):
            await task
        box.gate.close()

    on(loop, main())


def test_arun_from_two_loops(box: Mailbox) -> None:
    """One endpoint, first on one loop and then on another."""
    for number in range(3):

        async def main() -> int:
            asyncio.get_running_loop().call_later(0.01, box.add)
            return await box.arun()

        assert asyncio.run(main()) == number + 1
    assert box.run(0) if box.add() is None else False


def test_arun_and_run_on_one_endpoint(box: Mailbox) -> None:
    """A thread and a task wait at the same time; each gets one."""
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(box.run()))
    thread.start()

    async def main() -> None:
        task = asyncio.ensure_future(box.arun())
        await asyncio.sleep(0.03)
        box.add()
        box.add()
        got.append(await task)

    asyncio.run(main())
    thread.join(10)
    assert sorted(got) == [1, 2]


def test_arun_writer() -> None:
    """POLLOUT as well: a pipe that is full, until it is drained."""
    read, write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    gate = Gate("toy://x", lambda: (os.close(read), os.close(write)))
    lane = Lane(gate, "send")

    def send(data: bytes) -> Steps[int]:
        while True:
            try:
                return os.write(write, data)
            except BlockingIOError:
                yield Wait(((write, POLLOUT), (read, 0)))

    async def main() -> None:
        with contextlib.suppress(errors.Timeout):
            while True:
                await arun(send(bytes(4096)), lane, 0.01)
        asyncio.get_running_loop().call_later(0.01, lambda: os.read(read, 1 << 20))
        assert await arun(send(b"x"), lane, 10) == 1
        gate.close()

    asyncio.run(main())
