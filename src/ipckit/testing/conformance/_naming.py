"""Names: who has one, who reaches it and when; and what an endpoint tells about itself."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from concurrent.futures import Future
from typing import Any

import pytest

import ipckit
from ipckit import Capabilities, errors

from ._base import SLACK, Contract, Meeting, eventually, raises, with_options
from ._parties import HANG, Local, Party
from ._process import Process, Remote
from ._programs import echo, payload


class NamingContracts(Contract):
    def test_scheme_is_covered(self, url: str) -> None:
        if self.schemes:
            assert self.scheme(url) in self.schemes

    # -- meeting ---------------------------------------------------------------------------------------------------

    def test_connect_before_listen(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        """Connect waits for a listener."""
        self.needs(capabilities.listen, "listen")
        connecting = there.open("connect", url, timeout=20)
        time.sleep(0.2)
        assert not connecting.done()
        listener = here.open("listen", url, timeout=10).result(HANG)
        mine = listener.accept()
        connecting.result(HANG).send(b"at last")
        assert mine.recv() == b"at last"

    def test_nobody_listens(self, here: Local, url: str, capabilities: Capabilities) -> None:
        """NothingListening, when the time is up and not before; with timeout=0 after one try."""
        self.needs(capabilities.listen, "listen")
        for timeout in (0, 0.2):
            start = time.monotonic()
            error = raises(
                errors.NothingListening,
                lambda timeout=timeout: here.open("connect", url, timeout=timeout).result(HANG),  # type: ignore[misc]
            )
            assert time.monotonic() - start >= timeout
            assert error.operation == "connect"

    def test_name_is_free_after_close(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        self.needs(capabilities.listen, "listen")
        for number in range(3):
            listener, mine, theirs = self.meet(here, there, url, capabilities)
            theirs.send(bytes([number]))
            assert mine.recv() == bytes([number])
            assert listener is not None
            listener.close()
            raises(errors.NothingListening, lambda: there.open("connect", url, timeout=0.05).result(HANG))
            mine.close()
            theirs.close()

    def test_duplicate_listen(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        """A name has one listener; the second is refused, and does not disturb the first."""
        self.needs(capabilities.listen, "listen")
        first = here.open("listen", url, timeout=10).result(HANG)
        for party in (here, there):
            raises(errors.AddressInUse, lambda party=party: party.open("listen", url, timeout=5).result(HANG))  # type: ignore[misc]
        connecting = there.open("connect", first.url, timeout=10)
        mine = first.accept()
        connecting.result(HANG).send(b"undisturbed")
        assert mine.recv() == b"undisturbed"

    def test_stale_name(
        self, here: Local, spawned: Remote, process: Process, url: str, capabilities: Capabilities
    ) -> None:
        """What a killed listener left behind does not stand in the way of the next one."""
        self.needs(capabilities.listen, "listen")
        self.needs(capabilities.death != "unreported", "death")
        spawned.open("listen", url, timeout=10).result(HANG)
        process.kill()
        deadline = time.monotonic() + (capabilities.death_bound + SLACK if capabilities.death == "lease" else 0)
        while True:
            try:
                listener = here.open("listen", url, timeout=10).result(HANG)
                break
            except errors.AddressInUse:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        connecting = here.open("connect", listener.url, timeout=10)
        mine = listener.accept()
        connecting.result(HANG).send(b"a new start")
        assert mine.recv() == b"a new start"

    def test_connections_are_separate(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        self.needs(capabilities.listen, "listen")
        listener = here.open("listen", url, timeout=10).result(HANG)
        pairs = []
        for number in range(8):
            connecting = there.open("connect", listener.url, timeout=10)
            mine = listener.accept()
            theirs = connecting.result(HANG)
            theirs.send(payload(number, 100))
            pairs.append((number, mine, theirs))
        pairs[0][2].close()
        for number, mine, theirs in pairs[1:]:
            assert mine.recv() == payload(number, 100)
            mine.send(payload(number, 200))
            assert theirs.recv() == payload(number, 200)
        assert pairs[0][1].recv() == payload(0, 100)
        raises(errors.PeerClosed, pairs[0][1].recv)

    def test_many_connect_at_once(self, here: Local, there: Party, url: str, capabilities: Capabilities) -> None:
        self.needs(capabilities.listen, "listen")
        listener = here.open("listen", url, timeout=10).result(HANG)
        connecting = [there.open("connect", listener.url, timeout=20) for _ in range(6)]
        echoing: list[Future[int]] = []
        while len(echoing) < 6 or not all(future.done() for future in connecting):
            try:
                echoing.append(listener.accept(1).run(echo))
            except errors.Timeout:
                continue
        channels = [future.result(HANG) for future in connecting]
        for number, channel in enumerate(channels):
            channel.send(payload(number, 64))
        for number, channel in enumerate(channels):
            assert channel.recv() == payload(number, 64)
            channel.close()
        if capabilities.reliable:  # elsewhere one client may have been accepted twice
            assert [future.result(HANG) for future in echoing] == [1] * 6

    def test_listener_closes_before_it_accepts(
        self, here: Local, there: Party, url: str, capabilities: Capabilities
    ) -> None:
        """Who waits to be accepted hears that nobody will: in connect, or at the first use."""
        self.needs(capabilities.listen, "listen")
        listener = here.open("listen", url, timeout=10).result(HANG)
        connecting = there.open("connect", listener.url, timeout=1)
        time.sleep(0.1)
        listener.close()
        with contextlib.suppress(errors.NothingListening):
            channel = connecting.result(HANG)
            if capabilities.reliable:
                with pytest.raises(errors.PeerError):
                    channel.recv(capabilities.death_bound + SLACK)

    def test_client_killed_while_connecting(
        self, here: Local, spawned: Remote, process: Process, url: str, capabilities: Capabilities
    ) -> None:
        """It costs the others nothing."""
        self.needs(capabilities.listen, "listen")
        listener = here.open("listen", url, timeout=10).result(HANG)
        spawned.open("connect", listener.url, timeout=10)
        time.sleep(0.01)
        process.kill()
        connecting = here.open("connect", listener.url, timeout=20)
        good = listener.start("accept", 20)
        with contextlib.suppress(TimeoutError):
            connecting.result(0.5)
        for _ in range(5):
            channel = ipckit_end(here, good.result(HANG))
            if not connecting.done():
                good = listener.start("accept", 20)
                connecting.exception(HANG)
                continue
            theirs = connecting.result(HANG)
            theirs.send(b"good")
            try:
                assert channel.recv(5) == b"good"
                break
            except (errors.PeerError, errors.Timeout):
                good = listener.start("accept", 20)
        else:
            raise AssertionError("the good client was never accepted")

    # -- pairs -----------------------------------------------------------------------------------------------------

    def test_pair(self, here: Local, url: str, capabilities: Capabilities) -> None:
        address = url if not capabilities.listen else f"{self.scheme(url)}://"
        if not capabilities.pair:
            raises(errors.Unsupported, lambda: here.pair(url))
            return
        left, right = here.pair(address)
        left.send(b"over")
        assert right.recv() == b"over"
        right.send(b"and back")
        assert left.recv() == b"and back"
        right.close()
        raises(errors.PeerClosed, left.recv)

    def test_no_names(self, here: Local, url: str, capabilities: Capabilities) -> None:
        if not capabilities.listen:
            for verb in ("listen", "connect"):
                raises(errors.Unsupported, lambda verb=verb: here.open(verb, url, timeout=1).result(HANG))  # type: ignore[misc]

    # -- what is asked for, and what is told -----------------------------------------------------------------------

    def _opening(self, capabilities: Capabilities) -> str:
        return "listen" if capabilities.listen else "pair"

    def test_unknown_option(self, here: Local, url: str, capabilities: Capabilities) -> None:
        verb = self._opening(capabilities)
        error = raises(errors.BadOption, lambda: here.open(verb, with_options(url, limti=5)).result(HANG))
        assert "'limit'" in str(error)
        raises(errors.BadOption, lambda: here.open(verb, with_options(url, limit="many")).result(HANG))

    def test_require(self, here: Local, url: str, capabilities: Capabilities) -> None:
        """What it has may be required; what it has not is refused before anything is opened."""
        verb = self._opening(capabilities)
        has = {
            name for name in ("ordered", "reliable", "durable", "zero_copy", "fileno") if getattr(capabilities, name)
        }
        opened = here.shell.verb(here.shell.api, verb, (url,), {"require": has}).result(HANG)
        for endpoint in opened if isinstance(opened, tuple) else (opened,):
            here.shell.verb(endpoint, "close", (), {}).result(HANG)
        for name in {"durable", "zero_copy", "cross_machine", "priorities"} - has:
            if not getattr(capabilities, name):
                raises(
                    errors.Unsupported,
                    lambda name=name: here.open(verb, url, require={name}).result(HANG),  # type: ignore[misc]
                )
        raises(errors.BadOption, lambda: here.open(verb, url, require={"durabel"}).result(HANG))

    def test_peer(self, ends: Meeting, there: Party, capabilities: Capabilities, request: Any) -> None:
        """Who is at the other end, from the kernel; where it is not known, None, and never something wrong."""
        pid = there.process.pid if isinstance(there, Remote) else os.getpid()
        assert ends.here.handle.peer.pid in ({pid} if capabilities.peer_credentials else {pid, None})
        assert ends.here.handle.peer.uid in ({os.getuid()} if capabilities.peer_credentials else {os.getuid(), None})

    def test_fileno(self, near: Meeting, capabilities: Capabilities) -> None:
        """A selector on it wakes for a message."""
        if not capabilities.fileno:
            raises(errors.Unsupported, lambda: near.here.call("fileno"))
            return
        with selectors.DefaultSelector() as selector:
            selector.register(near.here.call("fileno"), selectors.EVENT_READ)
            for number in range(3):
                near.there.send(payload(number, 40))
                deadline = time.monotonic() + 10
                while True:
                    assert selector.select(max(deadline - time.monotonic(), 0)), "a message, and the selector sleeps"
                    with contextlib.suppress(errors.Timeout):
                        assert near.here.recv(0) == payload(number, 40)
                        break

    def test_native(self, near: Meeting, capabilities: Capabilities) -> None:
        assert hasattr(near.here.handle, "native")
        assert near.here.handle.capabilities == capabilities
        assert near.here.handle.native is near.here.handle.native

    def test_name_with_a_path_in_it(self, here: Local, url: str, capabilities: Capabilities, request: Any) -> None:
        """Whatever a transport takes for a name, it does not climb out of its directory."""
        self.needs(capabilities.listen, "listen")
        scheme = self.scheme(url)
        for address in (f"{scheme}://..", f"{scheme}://.%2e", f"{scheme}://a%2F..%2Fb", f"{scheme}://%00"):
            with pytest.raises(errors.IpcError):
                here.open("listen", address, timeout=1).result(HANG)
        assert eventually(lambda: True)


def ipckit_end(party: Local, channel: Any) -> Any:
    """An End for a channel that a raw call has returned; its party closes it."""
    assert isinstance(channel, ipckit.Channel | ipckit.aio.Channel)
    return party.adopt(channel).result(HANG)
