"""The rendezvous over mailboxes in memory: what it makes of a transport that has nothing but one-way queues."""

import contextlib
import os
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipckit import errors
from ipckit._spi import Peer, Wait, Want
from ipckit._url import parse
from ipckit._wait import Gate, Lane, run
from ipckit.transports import _mail as mail
from ipckit.transports import _rendezvous as rv

URL = parse("toy://somewhere")


class Box:
    """One mailbox: frames by priority, a bound, a bell for the reader and one for writers."""

    def __init__(self, hub, name, bound):
        self.hub, self.name, self.bound = hub, name, bound
        self.frames = []
        self.bell, self.room = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(1, os.EFD_NONBLOCK)
        self.open = True


class Inbox:
    native = None

    def __init__(self, box):
        self.box, self.card = box, {"box": box.name}

    def try_get(self):
        with self.box.hub.mutex:
            if not self.box.frames:
                return None
            os.eventfd_write(self.box.room, 1)
            best = max(range(len(self.box.frames)), key=lambda i: (self.box.frames[i][0], -i))
            return self.box.frames.pop(best)[1]

    def settled(self):
        return True

    def arm(self):
        with self.box.hub.mutex:
            if not self.box.frames:
                drain(self.box.bell)
        return Wait(((self.box.bell, 1),))

    def close(self):
        self.box.open = False
        self.box.hub.boxes.pop(self.box.name, None)

    abandon = close


class Outbox:
    native = None

    def __init__(self, box):
        self.box, self.max_frame = box, box.hub.max_frame

    def try_put(self, frame, priority=0):
        with self.box.hub.mutex:
            assert type(frame) is bytes
            assert len(frame) <= self.box.hub.max_frame
            if len(self.box.frames) >= self.box.bound and frame[:1] not in mail.CREDIT:
                drain(self.box.room)
                return False
            self.box.frames.append((priority, frame))
            os.eventfd_write(self.box.bell, 1)
            return True

    def try_flush(self):
        return True

    def arm(self):
        return Wait(((self.box.room, 1),))

    def close(self, farewell):
        if farewell is not None:
            self.box.frames.append((-1, farewell))
            os.eventfd_write(self.box.bell, 1)

    def abandon(self):
        pass


class Watch:
    def __init__(self, box):
        self.box, self.peer = box, Peer(pid=4711)

    def gone(self):
        return errors.PeerDied("killed", pid=4711) if self.box.name in self.box.hub.dead else None

    def arm(self):
        return Wait((), 0.01)

    def close(self):
        pass

    abandon = close


class Hub:
    """What the broker would be, and the Post of every party."""

    url = URL

    def __init__(self, max_frame=2048, bound=64, window=None, priorities=0):
        self.max_frame, self.bound, self.window, self.priorities = max_frame, bound, window, priorities
        self.boxes, self.dead, self.mutex, self.count = {}, set(), threading.Lock(), 0
        self.opened = []

    def make(self, name):
        self.boxes[name] = box = Box(self, name, self.bound)
        self.opened.append(box)
        return Inbox(box)

    def open_rendezvous(self):
        if "desk" in self.boxes:
            raise errors.AddressInUse(url=URL)
        return self.make("desk")
        yield

    def find(self):
        return {"box": "desk"} if "desk" in self.boxes else None
        yield

    def open_inbox(self):
        self.count += 1
        return self.make(f"session{self.count}")
        yield

    def open_outbox(self, card):
        if not isinstance(card.get("box"), str):
            raise errors.ProtocolError("bad card", url=URL)
        if card["box"] not in self.boxes:
            raise errors.NothingListening(url=URL)
        return Outbox(self.boxes[card["box"]]), Watch(self.boxes[card["box"]])
        yield

    def close(self):
        for box in self.opened:
            os.close(box.bell)
            os.close(box.room)


def drain(fd):
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(fd)


@pytest.fixture
def hub():
    hub = Hub()
    yield hub
    hub.close()


def drive(steps, timeout=5):
    return run(steps, Lane(Gate(URL, lambda: None), "test"), timeout)


def accepting(desk):
    while (link := desk.try_accept()) is None:
        wait = desk.arm(Want.RECV)
        if (link := desk.try_accept()) is not None:
            break
        yield wait
    return link


