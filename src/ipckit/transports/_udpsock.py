"""Sockets of topics over UDP: a multicast group's, with its interface, and unicast ones.

A group's receiver binds the group's own address, so the kernel sorts out what is said to other groups on that port. It also
sorts by the kind of a datagram (by a classic BPF program of five instructions), which lets a second receiver of the same group
hear announcements and sleep through the messages.
"""

from __future__ import annotations

import ctypes
import errno
import hmac
import ipaddress
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from .. import errors
from .._url import Url
from ._inet import Address
from ._oserror import map_oserror

_SO_ATTACH_FILTER = 26
_UDP_HEADER = 8
#: No interface was named, and the system has no route for multicast; or the interface is none for it.
_NO_WAY = frozenset({errno.ENODEV, errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.EHOSTUNREACH})
_HINT = "name the interface: interface=eth0, or interface=127.0.0.1 to stay on this machine"


def is_group(url: Url) -> bool:
    """Whether this is the address of a multicast group: 224.0.0.0/4, or ff00::/8."""
    if not url.hosts:
        return False
    try:
        return ipaddress.ip_address(url.host.name.partition("%")[0]).is_multicast
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Group:
    """A multicast group, and the interface by which it is reached."""

    url: Url
    address: Address
    interface: str | None
    ttl: int
    loopback: bool

    @property
    def v6(self) -> bool:
        return self.address.family == socket.AF_INET6

    @property
    def place(self) -> Any:
        """The group as a socket takes it. An address of IPv6's narrow scopes goes with its interface."""
        where = self.address.sockaddr
        return (*where[:3], self._index()) if self.v6 else where

    def sender(self, buffer: int) -> socket.socket:
        """A socket on a port of its own. Raises BadOption where no interface leads to the group."""
        with self._opening("publisher", buffer) as sock:
            sock.bind(("::" if self.v6 else "0.0.0.0", 0))
            self._direct(sock)
            with plain(self.address.family, 0) as probe:  # connect() looks for a way, and sends nothing
                self._direct(probe)
                probe.connect(self.place)
        return sock

    @contextmanager
    def _opening(self, operation: str, buffer: int) -> Iterator[socket.socket]:
        sock = plain(self.address.family, buffer)
        try:
            yield sock
        except BaseException as error:
            sock.close()
            if not isinstance(error, OSError):
                raise
            raise self._mapped(error, operation) from error

    def _direct(self, sock: socket.socket) -> None:
        if self.v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, self.ttl)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_LOOP, int(self.loopback))
            if index := self._index():
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
            return
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, self.ttl)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, int(self.loopback))
        if self.interface is not None:
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, self._v4_request())

    def receiver(self, buffer: int) -> socket.socket:
        """A member of the group from now on."""
        with self._opening("subscriber", buffer) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # each of them gets every datagram
            sock.bind(self.place)
            if self.v6:
                request = socket.inet_pton(socket.AF_INET6, self._name()) + struct.pack("@I", self._index())
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, request)
            else:
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, self._v4_request())
        return sock

    def _name(self) -> str:
        return str(self.address.sockaddr[0]).partition("%")[0]

    def _v4_request(self) -> bytes:
        """`struct ip_mreqn`: the group, then the interface by its address or its index."""
        local, index = bytes(4), 0
        if self.interface is not None:
            try:
                local = ipaddress.IPv4Address(self.interface).packed
            except ValueError:
                index = self._index()
        return struct.pack("@4s4si", socket.inet_aton(self._name()), local, index)

    def _index(self) -> int:
        """The interface's number; 0: the system chooses."""
        if self.interface is None:
            return int(self.address.sockaddr[3]) if self.v6 else 0
        try:
            return socket.if_nametoindex(self.interface)
        except OSError as error:
            what = "an interface's name" if self.v6 else "an interface's name or its IPv4 address"
            raise errors.BadOption(f"interface={self.interface} must be {what}", url=self.url) from error

    def _mapped(self, error: OSError, operation: str) -> errors.IpcError:
        if error.errno in _NO_WAY:
            return errors.BadOption("no interface leads to this group", url=self.url, operation=operation, hint=_HINT)
        return map_oserror(error, self.url, operation)


def plain(family: int, buffer: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    with suppress(OSError):  # as much of it as net.core.rmem_max allows
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, min(buffer, 2**30))
    return sock


def hear_only(sock: socket.socket, at: int, kinds: bytes) -> None:
    """Have the kernel drop every datagram whose byte `at` is none of these. Where it cannot, whoever reads drops them."""
    load, equal, give = 0x30, 0x15, 0x06  # BPF_LD|BPF_B|BPF_ABS, BPF_JMP|BPF_JEQ|BPF_K, BPF_RET|BPF_K
    program = [(load, 0, 0, _UDP_HEADER + at)]
    program += [(equal, len(kinds) - i, 0, kind) for i, kind in enumerate(kinds)]
    program += [(give, 0, 0, 0), (give, 0, 0, 0xFFFFFFFF)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("@HBBI", *line) for line in program))
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", len(program), ctypes.addressof(code)))


# -- where a datagram was sent to, and is to come from --------------------------------------------------------------

_IP_PKTINFO = 8


def tell_addresses(sock: socket.socket) -> None:
    """From now on `recvmsg` tells which of our addresses was spoken to: the answer has to come from that one."""
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)


def spoken_to(ancillary: list[tuple[int, int, bytes]]) -> str | None:
    for level, kind, data in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            return socket.inet_ntoa(data[4:8])
        if level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO and not data.startswith(b"\xfe\x80"):
            return socket.inet_ntop(socket.AF_INET6, data[:16])  # a link-local one needs its scope: left to the kernel
    return None


def coming_from(here: str | None, family: int) -> list[tuple[int, int, bytes]]:
    """For `sendmsg`: from this address of ours; None: from whichever the kernel chooses."""
    if here is None:
        return []
    if family == socket.AF_INET6:
        info = struct.pack("16sI", socket.inet_pton(socket.AF_INET6, here), 0)
        return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, info)]
    return [(socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("I4s4s", 0, socket.inet_aton(here), bytes(4)))]


class Allowance:
    """So many at once, and so many a second after that. What strangers make us do is done out of one of these."""

    def __init__(self, burst: int, rate: float) -> None:
        self._burst, self._rate = burst, rate
        self._left, self._at = float(burst), 0.0

    def take(self, now: float) -> bool:
        self._left = min(self._burst, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Cookies:
    """Proof that who speaks gets what is sent to its address. Nothing is kept of those who only ask."""

    LIFE = 30.0  # seconds; one is good for one to two of these

    def __init__(self, size: int) -> None:
        self._secret, self._size = os.urandom(32), size

    def make(self, address: Any, about: bytes, at: int | None = None) -> bytes:
        period = int(time.monotonic() / self.LIFE) if at is None else at
        return hmac.digest(self._secret, repr((address[:2], about, period)).encode(), "sha256")[: self._size]

    def good(self, cookie: bytes, address: Any, about: bytes) -> bool:
        now = int(time.monotonic() / self.LIFE)
        return any(hmac.compare_digest(cookie, self.make(address, about, at)) for at in (now, now - 1))
