"""Queues on Redis Streams: what is particular to them. What every queue does is in the conformance suite."""

import asyncio
import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import ipckit
from ipckit import aio, errors
from ipckit.testing.servers import redis_server
from ipckit.transports import _redis_log

redis = pytest.importorskip("redis")


@pytest.fixture(scope="module")
def server():
    with redis_server(private=True) as server:
        yield server


@pytest.fixture
def client(server):
    with redis.Redis.from_url(server.url, protocol=2) as client:
        yield client


@pytest.fixture
def name(tmp_path):
    return re.sub(r"\W", "_", tmp_path.name)


@pytest.fixture
def address(server, name):
    return lambda **options: server.address(f"/0/{name}", **options)


def pending(client, name, group="ipckit"):
    return {entry["message_id"]: entry for entry in client.xpending_range(name, group, "-", "+", 10_000)}


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def values(receiver, count, timeout=10):
    return [receiver.recv(timeout=timeout).value for _ in range(count)]


def pause(server):
    """SIGSTOP, and wait until it is: a signal takes its time."""
    server.pause()
    until(lambda: Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def nothing(receiver, seconds=0.2):
    with pytest.raises(errors.Timeout):
        receiver.recv(timeout=seconds)


# -- entries ----------------------------------------------------------------------------------------------------------


def test_an_entry_is_plain_fields(address, client, name):
    with ipckit.sender(address()) as jobs:
        jobs.send(b"\0body", id="a-1", headers={"traceparent": "00-x", "who": "é"})
    ((_, fields),) = client.xrange(name)
    assert fields == {b"body": b"\0body", b"id": b"a-1", b"traceparent": b"00-x", b"who": "é".encode()}
    with ipckit.receiver(address()) as jobs:
        message = jobs.recv(timeout=5)
        assert (message.value, message.id) == (b"\0body", "a-1")
        assert message.headers == {"traceparent": "00-x", "who": "é"}
        assert message.redelivered == 0


@pytest.mark.parametrize(
    ("fields", "value", "headers"),
    [
        ({"data": "x"}, b"x", {}),
        ({"body": "x", "kind": "k"}, b"x", {"kind": "k"}),
        ({"kind": "k", "body": "x"}, b"x", {"kind": "k"}),
        ({"kind": b"\xff"}, b"", {"kind": "\ufffd"}),
        ({"n": "nonsense", "body": "x"}, b"x", {"n": "nonsense"}),
    ],
)
def test_entries_that_others_added(address, client, name, fields, value, headers):
    number = client.xadd(name, fields)
    with ipckit.receiver(address()) as jobs:
        message = jobs.recv(timeout=5)
        assert (message.value, message.headers, message.id) == (value, headers, number.decode())


@pytest.mark.parametrize("header", ["body", "id", "topic", "n"])
def test_headers_that_are_fields(address, header):
    with ipckit.sender(address()) as jobs:
        with pytest.raises(errors.Unsupported):
            jobs.send(b"", headers={header: "x"})
        jobs.send(b"the sender stays good")


def test_limits(address):
    with ipckit.sender(address(limit="10")) as jobs:
        with pytest.raises(errors.MessageTooLarge):
            jobs.send(b"x" * 11)
        jobs.send(b"x" * 10)
        with pytest.raises(errors.Unsupported, match="lanes=2"):
            jobs.send(b"", priority=1)


def test_the_same_id_is_added_once(address, client, name):
    with ipckit.sender(address(dedup="300ms")) as one, ipckit.sender(address(dedup="300ms")) as two:
        for jobs in (one, two, one):
            assert jobs.send(b"x", id="same") == "same"
        assert client.xlen(name) == 1
        assert one.stats()["deduplicated"] + two.stats()["deduplicated"] == 2
        until(lambda: not client.exists(f"ipckit:{{{name}}}:sent:same"))
        one.send(b"x", id="same")
    assert client.xlen(name) == 2


def test_a_refused_message_is_not_taken_for_a_duplicate(address, client, name):
    with ipckit.sender(address()) as jobs:
        client.set(name, "no stream")
        with pytest.raises(errors.IpcError, match="WRONGTYPE"):
            jobs.send(b"x", id="mine")
        client.delete(name)
        jobs.send(b"x", id="mine")
    assert client.xlen(name) == 1


def test_each_of_the_tasks_that_share_a_sender_hears_of_its_own(address, client, name):
    client.set(name, "no stream")  # the lane of priority 0, and not that of priority 1

    async def main():
        async with await aio.sender(address(lanes="2")) as jobs:
            return await asyncio.gather(
                *(jobs.send(b"x", 10, priority=n % 2, id=f"n{n}") for n in range(10)), return_exceptions=True
            )

    refused, taken = (outcomes := asyncio.run(main()))[::2], outcomes[1::2]
    assert taken == ["n1", "n3", "n5", "n7", "n9"]
    assert all(isinstance(error, errors.IpcError) and "WRONGTYPE" in str(error) for error in refused)


def test_retention(address, client, name):
    with ipckit.sender(address(maxlen="10")) as jobs:
        jobs.send_many([b"x"] * 50)
        assert client.xlen(name) == 10
    with ipckit.sender(address(maxlen="~100")) as jobs:
        jobs.send_many([b"x"] * 1000)
        assert 100 <= client.xlen(name) < 400
    time.sleep(0.05)
    with ipckit.sender(address(maxage="40ms")) as jobs:
        for _ in range(3):
            jobs.send_many([b"y"] * 200)
            time.sleep(0.05)
        assert client.xlen(name) <= 500  # whole nodes go
    with ipckit.sender(address(maxage="1h", maxlen="5")) as jobs:
        jobs.send(b"z")
        assert client.xlen(name) == 5


@pytest.mark.parametrize(
    "option", ["maxlen=0", "maxlen=~", "maxage=5", "lanes=0", "replay=then", "fsync=no", "dedup=0"]
)
def test_bad_options(address, option):
    with pytest.raises(errors.BadOption):
        ipckit.sender(address(**dict([option.split("=")])))


# -- groups -----------------------------------------------------------------------------------------------------------


def test_each_group_gets_everything_and_shares_it(address):
    with contextlib.ExitStack() as stack:
        receivers = {
            group: [stack.enter_context(ipckit.receiver(address(prefetch="1"), group=group)) for _ in range(2)]
            for group in ("a", "b")
        }
        jobs = stack.enter_context(ipckit.sender(address()))
        sent = [b"%d" % number for number in range(40)]
        jobs.send_many(sent)
        for pair in receivers.values():
            got = []
            while len(got) < 40:
                for receiver in pair:
                    with contextlib.suppress(errors.Timeout):
                        got.append(receiver.recv(timeout=0.02).value)
            assert sorted(got) == sorted(sent)


def test_where_a_new_group_begins(address, client, name):
    first, second = client.xadd(name, {"body": "1"}), client.xadd(name, {"body": "2"})
    with (
        ipckit.receiver(address(), group="all") as everything,
        ipckit.receiver(address(replay="new"), group="new") as new,
        ipckit.receiver(address(replay=first.decode()), group="after") as after,
    ):
        client.xadd(name, {"body": "3"})
        assert values(everything, 3) == [b"1", b"2", b"3"]
        assert values(new, 1) == [b"3"]
        assert values(after, 2) == [b"2", b"3"]
    assert second


def test_an_audit_takes_nothing_away(address, client, name):
    with ipckit.sender(address()) as jobs:
        jobs.send_many([b"1", b"2"])
        with ipckit.receiver(address(audit="1")) as audit, ipckit.receiver(address()) as work:
            assert values(audit, 2) == [b"1", b"2"]
            assert values(work, 2) == [b"1", b"2"]
            jobs.send(b"3")
            message = audit.recv(timeout=5)
            message.ack()
            with pytest.raises(errors.Unsupported):
                message.nack()
            assert values(work, 1) == [b"3"]
        with ipckit.receiver(address(audit="1", replay="new")) as late:
            jobs.send(b"4")
            assert values(late, 1) == [b"4"]
    assert [group["name"] for group in client.xinfo_groups(name)] == [b"ipckit"]
    with pytest.raises(errors.BadOption):
        ipckit.receiver(address(audit="1"), group="g")


def test_lanes_go_higher_first(address):
    with ipckit.sender(address(lanes="3")) as jobs, ipckit.receiver(address(lanes="3", prefetch="2")) as work:
        for number in range(30):
            jobs.send(b"%d" % (number % 3), priority=number % 3)
        assert values(work, 30) == [b"2"] * 10 + [b"1"] * 10 + [b"0"] * 10
        jobs.send_many([b"low"] * 10)
        assert values(work, 1) == [b"low"]
        jobs.send(b"high", priority=2)
        got = [work.recv(timeout=5) for _ in range(10)]
        at = [message.value for message in got].index(b"high")
        assert at <= 4, "it passes those that are not fetched yet"
        assert got[at].priority == 2
    assert ipckit.capabilities(address(lanes="3")).priorities == 3
    assert ipckit.capabilities(address()).priorities == 0


def test_large_messages_are_not_fetched_all_at_once(address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address(), ack="manual") as work:
        for _ in range(12):
            jobs.send(b"x" * (4 << 20))
        for _ in range(3):
            assert len(work.recv(timeout=20).value) == 4 << 20
        assert len(pending(client, name)) < 12
        for _ in range(9):
            work.recv(timeout=20)


# -- settling ---------------------------------------------------------------------------------------------------------


def test_pending_is_what_was_not_acknowledged(address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address(), ack="manual") as work:
        jobs.send_many([b"%d" % number for number in range(10)])
        messages = [work.recv(timeout=5) for _ in range(10)]
        for message in messages[::2]:
            message.ack()
            message.ack()
        assert len(pending(client, name)) == 5
        for message in messages:
            message.ack()
        assert not pending(client, name)


def test_auto_acknowledges_when_the_next_is_asked_for(address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address(prefetch="1")) as work:
        jobs.send(b"1")
        work.recv(timeout=5)
        assert len(pending(client, name)) == 1
        jobs.send(b"2")
        work.recv(timeout=5)
        until(lambda: len(pending(client, name)) == 1)
    until(lambda: not pending(client, name))


def test_nack_comes_again_after_its_delay(address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address(), ack="manual") as work:
        jobs.send(b"x", id="x")
        began = time.monotonic()
        work.recv(timeout=5).nack(delay=0.4)
        nothing(work, 0.2)
        for times in (1, 2):
            message = work.recv(timeout=5)
            assert (message.id, message.redelivered) == ("x", times)
            assert time.monotonic() - began >= 0.4
            if times == 1:
                message.nack()
        message.ack()
        assert not pending(client, name)
        assert not client.exists(f"ipckit:{{{name}}}:later:ipckit")
        assert work.stats()["redelivered"] == 2


def test_a_delay_longer_than_claim_is_kept_and_the_others_pass_it(address, client, name):
    url = address(claim="200ms")
    with ipckit.sender(url) as jobs, ipckit.receiver(url, ack="manual") as work:
        jobs.send_many([b"%d" % number for number in range(150)])
        for _ in range(150):
            work.recv(timeout=5).nack(delay=1.5)
        jobs.send(b"held")
        work.recv(timeout=5)
        message = work.recv(timeout=1.2)  # overdue, so handed out again, behind 150 that are not
        assert (message.value, message.redelivered) == (b"held", 1)
        message.ack()
        found = set()
        while len(found) < 150:
            message = work.recv(timeout=5)
            assert message.redelivered
            message.ack()
            found.add(message.value)
        nothing(work)


def test_nobody_else_waits_for_what_was_given_back_by_who_left(address):
    with ipckit.sender(address()) as jobs:
        jobs.send(b"x")
        with ipckit.receiver(address(), ack="manual") as work:
            work.recv(timeout=5).nack(delay=0.3)
        with ipckit.receiver(address()) as other:
            assert other.recv(timeout=5).redelivered == 1


def test_extend_keeps_it_and_without_it_goes_to_another(address):
    url = address(claim="400ms", prefetch="1")
    with (
        ipckit.sender(url) as jobs,
        ipckit.receiver(url, ack="manual") as one,
        ipckit.receiver(url, ack="manual") as two,
    ):
        jobs.send(b"x")
        message = one.recv(timeout=5)
        for _ in range(6):
            nothing(two, 0.15)
            message.extend()
        other = two.recv(timeout=5)
        assert other.redelivered == 1
        message.extend()  # too late: it is not stolen back
        assert one.stats()["overdue"] == 1
        other.ack()


def test_what_waits_here_is_extended(address):
    url = address(claim="1500ms", prefetch="8")
    with (
        ipckit.sender(url) as jobs,
        ipckit.receiver(url, ack="manual") as slow,
        ipckit.receiver(url, ack="manual") as other,
    ):
        jobs.send_many([b"%d" % number for number in range(4)])
        for number in range(4):
            message = slow.recv(timeout=5)
            assert (message.value, message.redelivered) == (b"%d" % number, 0)
            nothing(other, 0.6)
            message.ack()


def test_dead_letters(address, client, name):
    with (
        ipckit.sender(address(max_deliver="2")) as jobs,
        ipckit.receiver(address(max_deliver="2"), ack="manual") as work,
    ):
        jobs.send(b"poison", id="p", headers={"who": "me"})
        jobs.send(b"good")
        for _ in range(3):
            message = work.recv(timeout=5)
            (message.nack if message.value == b"poison" else message.ack)()
        nothing(work, 1.3)
        assert work.stats()["dead_letters"] == 1
    assert not pending(client, name)
    with ipckit.receiver(address().replace(name, f"{name}:dead")) as dead:
        letter = dead.recv(timeout=5)
        assert (letter.value, letter.id) == (b"poison", "p")
        assert letter.headers["who"] == "me"
        assert (letter.headers["dead-group"], letter.headers["dead-deliveries"]) == ("ipckit", "2")


def test_a_thread_acknowledges_what_another_receives(address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address(), ack="manual") as work:
        todo = queue.SimpleQueue()

        def acknowledge():
            while (message := todo.get()) is not None:
                message.ack()

        thread = threading.Thread(target=acknowledge)
        thread.start()
        try:
            for number in range(300):
                jobs.send(b"%d" % number)
                message = work.recv(timeout=10)
                assert message.value == b"%d" % number
                todo.put(message)
        finally:
            todo.put(None)
            thread.join()
        assert not pending(client, name)


# -- who goes, and who comes back -------------------------------------------------------------------------------------

_HOLD = """
import ipckit, sys, time
with ipckit.receiver(sys.argv[1], ack="manual") as work:
    held = [work.recv(timeout=20) for _ in range(int(sys.argv[2]))]
    print("holding", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def holder(url, count):
    process = subprocess.Popen([sys.executable, "-c", _HOLD, url, str(count)], stdout=subprocess.PIPE)
    with process:
        try:
            assert process.stdout.readline() == b"holding\n"
            yield process
        finally:
            process.kill()


def test_what_a_killed_consumer_held_comes_at_once(address, client, name):
    with ipckit.sender(address()) as jobs:
        jobs.send_many([b"%d" % number for number in range(10)])
        with holder(address(prefetch="4"), 3) as process, ipckit.receiver(address(), ack="manual") as work:
            process.kill()
            process.wait()
            got = [work.recv(timeout=10) for _ in range(10)]
            assert sorted(message.value for message in got) == [b"%d" % number for number in range(10)]
            for message in got:
                message.ack()
            assert not pending(client, name)
            until(lambda: work._intake.try_get() or len(client.xinfo_consumers(name, "ipckit")) == 1)
            assert client.hlen(f"ipckit:{{{name}}}:readers:ipckit") == 1


_POISONED = """
import ipckit, os, sys
with ipckit.receiver(sys.argv[1], ack="manual") as work:
    for job in work:
        if job.value == b"poison":
            os.kill(os.getpid(), 9)
        job.ack()
"""


def test_a_poison_message_takes_no_other_along(address, client, name):
    """It kills those who receive it; what they would have had next is nobody's dead letter."""
    url = address(max_deliver="2")
    with ipckit.sender(url) as jobs:
        jobs.send_many([b"poison", *(b"%d" % number for number in range(5))])
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", _POISONED, url], timeout=60).returncode == -signal.SIGKILL
    with ipckit.receiver(url) as work:
        until(lambda: (work._intake.try_get(), work.stats()["dead_letters"])[1])
    letters = client.xrange(f"{name}:dead")
    assert [fields[b"body"] for _, fields in letters] == [b"poison"]


def test_what_was_lost_on_its_way_was_not_handed_out(address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address(max_deliver="1")) as work:
        jobs.send(b"x")
        client.xreadgroup("ipckit", work._intake._me, {name: ">"})  # in its name, and it never hears of it
        client.client_kill_filter(_type="normal", skipme=True)
        message = work.recv(timeout=10)
        assert (message.value, message.redelivered) == (b"x", 0)
        assert work.stats()["dead_letters"] == 0


def test_a_stopped_consumer_is_not_dead(address):
    with ipckit.sender(address()) as jobs:
        jobs.send(b"x")
        with holder(address(), 1) as process, ipckit.receiver(address()) as work:
            process.send_signal(signal.SIGSTOP)
            nothing(work, 3)
            process.kill()
            assert work.recv(timeout=10).redelivered == 1


def test_close_gives_everything_back(address):
    with ipckit.sender(address()) as jobs:
        jobs.send_many([b"%d" % number for number in range(10)])
        with ipckit.receiver(address(), ack="manual") as work:
            assert work.recv(timeout=5).value == b"0"
        with ipckit.receiver(address()) as other:
            found = {}
            for _ in range(10):
                message = other.recv(timeout=5)
                found[message.value] = message.redelivered
        assert sorted(found) == [b"%d" % number for number in range(10)]
        assert found[b"0"] == 1


def test_a_consumer_of_another_library_is_left_its_messages_until_claim(address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address(claim="1s"), ack="manual") as work:
        client.xgroup_createconsumer(name, "ipckit", "stranger")
        number = client.xadd(name, {"body": "x"}).decode()
        work._intake.try_get()
        message = work.recv(timeout=5)
        client.xclaim(name, "ipckit", "stranger", 0, [number])
        nothing(work, 0.5)
        assert work.recv(timeout=5).value == message.value
        jobs.send(b"fine")


def test_the_group_is_made_again_when_it_is_gone(address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address(), ack="manual") as work:
        for how in (client.delete, lambda key: client.xgroup_destroy(key, "ipckit")):
            jobs.send(b"before")
            work.recv(timeout=5).ack()
            how(name)
            jobs.send(b"after")
            assert values(work, 1) == [b"after"]
            jobs.send(b"and on")
            assert values(work, 1) == [b"and on"]
        assert work.stats()["regrouped"] >= 1


def test_a_flushed_server_does_not_stop_us(address, client):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address()) as work:
        jobs.send(b"1")
        assert values(work, 1) == [b"1"]
        client.flushall()
        client.script_flush()
        jobs.send(b"2")
        assert values(work, 1) == [b"2"]


