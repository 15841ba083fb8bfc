"""`scheme://[user:password@]host[:port][,host2[:port2]]/path?option=value`, parsed once into a frozen `Url`.

Nothing here knows a transport. Secrets stay inside: `str()` and `repr()` show `***` for a password and for every option
whose name says that it holds one. `urllib.parse` is imported by who needs it: it is a sixth of what `import ipckit` would cost.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from .errors import BadUrl

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*\Z")
_SECRET = re.compile(r"password|passwd|secret|token|key\b|credential", re.IGNORECASE)
#: Names become file names and queue names: one component, nothing that a path could climb with.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}\Z")


@dataclass(frozen=True, slots=True)
class Host:
    name: str
    port: int | None = None

    def __str__(self) -> str:
        from urllib.parse import quote

        name = f"[{quote(self.name, safe=':')}]" if ":" in self.name else quote(self.name, safe="*")
        return name if self.port is None else f"{name}:{self.port}"


@dataclass(frozen=True, slots=True, repr=False)
class Url:
    """An address and its options.

    Attributes:
        scheme: in lower case.
        hosts: empty when there is none (`unix:///run/x`).
        path: percent-decoded, with its leading slash, or empty.
        options: (name, value) pairs in the order written.
    """

    scheme: str
    hosts: tuple[Host, ...] = ()
    path: str = ""
    options: tuple[tuple[str, str], ...] = ()
    user: str | None = None
    password: str | None = field(default=None, repr=False)

    @property
    def host(self) -> Host:
        """The first host. Raises BadUrl when there is none."""
        if not self.hosts:
            raise BadUrl("the URL has no host", url=self)
        return self.hosts[0]

    @property
    def name(self) -> str:
        """The name of a local endpoint (`shm://NAME`). Raises BadUrl unless it is one plain component."""
        name = self.hosts[0].name if self.hosts else ""
        if len(self.hosts) != 1 or self.hosts[0].port is not None or self.path or not _NAME.match(name):
            raise BadUrl(
                "the name must be one word of letters, digits, '_', '.', '-'",
                url=self,
                hint=f"for example {self.scheme}://frames",
            )
        return name

    def with_port(self, port: int) -> Url:
        return replace(self, hosts=(Host(self.host.name, port), *self.hosts[1:]))

    def _text(self, *, secrets: bool) -> str:
        from urllib.parse import quote, urlencode

        login = ""
        if self.user is not None or self.password is not None:
            login = quote(self.user or "", safe="")
            if self.password is not None:
                login += ":" + (quote(self.password, safe="") if secrets else "***")
            login += "@"
        query = urlencode(
            [(k, "***" if not secrets and _SECRET.search(k) else v) for k, v in self.options], safe="/:*,"
        )
        return f"{self.scheme}://{login}{','.join(map(str, self.hosts))}{quote(self.path, safe='/:@+,$~')}" + (
            f"?{query}" if query else ""
        )

    def __str__(self) -> str:
        return self._text(secrets=False)

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    def reveal(self) -> str:
        """The URL with its secrets, for the one who has to connect with it."""
        return self._text(secrets=True)


def parse(text: str | Url) -> Url:
    """Read a URL. Raises BadUrl, which never repeats the text of a URL that may hold a secret."""
    if isinstance(text, Url):
        return text
    from urllib.parse import parse_qsl, unquote

    if not isinstance(text, str):
        raise BadUrl(f"a URL is a str, not {type(text).__name__}")
    scheme, mark, rest = text.partition("://")
    if not mark:
        raise BadUrl("this is no URL: it has no '://'", hint="for example unix://name or tcp://127.0.0.1:5000")
    scheme = scheme.lower()
    if not _SCHEME.match(scheme):
        raise BadUrl("the scheme before '://' is malformed", hint="for example unix://name")
    hidden = f"{scheme}://..."
    _refuse_control(text, hidden)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadUrl("this is no Unicode text", url=hidden) from None
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    login, at, places = authority.rpartition("@")
    user, colon, password = login.partition(":")
    # An '@' further on: a password with a bare '/' or '?' in it may have been cut in two, and places be its first half.
    shown = f"{scheme}://{places}" if "@" not in path + query else hidden
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise BadUrl("the options after '?' must read name=value&name=value", url=shown) from None
    seen = set[str]()
    for key, _value in pairs:
        if key in seen:
            raise BadUrl(f"option {key!r} is given twice", url=shown)
        seen.add(key)
    hosts = tuple(_host(place, shown) for place in places.split(",")) if places else ()
    path = unquote(slash + path)
    for part in (path, *(host.name for host in hosts)):
        _refuse_control(part, shown)
    return Url(scheme, hosts, path, tuple(pairs), unquote(user) if at else None, unquote(password) if colon else None)


def _refuse_control(text: str, shown: str) -> None:
    """Names and paths go into system calls, files and protocols of lines."""
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in text):
        raise BadUrl("control characters are not allowed", url=shown)


def _host(text: str, shown: str) -> Host:
    from urllib.parse import unquote

    if text.startswith("["):
        name, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise BadUrl("an IPv6 address is written [::1] or [::1]:port", url=shown)
        port = rest[1:]
        colon = ":" if rest else ""
    else:
        name, colon, port = text.partition(":")
    if not name and colon:
        raise BadUrl("there is a port but no host", url=shown, hint="write 127.0.0.1, or 0.0.0.0 for every interface")
    if not colon:
        return Host(unquote(name))
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) < 65536):
        raise BadUrl("a port is a number from 0 to 65535", url=shown)
    return Host(unquote(name), int(port))
