"""The state machines of calls under Hypothesis, against a model; and the decoder, against any bytes."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from ipckit.errors import ProtocolError
from ipckit.rpc import events
from ipckit.rpc._clientcore import ClientCall, ClientCore
from ipckit.rpc._servercore import Changed, ServerCall, ServerCore, Started
from ipckit.rpc.dialects import HEAD, MAGIC, Native

WINDOW = 100
LARGEST = 80  # bytes of an item, its header apart


class Side:
    """What one side has said of a call, and heard of it."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.heard: list[bytes] = []
        self.ended = False


class Known:
    """The model of one call."""

    def __init__(self, call: ClientCall) -> None:
        self.call = call
        self.client, self.server = Side(), Side()
        self.handler: ServerCall | None = None
        self.answer: bytes | events.Failure | None = None  # what the handler made of it
        self.cancelled = False
        self.seen: Any = None  # the outcome, when it was first there

    def outcome(self) -> Any:
        call = self.call
        return (call.result, call.failure, call.complete) if call.done else None


class Calls(RuleBasedStateMachine):
    """Two cores, two wires that keep their order and nothing else, a clock, and a world that ends connections."""

    calls = Bundle("calls")

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.number = 0
        self.known: list[Known] = []
        self.connect()

    def connect(self) -> None:
        self.client = ClientCore(window=WINDOW)
        self.server = ServerCore(window=WINDOW, max_calls=5)
        self.to_server: deque[bytes] = deque()
        self.to_client: deque[bytes] = deque()
        self.present: dict[int, Known] = {}
        self.client.hello({})
        for _ in range(2):
            self.deliver(20)

    def flush(self) -> None:
        for core, wire in ((self.client, self.to_server), (self.server, self.to_client)):
            wire.extend(core.outbox)
            core.outbox.clear()

    # -- the wires -------------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 4))
    def deliver(self, count: int) -> None:
        self.flush()
        for _ in range(min(count, len(self.to_server))):
            for happened in self.server.receive(self.to_server.popleft(), self.now):
                if isinstance(happened, Started):
                    known = self.present.get(happened.call.id)
                    if known is not None:  # else it wants no answer
                        known.handler = happened.call
                else:
                    assert isinstance(happened, Changed)
        for _ in range(min(count, len(self.to_client))):
            self.client.receive(self.to_client.popleft())
        self.flush()

    @rule(seconds=st.floats(0, 3))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for known in self.present.values():  # who has expired must not be asked for an answer any more
            known.cancelled |= known.call.deadline is not None and known.call.deadline <= self.now
        assert all(call.failure is not None for call in self.client.expire(self.now))
        assert all(call.cancelled == "deadline" for call in self.server.expire(self.now))
        for core in (self.client, self.server):
            assert core.next_deadline is None or core.next_deadline > self.now

    @rule()
    def the_connection_is_lost(self) -> None:
        lost = self.client.lost()
        assert all(call.done and call.result is None for call in lost)
        self.server.lost()
        assert not self.client.calls
        assert all(call.cancelled for call in self.server.calls.values())
        self.remember()
        self.connect()

    # -- the client ------------------------------------------------------------------------------------------------------

    @rule(target=calls, ttl=st.none() | st.floats(0.001, 5), body=st.binary(max_size=5))
    def begin(self, ttl: float | None, body: bytes) -> Known:
        deadline = None if ttl is None else self.now + ttl
        known = Known(self.client.begin("target", "method", body, self.now, deadline=deadline))
        self.known.append(known)
        self.present[known.call.id] = known
        return known

    @rule()
    def notice(self) -> None:
        self.client.notice("target", "method", b"")

    @rule(known=calls, size=st.integers(0, LARGEST))
    def client_item(self, known: Known, size: int) -> None:
        if self.here(known) and not known.client.ended and known.call.credit > 0:
            body = self.fresh(size)
            if self.client.item(known.call, body):
                known.client.sent.append(body)

    @rule(known=calls)
    def client_end(self, known: Known) -> None:
        if self.here(known) and not known.client.ended:
            known.client.ended = True
            self.client.end(known.call)

    @rule(known=consumes(calls))
    def cancel(self, known: Known) -> None:
        if self.here(known):
            known.cancelled |= not known.call.done
            self.client.cancel(known.call)
            assert known.call.done

    @rule(known=calls)
    def client_takes(self, known: Known) -> None:
        if self.here(known) and (body := self.client.take(known.call)) is not None:
            known.server.heard.append(body)

    # -- the handlers ----------------------------------------------------------------------------------------------------

    @rule(known=calls, size=st.integers(0, LARGEST))
    def server_item(self, known: Known, size: int) -> None:
        call = known.handler
        if self.here(known) and call is not None and known.answer is None and call.credit > 0:
            body = self.fresh(size)
            if self.server.item(call, body):
                known.server.sent.append(body)

    @rule(known=calls)
    def server_takes(self, known: Known) -> None:
        if self.here(known) and known.handler is not None and (body := self.server.take(known.handler)) is not None:
            known.client.heard.append(body)

    @rule(known=calls, how=st.sampled_from(["result", "failure", "end"]))
    def finish(self, known: Known, how: str) -> None:
        call = known.handler
        if not self.here(known) or call is None or known.answer is not None:
            return
        if how == "result":
            known.answer = self.fresh(3)
            self.server.result(call, known.answer)
        elif how == "failure":
            known.answer = events.Failure(call.id, "REMOTE_ERROR", "no", "ValueError")
            self.server.fail(call, known.answer)
        else:
            known.answer = b"end"
            self.server.end(call)
        self.server.finish(call)

    @rule(known=calls, count=st.integers(3, 12), size=st.integers(0, LARGEST))
    def talk(self, known: Known, count: int, size: int) -> None:
        """Both ways for a while: windows are used up, and given back."""
        for _ in range(count):
            self.client_item(known, size)
            self.server_item(known, size)
            self.deliver(9)
            self.client_takes(known)
            self.server_takes(known)

    # -- what always holds -----------------------------------------------------------------------------------------------

    def here(self, known: Known) -> bool:
        return self.present.get(known.call.id) is known

    def fresh(self, size: int) -> bytes:
        self.number += 1
        return self.number.to_bytes(4, "big") + b"x" * size

    def remember(self) -> None:
        """An outcome is final."""
        for known in self.known:
            outcome = known.outcome()
            assert known.seen is None or outcome == known.seen
            known.seen = outcome

    @invariant()
    def outcomes_are_final_and_true(self) -> None:
        self.remember()
        for known in self.known:
            call = known.call
            if call.result is not None:
                assert call.result == known.answer
            elif call.failure is not None:
                own = call.failure.code in ("DEADLINE_EXCEEDED", "TARGET_BUSY")
                assert own or call.failure == known.answer
            assert (call.result is not None) + (call.failure is not None) + call.complete <= 1

    @invariant()
    def streams_keep_their_order(self) -> None:
        for known in self.known:
            for side in (known.client, known.server):
                assert side.heard == side.sent[: len(side.heard)]

    @invariant()
    def nobody_holds_more_than_a_window_and_an_item(self) -> None:
        for core in (self.client, self.server):
            for call in core.calls.values():
                held = sum(item.cost for item in call.inbox)
                assert held <= WINDOW + HEAD.size + 4 + LARGEST

    @precondition(lambda self: len(self.known) > 3)
    @rule()
    def everything_settles(self) -> None:
        """All that is on its way arrives, handlers finish, readers read: every call is over, and nothing of it is left."""
        for _ in range(200):
            self.deliver(50)
            for known in tuple(self.present.values()):
                self.client_takes(known)
                self.server_takes(known)
                self.finish(known, "end")
            if not (self.to_client or self.to_server or self.client.outbox or self.server.outbox):
                break
        assert not self.client.calls
        assert not self.server.calls
        for known in self.present.values():
            assert known.call.done
            if not known.cancelled and known.call.complete:
                assert known.server.heard == known.server.sent


