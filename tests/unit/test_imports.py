"""`import ipckit` is cheap, and imports no backend."""

from __future__ import annotations

import os
import subprocess
import sys

BACKENDS = ["posix_ipc", "zmq", "nats", "redis", "hiredis", "grpc", "google", "msgpack", "numpy", "rich", "trustme"]
HEAVY = ["asyncio", "ssl", "multiprocessing", "msgspec", "importlib.metadata", "logging"]


def python(code: str) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))}
    run = [sys.executable, "-c", code]
    return subprocess.run(run, check=True, capture_output=True, text=True, timeout=60, env=environ).stdout


def test_no_backend_is_imported() -> None:
    loaded = python("import sys, ipckit; print(*sys.modules)").split()
    assert [name for name in BACKENDS if name in loaded] == []
    assert [name for name in loaded if name.startswith("ipckit.transports.")] == []


def test_one_transport_loads_no_other_backend() -> None:
    loaded = python(
        "import sys, ipckit; a, b = ipckit.pair('inproc://'); a.close(); b.close(); print(*sys.modules)"
    ).split()
    assert [name for name in BACKENDS if name in loaded] == []
    assert "ipckit.transports.inproc" in loaded


def test_what_is_dear_is_imported_where_it_is_used() -> None:
    loaded = python("import sys, ipckit; print(*sys.modules)").split()
    assert [name for name in HEAVY if name in loaded] == []


def test_import_takes_50_ms_at_most() -> None:
    """Processor time, and the least of some runs: the same work each time, to which a busy machine only adds."""
    code = "import time; t = time.process_time(); import ipckit; print(time.process_time() - t)"
    python(code)
    assert min(float(python(code)) for _ in range(9)) <= 0.050


def test_the_names_of_later_are_all_there() -> None:
    found = python(
        "import ipckit; print(*(type(getattr(ipckit, name)).__name__ for name in ipckit.__all__)); dir(ipckit)"
    )
    assert len(found.split()) == int(python("import ipckit; print(len(ipckit.__all__))"))
    assert python("from ipckit import *; print(sender.__module__)").strip() == "ipckit.queue"
    assert "no attribute" in python("import ipckit\ntry: ipckit.nothing\nexcept AttributeError as error: print(error)")
