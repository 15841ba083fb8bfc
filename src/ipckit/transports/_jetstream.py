"""JetStream over our NATS connection: requests to its API, and streams and consumers as the URL asks for them.

An endpoint has a `Jet`: one connection that comes back by itself, one inbox for all answers. nats-py's own JetStream
context is not used: its publish and fetch cost a future, a task and a queue a message, and its pull subscriptions
go dead without a word when the server restarts. What it would send, `_nats_queue` sends.

What exists already is never changed. `ensure_stream` and `ensure_consumer` create what is not there, adopt what is, and
raise `ConfigError` naming each thing that is not as the URL says; options that the URL leaves out are not compared.

    jet = yield from open_jet(url, options, "sender")
    yield from jet.steps(lambda: ensure_stream(jet, "jobs", options))
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from .. import _options, errors
from .._options import option
from .._spi import Steps, Wait
from .._url import Url, parse
from . import _natsclient
from ._natsclient import Connection, NatsOptions, map_nats

T = TypeVar("T")

_PATIENCE = 2.0  # seconds for one answer of the API, before it is asked again
_PAUSES = (0.05, 1.0)  # seconds between two attempts: doubled each time, and half of it by chance
_NAME = re.compile(r"/([A-Za-z0-9_-]{1,100})\Z")
_GROUP = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_NS = 10**9
#: Errors that pass: no leader yet, still recovering, too busy; a copy of the same id is on its way to the replicas.
PASSING = {10008, 10009, 10013, 10019, 10041, 10158, 10167, 10118}
_NO_STREAM, _NO_CONSUMER, _STREAM_IN_USE, _OVERLAP = 10059, 10014, 10058, 10065
_CONSUMER_EXISTS = (10105, 10148)


def _replay(text: str) -> str:
    if not (text in ("all", "new") or text.isdecimal()):
        try:
            start_time(text)
        except ValueError:
            raise ValueError("all, new, a sequence number, or a time such as 2026-01-31T12:00:00Z") from None
    return text


def start_time(text: str) -> str:
    """The time as the API takes it. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.astimezone()).isoformat()


