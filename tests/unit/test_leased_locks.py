"""Locks at brokers, real ones: what holds for every broker that keeps locks. What one of them does its own way is at the end."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import pytest

from ipckit import aio, capabilities, errors
from ipckit.sync import Lock, RLock
from ipckit.testing.servers import nats_server, redis_server
from ipckit.transports import _nats_lease, _redis_lease

pytest.importorskip("redis")
pytest.importorskip("nats")
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork beside pytest-timeout's thread

SERVERS = {"redis": (redis_server, "/"), "nats": (nats_server, "/locks/")}
LONG = 20  # seconds; the bound of a hang


@pytest.fixture(scope="module")
def running():
    with contextlib.ExitStack() as stack:
        servers = {}

        def server(name):
            if name not in servers:
                servers[name] = stack.enter_context(SERVERS[name][0]())
            return servers[name]

        yield server


@pytest.fixture(params=SERVERS)
def broker(request):
    return request.param


@pytest.fixture
def place(running, broker):
    """`place(**options)`: the URL of a lock that nobody else uses."""
    name = SERVERS[broker][1] + f"lock-{os.urandom(6).hex()}"
    return lambda **options: running(broker).address(name, **options)


@pytest.fixture
def lock(place):
    """`lock(**options)`: another object of the same name, closed at the end."""
    with contextlib.ExitStack() as stack:

        def make(**options):
            made = Lock(place(**options))
            stack.callback(made.close)
            return made

        yield make


def in_threads(*acts):
    failures = []

    def guarded(act):
        try:
            act()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(act,)) for act in acts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG)
        assert not thread.is_alive()
    assert failures == []


def refused(act):
    with pytest.raises(errors.NotOwner):
        act()


class Waiting:
    """A thread that waits for a lock, and gives it back."""

    def __init__(self, lock):
        self._got = []
        self._thread = threading.Thread(target=self._wait, args=(lock,))
        self._thread.start()

    def _wait(self, lock):
        try:
            with lock:
                self._got.append(lock.token)
        except BaseException as error:
            self._got.append(error)

    def token(self):
        self._thread.join(LONG)
        assert not self._thread.is_alive()
        if isinstance(self._got[0], BaseException):
            raise self._got[0]
        return self._got[0]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, LONG))


# -- one at a time ----------------------------------------------------------------------------------------------------


def test_one_at_a_time_and_tokens_grow(lock):
    shared, count, tokens = lock(), 0, []

    def work(mine):
        def act():
            nonlocal count
            for _ in range(15):
                with mine:
                    before = count
                    tokens.append(mine.check())
                    time.sleep(0)
                    count = before + 1

        return act

    in_threads(work(shared), work(shared), work(lock()), work(lock()))
    assert count == 60
    assert tokens == sorted(set(tokens))
    assert shared.token is None
    assert not shared.lost


def test_tasks_one_at_a_time(place):
    async def main():
        locks, count = [aio.Lock(place()) for _ in range(3)], 0

        async def work(mine):
            nonlocal count
            for _ in range(10):
                async with mine as held:
                    before = count
                    assert held.token is not None
                    await asyncio.sleep(0)
                    count = before + 1

        await asyncio.gather(*[work(mine) for mine in (locks[0], *locks)])
        assert count == 40
        for mine in locks:
            await mine.close()

    run(main())


def test_what_is_told(lock, place):
    first, second = lock(), lock()
    assert capabilities(place()).locks
    assert first.owner() is None
    assert not first.locked()
    assert not first.lost
    with pytest.raises(errors.NotOwner):
        first.release()
    with pytest.raises(errors.NotOwner):
        first.check()
    with first as held:
        assert held is first
        assert first.check() == first.token == second.owner().token
        assert str(os.getpid()) in second.owner().who
        assert 0 < second.owner().remaining <= 10
        assert 0 < first.remaining < 10
        assert second.locked()
        assert "held" in repr(first)
        assert "not held" in repr(second)
        assert not second.acquire(False)
        assert not second.acquire(timeout=0)
        assert not second.acquire(timeout=0.05)
        assert not first.acquire(False)
        with pytest.raises(errors.Deadlock):
            first.acquire()
        with pytest.raises(errors.NotOwner):
            second.release()
        in_threads(lambda: refused(first.release))
        copy = pickle.loads(pickle.dumps(first))
        assert copy.token is None
        assert not copy.acquire(False)
        copy.close()
        assert first.renew()
    assert second.acquire(False)
    assert not second.inherited
    second.close()
    assert first.acquire(timeout=LONG)
    first.release()
    first.close()
    with pytest.raises(errors.Closed):
        first.acquire()
    with pytest.raises(ValueError):
        second.acquire(timeout=float("nan"))


def test_what_is_wrong_is_refused(place, broker):
    for options in ({"lease": "1ms"}, {"lease": "2"}, {"renew": "perhaps"}, {"limit": "1MiB"}, {"leese": "1s"}):
        with pytest.raises(errors.BadOption):
            Lock(place(**options))
    with pytest.raises(errors.UnknownScheme):
        RLock(place())
    with pytest.raises(errors.Unsupported):
        Lock("tcp://127.0.0.1:1")
    with pytest.raises(errors.UnknownScheme):
        Lock("nothing://x")
    nobody = Lock(f"{broker}://127.0.0.1:1/locks/x")
    with pytest.raises(errors.NothingListening):
        nobody.acquire(timeout=0.2)


# -- who waits is woken -----------------------------------------------------------------------------------------------


def test_who_waits_is_woken(lock, monkeypatch):
    monkeypatch.setattr(_redis_lease, "_LOOK", 300.0)
    monkeypatch.setattr(_nats_lease, "_LOOK", 300.0)
    holder, waiter = lock(lease="300s"), lock(lease="300s")
    holder.acquire()
    third = lock()
    assert not third.acquire(False)  # connected: to connect in time is another matter
    waiting = Waiting(waiter)
    assert not third.acquire(timeout=0.1)
    token = holder.token
    holder.release()
    assert waiting.token() > token


def test_a_signal_handler_that_raises_ends_the_wait(lock):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    holder, waiter, third = lock(), lock(), lock()
    before = signal.signal(signal.SIGUSR1, stop)
    try:
        with holder:
            timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            with pytest.raises(Stop):
                waiter.acquire()
            timer.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert waiter.token is None
    with third, pytest.raises(errors.NotOwner):
        waiter.release()


def test_a_cancelled_task_leaves_no_lock_held(place):
    async def main():
        first, second = aio.Lock(place(lease="300s")), aio.Lock(place(lease="300s"))
        async with first, asyncio.TaskGroup() as group:
            assert not await second.acquire(False)
            assert not await second.acquire(timeout=0.01)
            waiting = group.create_task(second.acquire())
            await asyncio.sleep(0.02)
            waiting.cancel()
        # Cancelled at every point of an acquire and of a release: a lease is five minutes, so what stays held is seen.
        for turns in range(25):
            for verb in ("acquire", "release"):
                if verb == "release":
                    assert await second.acquire(timeout=LONG)
                task = asyncio.create_task(getattr(second, verb)())
                for _ in range(turns):
                    await asyncio.sleep(0)
                await asyncio.sleep(turns * 1e-5)
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                    if verb == "acquire":
                        await second.release()
                if verb == "release" and second.token is not None:
                    await second.release()  # it had not begun
            assert second.token is None
            assert await first.acquire(timeout=LONG)
            await first.release()
        await first.close()
        await second.close()

    run(main())


def test_closing_wakes_who_waits(lock):
    holder, waiter = lock(), lock()
    with holder:
        assert not waiter.acquire(False)
        waiting = Waiting(waiter)
        time.sleep(0.05)
        waiter.close()
        with pytest.raises(errors.Closed):
            waiting.token()


def test_closing_one_that_is_held_gives_it_back(lock, place):
    mine = lock()
    mine.acquire()
    waiting = Waiting(mine)  # for its turn in this object
    mine.close()
    with pytest.raises(errors.Closed):
        waiting.token()
    with pytest.raises(errors.Closed):
        mine.acquire()
    with pytest.raises(errors.NotOwner):
        mine.release()

    async def main():
        ours = aio.Lock(place())
        await ours.acquire()
        turn = asyncio.create_task(ours.acquire())
        await asyncio.sleep(0)
        await ours.close()
        for each in (turn, ours.acquire()):
            with pytest.raises(errors.Closed):
                await each

    run(main())
    assert lock().acquire(timeout=LONG)


def test_one_loop_after_the_other(place):
    lock = aio.Lock(place())

    async def use():
        async with lock:
            return lock.check()

    async def keep():
        await lock.acquire()

    assert run(use()) < run(use())
    run(keep())
    with pytest.raises(errors.ConfigError):
        run(use())

    async def end():
        await lock.close()

    run(end())
    other = Lock(place())
    assert other.acquire(timeout=LONG)
    other.release()
    other.close()


# -- leases -----------------------------------------------------------------------------------------------------------


def test_it_is_renewed_while_it_is_held(lock, running, broker):
    mine, other = lock(lease="1500ms"), lock()

    async def main():
        url = running(broker).address(f"{SERVERS[broker][1]}tasks-{os.urandom(6).hex()}", lease="1500ms")
        mine, other = aio.Lock(url), aio.Lock(url)
        async with mine:
            token = mine.token
            assert not await other.acquire(timeout=2.0)
            assert mine.check() == token == (await other.owner()).token
            assert mine.remaining > 0
        assert await other.acquire(timeout=LONG)
        await other.release()
        await mine.close()
        await other.close()

    with mine:
        token = mine.token
        run(main())
        assert mine.check() == token == other.owner().token
        assert mine.remaining > 0


def test_a_lease_that_runs_out_is_lost(lock, place):
    mine, other = lock(lease="200ms", renew="0"), lock()
    with pytest.raises(errors.LeaseLost) as caught, mine:  # noqa: PT012
        token = mine.token
        assert other.acquire(timeout=LONG)
        assert other.token > token
        assert other.inherited
        assert mine.lost
        assert mine.remaining == 0
        assert not mine.renew()
        with pytest.raises(errors.LeaseLost):
            mine.check()
    assert caught.value.token == token
    assert mine.lost
    assert mine.token is None
    assert other.check()
    other.release()
    with mine:
        assert not mine.lost
        assert not mine.inherited
    with pytest.raises(ZeroDivisionError) as also, mine:  # noqa: PT012
        time.sleep(0.25)
        _ = 1 / 0
    assert "was lost" in also.value.__notes__[0]

    async def main():
        mine = aio.Lock(place(lease="200ms", renew="0"))
        with pytest.raises(errors.LeaseLost):
            async with mine:
                await asyncio.sleep(0.25)
        async with mine:
            assert await mine.renew()
        await mine.close()

    run(main())


HOLDER = """
import os, signal, sys, time
from ipckit.sync import Lock
from ipckit import errors
lock = Lock(sys.argv[1])
lock.acquire()
print(lock.token, flush=True)
try:
    while True:
        lock.check()
        time.sleep(0.001)
