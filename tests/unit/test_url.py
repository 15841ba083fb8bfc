from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ipckit
from ipckit import errors
from ipckit._url import Host, Url, parse

SECRET = "hunter2-top-secret"

printable = st.text(
    st.characters(min_codepoint=0x20, exclude_characters="\x7f", exclude_categories=["Cs", "Cc"]), max_size=12
)
names = st.text(st.characters(min_codepoint=0x21, exclude_categories=["Cs", "Cc", "Zs"]), min_size=1, max_size=12)
hosts = st.builds(
    Host, names | st.sampled_from(["::1", "fe80::1%eth0", "127.0.0.1"]), st.none() | st.integers(0, 65535)
)
urls = st.builds(
    Url,
    scheme=st.from_regex(r"[a-z][a-z0-9+.-]{0,8}", fullmatch=True),
    hosts=st.lists(hosts, max_size=3).map(tuple),
    path=st.just("") | printable.map(lambda text: "/" + text),
    options=st.lists(st.tuples(names, printable), max_size=3, unique_by=lambda pair: pair[0]).map(tuple),
    user=st.none() | printable,
    password=st.none() | printable,
).filter(lambda url: url.user is not None or url.password is None)


@given(urls)
def test_round_trip(url: Url) -> None:
    assert parse(url.reveal()) == url
    assert parse(parse(url.reveal()).reveal()) == url


@given(st.text(max_size=60) | st.text(max_size=40).map("tcp://".__add__))
def test_anything_else_is_a_bad_url(text: str) -> None:
    """Whatever is written is read, or refused as BadUrl; and what was read can be shown and read again."""
    try:
        url = parse(text)
    except errors.BadUrl as error:
        str(error)
        return
    assert parse(url.reveal()) == url
    str(url), repr(url)


@given(urls.filter(lambda url: url.user is not None), st.sampled_from(["password", "token", "api_key", "secret"]))
def test_secrets_stay_inside(url: Url, option: str) -> None:
    url = Url(url.scheme, url.hosts, url.path, ((option, SECRET),), url.user, SECRET)
    for shown in (
        str(url),
        repr(url),
        f"{url}",
        str(errors.IpcError("x", url=url)),
        repr(errors.IpcError("x", url=url)),
    ):
        assert SECRET not in shown
    assert url.reveal().count(SECRET) == 2


@pytest.mark.parametrize(
    "text",
    [
        f"redis://user:{SECRET}@host:99999/0",
        f"redis://user:{SECRET}@:5",
        f"redis://user:{SECRET}@host?x",
        f"redis://user:{SECRET}@host?a=1&a=2",
        f"redis://user:{SECRET}@[::1",
        f"redis://user:{SECRET}@ho\x00st",
        f"redis://user:{SECRET}/more@host",
        f"redis://:{SECRET}/more@host",
        f"redis://:{SECRET}?more@host",
        f"redis://host?password={SECRET}&password={SECRET}",
        f"nosuch://user:{SECRET}@host",
        f"inproc://user:{SECRET}@name?limit=many",
        f"inproc://user:{SECRET}@name?limitt=5",
        f"inproc://name?token={SECRET}",
        f"{SECRET}",
        f"{SECRET} ://host",
    ],
)
def test_no_error_tells_a_secret(text: str) -> None:
    with pytest.raises(errors.IpcError) as caught:
        ipckit.connect(text, timeout=0)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert SECRET not in repr(caught.value.__cause__)
    assert isinstance(caught.value, ValueError)


def test_parts() -> None:
    url = parse("REDIS://me:p%40ss@one:1,two/0/jobs?Group=a+b&limit=1MiB")
    assert url == Url(
        "redis", (Host("one", 1), Host("two")), "/0/jobs", (("Group", "a b"), ("limit", "1MiB")), "me", "p@ss"
    )
    assert str(url) == "redis://me:***@one:1,two/0/jobs?Group=a+b&limit=1MiB"
    assert repr(url) == "Url('redis://me:***@one:1,two/0/jobs?Group=a+b&limit=1MiB')"


def test_ipv6() -> None:
    url = parse("tcp://[::1]:5000")
    assert url.host == Host("::1", 5000)
    assert str(url) == "tcp://[::1]:5000"
    assert parse("tcp://[fe80::1%25eth0]").host.name == "fe80::1%eth0"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("just words", "no '://'"),
        ("1tcp://x", "scheme"),
        ("://x", "scheme"),
        ("tcp://host:port", "0 to 65535"),
        ("tcp://host:65536", "0 to 65535"),
        ("tcp://host:²", "0 to 65535"),
        ("tcp://:80", "no host"),
        ("tcp://[::1]80", "IPv6"),
        ("tcp://h?limit", "name=value"),
        ("tcp://h\n", "control"),
        ("unix:///run/%00", "control"),
        ("tcp://h%0d%0a", "control"),
        ("tcp://\udc80", "Unicode"),
    ],
)
def test_refused(text: str, hint: str) -> None:
    with pytest.raises(errors.BadUrl, match=hint):
        parse(text)


def test_no_url_at_all() -> None:
    with pytest.raises(errors.BadUrl, match="not bytes"):
        parse(b"tcp://x")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["frames", "a.b-c_9", "A" * 100])
def test_good_names(name: str) -> None:
    assert parse(f"shm://{name}").name == name


@pytest.mark.parametrize(
    "rest", ["", "a:5", "a/b", "..", ".hidden", "-x", "a%2Fb", "a,b", "A" * 101, "a b", "ä", "a%0a"]
)
def test_bad_names(rest: str) -> None:
    """A name becomes a file name: nothing that a path could climb with."""
    with pytest.raises(errors.BadUrl):
        _ = parse(f"shm://{rest}").name


def test_no_host() -> None:
    with pytest.raises(errors.BadUrl, match="no host"):
        _ = parse("unix:///run/x").host


def test_with_port() -> None:
    assert str(parse("tcp://h:0,other?limit=1").with_port(7)) == "tcp://h:7,other?limit=1"


def test_is_a_value() -> None:
    url = parse("tcp://me:secret@h:1/p?x=y")
    assert pickle.loads(pickle.dumps(url)) == url == copy.deepcopy(url)
    assert len({url, parse(url), parse(url.reveal())}) == 1
    with pytest.raises(AttributeError):
        url.scheme = "udp"  # type: ignore[misc]
