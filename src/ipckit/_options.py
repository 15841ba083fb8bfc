"""What stands behind the `?`: read into a frozen dataclass per transport, refused loudly when it is not understood.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options:
        spin: float | None = option(None, spin, "seconds to spin before sleeping, or auto")
        limit: int = option(16 << 20, size, "largest message accepted")

Durations carry units (`20us`, `1.5s`), sizes too (`64KiB`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from ._url import Url
from .errors import BadOption, likeliest

T = TypeVar("T")
U = TypeVar("U")

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-zµ]*)\Z")
#: In nanoseconds, so that 20us is exactly 2e-05.
_TIME = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9}
_TIME |= {"m": 60 * 10**9, "min": 60 * 10**9, "h": 3600 * 10**9, "d": 86400 * 10**9}
_SIZE = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "k": 1 << 10, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

# What those who are given it can count: nanoseconds and bytes in 64 bits.
LONGEST = 10_000 * 86400
LARGEST = 2**63 - 1

#: Messages above this are refused unless `limit=` says otherwise; checked before anything is allocated.
DEFAULT_LIMIT = 16 << 20


def option(default: Any, parse: Callable[[str], object], help: str) -> Any:
    """A field of an options class: its default, how its text is read (ValueError: it cannot be), what it is for."""
    return field(default=default, metadata={"parse": parse, "help": help})


def duration(text: str) -> float:
    """Seconds, from `20us`, `1.5s`, `5m`; a bare `0` needs no unit."""
    match = _NUMBER.match(text)
    if match and (match[2] in _TIME or (float(match[1]) == 0 and not match[2])):
        seconds = float(match[1]) * _TIME.get(match[2], 0) / 10**9
        if seconds > LONGEST:
            raise ValueError("at most 10000d")
        return seconds
    raise ValueError("a duration with its unit, for example 20us, 5ms, 1.5s")


def lasting(least: float) -> Callable[[str], float]:
    """A duration that is not shorter than this."""

    def parse(text: str) -> float:
        seconds = duration(text)
        if seconds < least:
            raise ValueError(f"{least:g}s or more")
        return seconds

    return parse


def size(text: str) -> int:
    """Bytes, from `4096`, `64KiB`, `16MiB`."""
    match = _NUMBER.match(text)
    if match and match[2] in _SIZE and len(match[1]) <= 20:
        number = float(match[1]) if "." in match[1] else int(match[1])
        value = int(number * _SIZE[match[2]])
        if value > LARGEST:
            raise ValueError(f"at most {LARGEST}")
        return value
    raise ValueError("a size, for example 4096, 64KiB, 16MiB")


def flag(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise ValueError("1 or 0 (true, yes, on; false, no, off)") from None


def integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value

    return parse


def choice(*values: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in values:
            raise ValueError("one of " + ", ".join(values))
        return text

    return parse


def spin(text: str) -> float | None:
    """Seconds to spin before sleeping; None is `auto`: what the machine has cores for."""
    return None if text == "auto" else duration(text)


def text(value: str) -> str:
    if not value:
        raise ValueError("some text")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """What every Channel takes."""

    limit: int = option(DEFAULT_LIMIT, size, "largest message, in bytes; larger ones are refused")


def read_both(first: type[T], second: type[U], url: Url) -> tuple[T, U]:
    """Options of two kinds in one URL, such as those of a pattern and of its transport. Names are of one kind only."""
    mine = {f.name for f in fields(first)}  # type: ignore[arg-type]
    own = tuple(pair for pair in url.options if pair[0] in mine)
    rest = tuple(pair for pair in url.options if pair[0] not in mine)
    return read(first, replace(url, options=own)), read(second, replace(url, options=rest), mine)


def read(cls: type[T], url: Url, besides: Iterable[str] = ()) -> T:
    """Make `cls` from the options of the URL. Raises BadOption with a suggestion, or with what would be a good value.

    `besides`: names that the URL may have as well, and that somebody else has read.
    """
    known = {f.name.rstrip("_"): f for f in fields(cls)}  # type: ignore[arg-type]
    values: dict[str, object] = {}
    for name, written in url.options:
        if name not in known:
            names = sorted({*known, *besides})
            raise BadOption(
                f"there is no option {name!r}",
                url=url,
                hint=likeliest(name, names, f"{url.scheme} takes: {', '.join(names) or 'none'}"),
            )
        try:
            values[known[name].name] = known[name].metadata["parse"](written)
        except ValueError as error:
            raise BadOption(f"option {name!r} must be {error}", url=url) from None
    return cls(**values)
