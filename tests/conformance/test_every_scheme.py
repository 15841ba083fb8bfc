"""No transport without its conformance classes: each pattern that a scheme of the registry declares has one, or fails here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ipckit import _registry, capabilities
from ipckit.testing.conformance import ChannelContract, PubSubContract, QueueContract, RpcContract
from ipckit.testing.conformance._base import Contract

CONTRACTS: dict[str, type[Contract]] = {
    "channel": ChannelContract,
    "queue": QueueContract,
    "pubsub": PubSubContract,
    "rpc": RpcContract,
}


def classes() -> list[type[Contract]]:
    """The conformance classes of this directory."""
    found: dict[type[Contract], None] = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name == Path(__file__).name:
            continue
        spec = importlib.util.spec_from_file_location(f"_covered_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for value in vars(module).values():
            own = isinstance(value, type) and value.__module__ == module.__name__
            if own and issubclass(value, Contract) and value.__name__.startswith("Test"):
                assert value.schemes, f"{path.name}: {value.__name__} does not say which schemes it covers"
                found[value] = None
    return list(found)


CLASSES = classes()


@pytest.mark.parametrize("pattern", CONTRACTS)
def test_every_scheme_has_a_conformance_class(pattern: str) -> None:
    declared = {scheme for scheme in _registry.schemes() if pattern in capabilities(f"{scheme}://").patterns}
    covered = {scheme for each in CLASSES if issubclass(each, CONTRACTS[pattern]) for scheme in each.schemes}
    assert declared - covered == set(), f"these declare {pattern!r}, and no class holds them to it"


def test_no_class_is_skipped_throughout() -> None:
    """A class whose scheme does not declare its pattern would skip every test, and look like a pass."""
    for each in CLASSES:
        (pattern,) = (name for name, contract in CONTRACTS.items() if issubclass(each, contract))
        for scheme in each.schemes:
            assert pattern in capabilities(f"{scheme}://").patterns, f"{each.__name__}: {scheme} has no {pattern}"