TestCalls = Calls.TestCase
TestCalls.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# -- what does not keep to the protocol ------------------------------------------------------------------------------------


def test_more_than_the_window_costs_the_connection() -> None:
    client, server = ClientCore(window=WINDOW), ServerCore(window=WINDOW)
    call = client.begin("t", "m", b"", 0.0)
    for _ in range(3):
        client.item(call, b"x" * 60)  # whatever its credit
    *allowed, too_much = client.outbox
    for frame in allowed:
        server.receive(frame, 0.0)
    with pytest.raises(ProtocolError, match="window"):
        server.receive(too_much, 0.0)


def test_an_id_that_is_in_use_costs_the_connection() -> None:
    server = ServerCore()
    frame = Native().encode(events.Call(7, "t", "m", b""))[0]
    server.receive(frame, 0.0)
    with pytest.raises(ProtocolError, match="under way"):
        server.receive(frame, 0.0)


@pytest.mark.parametrize("event", [events.Result(1, b""), events.Push("T", b""), events.Goodbye()])
def test_a_client_says_nothing_that_is_the_servers(event: events.Event) -> None:
    with pytest.raises(ProtocolError):
        ServerCore().receive(Native().encode(event)[0], 0.0)


def test_what_is_too_large_fails_its_own_call_only() -> None:
    client, server = ClientCore(), ServerCore()
    small, large = client.begin("t", "small", b"", 0.0), client.begin("t", "large", b"", 0.0)
    client.outbox.rotate(1)
    client.unsendable("too large")
    assert (large.done, large.failure and large.failure.code, small.done) == (True, "TOO_LARGE", False)
    [started] = [each for each in server.receive(client.outbox.popleft(), 0.0) if isinstance(each, Started)]
    server.result(started.call, b"huge")
    server.unsendable("too large")
    client.receive(server.outbox.popleft())
    assert small.failure is not None
    assert small.failure.code == "TOO_LARGE"