except errors.LeaseLost as lost:
    print("lost", lost.token, flush=True)
try:
    lock.release()
except errors.LeaseLost:
    print("released", flush=True)
"""


@pytest.fixture
def holder(place):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, place(lease="1500ms")], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    with child:
        try:
            yield child, int(child.stdout.readline())
        finally:
            child.kill()


def test_the_next_one_gets_it_from_a_killed_holder(holder, lock):
    child, token = holder
    waiter = lock()
    assert not waiter.acquire(False)
    child.kill()
    with waiter:
        assert waiter.token > token
        assert waiter.inherited
    with waiter:
        assert not waiter.inherited


def test_a_stopped_holder_learns_that_it_lost(holder, lock):
    child, token = holder
    waiter = lock()
    child.send_signal(signal.SIGSTOP)
    with waiter:
        assert waiter.token > token
        child.send_signal(signal.SIGCONT)
        assert child.stdout.readline() == f"lost {token}\n"
        assert child.stdout.readline() == "released\n"
        assert waiter.check()
        assert waiter.renew()


def test_a_forked_child_does_not_hold_it(lock):
    mine = lock()

    def child(pipe):
        pipe.send((mine.token, mine.acquire(False)))
        with pytest.raises(errors.NotOwner):
            mine.release()
        pipe.recv()
        with mine:
            pipe.send(mine.token)

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    with mine:
        process = context.Process(target=child, args=(theirs,))
        process.start()
        assert ours.poll(LONG)
        assert ours.recv() == (None, False)
        assert mine.renew()
        token = mine.token
    ours.send(None)
    assert ours.poll(LONG)
    assert ours.recv() > token
    process.join(LONG)
    assert process.exitcode == 0
    with mine:
        pass


def test_one_that_is_thrown_away_is_given_back(lock, place):
    dropped = Lock(place(lease="300s"))
    dropped.acquire()
    with pytest.warns(ResourceWarning, match="was dropped"):
        del dropped
    other = lock()
    assert other.acquire(timeout=LONG)
    other.release()


def test_one_that_has_made_its_bucket_is_thrown_away_like_others(running):
    """The server's "no such stream" came first: that error must not keep everything alive that was called then."""
    dropped = Lock(running("nats").address(f"/made-{os.urandom(6).hex()}/x", lease="300s"))
    dropped.acquire()
    with pytest.warns(ResourceWarning, match="was dropped"):
        del dropped