def test_a_lost_connection_loses_and_doubles_nothing(address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address(), ack="manual") as work:
        for round_ in range(10):
            jobs.send_many([b"%d" % number for number in range(20)])
            got = [work.recv(timeout=10) for _ in range(10)]
            client.client_kill_filter(_type="normal", skipme=True)
            got += [work.recv(timeout=10) for _ in range(10)]
            assert [message.value for message in got] == [b"%d" % number for number in range(20)], round_
            for message in got:
                message.ack()
        assert not pending(client, name)
        assert client.xlen(name) == 200
        assert jobs.stats()["reconnects"] > 0
        assert work.stats()["reconnects"] > 0


def test_a_paused_server_makes_unknowns_and_no_duplicates(address, client, name, server):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address()) as work:
        pause(server)
        try:
            with pytest.raises(errors.OutcomeUnknown) as unknown:
                jobs.send(b"x", id="mine", timeout=0.2)
            assert unknown.value.message_id == "mine"
        finally:
            server.resume()
        jobs.send(b"x", id="mine")
        assert work.recv(timeout=5).id == "mine"
        nothing(work)
    assert client.xlen(name) == 1


def test_what_the_server_may_have_forgotten_is_not_sent_again(monkeypatch):
    """It was away for longer than it remembers ids: sent again, the message could be there twice."""
    with redis_server(private=True) as server, ipckit.sender(server.address("/0/jobs")) as jobs:
        told = queue.SimpleQueue()

        def send():
            try:
                told.put(jobs.send(b"x", id="mine"))
            except errors.IpcError as error:
                told.put(error)

        pause(server)
        sending = threading.Thread(target=send)
        sending.start()
        until(lambda: jobs.stats()["unconfirmed"] == 1)
        now = time.monotonic
        monkeypatch.setattr(_redis_log, "time", SimpleNamespace(monotonic=lambda: now() + 120))
        server.kill()
        server.start()
        error = told.get(timeout=20)
        sending.join()
        assert isinstance(error, errors.OutcomeUnknown), error
        assert (error.message_id, error.message_ids) == ("mine", ("mine",))
        jobs.send(b"y", timeout=10)
        with ipckit.receiver(server.address("/0/jobs")) as work:
            assert work.recv(timeout=5).value == b"y"
            nothing(work)