# -- bytes -----------------------------------------------------------------------------------------------------------------

text = st.text(max_size=8)
names = st.from_regex(r"[a-z]{1,8}", fullmatch=True)
ids = st.integers(1, 0xFFFFFFFF)
every_event = st.one_of(
    st.builds(events.Hello, window=ids, targets=st.dictionaries(names, text)),
    st.builds(events.Call, ids, names, names, st.binary(), st.none(), st.dictionaries(names, text)),
    st.builds(events.Result, ids, st.binary()),
    st.builds(events.Failure, ids, names, text, text, st.none() | text, st.none() | st.floats(0, 9)),
    st.builds(events.End, ids),
    st.builds(events.Credit, ids, ids),
    st.builds(events.Cancel, ids),
    st.builds(events.Subscribe, ids, st.lists(names, max_size=3)),
    st.builds(events.Unsubscribe, ids, st.lists(names, max_size=3)),
    st.builds(events.Push, names, st.binary()),
    st.just(events.Goodbye()),
    st.just(events.Heartbeat()),
)


@given(every_event)
def test_an_event_is_what_its_frame_says(event: events.Event) -> None:
    dialect = Native()
    [frame] = dialect.encode(event)
    assert list(dialect.decode(frame)) == [event]
    assert dialect.whose(frame) == getattr(event, "id", 0)


@given(st.floats(0.001, 4e6))
def test_a_deadline_travels_in_milliseconds(ttl: float) -> None:
    [call] = Native().decode(Native().encode(events.Call(1, "t", "m", b"", ttl))[0])
    assert isinstance(call, events.Call)
    assert call.ttl is not None
    assert abs(call.ttl - ttl) <= 0.0006


frames = st.binary(max_size=80) | st.builds(
    lambda kind, length, id, number, rest: HEAD.pack(MAGIC, kind, length, id, number) + rest,
    st.integers(0, 255),
    st.integers(0, 40),
    st.integers(0, 3),
    st.integers(0, 3),
    st.binary(max_size=60),
)


@given(st.lists(frames, max_size=8))
def test_any_bytes_are_events_or_a_protocol_error(several: list[bytes]) -> None:
    server, client = ServerCore(max_calls=2), ClientCore()
    client.begin("t", "m", b"", 0.0)
    for core in (lambda frame: server.receive(frame, 0.0), client.receive):
        for frame in several:
            try:
                core(frame)
            except ProtocolError:
                break
