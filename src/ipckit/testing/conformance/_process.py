"""A party in a spawned process, driven by commands over a pipe; one process serves many contracts, until it is killed.

    here   Remote -- (id, shell, operation, arguments) -->  there   main(): a `Local` party in each shell
                  <-- (id, result or exception) ----------

Endpoints stay there; a handle, which is a number, stands for each of them here.
"""

from __future__ import annotations

import faulthandler
import itertools
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from ._parties import HANG, WITNESSES, End, Local, Pending, ShellName, shell_of

T = TypeVar("T")
_spawn = multiprocessing.get_context("spawn")


class Handle(int):
    """An endpoint in the other process."""


class Process:
    """One spawned process."""

    def __init__(self) -> None:
        ours, theirs = _spawn.Pipe()
        self._diary = tempfile.NamedTemporaryFile("r", prefix="ipckit-")  # noqa: SIM115 - until close()
        self._process = _spawn.Process(target=main, args=(theirs, self._diary.name), daemon=True)
        self._process.start()
        theirs.close()
        WITNESSES.add(self.tell)
        self._pipe = ours
        self._ids = itertools.count()
        self._asked: dict[int, Future[Any]] = {}
        self._mutex = threading.Lock()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def ask(self, shell: ShellName, operation: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Pending()
        with self._mutex:
            number = next(self._ids)
            self._asked[number] = future
            self._pipe.send((number, shell, operation, args))
        return future

    def environ(self, **variables: str) -> None:
        self.ask("sync", "environ", variables).result(HANG)

    def tell(self) -> str:
        """Where its threads stand."""
        if self.alive:
            self.signal(signal.SIGUSR1)
            time.sleep(0.3)
        return f"== process {self.pid}, {'alive' if self.alive else 'dead'}\n{self._diary.read()}"

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """As `kill -9`; returns when the kernel has done it."""
        self._process.kill()
        while self._process.is_alive():  # not join(): that waits for its children as well, which have its descriptors
            time.sleep(0.001)

    def close(self) -> None:
        WITNESSES.discard(self.tell)
        self.kill()
        self._diary.close()
        self._listener.join(HANG)
        self._pipe.close()
        self._process.close()

    def _listen(self) -> None:
        with suppress(EOFError, ConnectionResetError):
            while True:
                number, result, error = self._pipe.recv()
                future = self._asked.pop(number)
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
        for future in tuple(self._asked.values()):
            future.set_exception(ConnectionResetError("the peer process has ended"))


class Remote:
    """The party in such a process, in one shell."""

    def __init__(self, process: Process, shell: ShellName) -> None:
        self.process = process
        self._shell = shell

    def _ask(self, operation: str, *args: Any) -> Future[Any]:
        return self.process.ask(self._shell, operation, *args)

    def _ask_end(self, operation: str, *args: Any) -> Future[End]:
        after: Future[End] = Pending()

        def done(first: Future[Any]) -> None:
            try:
                handle, url = first.result()
            except BaseException as error:
                after.set_exception(error)
            else:
                after.set_result(End(self, handle, url))

        self._ask(operation, *args).add_done_callback(done)
        return after

    def open(self, verb: str, url: str | End, **named: Any) -> Future[End]:
        return self._ask_end("open", verb, url.handle if isinstance(url, End) else url, named)

    def accept(self, listener: End, timeout: float) -> Future[End]:
        return self._ask_end("accept", listener.handle, timeout)

    def adopt(self, channel: Any) -> Future[End]:
        return self._ask_end("adopt", channel)

    def verb(self, end: End, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Future[Any]:
        return self._ask("verb", end.handle, name, args, named)

    def run(self, program: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> Future[T]:
        return self._ask("run", program, tuple(arg.handle if isinstance(arg, End) else arg for arg in args))

    def on_main_thread(self, function: Callable[..., T], *args: Any) -> Future[T]:
        """Call `function` on the main thread there, where signals arrive. Until it returns, nothing else is answered."""
        return self._ask("main", function, tuple(arg.handle if isinstance(arg, End) else arg for arg in args))

    def close(self) -> None:
        """Close what was opened there. The process lives on, for the next."""
        if self.process.alive:
            self._ask("close").result(HANG)


class Pool:
    """Processes kept warm: taken, given back, replaced when they were killed."""

    def __init__(self) -> None:
        self._idle: list[Process] = []

    def take(self) -> Process:
        while self._idle:
            process = self._idle.pop()
            if process.alive:
                return process
            process.close()
        return Process()

    def give_back(self, process: Process) -> None:
        if process.alive:
            self._idle.append(process)
        else:
            process.close()
            self._idle.append(Process())  # the next one boots while the next contract is under way

    def close(self) -> None:
        for process in self._idle:
            process.close()


# -- what runs there -----------------------------------------------------------------------------------------------------


def main(pipe: Connection, diary: str) -> None:
    faulthandler.register(signal.SIGUSR1, open(diary, "a"))  # noqa: SIM115 - for as long as the process lives
    signal.signal(signal.SIGINT, signal.default_int_handler)
    parties: dict[ShellName, Local] = {}
    numbers = itertools.count(1)
    endpoints: dict[int, End] = {}
    mutex = threading.Lock()

    def register(end: End) -> tuple[Handle, str]:
        handle = Handle(next(numbers))
        endpoints[handle] = end
        return handle, end.url

    def resolve(args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(endpoints[arg] if isinstance(arg, Handle) else arg for arg in args)

    def reply(number: int, result: Any, error: BaseException | None) -> None:
        with mutex, suppress(BrokenPipeError):
            try:
                pipe.send((number, result, error))
            except Exception as unsendable:  # whatever pickling raises: the other side waits for an answer
                pipe.send((number, None, RuntimeError(f"{result!r}, {error!r} cannot be sent: {unsendable!r}")))

    def answer(number: int, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None:
            reply(number, None, error)
        else:
            result = future.result()
            reply(number, register(result) if isinstance(result, End) else result, None)

    def start(party: Local, operation: str, args: tuple[Any, ...]) -> Future[Any]:
        match operation, args:
            case "open", (verb, url, named):
                return party.open(verb, *resolve((url,)), **named)
            case "accept", (handle, timeout):
                return party.accept(endpoints[handle], timeout)
            case "adopt", (channel,):
                return party.adopt(channel)
            case "verb", (handle, name, values, named):
                return party.verb(endpoints[handle], name, values, named)
            case "run", (program, values):
                return party.run(program, *resolve(values))
        raise ValueError(f"no operation {operation!r}")

    while True:
        try:
            number, shell, operation, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            if operation == "environ":
                os.environ.update(args[0])
                reply(number, None, None)
            elif operation == "main":
                function, values = args
                reply(number, function(*(v.handle if isinstance(v, End) else v for v in resolve(values))), None)
            elif operation == "close":
                while parties:
                    parties.popitem()[1].close()
                endpoints.clear()
                reply(number, None, None)
            else:
                if shell not in parties:
                    parties[shell] = Local(shell_of(shell))
                start(parties[shell], operation, args).add_done_callback(
                    lambda future, number=number: answer(number, future)  # type: ignore[misc]
                )
        except BaseException as error:
            reply(number, None, error)
