from __future__ import annotations

import builtins
import copy
import inspect
import pickle

import pytest

from ipckit import errors
from ipckit._url import parse

#: DESIGN 6, as far as it is there: class, its parent, and the word that Python has for it.
TREE = """
AddressError IpcError
BadUrl AddressError ValueError
UnknownScheme AddressError ValueError
AddressInUse AddressError
NothingListening AddressError ConnectionError
ConfigError IpcError
MissingDependency ConfigError ImportError
Unsupported ConfigError
BadOption ConfigError ValueError
ResourceLimit ConfigError
AccessDenied ConfigError PermissionError
Closed IpcError
PeerError IpcError ConnectionError
PeerClosed PeerError
PeerDied PeerError
Timeout IpcError TimeoutError
OutcomeUnknown Timeout
QueueFull IpcError
MessageTooLarge IpcError ValueError
ProtocolError IpcError
SchemaError ProtocolError
CodecError ProtocolError
RpcError IpcError
SyncError IpcError
ForkedError IpcError
"""


CLASSES = [
    value for _, value in sorted(vars(errors).items()) if inspect.isclass(value) and issubclass(value, errors.IpcError)
]


@pytest.mark.parametrize("line", TREE.split("\n")[1:-1])
def test_tree(line: str) -> None:
    name, *parents = line.split()
    found = getattr(errors, name)
    for parent in parents:
        assert issubclass(found, getattr(errors, parent, None) or getattr(builtins, parent))
    assert found.__bases__[0].__name__ == parents[0]


@pytest.mark.parametrize("error", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_one_of_ours_and_travels(error: type[errors.IpcError]) -> None:
    """Pickled (to another process) and copied, it is the same, attributes and all."""
    original = error("it broke", url=parse("tcp://me:secret@h:1"), operation="recv", hint="mend it")
    original.add_note("a note")
    for twin in (pickle.loads(pickle.dumps(original)), copy.copy(original)):
        assert type(twin) is error
        told = (
            "Exception: it broke" if error is errors.RemoteError else "it broke"
        )  # with the class that was raised there
        assert str(twin) == str(original) == f"recv tcp://me:***@h:1: {told} (mend it)"
        assert (twin.message, twin.url, twin.operation, twin.hint) == (
            "it broke", "tcp://me:***@h:1", "recv", "mend it",
        )  # fmt: skip
        assert twin.__notes__ == ["a note"]
    assert error.__doc__


def test_details_travel() -> None:
    assert pickle.loads(pickle.dumps(errors.PeerDied("x", pid=17))).pid == 17
    assert pickle.loads(pickle.dumps(errors.OutcomeUnknown("x", message_id="m1"))).message_id == "m1"


def test_str_says_what_there_is() -> None:
    assert str(errors.IpcError("it broke")) == "it broke"
    assert str(errors.IpcError("it broke", operation="send")) == "send: it broke"
    assert str(errors.IpcError("it broke", hint="mend it")) == "it broke (mend it)"
    assert errors.IpcError("x").url is None


def test_three_ends_are_three() -> None:
    """We closed it; they closed it; they were killed: no `except` for one catches another."""
    ends = [errors.Closed, errors.PeerClosed, errors.PeerDied]
    assert not any(issubclass(a, b) for a in ends for b in ends if a is not b)
    assert not issubclass(errors.Closed, ConnectionError)


def test_python_words_catch_them() -> None:
    with pytest.raises(TimeoutError):
        raise errors.OutcomeUnknown("x")
    with pytest.raises(ConnectionError):
        raise errors.PeerDied("x")
    with pytest.raises(OSError):
        raise errors.AccessDenied("x")