def _count(text: str) -> int:
    return _options.integer(1, 1 << 62)(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class JetOptions(NatsOptions):
    maxlen: int | None = option(None, _count, "messages that the stream keeps")
    maxage: float | None = option(None, _options.lasting(0.1), "how long the stream keeps a message")
    maxbytes: int | None = option(None, _options.size, "bytes that the stream keeps")
    discard: str | None = option(
        None, _options.choice("old", "new"), "what a full stream drops: its oldest, or what comes"
    )
    retention: str | None = option(
        None,
        _options.choice("limits", "interest", "work"),
        "work: a message goes when the one group has acknowledged it",
    )
    storage: str | None = option(None, _options.choice("file", "memory"), "where the stream is kept")
    replicas: int | None = option(None, _options.integer(1, 5), "servers of the cluster that have the stream")
    dedup: float | None = option(None, _options.lasting(0.1), "how long the stream knows the ids of messages")
    replay: str | None = option(None, _replay, "where a new group or a subscriber begins: all, new, a sequence, a time")
    prefetch: int | None = option(None, _options.integer(0, 65536), "messages fetched before they are asked for")
    ack_wait: float | None = option(
        None, _options.lasting(0.01), "after which an unacknowledged message goes to somebody else"
    )
    fsync: str = option(
        "server", _options.choice("server", "always"), "always: refuse servers that do not sync each write"
    )
    monitor: str | None = option(
        None, _options.text, "host:port,...: where the servers' monitoring answers, for fsync=always"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueOptions(JetOptions):
    lanes: int = option(1, _options.integer(1, 10), "levels of priority")
    max_deliver: int | None = option(
        None, _options.integer(1, 1 << 20), "deliveries before a message goes to <name>-dead"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicOptions(JetOptions):
    durable: bool = option(True, _options.flag, "0: core NATS; fast, nothing is stored, and what is missed is counted")


def stream_name(url: Url) -> str:
    match = _NAME.match(url.path)
    if not url.hosts or match is None:
        raise errors.BadUrl(
            "the name of a stream is letters, digits, '_' and '-'",
            url=url,
            hint=f"for example {url.scheme}://127.0.0.1:4222/jobs",
        )
    return match[1]


def group_name(url: Url, group: str | None) -> str:
    if group is not None and not _GROUP.match(group):
        raise errors.BadOption(f"group={group!r} must be letters, digits, '_' and '-'", url=url)
    return "default" if group is None else group


class ApiError(Exception):
    """The API says no."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.code = int(answer.get("err_code", 0))
        self.status = int(answer.get("code", 0))
        super().__init__(str(answer.get("description", "no reason given")))


def pauses() -> Callable[[], float]:
    """A function that gives the next pause."""
    pause = _PAUSES[0]

    def following() -> float:
        nonlocal pause
        now, pause = pause, min(pause * 2, _PAUSES[1])
        return now * random.uniform(0.5, 1.0)

    return following


class Jet:
    """A connection that comes back, and its inbox. What is marked *loop* is called on the client's loop only."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.client = connection.client
        self.home = connection.home
        self.url = connection.url
        self.inbox = connection.client.new_inbox()
        self._answers: dict[str, asyncio.Future[Any]] = {}
        self._asked = 0
        self._tasks = set[asyncio.Task[None]]()

    async def start(self) -> None:
        await self.connection.tap(f"{self.inbox}.q.*", self._answered)
        await self.connection.round_trip()  # questions overtake what the client has not written yet

    @property
    def native(self) -> Any:
        return self.client.jetstream()

    @property
    def up(self) -> bool:
        return self.client.is_connected and not self.home.broken

    def check(self, operation: str) -> None:
        """Raise if this connection will not come back."""
        if self.connection.denied is not None or self.home.broken:
            self.connection.check(self.connection.cut, operation)
        if self.client.is_closed:
            raise self.connection.broken(operation)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Loop: run it beside everything else, until the endpoint is closed."""
        task = self.home.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.connection.error = error
            _natsclient.log.error("%s: %s: %s", self.url, type(error).__name__, error)

    def steps(self, function: Callable[[], Coroutine[Any, Any, T]], operation: str) -> Steps[T]:
        try:
            return (yield from self.home.steps(function))
        except ApiError as refused:
            raise refusal(refused, self.url, operation) from refused
        except errors.IpcError:
            raise
        except Exception as error:
            raise map_nats(error, self.url, operation) from error

    async def ask(self, subject: str, body: bytes, headers: bytes = b"") -> Any:
        """One question, one answer (a nats-py message). Raises TimeoutError; ConnectionError while there is no server."""
        self._asked += 1
        key = str(self._asked)
        answer: asyncio.Future[Any] = self.home.loop.create_future()
        self._answers[key] = answer
        try:
            if not self.connection.write(command(subject, f"{self.inbox}.q.{key}", body, headers)):
                raise ConnectionError("not connected")
            return await asyncio.wait_for(answer, _PATIENCE)
        finally:
            del self._answers[key]

    def _answered(self, message: Any) -> None:
        answer = self._answers.get(message.subject.rpartition(".")[2])
        if answer is not None and not answer.done():
            answer.set_result(message)

    async def api(self, verb: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask the API, again and again while nobody can answer. Raises ApiError."""
        return await self.insist(f"$JS.API.{verb}", b"" if body is None else json.dumps(body).encode())

    async def insist(self, subject: str, body: bytes, headers: bytes = b"") -> dict[str, Any]:
        pause = pauses()
        while True:
            try:
                message = await self.ask(subject, body, headers)
            except (TimeoutError, ConnectionError):
                self.check("open")
            else:
                if (message.headers or {}).get("Status") != "503":
                    answer: dict[str, Any] = json.loads(message.data)
                    if "error" not in answer:
                        return answer
                    if answer["error"].get("err_code") not in PASSING:
                        raise ApiError(
                            answer["error"]
                        )  # not kept here: it would keep this frame, and all that called it
                elif not self.client._server_info.get("jetstream"):
                    raise errors.Unsupported(
                        "this NATS server has no JetStream",
                        url=self.url,
                        hint="start it with -js, or ask for durable=0",
                    )
            await asyncio.sleep(pause())

    def close(self) -> None:
        def cancel() -> None:
            for task in tuple(self._tasks):
                task.cancel()

        with contextlib.suppress(RuntimeError):  # the caller's loop may be closed
            self.home.do(cancel)
        self.connection.leave()


def command(subject: str, reply: str, body: bytes, headers: bytes = b"") -> bytes:
    """PUB or HPUB. `headers` is the whole block, or nothing."""
    if headers:
        head = f"HPUB {subject} {reply} {len(headers)} {len(headers) + len(body)}\r\n"
        return b"".join((head.encode(), headers, body, b"\r\n"))
    return b"".join((f"PUB {subject} {reply} {len(body)}\r\n".encode(), body, b"\r\n"))


def open_jet(url: Url, options: NatsOptions, operation: str) -> Steps[Jet]:
    """Connect, trying again until the driver says that the time is up."""
    pause = pauses()
    nobody: errors.NothingListening | None = None
    try:
        while True:
            try:
                connection = yield from _natsclient.connect(url, options, operation, reconnect=True)
                break
            except errors.NothingListening as error:
                nobody = error
            yield Wait((), pause())
    except errors.Timeout as timeout:
        message = "no NATS server answers" if nobody is None else nobody.message
        raise errors.NothingListening(message, url=url, operation=operation) from nobody or timeout
    jet = Jet(connection)
    try:
        yield from jet.steps(jet.start, operation)
    except BaseException:
        jet.close()
        raise
    return jet


def opening(jet: Jet, begin: Callable[[], Coroutine[Any, Any, T]], operation: str) -> Steps[T]:
    """The rest of an opening; when it fails, the connection is closed."""
    try:
        return (yield from jet.steps(begin, operation))
    except BaseException:
        jet.close()
        raise


def refusal(error: ApiError, url: Url, operation: str) -> errors.IpcError:
    """What the API refuses, as ours. The only place where its codes become our errors."""
    text = str(error)
    if error.code in (10054, 10110):
        return errors.MessageTooLarge(text, url=url, operation=operation)
    if error.code == 10077 and "maximum" in text:
        return errors.QueueFull(text, url=url, operation=operation, hint="the stream is full, and discard=new")
    if error.code in (10023, 10028, 10047) or "insufficient" in text:
        return errors.ResourceLimit(text, url=url, operation=operation, hint="see the limits of the server's JetStream")
    if error.code in (10039, 10076):
        return errors.Unsupported(text, url=url, operation=operation, hint="start the server with -js")
    return errors.ConfigError(text, url=url, operation=operation)


# -- streams and consumers as asked for -------------------------------------------------------------------------------


def _stream_config(options: JetOptions) -> dict[str, Any]:
    """What the URL says; nothing where it says nothing."""
    retention = {"work": "workqueue"}.get(options.retention or "", options.retention)
    said = {
        "max_msgs": options.maxlen,
        "max_age": None if options.maxage is None else int(options.maxage * _NS),
        "max_bytes": options.maxbytes,
        "discard": options.discard,
        "retention": retention,
        "storage": options.storage,
        "num_replicas": options.replicas,
        "duplicate_window": None if options.dedup is None else int(options.dedup * _NS),
    }
    return {name: value for name, value in said.items() if value is not None}


async def ensure_stream(jet: Jet, name: str, options: JetOptions) -> dict[str, Any]:
    """The stream's `info`; it is created if it is not there. Raises ConfigError if it is another than asked for."""
    said = _stream_config(options)
    subjects = [name, f"{name}.>"]
    while True:
        try:
            info = await jet.api(f"STREAM.INFO.{name}")
            break
        except ApiError as error:
            if error.code != _NO_STREAM:
                raise
        config = {"name": name, "subjects": subjects, "storage": "file", "retention": "limits", "discard": "old"} | said
        if "max_age" in said and "duplicate_window" not in said:  # the window may not be longer
            config["duplicate_window"] = min(120 * _NS, said["max_age"])
        try:
            info = await jet.api(f"STREAM.CREATE.{name}", config)
            break
        except ApiError as error:
            if error.code == _OVERLAP:
                raise errors.ConfigError(f"another stream has the subjects {subjects}", url=jet.url) from error
            if error.code != _STREAM_IN_USE:  # somebody else was quicker: look at it
                raise
    differing = _differing(said, info["config"])
    if not set(subjects) <= set(info["config"].get("subjects") or ()):
        differing.append(f"its subjects are {info['config'].get('subjects')}, not {subjects}")
    if differing:
        raise errors.ConfigError(
            f"the stream {name!r} is there, and differs: {'; '.join(differing)}",
            url=jet.url,
            hint="it is not changed; leave these options out, or change the stream with the nats tool",
        )
    if options.fsync == "always":
        await _check_sync(jet, info, options)
    return info


def _differing(said: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    # The server leaves out what is empty.
    return [
        f"{name} is {found.get(name)!r}, not {value!r}"
        for name, value in said.items()
        if found.get(name) != value and not (not value and name not in found)
    ]


async def ensure_consumer(
    jet: Jet, stream: str, name: str, options: JetOptions, filters: list[str], replay: str
) -> dict[str, Any]:
    """The durable consumer's `info`; created if it is not there, and then it begins at `replay`."""
    said: dict[str, Any] = {"ack_policy": "explicit"}
    if options.ack_wait is not None:
        said["ack_wait"] = int(options.ack_wait * _NS)
    if len(filters) == 1:
        said["filter_subject"] = filters[0]
    elif filters:
        said["filter_subjects"] = filters
    while True:
        try:
            info = await jet.api(f"CONSUMER.INFO.{stream}.{name}")
            break
        except ApiError as error:
            if error.code != _NO_CONSUMER:
                raise
        # max_deliver stays open: a message that the server gives up is told to nobody. We count, and bury it.
        config = {"durable_name": name, "name": name, "max_ack_pending": -1} | said | beginning(replay)
        try:
            info = await jet.api(
                f"CONSUMER.CREATE.{stream}.{name}", {"stream_name": stream, "config": config, "action": "create"}
            )
            break
        except ApiError as error:
            if error.code not in _CONSUMER_EXISTS:
                raise
    found = dict(info["config"])
    found.setdefault("filter_subject", "")
    if not filters:
        said["filter_subject"] = ""
    differing = _differing(said, found)
    if "deliver_subject" in found:
        differing.append("it pushes")
    if differing:
        raise errors.ConfigError(
            f"the group {name!r} is there, and differs: {'; '.join(differing)}",
            url=jet.url,
            hint="it is not changed; take another group, or delete this one with the nats tool",
        )
    return info


def beginning(replay: str) -> dict[str, Any]:
    """Where a consumer begins, as the API takes it."""
    if replay in ("all", "new"):
        return {"deliver_policy": replay}
    if replay.isdecimal():
        return {"deliver_policy": "by_start_sequence", "opt_start_seq": max(int(replay), 1)}
    return {"deliver_policy": "by_start_time", "opt_start_time": start_time(replay)}


# -- fsync=always -------------------------------------------------------------------------------------------------


async def _check_sync(jet: Jet, info: Mapping[str, Any], options: JetOptions) -> None:
    """Raise Unsupported unless each server that has the stream syncs each write before it confirms it.

    Clients are not told; the servers' monitoring tells it (`/jsz?config=true`), where it is switched on.
    """
    hint = "nats-server: jetstream { sync_interval: always }, and its http port here as monitor=host:port[,host:port]"
    if info["config"]["storage"] != "file":
        raise errors.Unsupported("fsync=always, and this stream is kept in memory", url=jet.url)
    if options.monitor is None:
        raise errors.Unsupported("whether this server syncs cannot be known without monitor=", url=jet.url, hint=hint)
    cluster = info.get("cluster") or {}
    wanted = {peer["name"] for peer in cluster.get("replicas") or ()}
    wanted.add(cluster.get("leader") or jet.client._server_info.get("server_name"))
    for place in parse(f"http://{options.monitor}").hosts:
        try:
            told = await asyncio.wait_for(_get(place.name, place.port or 8222, "/jsz?config=true"), _PATIENCE)
            varz = await asyncio.wait_for(_get(place.name, place.port or 8222, "/varz"), _PATIENCE)
        except (TimeoutError, OSError, ValueError, asyncio.IncompleteReadError) as error:
            raise errors.Unsupported(f"no monitoring at {place}", url=jet.url, hint=hint) from error
        name = varz.get("server_name")
        if name in wanted and not (told.get("config") or {}).get("sync_always"):
            raise errors.Unsupported(f"the server {name} confirms before it syncs", url=jet.url, hint=hint)
        wanted.discard(name)
    if wanted:
        raise errors.Unsupported(f"monitor= names no server {', '.join(sorted(wanted))}", url=jet.url, hint=hint)


async def _get(host: str, port: int, path: str) -> dict[str, Any]:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
        answer = await reader.read(1 << 20)
        while more := await reader.read(1 << 20):
            answer += more
            if len(answer) > 4 << 20:
                raise ValueError("too long an answer")
    finally:
        writer.close()
    found = json.loads(answer.partition(b"\r\n\r\n")[2])
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found