def meet(hub, limit=1 << 20, client_limit=None):
    desk = drive(rv.listen(hub, limit))
    found = []
    thread = threading.Thread(target=lambda: found.append(drive(rv.connect(hub, client_limit or limit))))
    thread.start()
    server = drive(accepting(desk))
    thread.join()
    return desk, found[0], server


def recv(link, timeout=5):
    def steps():
        while (frame := link.try_recv()) is None:
            wait = link.arm(Want.RECV)
            if (frame := link.try_recv()) is not None:
                break
            yield wait
        return frame

    return drive(steps(), timeout)


def send(link, frame, priority=0, timeout=5):
    def steps():
        while not link.try_send_priority(frame, priority):
            yield link.arm(Want.SEND)
        while not link.try_flush():
            yield link.arm(Want.SEND)

    drive(steps(), timeout)


def test_messages_of_every_size_arrive_in_order(hub):
    _, a, b = meet(hub)
    sent = [bytes([n % 256]) * n for n in (0, 1, 100, 2046, 2047, 2048, 2049, 5000, 100_000)]
    thread = threading.Thread(target=lambda: [send(a, frame) for frame in sent])
    thread.start()
    assert [recv(b) for _ in sent] == sent
    thread.join()
    send(b, memoryview(bytearray(b"back")))
    assert recv(a) == b"back"


def test_a_name_is_taken_once(hub):
    drive(rv.listen(hub, 1))
    with pytest.raises(errors.AddressInUse):
        drive(rv.listen(hub, 1))


def test_nobody_listens(hub):
    with pytest.raises(errors.NothingListening, match="nobody listens"):
        drive(rv.connect(hub, 10), 0.05)
    assert hub.boxes == {}


def test_a_listener_that_does_not_accept_leaves_nothing_of_the_client(hub):
    drive(rv.listen(hub, 10))
    with pytest.raises(errors.NothingListening, match="did not accept"):
        drive(rv.connect(hub, 10), 0.05)
    assert set(hub.boxes) == {"desk"}


def test_the_client_that_gave_up_is_not_accepted(hub):
    desk = drive(rv.listen(hub, 10))
    with pytest.raises(errors.NothingListening):
        drive(rv.connect(hub, 10), 0.02)
    with pytest.raises(errors.Timeout):
        drive(accepting(desk), 0.05)
    assert desk._guests == []


def test_the_client_that_died_after_its_hello_is_dropped(hub):
    desk = drive(rv.listen(hub, 10))
    steps = rv.connect(hub, 10)
    next(steps)  # HELLO is in the mailbox
    hub.dead.add("session1")
    with pytest.raises(errors.Timeout):
        drive(accepting(desk), 0.05)
    assert desk._guests == []
    steps.close()


def test_a_listener_that_dies_during_the_handshake_is_replaced_by_the_next(hub):
    first = drive(rv.listen(hub, 10))
    found = []
    thread = threading.Thread(target=lambda: found.append(drive(rv.connect(hub, 10))))
    thread.start()
    while not hub.boxes["desk"].frames:
        time.sleep(0.001)
    hub.dead.add("desk")
    first.close()
    time.sleep(0.05)
    hub.dead.clear()
    server = drive(accepting(drive(rv.listen(hub, 10))))
    thread.join()
    send(found[0], b"hi")
    assert recv(server) == b"hi"


GREETINGS = [
    b"",
    b"H",
    b"garbage",
    b"H{}",
    b'H{"version":1,"card":[],"limit":1}',
    b'H{"version":9,"card":{"box":"desk"},"limit":1}',
    b'H{"version":1,"card":{"box":7},"limit":1}',
    b'H{"version":1,"card":{"box":"nowhere"},"limit":1}',
    b"H\xff\xff",
    b"H" + b"[" * 2000,
]


@pytest.mark.parametrize(
    ("problem", "error", "told"),
    [
        (
            errors.ResourceLimit("no more queues", url=URL, hint="buy some"),
            errors.ResourceLimit,
            r"no more queues \(buy some\)",
        ),
        (OSError("a mystery"), errors.NothingListening, r"turned us away \(its log says why"),
    ],
)
def test_who_is_turned_away_is_told(hub, monkeypatch, problem, error, told):
    """At once, if the listener has no room for another session; else it tries again: another one may come."""
    open_inbox, main = hub.open_inbox, threading.current_thread()

    def only_for_clients():
        if threading.current_thread() is not main:
            raise problem
        return (yield from open_inbox())

    monkeypatch.setattr(hub, "open_inbox", only_for_clients)

    def listen(desk):
        with pytest.raises(errors.Timeout):
            drive(accepting(desk), 0.7)

    with contextlib.closing(drive(rv.listen(hub, 1 << 20))) as desk:
        listening = threading.Thread(target=listen, args=(desk,))
        listening.start()
        with pytest.raises(error, match=told):
            drive(rv.connect(hub, 1 << 20), 0.5)
        listening.join()
    assert (hub.count > 1) == (error is errors.NothingListening)
    assert not hub.boxes


