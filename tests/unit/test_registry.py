from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import ipckit
from ipckit import _registry, errors
from ipckit._capabilities import Capabilities
from ipckit._options import LinkOptions
from ipckit._spi import Link, Listener, Steps, Transport
from ipckit._url import Url, parse


class Toy(Transport[LinkOptions]):
    capabilities = Capabilities(patterns=frozenset({"channel"}))
    options = LinkOptions

    def listen(self, url: Url, options: LinkOptions) -> Steps[Listener]:
        raise NotImplementedError

    def connect(self, url: Url, options: LinkOptions) -> Steps[Link]:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_registry, "_table", dict(_registry._table))


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("unx://a", "unix"),
        ("TPC://h:1", "tcp"),
        ("radis://h", "redis"),
        ("zmqtcp://h:1", "zmq"),
        ("qqqqq://", "known:"),
    ],
)
def test_did_you_mean(url: str, hint: str) -> None:
    with pytest.raises(errors.UnknownScheme, match=hint) as caught:
        ipckit.connect(url, timeout=0)
    assert isinstance(caught.value, ValueError)


def test_register() -> None:
    ipckit.register("toy", Toy())
    assert ipckit.capabilities("toy://x") is Toy.capabilities
    assert "toy" in ipckit.schemes()


def test_missing_dependency() -> None:
    class Lacking(Toy):
        requires = ("json", "no_such_module_here")
        extra = "toy"

    ipckit.register("lacking", Lacking())
    with pytest.raises(errors.MissingDependency, match=r"no_such_module_here.*\.\[toy\]") as caught:
        ipckit.connect("lacking://x", timeout=0)
    assert isinstance(caught.value, ImportError)
    assert ipckit.capabilities("lacking://x").ordered, "what it promises can be read without it"


def test_missing_package_of_a_dotted_module() -> None:
    class Lacking(Toy):
        requires = ("no_such_package.inside",)

    ipckit.register("lacking", Lacking())
    with pytest.raises(errors.MissingDependency, match=r"no_such_package\.inside"):
        ipckit.connect("lacking://x", timeout=0)


def test_require_comes_before_the_dependency() -> None:
    class Lacking(Toy):
        requires = ("no_such_module_here",)

    ipckit.register("lacking", Lacking())
    with pytest.raises(errors.Unsupported, match="durable"):
        ipckit.connect("lacking://x", timeout=0, require={"durable"})


@pytest.mark.parametrize("target", ["ipckit.no_such_module:TRANSPORT", "ipckit._url:NO_SUCH_NAME", "ipckit._url:parse"])
def test_an_entry_that_leads_nowhere(target: str) -> None:
    _registry._table["broken"] = target
    with pytest.raises(errors.ConfigError, match=r"ipckit\."):
        ipckit.capabilities("broken://x")


def test_patterns_are_checked() -> None:
    class Queues(Toy):
        capabilities = Capabilities(patterns=frozenset({"queue"}))

    ipckit.register("queues", Queues())
    with pytest.raises(errors.Unsupported, match="channel"):
        ipckit.connect("queues://x", timeout=0)


PACKAGE = """
from ipckit._spi import Transport
from ipckit._capabilities import Capabilities
from ipckit._options import LinkOptions
class Third(Transport):
    capabilities = Capabilities(patterns=frozenset({"channel"}), durable=True)
    options = LinkOptions
    def listen(self, url, options): ...
    def connect(self, url, options): ...
TRANSPORT = Third()
"""

PROGRAM = """
import sys, ipckit
assert "third_transport" not in sys.modules
assert ipckit.capabilities("third://x").durable
assert "third" in ipckit.schemes()
assert not ipckit.capabilities("inproc://x").durable, "an entry point took a built-in scheme"
"""


def test_entry_points(tmp_path: Path) -> None:
    """Another package adds a scheme; it does not replace one of ours."""
    (tmp_path / "third_transport.py").write_text(PACKAGE)
    info = tmp_path / "third_transport-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-transport\nVersion: 1.0\n")
    entry = "third_transport:TRANSPORT"
    (info / "entry_points.txt").write_text(f"[ipckit.transports]\nthird = {entry}\ninproc = {entry}\n")
    path = [str(tmp_path), *(part for part in sys.path if part)]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}\n{PROGRAM}"], check=True, timeout=60)


def test_lookup_is_by_scheme_and_lazy() -> None:
    _registry._table["lazy"] = "ipckit.transports.inproc:TRANSPORT"
    first = _registry.find(parse("lazy://x"))
    assert _registry.find(parse("lazy://y")) is first
    assert _registry._table["lazy"] is first
