"""How the process at the other end of a Unix socket is doing, asked when the stream ended without a goodbye.

The kernel closes the descriptors of a killed process as if it had closed them itself, so an end of file alone does not tell
`close()` from `kill -9`. But it also remembers who connected (SO_PEERPIDFD: not a number that could be reused, but the
process itself), and how that process ended:

    not reaped   /proc/PID/stat    alive, or on its way out (PF_EXITING is set before any descriptor is closed) + status
    reaped       PIDFD_GET_INFO    the exit status, Linux 6.15 and later
    older        nothing           unknown
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
from dataclasses import dataclass
from typing import Literal

_SO_PEERPIDFD = 77  # Linux 6.5; for a process that is gone already, 6.16
_PF_EXITING = 0x4
_PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info)
_INFO_EXIT = 1 << 3
_INFO_SIZE, _INFO_EXIT_CODE = 64, 60  # offset of exit_code in struct pidfd_info


@dataclass(frozen=True, slots=True)
class Fate:
    state: Literal["alive", "exited", "killed", "unknown"]
    how: str  # words for the error

    @property
    def orderly(self) -> bool:
        """It closed the stream itself, or ended with status 0."""
        return self.state == "alive" or (self.state == "exited" and self.how == "")


_UNKNOWN = Fate("unknown", "it is gone; the kernel does not say how")


def fate_of(fd: int, pid: int | None) -> Fate:
    """What became of the peer of this connected Unix socket; `pid` as SO_PEERCRED gave it."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            (pidfd,) = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))
    except OSError:
        return _UNKNOWN
    try:
        # Reaped first: before that the number cannot be reused, so what /proc then says is about the right process.
        status = _reaped(pidfd)
        if status is None and pid is not None:
            alive, status = _look(pid)
            if alive:
                return Fate("alive", "")
            if status is None:
                status = _reaped(pidfd)
    finally:
        os.close(pidfd)
    return _UNKNOWN if status is None else _read(status)


def _reaped(pidfd: int) -> int | None:
    info = bytearray(_INFO_SIZE)
    struct.pack_into("=Q", info, 0, _INFO_EXIT)
    try:
        fcntl.ioctl(pidfd, _PIDFD_GET_INFO, info)
    except OSError:
        return None
    (mask,) = struct.unpack_from("=Q", info)
    return int(struct.unpack_from("=i", info, _INFO_EXIT_CODE)[0]) if mask & _INFO_EXIT else None


def _look(pid: int) -> tuple[bool, int | None]:
    """(alive, wait status if it is ending)."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return False, None
    if not int(fields[6]) & _PF_EXITING and fields[0] not in "ZX":
        return True, None
    # Who may not look at the process is shown 0 there, which would read as an orderly exit.
    readable = os.geteuid() == 0 or _owner(pid) == os.geteuid()
    return False, int(fields[49]) if readable and len(fields) > 49 else None


def _owner(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def _read(status: int) -> Fate:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return Fate("killed", f"it was killed by {name}")
    code = os.WEXITSTATUS(status)
    return Fate("exited", f"it exited with status {code}" if code else "")