@pytest.mark.parametrize("garbage", GREETINGS)
def test_garbage_at_the_rendezvous_costs_nobody_else(hub, garbage):
    desk = drive(rv.listen(hub, 1 << 10))
    for _ in range(10):
        assert Outbox(hub.boxes["desk"]).try_put(garbage)
    found = []
    thread = threading.Thread(target=lambda: found.append(drive(rv.connect(hub, 1 << 10))))
    thread.start()
    server = drive(accepting(desk))
    thread.join()
    send(found[0], b"hi")
    assert recv(server) == b"hi"


def test_handshakes_under_way_are_bounded(hub, monkeypatch):
    desk = drive(rv.listen(hub, 10))
    guests = [rv.connect(hub, 10) for _ in range(rv.MAX_GUESTS)]
    hub.boxes["desk"].bound = 1000
    for guest in guests:
        next(guest)  # HELLO, and then never a READY
    for _ in range(40):
        Outbox(hub.boxes["desk"]).try_put(b"H{}")
    for _ in range(5):
        assert desk.try_accept() is None
    assert len(desk._guests) == rv.MAX_GUESTS
    assert len(hub.boxes["desk"].frames) == 40
    later = time.monotonic() + 2 * rv.PATIENCE
    monkeypatch.setattr(time, "monotonic", lambda: later)
    desk.try_accept()
    assert desk._guests == []
    for guest in guests:
        guest.close()
    desk.close()


def test_closed_in_order_after_everything_before(hub):
    _, a, b = meet(hub)
    for n in range(5):
        send(a, b"%d" % n)
    send(a, b"x" * 5000)
    a.close()
    a.close()
    assert [recv(b) for _ in range(6)] == [b"0", b"1", b"2", b"3", b"4", b"x" * 5000]
    for _ in range(2):
        with pytest.raises(errors.PeerClosed):
            recv(b)
        with pytest.raises(errors.PeerClosed):
            b.try_send(b"?")
    assert a._closed
    with pytest.raises(errors.Closed):
        a.try_recv()


def test_death_after_everything_committed_and_again_at_every_call(hub):
    _, a, b = meet(hub)
    send(a, b"last words")
    hub.dead.add(b._watch.box.name)
    assert recv(b) == b"last words"
    for _ in range(2):
        with pytest.raises(errors.PeerDied) as caught:
            recv(b)
        assert caught.value.pid == 4711
        with pytest.raises(errors.PeerDied):
            b.try_send(b"x")


def test_a_sender_hears_of_the_death(hub):
    _, a, b = meet(hub)
    hub.dead.add(a._watch.box.name)
    with pytest.raises(errors.PeerDied):
        a.try_send(b"x")
    b.close()


def test_closed_inside_a_message_is_no_orderly_end():
    hub = Hub(bound=2)
    _, a, b = meet(hub)
    assert a.try_send(b"x" * 20_000)
    assert not a.try_flush()
    a.close()
    with pytest.raises(errors.PeerDied, match="inside a message"):
        recv(b)
    hub.close()


def test_the_rest_of_a_message_goes_out_with_the_next_calls():
    hub = Hub(bound=2)
    _, a, b = meet(hub)
    message = os.urandom(20_000)
    assert a.try_send(message)
    assert not a.try_flush()
    assert not a.try_send(b"next")
    got = None
    while got is None:  # a's receiver drives it out
        assert a.try_recv() is None
        got = b.try_recv()
    assert got == message
    assert a.try_flush()
    assert a.try_send(b"next")
    assert recv(b) == b"next"
    hub.close()


def test_too_large_is_refused_by_either_limit(hub):
    _, a, b = meet(hub, limit=100, client_limit=200)
    for link in (a, b):
        with pytest.raises(errors.MessageTooLarge):
            link.try_send(b"x" * 101)
        assert link.try_send(b"x" * 100)


