"""No transport without its conformance class: a scheme in the registry that no class covers fails here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ipckit import _registry
from ipckit.testing.conformance import ChannelContract


def covered() -> set[str]:
    schemes: set[str] = set()
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.name == Path(__file__).name:
            continue
        spec = importlib.util.spec_from_file_location(f"_covered_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, ChannelContract) and value is not ChannelContract:
                assert value.schemes, f"{path.name}: {value.__name__} does not say which schemes it covers"
                schemes |= set(value.schemes)
    return schemes


def test_every_scheme_has_a_conformance_class() -> None:
    assert set(_registry.schemes()) - covered() == set()