# -- the broker goes, and comes back ----------------------------------------------------------------------------------


def test_a_broker_that_is_restarted(broker):
    options = {"appendonly": True, "appendfsync": "always"} if broker == "redis" else {}
    with SERVERS[broker][0](private=True, **options) as server:
        url = server.address(SERVERS[broker][1] + "x")
        holder, waiter = Lock(url), Lock(url)
        with holder:
            token = holder.token
            assert not waiter.acquire(False)  # it is connected
            waiting = Waiting(waiter)
            server.kill()
            server.start()
            assert holder.renew(LONG)
            assert holder.check() == token
        assert waiting.token() > token
        assert not waiter.inherited
        server.kill()
        assert not holder.lost
        with pytest.raises(errors.NothingListening):
            holder.acquire(timeout=0.3)
        server.start()
        with holder:
            assert holder.token > token
        with pytest.raises(errors.LeaseLost), Lock(url + "?lease=500ms") as brief:  # noqa: PT012
            server.kill()
            while not brief.lost:
                time.sleep(0.01)
        brief.close()
        holder.close()
        waiter.close()


# -- Redis ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def redis_lock(running):
    name = f"/lock-{os.urandom(6).hex()}"
    with contextlib.ExitStack() as stack:

        def make(**options):
            made = Lock(running("redis").address(name, **options))
            stack.callback(made.close)
            return made

        yield make


