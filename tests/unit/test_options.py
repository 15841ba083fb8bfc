from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipckit import _options as options
from ipckit import _registry, errors
from ipckit._url import parse


@dataclass(frozen=True, slots=True, kw_only=True)
class Example(options.LinkOptions):
    spin: float | None = options.option(None, options.spin, "how long to spin")
    mode: str = options.option("fast", options.choice("fast", "safe"), "which")
    count: int = options.option(3, options.integer(1, 9), "how many")
    fast: bool = options.option(False, options.flag, "hurry")
    group: str = options.option("", options.text, "which group")
    from_: str = options.option("", options.text, "a Python keyword in the URL")


def read(query: str) -> Example:
    return options.read(Example, parse(f"toy://x?{query}" if query else "toy://x"))


def test_defaults() -> None:
    assert read("") == Example()
    assert Example().limit == 16 << 20


def test_values() -> None:
    assert read("spin=20us&mode=safe&count=9&fast=yes&group=a%20b&from=here&limit=64KiB") == Example(
        spin=20e-6, mode="safe", count=9, fast=True, group="a b", from_="here", limit=65536
    )


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("limitt=5", "did you mean 'limit'?"),
        ("frm=x", "did you mean 'from'?"),
        ("zzzzzz=1", "toy takes: count, fast, from, group, limit, mode, spin"),
        ("mode=quick", "one of fast, safe"),
        ("count=10", "from 1 to 9"),
        ("count=x", "from 1 to 9"),
        ("count=", "from 1 to 9"),
        ("fast=maybe", "true, yes, on"),
        ("spin=20", "its unit"),
        ("limit=16MiBB", "a size"),
        ("limit=-1", "a size"),
        ("limit=99999999999GiB", "at most"),
        ("spin=10001d", "at most 10000d"),
        ("group=", "some text"),
    ],
)
def test_refused_with_what_would_do(query: str, says: str) -> None:
    with pytest.raises(errors.BadOption) as caught:
        read(query)
    assert says in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("0s", 0), ("20us", 20e-6), ("20µs", 20e-6), ("5ms", 5e-3), ("1.5s", 1.5), ("2 m", 120), ("1h", 3600)],
)
def test_durations(text: str, seconds: float) -> None:
    assert options.duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("1kB", 1000), ("1KiB", 1024), ("64 KiB", 65536), ("1.5MiB", 1572864), ("2G", 2 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert options.size(text) == size


def test_large_sizes_are_exact() -> None:
    assert options.size(str(2**63 - 1)) == 2**63 - 1


parsers = [
    options.duration,
    options.size,
    options.flag,
    options.integer(0, 99),
    options.choice("a"),
    options.spin,
    options.text,
]


@pytest.mark.parametrize("parser", parsers)
@given(text=st.text(max_size=20) | st.from_regex(r"[0-9]{1,400}(\.[0-9]+)?[A-Za-z]{0,3}", fullmatch=True))
def test_a_parser_answers_or_raises_value_error(parser: object, text: str) -> None:
    try:
        value = parser(text)  # type: ignore[operator]
    except ValueError:
        return
    if isinstance(value, float):
        assert math.isfinite(value)
        assert value >= 0


@pytest.mark.parametrize("scheme", _registry.schemes())
def test_every_option_has_a_help_and_takes_its_default(scheme: str) -> None:
    from dataclasses import fields

    transport = _registry.find(parse(f"{scheme}://x"))
    for field in fields(transport.options):
        assert field.metadata["help"], f"{scheme}: {field.name} has no help"
        assert callable(field.metadata["parse"])
    options.read(transport.options, parse(f"{scheme}://x"))
