"""A lock in a bucket of JetStream's key-value store: `nats://host/BUCKET/NAME`.

The bucket is the stream KV_BUCKET, as every NATS client knows it; the lock is the key NAME, subject $KV.BUCKET.NAME:

    {"id": ..., "who": ..., "lease": 10.0, "token": ...}      held; renewed by writing it anew
    no message, or a deletion (KV-Operation: DEL, or PURGE)   free

Each write names the revision that it replaces, and is refused if that is not the last any more: so of two who want it one gets
it, and only its holder prolongs it and gives it back. The token is the revision of the first write of a hold: a sequence number
of the stream, which never goes back (the values of later writes say it, for `owner()`).

Nobody compares clocks. A holder counts its lease from before it wrote; another may take the key over when it has seen the same
revision for a whole lease by its own clock. So who comes to the lock of a dead holder waits for at most one lease.
Who waits watches the key (an ephemeral consumer), and looks now and then for what a broken connection may have cost it. There is
no order among those who wait.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from .. import _options, errors
from .._leasing import Grant, Holder, LeaseTerms
from .._options import option
from .._spi import Steps
from .._url import Url
from ._jetstream import ApiError, Jet, open_jet, opening
from ._natsclient import NatsOptions, log

_PATH = re.compile(r"/([A-Za-z0-9_-]{1,100})/([A-Za-z0-9_=-](?:[A-Za-z0-9_=/.-]{0,198}[A-Za-z0-9_=/-])?)\Z")
_NS = 10**9
_WRONG_REVISION, _NO_MESSAGE, _NO_STREAM, _STREAM_IN_USE = (10071, 10164), 10037, 10059, 10058
_LOOK = 2.0  # seconds between two looks of one who waits, at most; half of it by chance
_LATE = 0.02  # seconds, by chance, that one who waits comes after the end of a lease: not all at once
_PATIENCE = 5.0  # seconds that one who will not wait gives a server that is away
_LEASES = (0.1, 86400.0)  # seconds; what another holder may say of itself
_IDLE = 30 * _NS  # after which the server forgets the watch of one who was killed
_HOLDER = "ipckit-lock"  # header of a deletion: who gave it back


@dataclass(frozen=True, slots=True, kw_only=True)
class NatsLeaseOptions(NatsOptions):
    storage: str | None = option(None, _options.choice("file", "memory"), "where a new bucket is kept")
    replicas: int | None = option(None, _options.integer(1, 5), "servers of the cluster that have a new bucket")


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the key says. `id` is None when it is free; then `by` is who gave it back, as far as it says."""

    revision: int = 0
    id: str | None = None
    by: str | None = None
    who: str = ""
    token: int = 0
    lease: float = 0.0
    seen: float = 0.0  # by our clock


class _Conflict(Exception):
    """Another revision is the last."""


def open_lease(url: Url, options: NatsLeaseOptions, terms: LeaseTerms) -> Steps[NatsLease]:
    found = _PATH.match(url.path)
    if not url.hosts or found is None:
        raise errors.BadUrl(
            "the path is /BUCKET/NAME",
            url=url,
            hint=f"for example {url.scheme}://127.0.0.1:4222/locks/orders",
        )
    jet = yield from open_jet(url, options, "lock")
    lease = NatsLease(jet, found[1], found[2], terms)
    yield from opening(jet, lambda: lease.ensure(options), "lock")
    return lease


