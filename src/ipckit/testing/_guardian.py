"""The parent of one ephemeral server: as long as its standard input is open, the server may live.

`_server.py` runs this file as a process of its own, because nothing else is sound: the death signal of `prctl` fires
when the *thread* that started the server ends, and no `finally` runs after `kill -9`. A pipe does end, however its
writer died. The guardian makes the data directory too, and removes it, so that there is no instant at which a crash
leaves one.

It imports nothing of ipckit, and starts in isolated mode, so that it costs milliseconds. It speaks JSON lines:

    in     {"start": [argv...]}   {"signal": 15}       end of file: end the server, remove the directory, exit
    out    {"directory": path}    {"pid": 123}    {"exit": -15}    {"failed": "why it could not be started"}
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile

GRACE = 2.0  # seconds between TERM and KILL
PR_SET_PDEATHSIG = 1


def _die_with_guardian() -> None:
    # Sound here, as it is not in the program under test: the guardian has one thread, and it ends with the process.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _say(**event: object) -> None:
    with contextlib.suppress(BrokenPipeError):  # the reader is gone; the end of our input tells us next
        os.write(1, json.dumps(event).encode() + b"\n")


class Guardian:
    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.server: subprocess.Popen[bytes] | None = None

    def start(self, argv: list[str]) -> None:
        try:
            with open(os.path.join(self.directory, "server.log"), "ab") as log:
                self.server = subprocess.Popen(
                    argv,
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=_die_with_guardian,
                )
        except OSError as error:
            _say(failed=str(error))
        else:
            _say(pid=self.server.pid)

    def reap(self) -> None:
        if self.server is not None and self.server.poll() is not None:
            _say(exit=self.server.returncode)
            self.server = None

    def signal(self, number: int) -> None:
        if self.server is not None:
            self.server.send_signal(number)

    def end(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGCONT)
            self.server.terminate()
            try:
                self.server.wait(GRACE)
            except subprocess.TimeoutExpired:
                self.server.kill()
                self.server.wait()
        shutil.rmtree(self.directory, ignore_errors=True)


def main() -> None:
    bell, ring = os.pipe()
    os.set_blocking(ring, False)
    os.set_blocking(bell, False)
    signal.set_wakeup_fd(ring, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: None)
    guardian = Guardian(tempfile.mkdtemp(prefix="ipckit-server-"))  # 0700
    _say(directory=guardian.directory)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(bell, select.POLLIN)
    pending = b""
    try:
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if bell in ready:
                if signal.SIGTERM in os.read(bell, 64):
                    return
                guardian.reap()
            if 0 in ready:
                data = os.read(0, 65536)
                if not data:
                    return
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    command = json.loads(line)
                    if "start" in command:
                        guardian.start(command["start"])
                    else:
                        guardian.signal(command["signal"])
    finally:
        guardian.end()


if __name__ == "__main__":
    main()
