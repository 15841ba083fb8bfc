"""Which changes of a contract break its callers.

`check(old, new)` takes two descriptions (`Contract.describe()`) and asks: can a client that was written for `old` go on calling a
server that has `new`? What the client sends must be accepted by the new parameters, what the server returns by the old
result. The answer names the method and the field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties")
_UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties")
_SAME = ("pattern", "format", "multipleOf", "contentEncoding")


def check(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What breaks, one line each: `order.qty: ...`; empty when nothing does."""
    found: list[str] = []
    for name, before in old["methods"].items():
        after = new["methods"].get(name)
        if after is None:
            found.append(f"{name}: the method is gone")
        else:
            found += [f"{name}{path}: {why}" for path, why in _method(before, after, old, new)]
    return found


def _method(
    before: Mapping[str, Any], after: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    if before["shape"] != after["shape"]:
        yield "", f"was {before['shape']}, is {after['shape']}"
        return
    if before.get("message") is not None and before["message"] != after.get("message"):
        yield "", f"no longer takes the message {before['message']!r}"
    sent, taken = before["parameters"], after["parameters"]
    to_server, to_client = _Reader(new, old), _Reader(old, new)
    for ours, theirs in zip(sent, taken, strict=False):
        path = f".{ours['name']}"
        if ours["name"] != theirs["name"]:
            yield path, f"the parameter is now {theirs['name']!r}"
        elif theirs["required"] and not ours["required"]:
            yield path, "is now required"
        else:
            yield from to_server.differences(theirs["schema"], ours["schema"], path)
    for extra in sent[len(taken) :]:
        yield f".{extra['name']}", "the parameter is gone"
    for extra in taken[len(sent) :]:
        if extra["required"]:
            yield f".{extra['name']}", "a new parameter that is required"
    if "items" in before:
        yield from to_server.differences(after["items"], before["items"], " (items sent)")
    yield from to_client.differences(before["result"], after["result"], " (result)")


class _Reader:
    """Whether what is written by one schema can be read by another. Each has its own definitions."""

    def __init__(self, reader: Mapping[str, Any], writer: Mapping[str, Any]) -> None:
        self._reads, self._writes = reader.get("$defs", {}), writer.get("$defs", {})
        self._met: set[tuple[str, str]] = set()

    def differences(self, reads: Any, writes: Any, path: str) -> Iterator[tuple[str, str]]:
        """(path, why) of everything that is written and cannot be read."""
        both = reads.get("$ref", ""), writes.get("$ref", "")
        if both[0] or both[1]:
            if both in self._met:  # a type that contains itself: asked already
                return
            self._met.add(both)
            yield from self.differences(_resolve(reads, self._reads), _resolve(writes, self._writes), path)
            self._met.discard(both)
        elif reads and not writes:
            yield (
                path,
                f"was {_name(reads)}, is anything" if path.startswith(" ") else f"was anything, is {_name(reads)}",
            )
        elif "anyOf" in writes:
            for each in writes["anyOf"]:
                yield from self.differences(reads, each, path)
        elif "anyOf" in reads:
            tried = [list(self.differences(each, writes, path)) for each in reads["anyOf"]]
            if all(tried):
                yield min(tried, key=lambda each: -len(each[0][0]))[0]
        elif reads:
            yield from self._plain(reads, writes, path)

    def _plain(self, reads: Any, writes: Any, path: str) -> Iterator[tuple[str, str]]:
        if "enum" in reads or "const" in reads:
            allowed, sent = _values(reads), _values(writes)
            if sent is None or not all(each in (allowed or []) for each in sent):
                yield path, f"only {allowed} can be read, {sent or _name(writes)} is written"
            return
        kind, written = reads.get("type"), writes.get("type")
        if written is None and (values := _values(writes)) is not None:
            written = _type_of(values)
        if kind != written and not (kind == "number" and written == "integer"):
            yield path, f"{written} is written, {kind} is read"
            return
        for word in (*_LOWER, *_UPPER, *_SAME):
            limit, other = reads.get(word), writes.get(word)
            if limit is None or limit == other:
                continue
            looser = other is not None and ((word in _LOWER and other >= limit) or (word in _UPPER and other <= limit))
            if not looser:
                yield path, f"{word} {limit} where it was {other if other is not None else 'free'}"
        if writes.get("contentEncoding") is not None and reads.get("contentEncoding") is None:
            yield path, "bytes are written, text is read"
        elif writes.get("format") == "date-time" and reads.get("format") is None:
            yield path, "a time is written, text is read"
        if kind == "object":
            yield from self._object(reads, writes, path)
        elif kind == "array":
            yield from self._array(reads, writes, path)

    def _object(self, reads: Any, writes: Any, path: str) -> Iterator[tuple[str, str]]:
        mine, theirs = reads.get("properties", {}), writes.get("properties", {})
        for name in reads.get("required", ()):
            if name not in writes.get("required", ()):
                yield f"{path}.{name}", "is required, and not always written"
        for name in sorted(mine.keys() & theirs.keys()):
            yield from self.differences(mine[name], theirs[name], f"{path}.{name}")
        extra, others = reads.get("additionalProperties", True), sorted(theirs.keys() - mine.keys())
        if extra is False:
            for name in others:
                yield f"{path}.{name}", "is written, and not known"
        elif isinstance(extra, dict):
            for name in others:
                yield from self.differences(extra, theirs[name], f"{path}.{name}")
            if "properties" not in writes:  # any keys
                yield from self.differences(extra, _schema(writes.get("additionalProperties")), f"{path}[...]")

    def _array(self, reads: Any, writes: Any, path: str) -> Iterator[tuple[str, str]]:
        mine, theirs = reads.get("prefixItems", []), writes.get("prefixItems", [])
        for number, (ours, other) in enumerate(zip(mine, theirs, strict=False)):
            yield from self.differences(ours, other, f"{path}[{number}]")
        items = reads.get("items")
        if isinstance(items, dict):
            for number, other in enumerate(theirs[len(mine) :], len(mine)):
                yield from self.differences(items, other, f"{path}[{number}]")
            if "prefixItems" not in writes:  # any number
                yield from self.differences(items, _schema(writes.get("items")), f"{path}[]")


def _schema(found: Any) -> Mapping[str, Any]:
    """Of what is not described: anything."""
    return found if isinstance(found, dict) else {}


def _resolve(schema: Any, definitions: Mapping[str, Any]) -> Any:
    while "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    return schema


def _values(schema: Any) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    found: list[Any] | None = schema.get("enum")
    return found


def _type_of(values: list[Any]) -> str:
    return "string" if all(isinstance(value, str) for value in values) else "integer"


def _name(schema: Any) -> str:
    return str(schema.get("type") or ("one of several" if "anyOf" in schema else "restricted"))
