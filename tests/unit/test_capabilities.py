from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

import ipckit
from ipckit import _capabilities, _registry, errors
from ipckit._capabilities import Capabilities

PLAIN = Capabilities(patterns=frozenset({"channel"}))


def test_features_are_what_can_be_required() -> None:
    features = _capabilities.features()
    assert {"durable", "ordered", "zero_copy", "priorities", "pair"} <= set(features)
    assert {"patterns", "death", "max_message", "model", "use_case"}.isdisjoint(features)


def test_check() -> None:
    _capabilities.check(frozenset(), PLAIN, "toy://x")
    _capabilities.check(frozenset({"ordered", "reliable"}), PLAIN, "toy://x")
    with pytest.raises(errors.Unsupported, match=r"toy://x.*durable"):
        _capabilities.check(frozenset({"ordered", "durable"}), PLAIN, "toy://x")
    with pytest.raises(errors.BadOption, match="did you mean 'durable'"):
        _capabilities.check(frozenset({"durabel"}), PLAIN, "toy://x")
    with pytest.raises(errors.BadOption, match="no capability"):
        _capabilities.check(frozenset({"model"}), PLAIN, "toy://x")


def test_a_number_counts_as_promised() -> None:
    priorities = Capabilities(patterns=frozenset({"channel"}), priorities=10)
    _capabilities.check(frozenset({"priorities"}), priorities, "toy://x")
    with pytest.raises(errors.Unsupported):
        _capabilities.check(frozenset({"priorities"}), PLAIN, "toy://x")


def test_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        PLAIN.durable = True  # type: ignore[misc]


@pytest.mark.parametrize("scheme", _registry.schemes())
def test_declarations_make_sense(scheme: str) -> None:
    promised = ipckit.capabilities(f"{scheme}://x")
    assert promised.patterns <= {"channel", "queue", "pubsub", "rpc"}
    assert promised.patterns
    assert promised.listen or promised.pair, "there is no way to open anything"
    assert promised.model, "the table of `ipckit transports` has a hole"
    assert promised.use_case, "the table of `ipckit transports` has a hole"
    assert not promised.cross_machine or promised.cross_process
    assert promised.max_message is None or promised.max_message > 0
    assert promised.death_bound > 0
    assert {field.name for field in fields(promised)} == {field.name for field in fields(PLAIN)}


PROGRAM = """
import sys, importlib.abc
class Wall(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in {"posix_ipc", "zmq", "nats", "redis", "grpc", "msgpack", "hiredis", "rich", "numpy"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Wall())
import ipckit
for scheme in ipckit.schemes():
    assert ipckit.capabilities(f"{scheme}://x").patterns, scheme
"""


def test_readable_without_any_backend() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=60)