def test_priorities_overtake_and_fragments_do_not_mix():
    hub = Hub(bound=1000, priorities=32)
    _, a, b = meet(hub)
    low, high = os.urandom(9000), os.urandom(9000)
    a.try_send_priority(low, 0)
    a.try_send_priority(b"low", 0)
    first = b._inbox.try_get()  # the beginning of the low one is taken before the high one exists
    b._stash.append(first)
    a.try_send_priority(high, 31)
    a.try_send_priority(b"mid", 5)
    assert [recv(b) for _ in range(4)] == [high, b"mid", low, b"low"]
    with pytest.raises(errors.BadOption):
        a.try_send_priority(b"", 32)
    hub.close()


@pytest.mark.parametrize("window", [mail.Window(4, 1 << 30), mail.Window(1 << 30, 5000)])
def test_the_window_bounds_what_is_under_way(window):
    hub = Hub(bound=1 << 20, window=window)
    _, a, b = meet(hub)
    count = 0
    while a.try_send(b"x" * 1000):
        count += 1
        assert count <= 6
    assert len(hub.boxes[b._inbox.box.name].frames) == count
    assert recv(b)
    assert recv(b)
    assert recv(b)
    assert a.try_send(b"x" * 1000)  # credit came back
    # both full, nobody receives: credit still passes the data before it
    while b.try_send(b"y" * 1000):
        pass
    while b.try_recv() is not None:
        pass
    assert a.try_send(b"again")
    hub.close()


def test_large_messages_through_a_small_window():
    hub = Hub(window=mail.Window(3, 5000))
    _, a, b = meet(hub)
    messages = [os.urandom(50_000) for _ in range(3)]
    thread = threading.Thread(target=lambda: [send(a, message) for message in messages])
    thread.start()
    assert [recv(b) for _ in messages] == messages
    thread.join()
    hub.close()


def test_a_sender_blocked_by_the_window_does_not_spin_on_unread_data():
    hub = Hub(bound=1 << 20, window=mail.Window(4, 1 << 30))
    _, a, b = meet(hub)
    while a.try_send(b"x"):
        pass
    b.try_send(b"unread")
    assert not a.try_send(b"x")
    wait = a.arm(Want.SEND)
    assert not a.try_send(b"x")
    ready = [fd for fd, _ in wait.fds if fd == a._inbox.box.bell]
    assert ready
    with pytest.raises(BlockingIOError):
        os.eventfd_read(ready[0])
    hub.close()


BAD_FRAMES = [
    b"",
    b"?",
    b"Cshort",
    mail._CREDIT.pack(b"C", 99, 99),
    b"D" + b"x" * 2000,
    b"F",
    mail._FIRST.pack(b"F", 1, 1 << 60) + b"x",
    mail._FIRST.pack(b"F", 1, 0) + b"x",
    mail._FIRST.pack(b"F", 1, 10),
    mail._FIRST.pack(b"F", 1, 2) + b"xxx",
    mail._MORE.pack(b"M", 1) + b"x",
    b"M",
]


@pytest.mark.parametrize("frame", BAD_FRAMES)
def test_a_bad_frame_ends_this_link(frame):
    hub = Hub(bound=100)
    _, a, b = meet(hub, limit=1000)
    a._outbox.try_put(frame)
    for _ in range(2):
        with pytest.raises(errors.ProtocolError):
            recv(b)
    with pytest.raises(errors.ProtocolError):
        b.try_send(b"x")
    b.close()
    hub.close()


@given(st.lists(st.binary(max_size=60), max_size=20))
def test_any_frames_are_messages_or_a_typed_error(frames):
    hub = Hub(bound=100)
    box_in, box_out = hub.make("in"), hub.make("out")
    link = mail.MailLink(hub, box_in, Outbox(box_out.box), Watch(box_out.box), 100, 100)
    for frame in frames:
        box_in.box.frames.append((0, frame))
    try:
        while link.try_recv() is not None:
            pass
    except (errors.ProtocolError, errors.PeerClosed, errors.PeerDied):
        pass
    assert sum(len(memory) for memory, _ in link._partial.values()) <= 100
    link.close()
    hub.close()


def test_merge_joins_what_waits_for_the_same_descriptor():
    wait = mail.merge([Wait(((3, 1), (4, 1)), 2.0), Wait(((3, 4),)), Wait((), 1.0)])
    assert wait == Wait(((3, 5), (4, 1)), 1.0)
