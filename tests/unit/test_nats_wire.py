"""The payloads on a NATS subject: what is packed is unpacked, and anything else is a ProtocolError and nothing worse."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipckit import errors
from ipckit.transports import _natswire as wire

NUMBERS = st.integers(0, 2**64 - 1)


@given(NUMBERS, st.lists(st.binary(max_size=300), max_size=20))
def test_many_messages_come_back(number, messages):
    payload = wire.pack_many(number, messages)
    assert wire.read_head(payload) == (wire.MESSAGES, number)
    assert wire.messages(payload) == messages


@given(st.sampled_from([wire.MESSAGE, wire.MORE, wire.BYE, wire.PROBE, wire.CLAIM]), NUMBERS, st.binary(max_size=300))
def test_content_comes_back(kind, number, content):
    payload = wire.pack(kind, number, memoryview(content))
    assert wire.read_head(payload) == (kind, number)
    assert wire.content(payload) == content


@given(NUMBERS, NUMBERS, st.binary(min_size=1, max_size=300))
def test_second_numbers_come_back(number, second, content):
    first = wire.pack_first(number, second, memoryview(content))
    assert (wire.read_head(first), wire.read_u64(first)) == ((wire.FIRST, number), second)
    assert first[wire.HEAD_SIZE :] == content
    assert wire.read_u64(wire.pack_credit(number, second)) == second


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(payload):
    for read in (wire.messages, wire.read_u64):
        with contextlib.suppress(errors.ProtocolError):
            read(payload)


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8), st.data())
def test_a_cut_payload_is_refused_or_shorter(messages, data):
    payload = wire.pack_many(7, messages)
    cut = payload[: data.draw(st.integers(9, len(payload) - 1))]
    try:
        found = wire.messages(cut)
    except errors.ProtocolError:
        return
    assert found == messages[: len(found)]
    assert len(found) < len(messages)


def test_a_length_of_four_gigabytes_allocates_nothing():
    with pytest.raises(errors.ProtocolError):
        wire.messages(wire.pack(wire.MESSAGES, 0, b"\xff\xff\xff\xff"))