def test_a_server_that_is_not_there_yet_is_waited_for():
    with redis_server(private=True) as server:
        server.kill()
        url = server.address("/0/jobs")
        for open_ in (ipckit.sender, ipckit.receiver):
            for timeout in (0, 0.2):
                with pytest.raises(errors.NothingListening, match="no Redis server answers"):
                    open_(url, timeout=timeout)
        opened = queue.SimpleQueue()
        opening = [
            threading.Thread(target=lambda open_=open_: opened.put(open_(url, timeout=20)), daemon=True)
            for open_ in (ipckit.sender, ipckit.receiver)
        ]
        for thread in opening:
            thread.start()
        server.start()
        for _ in opening:
            opened.get(timeout=20).close()


def test_a_vanished_machine_is_noticed_though_data_are_on_their_way(address):
    with ipckit.sender(address()) as jobs:
        sock = jobs._outlet.line.ready()._sock
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_a_key_that_is_something_else(address, client, name):
    client.set(name, "x")
    with pytest.raises(errors.ConfigError, match="WRONGTYPE"):
        ipckit.receiver(address())
    with ipckit.sender(address()) as jobs, pytest.raises(errors.ConfigError, match="WRONGTYPE"):
        jobs.send(b"x")


def test_a_batch_whose_fate_is_unknown_has_all_its_ids(server, address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address()) as work:
        pause(server)
        try:
            with pytest.raises(errors.OutcomeUnknown) as unknown:
                jobs.send_many([b"0", b"1", b"2"], timeout=0.2)
        finally:
            server.resume()
        for number, id in enumerate(unknown.value.message_ids):
            jobs.send(b"%d" % number, id=id, timeout=10)
        assert values(work, 3) == [b"0", b"1", b"2"]
        nothing(work)
    assert client.xlen(name) == 3


