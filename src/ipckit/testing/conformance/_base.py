"""What every contract starts from: a URL, a shell, two parties, and the two ends of a channel between them."""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, ClassVar, NamedTuple, NoReturn, TypeVar

import pytest

import ipckit
from ipckit import Capabilities, errors
from ipckit import _registry as registry

from ._parties import HANG, End, Local, Party, ShellName, shell_of
from ._process import Pool, Process, Remote

T = TypeVar("T")
_processes = Pool()
atexit.register(_processes.close)

#: Seconds above its `death_bound` that a busy machine may take until it reports a death.
SLACK = 5.0


class Meeting(NamedTuple):
    """A channel: our end and theirs; the listener is ours, where there is one."""

    listener: End | None
    here: End
    there: End


#: Below what the system gives to connections (32768 on), or one of those would take it; each process begins elsewhere.
_ports = itertools.count(os.getpid() * 997)


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A loopback port that nobody has at the moment."""
    while True:
        port = 20_000 + next(_ports) % 12_000
        with socket.socket(socket.AF_INET, kind) as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def with_options(url: str, **options: object) -> str:
    mark = "&" if "?" in url else "?"
    return url + mark + "&".join(f"{name}={value}" for name, value in options.items())


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it comes true; for what settles by itself, such as threads that end."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def raises(kind: type[errors.IpcError], action: Callable[[], object]) -> errors.IpcError:
    """The error of exactly this kind that `action` raises: a PeerDied is no answer where a PeerClosed is due."""
    with pytest.raises(errors.IpcError) as caught:
        action()
    assert type(caught.value) is kind, f"raised {caught.value!r}, not {kind.__name__}"
    return caught.value


@contextmanager
def broker(server: AbstractContextManager[T]) -> Iterator[T]:
    """A server for the tests of one module. Where there is no binary for it: skipped on a laptop, an error in CI."""
    try:
        running = server.__enter__()
    except errors.MissingDependency as missing:
        absent(str(missing))
    try:
        yield running
    finally:
        server.__exit__(None, None, None)


def absent(what: str) -> NoReturn:
    """What cannot be tested here for want of something that is not installed. CI has to have it."""
    if os.environ.get("CI"):
        pytest.fail(f"missing in CI: {what}")
    pytest.skip(what)


class Ground:
    """What all contracts stand on: an address that a subclass brings, a shell, a runtime directory."""

    @pytest.fixture
    def url(self) -> str:
        raise NotImplementedError("a conformance class has a fixture `url`")

    @pytest.fixture(autouse=True)
    def runtime_dir(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        """A runtime directory for each test. Its path is short, because the path of a Unix socket has to be."""
        path = tempfile.mkdtemp(prefix="ipckit-")
        monkeypatch.setenv("IPCKIT_RUNTIME_DIR", path)
        yield path
        shutil.rmtree(path, ignore_errors=True)

    @pytest.fixture(params=["sync", "async"])
    def shell(self, request: pytest.FixtureRequest) -> ShellName:
        name: ShellName = request.param
        return name


class Contract(Ground):
    """The fixtures. A subclass brings `url`: a fresh, unused address for each test."""

    #: The schemes that this class covers; ipckit's own tests make sure that none is left out.
    schemes: ClassVar[tuple[str, ...]] = ()

    @pytest.fixture(autouse=True)
    def installed(self, url: str) -> None:
        """The transport's client library is there."""
        lacking = registry.missing(registry.find(ipckit.Url(self.scheme(url))))
        if lacking is not None:
            absent(f"the module {lacking!r}")

    @pytest.fixture
    def capabilities(self, url: str) -> Capabilities:
        return ipckit.capabilities(url)

    @pytest.fixture
    def options(self, url: str) -> frozenset[str]:
        """The names of the options that this transport takes."""
        transport = registry.find(ipckit.Url(self.scheme(url)))
        return frozenset(transport.options.__dataclass_fields__)

    @pytest.fixture
    def here(self, shell: ShellName) -> Iterator[Local]:
        party = Local(shell_of(shell))
        yield party
        party.close()

    @pytest.fixture
    def neighbour(self, shell: ShellName) -> Iterator[Local]:
        """A second party in this process, with a thread or a loop of its own."""
        party = Local(shell_of(shell))
        yield party
        party.close()

    @pytest.fixture
    def process(self, url: str, capabilities: Capabilities, runtime_dir: str) -> Iterator[Process]:
        """A spawned process; whoever kills it need not tell."""
        self.needs(capabilities.cross_process, "cross_process")
        taken = _processes.take()
        taken.environ(IPCKIT_RUNTIME_DIR=runtime_dir)
        yield taken
        killed = not taken.alive
        _processes.give_back(taken)
        if killed and capabilities.listen:  # the next start sweeps up what a killed process left; here is none
            with suppress(errors.IpcError):
                ipckit.listen(url, timeout=capabilities.death_bound + SLACK).close()

    @pytest.fixture
    def spawned(self, process: Process, shell: ShellName) -> Iterator[Remote]:
        """The party in that process."""
        party = Remote(process, shell)
        yield party
        party.close()

    @pytest.fixture(params=["thread", "process"])
    def there(self, request: pytest.FixtureRequest) -> Party:
        """The other party: a thread (or a loop) of this process, or a spawned process."""
        party: Party = request.getfixturevalue("neighbour" if request.param == "thread" else "spawned")
        return party

    @pytest.fixture
    def ends(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> Meeting:
        return self.meet(here, there, url, capabilities)

    @pytest.fixture
    def near(self, here: Local, neighbour: Local, url: str, capabilities: Capabilities) -> Meeting:
        """Both ends in this process."""
        return self.meet(here, neighbour, url, capabilities)

    @pytest.fixture
    def far(self, here: Local, spawned: Remote, url: str, capabilities: Capabilities) -> Meeting:
        """The other end in a spawned process."""
        return self.meet(here, spawned, url, capabilities)

    # -- what contracts do often -----------------------------------------------------------------------------------

    @classmethod
    def hand_one(cls, here: Local, others: list[Party], url: str) -> tuple[End, End] | None:
        """Where there are no names: our end of a pair, and theirs, for a queue or topics to take over. Else None."""
        if ipckit.capabilities(url).listen:
            return None
        cls.needs(len(others) == 1, "listen")
        ours, theirs = here.pair(url)
        adopted = others[0].adopt(theirs.handle).result(HANG)
        if adopted.handle is not theirs.handle:
            theirs.close()  # it has passed to another process
        return ours, adopted

    @staticmethod
    def meet(here: Local, there: Party, url: str, capabilities: Capabilities, **named: Any) -> Meeting:
        """A channel between two parties: we listen and they connect, or they are given one end of a pair."""
        if not capabilities.listen:
            left, right = here.pair(url)
            theirs = there.adopt(right.handle).result(HANG)
            if theirs.handle is not right.handle:
                right.close()  # it has passed to another process; a copy here would keep it open
            return Meeting(None, left, theirs)
        listener = here.open("listen", url, timeout=10, **named).result(HANG)
        connecting = there.open("connect", listener.url, timeout=10, **named)
        accepted = listener.accept()
        return Meeting(listener, accepted, connecting.result(HANG))

    @staticmethod
    def needs(declared: object, name: str) -> None:
        if not declared:
            pytest.skip(f"the transport does not declare {name!r}")

    @staticmethod
    def largest(capabilities: Capabilities, limit: int) -> int:
        return min(limit, capabilities.max_message or limit)

    @staticmethod
    def scheme(url: str) -> str:
        return url.partition("://")[0]
