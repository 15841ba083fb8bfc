"""The envelope dialects without a server: every byte of both headers, every name of an error, any split of the bytes."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipckit import errors
from ipckit._options import DEFAULT_LIMIT
from ipckit._url import parse
from ipckit.rpc import events
from ipckit.rpc._rate import Bucket
from ipckit.rpc._seed import SeedJson, SeedMsgpack
from ipckit.rpc._servercore import ServerCore, Started
from ipckit.rpc._versioned import Version1, Version2
from ipckit.rpc.dialects import Native
from ipckit.rpc.envelope import FIRST, NAMES, Envelope, Unknown, recognise
from ipckit.transports._frames import FrameDecoder
from ipckit.transports._stream import StreamOptions, make_link

pack, unpack = msgspec.msgpack.encode, msgspec.msgpack.decode
DIALECTS = (SeedJson, SeedMsgpack, Version1, Version2)


def prefixed(body: bytes, uncounted: int = 0) -> bytes:
    return (len(body) - uncounted).to_bytes(4) + body


def clock() -> float:
    return 1_699_999_999.999


# -- telling them apart ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("byte", "expected"),
    [
        (b"{", SeedJson),
        (b" ", SeedJson),
        (b"\n", SeedJson),
        (b"\x80", SeedMsgpack),
        (b"\x8f", SeedMsgpack),
        (b"\xde", SeedMsgpack),
        (b"\xdf", SeedMsgpack),
        (b"\x01", Version1),
        (b"\x02", Version2),
        (b"\xc1", Native),
    ],
)
def test_the_first_byte_tells_the_dialect(byte, expected):
    assert recognise(bytes(4) + byte) is expected


def test_other_first_bytes_are_none():
    known = {*b"{ \t\r\n\x01\x02\xc1\xde\xdf", *range(0x80, 0x90)}
    for byte in set(range(256)) - known:
        found = recognise(bytes((0, 0, 0, 1, byte)))
        assert isinstance(found, Unknown), byte
        assert bool(found.answer) == (3 <= byte <= 8)


def test_a_version_to_come_is_told_so():
    found = recognise(bytes((0, 0, 0, 9, 3)))
    assert isinstance(found, Unknown)
    assert found.answer[:3] == b"\x02\x03\x01"
    assert json.loads(found.answer[3:])["error_code"] == "UNSUPPORTED_PROTOCOL_VERSION"


# -- the seed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "write", "read"), [(SeedJson, json.dumps, json.loads), (SeedMsgpack, pack, unpack)]
)
def test_a_seed_request_and_its_response(dialect, write, read):
    speaker = dialect(clock)
    said = write(
        {"target": "calc", "message_type": "Add", "payload": {"a": 5}, "request_id": "r1", "expects_reply": True}
    )
    (call,) = speaker.decode(said if isinstance(said, bytes) else said.encode())
    assert isinstance(call, events.Call)
    assert (call.target, call.method, read(call.body), call.stream) == ("calc", "Add", {"a": 5}, False)
    body = write({"sum": 8})
    (frame,) = speaker.encode(events.Result(call.id, body if isinstance(body, bytes) else body.encode()))
    assert read(frame) == {"request_id": "r1", "success": True, "payload": {"sum": 8}, "error": None}


def test_the_bytes_of_a_seed_response():
    speaker = SeedJson()
    (call,) = speaker.decode(b'{"target":"c","message_type":"Nope","payload":{},"expects_reply":true}')
    (frame,) = speaker.encode(events.Failure(call.id, "UNKNOWN_METHOD", "'c' has no method 'Nope'"))
    assert frame == (
        b'{"request_id":null,"success":false,"payload":null,"error":"UnknownMessageType: Nope is not registered"}'
    )


def ask(speaker: Envelope, **more: object) -> int:
    (event,) = speaker.decode(json.dumps({"target": "c", "message_type": "M", "payload": {}, **more}).encode())
    assert isinstance(event, events.Call)
    return event.id


def said(frames) -> list[dict]:
    return [json.loads(frame) for frame in frames]


def test_without_a_request_id_answers_keep_the_order_of_the_requests():
    speaker = SeedJson()
    first, named, second, third = (
        ask(speaker, expects_reply=True),
        ask(speaker, expects_reply=True, request_id="n"),
        ask(speaker, expects_reply=True),
        ask(speaker, expects_reply=True),
    )
    assert speaker.encode(events.Result(third, b"3")) == ()
    assert [each["payload"] for each in said(speaker.encode(events.Result(named, b'"n"')))] == ["n"]
    assert [each["payload"] for each in said(speaker.encode(events.Result(first, b"1")))] == [1]
    assert [each["payload"] for each in said(speaker.encode(events.Result(second, b"2")))] == [2, 3]


@settings(deadline=None)
@given(st.data())
def test_any_order_of_answers_leaves_in_the_order_of_the_questions(data):
    speaker = SeedJson()
    asked = [ask(speaker, expects_reply=True) for _ in range(data.draw(st.integers(1, 8)))]
    streams = {id for id in asked if data.draw(st.booleans())}
    told: list[dict] = []
    waiting = list(asked)
    while waiting:
        id = data.draw(st.sampled_from(waiting))
        if id in streams and data.draw(st.booleans()):
            told += said(speaker.encode(events.Failure(id, "TARGET_BUSY", str(id))))
        else:
            told += said(speaker.encode(events.Result(id, b"%d" % id)))
        waiting.remove(id)
        assert not waiting or not speaker.waits(min(waiting))
        more = ask(speaker, expects_reply=True, request_id="named")
        assert said(speaker.encode(events.Result(more, b"0")))[0]["request_id"] == "named"
    assert [each["payload"] or int(each["error"].split()[-1]) for each in told] == asked
    assert set(speaker.released()) <= set(asked)


def test_a_stream_behind_another_question_waits_for_its_turn():
    core = ServerCore(SeedJson())
    question = b'{"target":"c","message_type":"M","payload":{},"expects_%s":true}'
    ((first,), (stream,)) = core.receive(question % b"reply", 0), core.receive(question % b"stream", 0)
    assert isinstance(first, Started)
    assert isinstance(stream, Started)
    assert stream.call.credit == 0
    core.result(first.call, b"1")
    assert core.freed == [stream.call]
    assert stream.call.credit > 0
    assert len(core.outbox) == 1


def test_a_seed_stream_says_of_its_last_item_that_it_is_the_last():
    speaker = SeedJson()
    id = ask(speaker, expects_stream=True, request_id="s")
    frames = [*speaker.encode(events.Item(id, b"1")), *speaker.encode(events.Item(id, b"2"))]
    frames += speaker.encode(events.End(id))
    assert said(frames) == [
        {"stream_id": "s", "sequence": 0, "payload": 1, "is_final": False},
        {"stream_id": "s", "sequence": 1, "payload": 2, "is_final": True},
    ]
    empty = ask(speaker, expects_stream=True, request_id="e")
    assert said(speaker.encode(events.End(empty))) == [
        {"stream_id": "e", "sequence": 0, "payload": None, "is_final": True}
    ]


def test_a_seed_stream_that_breaks_gives_what_it_had():
    speaker = SeedJson()
    id = ask(speaker, expects_stream=True, request_id="s")
    frames = [*speaker.encode(events.Item(id, b"1"))]
    frames += speaker.encode(events.Failure(id, "REMOTE_ERROR", "no more", "ValueError"))
    assert said(frames) == [
        {"stream_id": "s", "sequence": 0, "payload": 1, "is_final": False},
        {"request_id": "s", "success": False, "payload": None, "error": "RemoteError: ValueError: no more"},
    ]


def test_seed_subscriptions():
    speaker = SeedJson(clock)
    assert speaker.decode(b'{"message_types":["Tick"]}') == (events.Subscribe(0, ["Tick"]),)
    assert speaker.decode(b'{"message_types":[],"unsubscribe":true}') == (events.Unsubscribe(0, []),)
    (asked,) = speaker.decode(b'{"message_types":["Tick"],"request_id":"a"}')
    assert isinstance(asked, events.Subscribe)
    assert said(speaker.encode(events.Result(asked.id, b'["Tick"]')))[0]["payload"] == {"subscribed_types": ["Tick"]}
    assert said(speaker.encode(events.Push("Tick", b'{"n":1}'))) == [
        {
            "notification_type": "subscription",
            "message_type": "Tick",
            "payload": {"n": 1},
            "timestamp": 1_699_999_999_999,
        }
    ]


@pytest.mark.parametrize(
    "body",
    [b"{", b'{"target":1}', b'{"target":"c"}', b'{"target":"c","message_type":"M"}', b'{"message_types":[1]}', b"{}"],
)
def test_what_cannot_be_read_is_answered(body):
    speaker = SeedJson()
    (event,) = speaker.decode(body)
    assert isinstance(event, events.Malformed)
    (frame,) = speaker.encode(events.Failure(event.id, "CODEC", event.why))
    assert json.loads(frame)["error"].startswith("SerializationError: ")


@pytest.mark.parametrize(
    "word",
    [
        "UnknownMessageType",
        "AgentNotFound",
        "SerializationError",
        "TargetBusy",
        "ProtocolError",
        "RateLimited",
        "ConnectionClosed",
        "Timeout",
    ],
)
def test_every_error_of_the_seed_has_its_name(word):
    code = next(code for code, names in NAMES.items() if names.seed == word)
    speaker = SeedJson()
    id = ask(speaker, expects_reply=True)
    assert json.loads(speaker.encode(events.Failure(id, code, "why"))[0])["error"].startswith(f"{word}: ")


# -- versions 1 and 2 --------------------------------------------------------------------------------------------------

ASK = {"correlation_id": "c1", "target": "calc", "message_type": "Add", "payload": {"a": 5}, "expects_reply": True}


def test_heartbeats_byte_for_byte():
    for dialect, sent in ((Version1, "0104"), (Version2, "020401")):
        speaker = dialect()
        assert prefixed(bytes.fromhex(sent), dialect.uncounted[0]).hex() in ("00000000020401", "000000000104")
        assert speaker.decode(bytes.fromhex(sent)) == (events.Heartbeat(),)
        (answer,) = speaker.encode(events.Heartbeat())
        assert prefixed(answer, dialect.uncounted[1]).hex() == "00000000020401"


@pytest.mark.parametrize(
    ("dialect", "header", "write", "read"),
    [
        (Version1, b"\x01\x01", lambda value: json.dumps(value).encode(), json.loads),
        (Version2, b"\x02\x01\x01", lambda value: json.dumps(value).encode(), json.loads),
        (Version2, b"\x02\x01\x02", pack, unpack),
    ],
)
def test_a_versioned_request_and_its_response(dialect, header, write, read):
    speaker = dialect()
    (call,) = speaker.decode(header + write(ASK | {"a field of tomorrow": 1}))
    assert isinstance(call, events.Call)
    assert (call.target, call.method, read(call.body), call.ttl, call.oneway) == ("calc", "Add", {"a": 5}, 30, False)
    (frame,) = speaker.encode(events.Result(call.id, write({"sum": 8})))
    number = 2 if write is pack else 1
    assert frame[:3] == bytes((2, 2, number))
    assert read(frame[3:]) == {"correlation_id": "c1", "success": True, "payload": {"sum": 8}}
    (call,) = speaker.decode(header + write(ASK))
    (frame,) = speaker.encode(events.Failure(call.id, "UNKNOWN_TARGET", "nothing is exposed as 'calc'"))
    assert frame[:3] == bytes((2, 3, number))
    assert read(frame[3:]) == {
        "correlation_id": "c1",
        "success": False,
        "error": "nothing is exposed as 'calc'",
        "error_code": "ACTOR_NOT_FOUND",
    }


def v2(kind: int, **body: object) -> bytes:
    return bytes((2, kind, 1)) + json.dumps(body).encode()


def body_of(frame: bytes, kind: int) -> dict:
    assert frame[:3] == bytes((2, kind, 1))
    return json.loads(frame[3:])


def test_the_bytes_of_a_versioned_response():
    speaker = Version1()
    (call,) = speaker.decode(b"\x01\x01" + json.dumps(ASK).encode())
    (frame,) = speaker.encode(events.Result(call.id, b'{"sum":8}'))
    body = b'{"correlation_id":"c1","success":true,"payload":{"sum":8}}'
    assert prefixed(frame, 3) == b"\x00\x00\x00\x3a\x02\x02\x01" + body


def test_a_versioned_stream_ends_with_a_frame_of_its_own():
    speaker = Version2()
    (call,) = speaker.decode(v2(1, **ASK | {"expects_stream": True}))
    assert isinstance(call, events.Call)
    assert call.stream
    frames = [frame for n in range(5) for frame in speaker.encode(events.Item(call.id, b"%d" % n))]
    frames += speaker.encode(events.End(call.id))
    bodies = [body_of(frame, 9) for frame in frames]
    assert [each["sequence"] for each in bodies] == [0, 1, 2, 3, 4, 5]
    assert [each.get("payload") for each in bodies] == [0, 1, 2, 3, 4, None]
    assert [each["is_final"] for each in bodies] == [False] * 5 + [True]
    assert "payload" not in bodies[-1]
    (call,) = speaker.decode(v2(1, **ASK | {"expects_stream": True}))
    (frame,) = speaker.encode(events.Failure(call.id, "REMOTE_ERROR", "broken", "ValueError"))
    assert body_of(frame, 9) == {
        "correlation_id": "c1",
        "sequence": 0,
        "is_final": True,
        "error": "ValueError: broken",
        "error_code": "STREAM_ERROR",
    }


def test_fire_and_forget_is_answered_once_it_is_delivered():
    core = ServerCore(Version2())
    (started,) = core.receive(v2(1, **ASK | {"expects_reply": False}), 0)
    assert isinstance(started, Started)
    assert not core.outbox
    core.accept(started.call)
    assert body_of(core.outbox.popleft(), 2)["payload"] == {"status": "delivered"}
    assert core.lost() == []  # its caller may go: it runs on
    core.result(started.call, b"1")
    assert not core.outbox


def test_versioned_subscriptions_and_discovery():
    speaker = Version2(clock)
    (asked,) = speaker.decode(v2(6, correlation_id="s", message_types=["Tick"]))
    assert isinstance(asked, events.Subscribe)
    (frame,) = speaker.encode(events.Result(asked.id, b'["Tick"]'))
    assert body_of(frame, 2) == {"correlation_id": "s", "success": True, "subscribed_types": ["Tick"]}
    (asked,) = speaker.decode(v2(7, correlation_id="s", message_types=[]))
    assert isinstance(asked, events.Unsubscribe)
    assert asked.types == []
    push = body_of(speaker.encode(events.Push("Tick", b'{"n":1}'))[0], 5)
    assert push.pop("notification_id")
    assert push == {"message_type": "Tick", "payload": {"n": 1}, "timestamp_ms": 1_699_999_999_999}
    (asked,) = speaker.decode(v2(8, correlation_id="d"))
    assert isinstance(asked, events.Discover)
    assert asked.targets
    assert asked.types
    told = body_of(speaker.encode(events.Discovered(asked.id, ["calc"], ["Add"]))[0], 2)
    assert [each["name"] for each in told["actors"]] == ["calc"]
    assert told["message_types"] == ["Add"]
    assert told["protocol_version"]["capabilities"] == dict.fromkeys(
        ("messagepack", "streaming", "push", "discovery"), True
    )
    (asked,) = speaker.decode(v2(8, correlation_id="d", include_actors=False, include_message_types=False))
    assert isinstance(asked, events.Discover)
    assert not asked.targets
    assert not asked.types
    assert {"actors", "message_types"}.isdisjoint(
        body_of(speaker.encode(events.Discovered(asked.id, None, None))[0], 2)
    )


@pytest.mark.parametrize("body", [b"{", b"{}", b'{"correlation_id":5}', b"\xff"])
def test_a_versioned_body_that_cannot_be_read_is_answered_as_unknown(body):
    speaker = Version2()
    (event,) = speaker.decode(b"\x02\x01\x01" + body)
    assert isinstance(event, events.Malformed)
    answer = body_of(speaker.encode(events.Failure(event.id, "CODEC", event.why))[0], 3)
    assert (answer["correlation_id"], answer["error_code"]) == ("unknown", "SERIALIZATION_ERROR")


@pytest.mark.parametrize("frame", ["0306017b7d", "02ff017b7d", "0202017b7d", "0201037b7d", "0105017b7d"])
def test_a_header_that_cannot_be_read_ends_the_connection(frame):
    with pytest.raises(errors.ProtocolError):
        (Version1() if frame.startswith("01") else Version2()).decode(bytes.fromhex(frame))


def test_a_connection_keeps_its_format():
    speaker = Version2()
    speaker.decode(b"\x02\x01\x02" + pack(ASK))
    assert speaker.decode(b"\x02\x04\x01") == (events.Heartbeat(),)
    with pytest.raises(errors.ProtocolError):
        speaker.decode(v2(1, **ASK))


def test_every_versioned_error_has_its_code():
    assert {names.versioned for names in NAMES.values()} >= {
        "UNKNOWN_MESSAGE_TYPE",
        "ACTOR_NOT_FOUND",
        "SERIALIZATION_ERROR",
        "TARGET_BUSY",
        "CONNECTION_CLOSED",
        "PROTOCOL_ERROR",
        "IO_ERROR",
        "TIMEOUT",
        "RATE_LIMITED",
        "SHUTTING_DOWN",
        "CONNECTION_LIMIT_REACHED",
        "UNSUPPORTED_PROTOCOL_VERSION",
        "STREAM_ERROR",
    }
    speaker = Version2()
    (call,) = speaker.decode(v2(1, **ASK))
    failure = events.Failure(call.id, "REMOTE_ERROR", "no such file", "FileNotFoundError")
    assert body_of(speaker.encode(failure)[0], 3)["error_code"] == "IO_ERROR"


def test_who_is_one_too_many_is_told():
    assert body_of(Version2().turn_away(7)[0], 3) == {
        "correlation_id": "__acton_connection_rejected__",
        "success": False,
        "error": "the server has 7 connections already",
        "error_code": "CONNECTION_LIMIT_REACHED",
        "payload": {"limit": 7},
    }
    assert json.loads(SeedJson().turn_away(7)[0])["error"].startswith("ConnectionClosed: ")


# -- the order of checks -----------------------------------------------------------------------------------------------


def test_draining_comes_before_the_rate_and_the_rate_before_the_body():
    core = ServerCore(Version2(), rate=Bucket(1, 1))
    core.receive(v2(4), 0)
    core.outbox.clear()
    for frame in (b"\x02\x01\x01{", v2(1, **ASK), v2(6, correlation_id="s", message_types=[]), b"\x02\x04\x01"):
        assert core.receive(frame, 0) == []
        answer = body_of(core.outbox.pop(), 3)
        assert answer["error_code"] == "RATE_LIMITED"
    core.goodbye()
    assert core.receive(b"\x02\x01\x01{", 0) == []
    assert body_of(core.outbox.pop(), 3)["error_code"] == "SHUTTING_DOWN"


@settings(deadline=None)
@given(st.lists(st.floats(0, 3), max_size=60), st.integers(1, 9), st.integers(1, 20))
def test_a_bucket_gives_no_more_than_its_rate(pauses, rate, burst):
    bucket, now, taken = Bucket(rate, burst), 0.0, 0
    for pause in pauses:
        now += pause
        wait = bucket.take(now)
        if wait:
            assert 0 < wait <= 1 / rate
        else:
            taken += 1
        assert taken <= burst + now * rate + 1e-6


# -- any split of the bytes --------------------------------------------------------------------------------------------

texts = st.text(max_size=20)
numbers = st.integers(0, 2**63)
payloads = st.dictionaries(texts, numbers | texts | st.none(), max_size=3)


def seed_bodies() -> st.SearchStrategy[dict]:
    envelope = st.fixed_dictionaries(
        {"target": texts, "message_type": texts, "payload": payloads},
        optional={"request_id": texts, "expects_reply": st.booleans(), "expects_stream": st.booleans()},
    )
    return envelope | st.fixed_dictionaries({"message_types": st.lists(texts, max_size=3)}) | payloads


def versioned(write, version: int, number: int) -> st.SearchStrategy[bytes]:
    header = lambda kind: bytes((version, kind)) + (bytes((number,)) if version == 2 else b"")  # noqa: E731
    request = st.fixed_dictionaries(
        {"correlation_id": texts, "target": texts, "message_type": texts, "payload": payloads},
        optional={
            "expects_reply": st.booleans(),
            "expects_stream": st.booleans(),
            "response_timeout_ms": numbers,
        },
    )
    requests = (request | payloads).map(lambda body: header(1) + write(body))
    return requests | st.just(header(4))


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


FRAMES = {
    SeedJson: seed_bodies().map(encoded),
    SeedMsgpack: seed_bodies().map(lambda body: pack({"a": 1, **body})),
    Version1: versioned(encoded, 1, 1),
    Version2: versioned(pack, 2, 2),
}


@st.composite
def conversations(draw) -> tuple[list[bytes], list[int], bytes, type]:
    dialect = draw(st.sampled_from(DIALECTS))
    frames = draw(st.lists(FRAMES[dialect].filter(len), min_size=1, max_size=6))
    stream = b"".join(prefixed(frame, dialect.uncounted[0]) for frame in frames)
    cuts = sorted(set(draw(st.lists(st.integers(0, len(stream)), max_size=12))))
    return frames, cuts, stream, dialect


def decoded(dialect: Envelope, frames: list[bytes]) -> list:
    return [event for frame in frames for event in dialect.decode(frame)]


def pieces(stream: bytes, cuts: list[int]) -> Iterator[bytes]:
    for begin, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        if begin != end:
            yield stream[begin:end]


@settings(deadline=None, max_examples=150)
@given(conversations())
def test_any_split_of_the_bytes_gives_the_same_events(conversation):
    frames, cuts, stream, dialect = conversation
    left, right = socket.socketpair()
    right.setblocking(False)
    fd = right.detach()
    link = make_link(parse("unix://test"), StreamOptions(), fd, fd)
    framer = FrameDecoder(DEFAULT_LIMIT)  # what tls:// has in place of the native reader
    native: list[bytes] = []
    plain: list[bytes] = []
    known = known_plain = False
    with left:
        for piece in pieces(stream, cuts):
            left.sendall(piece)
            framer.feed(piece)
            if not known and (first := link.try_glance(FIRST)) is not None:
                assert recognise(first) is dialect
                link.reframe(*dialect.uncounted)
                known = True
            while known and (frame := link.try_recv()) is not None:
                native.append(frame)
            if not known_plain and (first := framer.glance(FIRST)) is not None:
                framer.uncounted, known_plain = dialect.uncounted[0], True
            while known_plain and (frame := framer.next()) is not None:
                plain.append(frame)
        assert native == plain == frames
        assert decoded(dialect(), native) == decoded(dialect(), frames)
        assert not framer.inside
        link.close()
        assert left.recv(1) == b""  # no goodbye: it would be taken for a length


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(DIALECTS), st.binary(max_size=60), st.data())
def test_no_bytes_are_worse_than_a_protocol_error(dialect, noise, data):
    whole = data.draw(FRAMES[dialect])
    speaker = dialect()
    for frame in (whole[:3] + noise, noise, whole + noise):
        if len(frame) >= dialect.uncounted[0]:  # a link gives no less
            try:
                happened = speaker.decode(frame)
            except errors.ProtocolError:
                continue
            for event in happened:
                if isinstance(event, events.Malformed):
                    speaker.encode(events.Failure(event.id, "CODEC", event.why))