def test_an_acknowledgement_that_is_late_is_made_up_for(server, address, client, name):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address(), ack="manual") as work:
        jobs.send(b"x", timeout=5)
        message = work.recv(timeout=5)
        pause(server)
        try:
            with pytest.raises(errors.Timeout, match="ack"):
                message.ack(timeout=0.2)
        finally:
            server.resume()
        message.ack(timeout=5)
        assert not pending(client, name)


def test_no_group_is_no_name(address):
    with pytest.raises(errors.BadOption, match="is no name of a group"):
        ipckit.receiver(address(), group="")


@pytest.mark.parametrize(("priority", "lanes"), [(-1, 2), (1, 2), (7, 8), (99, 16)])
def test_a_lane_that_is_not_there(address, priority, lanes):
    with ipckit.sender(address()) as jobs, pytest.raises(errors.Unsupported, match=f"lanes={lanes} at every"):
        jobs.send(b"x", priority=priority)


# -- shells -----------------------------------------------------------------------------------------------------------


def test_awaited(address):
    async def main():
        async with await aio.sender(address()) as jobs, await aio.receiver(address(), ack="manual") as work:
            await asyncio.gather(*(jobs.send(b"%d" % number) for number in range(100)))
            for _ in range(50):
                await (await work.recv(timeout=5)).ack()
            for message in await work.recv_many(100, timeout=5):
                await message.nack(0.05)
            rest = set()
            while len(rest) < 50:
                message = await work.recv(timeout=5)
                await message.ack()
                rest.add(message.value)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(work.recv(), 0.01)
            await jobs.send(b"after a cancelled recv")
            assert (await work.recv(timeout=5)).value == b"after a cancelled recv"

    asyncio.run(main())


def test_awaited_across_a_lost_connection(address, client):
    async def main():
        async with await aio.sender(address()) as jobs, await aio.receiver(address(), ack="manual") as work:
            for number in range(5):
                client.client_kill_filter(_type="normal", skipme=True)
                await jobs.send(b"%d" % number, timeout=10)
                message = await work.recv(timeout=10)
                assert message.value == b"%d" % number
                await message.ack()

    asyncio.run(main())


def test_nothing_stays_open(address):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with ipckit.sender(address()) as jobs, ipckit.receiver(address()) as work:
            jobs.send(b"x")
            work.recv(timeout=5)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_forked_child_lets_go(address):
    with ipckit.sender(address()) as jobs, ipckit.receiver(address()) as work:
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException):
                try:
                    work.recv(timeout=0)
                except errors.ForkedError:
                    code = 0
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        jobs.send(b"x")
        assert values(work, 1) == [b"x"]


test_a_forked_child_lets_go = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")(
    test_a_forked_child_lets_go
)