class NatsLease:
    """`_leasing.Leasing`. What is `async` here runs on the client's loop."""

    def __init__(self, jet: Jet, bucket: str, name: str, terms: LeaseTerms) -> None:
        self._jet, self._terms = jet, terms
        self._bucket, self._stream, self._subject = bucket, f"KV_{bucket}", f"$KV.{bucket}.{name}"
        self._entry = _Entry()
        self._token = 0
        self._wanted = ""  # the id that wants it now
        self._perhaps = set[str]()  # ids that may have the lock, or get it
        self._writing: asyncio.Task[int] | None = None  # the write by which we want to get it
        self._undoing = set[asyncio.Task[None]]()
        self._asked: tuple[str, float, bool] = ("", 0.0, False)  # the first write of an attempt: id, since, inherited
        self._changed = asyncio.Event()
        self._watch = _Watch(jet, self._stream, self._subject, self._told)
        jet.connection.connected = self._changed.set
        jet.connection.last_words = self._undone

    @property
    def native(self) -> Any:
        """The JetStream context of nats-py."""
        return self._jet.native

    async def ensure(self, options: NatsLeaseOptions) -> None:
        """The bucket is there, and keeps a lock for as long as its lease."""
        while True:
            try:
                info = await self._jet.api(f"STREAM.INFO.{self._stream}")
                break
            except ApiError as error:
                if error.code != _NO_STREAM:
                    raise
            config = {
                "name": self._stream,
                "subjects": [f"$KV.{self._bucket}.>"],
                "max_msgs_per_subject": 1,
                "discard": "new",
                "allow_rollup_hdrs": True,
                "deny_delete": True,
                "allow_direct": True,
                "storage": options.storage or "file",
                "num_replicas": options.replicas or 1,
            }
            try:
                info = await self._jet.api(f"STREAM.CREATE.{self._stream}", config)
                break
            except ApiError as error:
                if error.code != _STREAM_IN_USE:  # somebody else was quicker: look at it
                    raise
        found = info["config"]
        wrong = [
            f"{name} is {found.get(key)!r}, not {said!r}"
            for name, key, said in (
                ("storage", "storage", options.storage),
                ("replicas", "num_replicas", options.replicas),
            )
            if said not in (None, found.get(key))
        ]
        if 0 < found.get("max_age", 0) < self._terms.lease * _NS:
            wrong.append(f"it forgets a key after {found['max_age'] / _NS:g} s, before the lease of a lock ends")
        if wrong:
            raise errors.ConfigError(
                f"the bucket {self._bucket!r} is there, and cannot be used like this: {'; '.join(wrong)}",
                url=self._jet.url,
                hint="it is not changed; leave these options out, or take another bucket",
            )

    # what is asked

    def take(self, id: str, wait: bool) -> Steps[Grant | None]:
        self._wanted = id
        try:
            return (yield from self._jet.steps(lambda: self._take(id) if wait else self._try_once(id), "lock"))
        except BaseException as error:
            self.withdraw(id)
            if isinstance(error, errors.Timeout) and not self._jet.up:
                raise errors.NothingListening("no NATS server answers", url=self._jet.url) from error
            raise

    async def _try_once(self, id: str) -> Grant | None:
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self._try_anew(id)
        except TimeoutError:
            raise errors.NothingListening("no NATS server answers", url=self._jet.url) from None

    async def _take(self, id: str) -> Grant | None:
        if (grant := await self._try_anew(id)) is not None:
            return grant
        try:
            while True:
                self._changed.clear()
                await self._watch.begin()
                if (grant := await self._try(id)) is not None:
                    return grant
                entry = self._entry
                lapses = entry.seen + entry.lease - self._terms.clock() + random.uniform(0.001, _LATE)
                try:
                    async with asyncio.timeout(max(min(lapses, _LOOK * random.uniform(0.5, 1.0)), 0)):
                        await self._changed.wait()
                except TimeoutError:
                    await self._look()
        finally:
            self._watch.end()

    async def _try_anew(self, id: str) -> Grant | None:
        if self._entry.id is not None:
            await self._look()
        return await self._try(id)

    async def _try(self, id: str) -> Grant | None:
        """Write where it is free, as far as we know; None: it is held."""
        while True:
            entry = self._entry
            if entry.id == id:  # a write of ours that nobody confirmed
                self._token = entry.token
                return Grant(entry.token, *self._asked[1:])
            if entry.id is not None and self._terms.clock() < entry.seen + entry.lease:
                return None
            if self._wanted != id:  # asyncio.wait_for of Python 3.11 may swallow a cancellation
                raise asyncio.CancelledError
            since = self._terms.clock()
            self._asked = (id, self._asked[1] if self._asked[0] == id else since, entry.id is not None)
            self._perhaps.add(id)
            self._writing = asyncio.ensure_future(self._write(self._value(id, 0), entry.revision))
            self._writing.add_done_callback(_seen)
            try:
                # Shielded: who is cancelled now must hear whether it got the lock, to give it back (`_undo`).
                revision = await asyncio.shield(self._writing)
            except _Conflict:
                await self._look()
                continue
            self._token = revision
            self._now(_Entry(revision, id, None, self._terms.who, revision, self._terms.lease, since))
            return Grant(revision, since, inherited=entry.id is not None)

    def renew(self, id: str) -> Steps[float | None]:
        return self._jet.steps(lambda: self._renew(id), "renew")

    async def _renew(self, id: str) -> float | None:
        while await self._ours(id):
            since = self._terms.clock()
            try:
                revision = await self._write(self._value(id, self._token), self._entry.revision)
            except _Conflict:  # with one of ours that nobody confirmed?
                await self._look()
                continue
            self._now(_Entry(revision, id, None, self._terms.who, self._token, self._terms.lease, since))
            return since
        return None

    def give_back(self, id: str) -> Steps[bool]:
        try:
            return (yield from self._jet.steps(lambda: self._give_back(id), "release"))
        except BaseException:
            self.withdraw(id)
            raise

    async def _give_back(self, id: str) -> bool:
        while await self._ours(id):
            try:
                revision = await self._write(b"", self._entry.revision, {"KV-Operation": "DEL", _HOLDER: id})
            except _Conflict:
                await self._look()
                continue
            self._now(_Entry(revision, by=id))
            self._perhaps.discard(id)
            return True
        self._perhaps.discard(id)
        return self._entry.by == id  # by a write that nobody confirmed

    async def _ours(self, id: str) -> bool:
        if self._entry.id != id:
            await self._look()
        return self._entry.id == id

    def withdraw(self, id: str) -> None:
        if self._wanted == id:
            self._wanted = ""

        def begin() -> None:
            if id in self._perhaps:
                task = self._jet.home.loop.create_task(self._undo(id))
                self._undoing.add(task)
                task.add_done_callback(self._undoing.discard)
                task.add_done_callback(_seen)

        with contextlib.suppress(RuntimeError):  # the caller's loop may be closed
            self._jet.home.do(begin)

    async def _undo(self, id: str) -> None:
        if self._writing is not None:
            await asyncio.wait([self._writing])
        await self._look()
        await self._give_back(id)

    async def _undone(self) -> None:
        if self._undoing:
            await asyncio.wait(self._undoing)

    def holder(self) -> Steps[Holder | None]:
        return self._jet.steps(self._holder, "owner")

    async def _holder(self) -> Holder | None:
        """What is left of the lease goes by the time of day of the server and of this machine: for looking at only."""
        written = await self._look()
        entry = self._entry
        if entry.id is None:
            return None
        return Holder(entry.who, entry.token, max(entry.lease - (time.time() - written), 0.0))

    # how it is asked

    def _value(self, id: str, token: int) -> bytes:
        said = {"id": id, "who": self._terms.who, "lease": self._terms.lease}
        return json.dumps(said | ({"token": token} if token else {})).encode()

    async def _write(self, body: bytes, revision: int, headers: Mapping[str, str] | None = None) -> int:
        """Its revision. Raises _Conflict: `revision` is not the last, perhaps because of this very write."""
        said = {"Nats-Expected-Last-Subject-Sequence": str(revision)} | dict(headers or {})
        block = "NATS/1.0\r\n" + "".join(f"{name}: {value}\r\n" for name, value in said.items()) + "\r\n"
        try:
            answer = await self._jet.insist(self._subject, body, block.encode())
        except ApiError as error:
            if error.code in _WRONG_REVISION:
                raise _Conflict from error
            raise
        return int(answer["seq"])

    async def _look(self) -> float:
        """Learn the last revision; when it was written, by the server's clock."""
        try:
            answer = await self._jet.api(f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": self._subject})
        except ApiError as error:
            if error.code != _NO_MESSAGE:
                raise
            self._entry = _Entry()
            return 0.0
        message = answer["message"]
        block = base64.b64decode(message.get("hdrs") or "").decode(errors="replace")
        if int(message["seq"]) < self._entry.revision:
            self._entry = _Entry()  # the bucket is another than it was
        headers = dict(line.split(": ", 1) for line in block.split("\r\n") if ": " in line)
        self._learn(int(message["seq"]), headers, base64.b64decode(message.get("data") or ""))
        return datetime.fromisoformat(message["time"][:26].rstrip("Z") + "+00:00").timestamp()

    def _told(self, message: Any) -> None:
        """By the watch: the same."""
        with contextlib.suppress(errors.ProtocolError, ValueError):  # `_look` will say it
            self._learn(message.metadata.sequence.stream, message.headers or {}, message.data)
        self._changed.set()

    def _learn(self, revision: int, headers: Mapping[str, str], body: bytes) -> None:
        if revision <= self._entry.revision:
            return  # `seen` counts from the first time
        if "KV-Operation" in headers or "Nats-Marker-Reason" in headers:
            self._now(_Entry(revision, by=headers.get(_HOLDER)))
            return
        try:
            said = json.loads(body)
            id, who, lease = str(said["id"]), str(said["who"]), float(said["lease"])
            token = int(said.get("token", revision))
            if not _LEASES[0] <= lease <= _LEASES[1]:
                raise ValueError("its lease is out of bounds")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise errors.ProtocolError("the key holds something that is no lock of ours", url=self._jet.url) from error
        self._now(_Entry(revision, id, None, who, token, lease, self._terms.clock()))

    def _now(self, entry: _Entry) -> None:
        """What is older than what we know already comes too late: an attempt may be undone while another is under way."""
        if entry.revision > self._entry.revision:
            self._entry = entry

    def close(self) -> None:
        self._jet.close()

    def abandon(self) -> None:
        self._jet.connection.abandon()


def _seen(task: asyncio.Task[Any]) -> None:
    """Its exception is somebody else's business, or nobody's."""
    if not task.cancelled():
        task.exception()


class _Watch:
    """An ephemeral consumer that tells the last revision of a key, and each that follows, while somebody waits."""

    def __init__(self, jet: Jet, stream: str, subject: str, told: Callable[[Any], None]) -> None:
        self._jet, self._stream, self._subject, self._told = jet, stream, subject, told
        self._inbox = ""
        self._name = ""
        self._reconnects = -1  # when it was begun

    async def begin(self) -> None:
        """Once for each connection: what came while there was none is told by the next consumer."""
        connection = self._jet.connection
        if self._name and self._reconnects == connection.reconnects:
            return
        self.end()
        self._reconnects = connection.reconnects
        try:
            if not self._inbox:
                inbox = self._jet.client.new_inbox()
                await connection.tap(inbox, self._told)
                self._inbox = inbox
                await connection.round_trip()  # what we ask next overtakes what the client has not written yet
        except (errors.IpcError, asyncio.CancelledError):
            raise
        except Exception as error:  # nats-py's, while there is no connection: we are called again when there is one
            self._jet.check("lock")
            log.debug("%s: no watch yet: %s", self._jet.url, error)
            return
        name = f"ipckit-{os.urandom(8).hex()}"
        config = {
            "name": name,
            "deliver_subject": self._inbox,
            "deliver_policy": "last_per_subject",
            "filter_subject": self._subject,
            "ack_policy": "none",
            "inactive_threshold": _IDLE,
            "mem_storage": True,
            "num_replicas": 1,
        }
        self._name = name
        await self._jet.api(
            f"CONSUMER.CREATE.{self._stream}.{name}",
            {"stream_name": self._stream, "config": config, "action": "create"},
        )

    def end(self) -> None:
        if self._name:
            self._jet.spawn(self._delete(self._name))
            self._name = ""

    async def _delete(self, name: str) -> None:
        with contextlib.suppress(TimeoutError, ConnectionError):  # it goes by itself then, with its inbox
            await self._jet.ask(f"$JS.API.CONSUMER.DELETE.{self._stream}.{name}", b"")