def test_redis_gives_it_to_the_eldest_and_passes_over_the_dead(redis_lock, monkeypatch):
    monkeypatch.setattr(_redis_lease, "_LOOK", 300.0)
    first, queue, order = redis_lock(lease="300s"), [], []
    gone = redis_lock(lease="300s")
    with first:
        with pytest.raises(ZeroDivisionError):  # it stands in the queue, and then its connection breaks
            _stand_in_line_and_vanish(gone)
        for number in range(4):
            mine = redis_lock(lease="300s")
            assert not mine.acquire(False)

            def wait(mine=mine, number=number):
                with mine:
                    order.append(number)

            queue.append(threading.Thread(target=wait))
            queue[-1].start()
            _until_it_waits(first, number + 2)
    with first:  # whoever asks again stands behind them
        order.append("first")
    for thread in queue:
        thread.join(LONG)
    assert order == [0, 1, 2, 3, "first"]


def _until_it_waits(lock, count):
    key, client = _client(lock)
    with client:
        deadline = time.monotonic() + LONG
        while client.llen(key.replace(":lock", ":queue")) < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)


def _stand_in_line_and_vanish(lock):
    assert not lock.acquire(False)
    leasing = lock._desk.box[0]
    leasing.withdraw = lambda id: None
    steps = leasing.take("f" * 32, True)
    for wait in steps:
        if leasing._subscribed and not leasing._line._wire.waiting:
            break
        _poll(wait)
    leasing._line._wire.abandon()
    steps.throw(ZeroDivisionError)


def _poll(wait):
    import select

    poll = select.poll()
    for fd, events in wait.fds:
        poll.register(fd, events)
    poll.poll(1000)


def _client(lock):
    native = lock.native
    return native.key, native.address.client()


def test_redis_without_the_right_to_subscribe(redis_lock, running):
    first = redis_lock()
    assert first.acquire()
    _, client = _client(first)
    with client:
        client.execute_command("ACL", "SETUSER", "deaf", "on", ">word", "~*", "+@all", "resetchannels")
        url = first.url.reveal().replace("://", "://deaf:word@")
        waiter = Lock(url)
        assert not waiter.acquire(False)
        assert not waiter.acquire(timeout=0.3)
        waiting = Waiting(waiter)
        first.release()
        assert waiting.token()
        client.execute_command("ACL", "DELUSER", "deaf")
    waiter.close()


def test_redis_keys_that_are_lost_or_taken(redis_lock):
    lock = redis_lock()
    with pytest.raises(errors.LeaseLost), lock:  # noqa: PT012
        token = lock.token
        key, client = _client(lock)
        with client:
            client.flushall()
            assert not lock.renew()
            assert lock.lost
    with lock:
        assert lock.token > token  # though the server has forgotten the last
    with client:
        client.hset(key, "a", "b")
        with pytest.raises(errors.IpcError, match="WRONGTYPE"):
            lock.acquire(timeout=1)
        client.delete(key)
        with lock:
            client.execute_command("SCRIPT", "FLUSH")
            assert lock.renew(LONG)


def test_redis_addresses(running):
    url = running("redis").url
    for path in ("", "/", "/5", "/5/", "/x y"):
        with pytest.raises(errors.BadUrl):
            Lock(f"{url}{path}").acquire(timeout=1)
    zero, one = Lock(f"{url}/a/b"), Lock(f"{url}/1/a/b")
    with zero, one:
        assert _client(zero)[0] == _client(one)[0] == "ipckit:{a/b}:lock"
    again = Lock(f"{url}/0/a/b")
    with zero:
        assert not again.acquire(False)
    for lock in (zero, one, again):
        lock.close()


# -- NATS -------------------------------------------------------------------------------------------------------------


def test_nats_buckets(running):
    url = running("nats").url

    async def main():
        import nats

        client = await nats.connect(url)
        try:
            stream = client.jetstream()
            brief = await stream.create_key_value(bucket="brief", ttl=5)
            with pytest.raises(errors.ConfigError, match="forgets a key after 5 s"):
                await aio.Lock(f"{url}/brief/x").acquire(timeout=LONG)
            lock = aio.Lock(f"{url}/brief/x?lease=1s")
            async with lock:
                entry = await brief.get("x")
                assert entry.revision == lock.token
                await brief.purge("x")
                assert not await lock.renew()
                with pytest.raises(errors.LeaseLost):
                    await lock.release()
                await lock.acquire()
            await brief.put("x", b"something else")
            with pytest.raises(errors.ProtocolError):
                await lock.acquire(timeout=LONG)
            await lock.close()
            with pytest.raises(errors.ConfigError, match="storage"):
                await aio.Lock(f"{url}/brief/x?lease=1s&storage=memory").acquire(timeout=LONG)
            for path in ("", "/x", "/a.b/x", "/b/.x", "/b/*"):
                with pytest.raises(errors.BadUrl):
                    await aio.Lock(url + path).acquire(timeout=LONG)
        finally:
            await client.close()

    run(main())
