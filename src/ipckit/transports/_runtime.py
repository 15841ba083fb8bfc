"""Where names live: one directory per user, that nobody else can look into.

`$IPCKIT_RUNTIME_DIR`, else `$XDG_RUNTIME_DIR/ipckit`, else `/tmp/ipckit-<uid>`. In /tmp anybody may have been there
first, so the directory is looked at before it is used: a directory and not a link to one, ours, and closed to others.
`scheme://NAME` is a file in it; `scheme:///abs/path` is that path, and the caller answers for its directory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from pathlib import Path

from .. import errors
from .._url import Url
from ._oserror import map_oserror


def runtime_dir() -> Path:
    """The directory, made with mode 0700 if it is not there.

    Raises: AccessDenied when it is a link, somebody else's, or open to others; ConfigError when it cannot be made.
    """
    return _made(_choose())


def default_dir() -> Path:
    """The one that it is without `$IPCKIT_RUNTIME_DIR`: for records of what belongs to the user and to no directory."""
    return _made(_default())


def memory_dir() -> Path:
    """Where files live that processes map: the runtime directory, if it was chosen or is in memory; else one in /dev/shm.

    A mapped file on a disk works, but the kernel writes it back over and over. A directory that the user names is used as it is:
    containers that share it must meet there. Raises as `runtime_dir`.
    """
    if os.environ.get("IPCKIT_RUNTIME_DIR"):
        return runtime_dir()
    path = runtime_dir()
    if _in_memory(path):
        return path
    memory = Path("/dev/shm")
    return _made(memory / f"ipckit-{os.geteuid()}") if memory.is_dir() and _in_memory(memory) else path


def _in_memory(path: Path) -> bool:
    """On a tmpfs, as /proc/self/mountinfo tells by device number."""
    return _is_memory(os.stat(path).st_dev)


@functools.cache  # half a millisecond where there are many mounts
def _is_memory(device: int) -> bool:
    name = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            fields = line.split()
            if fields[2] == name:
                return fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
    return False


def _made(path: Path) -> Path:
    try:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            found = os.lstat(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise errors.ConfigError(
                f"the runtime directory {path} cannot be made: its parent does not exist",
                hint="make it, or set IPCKIT_RUNTIME_DIR",
            ) from error
        raise map_oserror(error, path, "runtime directory") from error
    if not stat.S_ISDIR(found.st_mode):
        problem, hint = "is no directory", "remove it, or set IPCKIT_RUNTIME_DIR"
        if stat.S_ISLNK(found.st_mode):
            problem, hint = "is a symbolic link", "set IPCKIT_RUNTIME_DIR to the directory itself"
    elif found.st_uid != os.geteuid():
        problem, hint = f"belongs to uid {found.st_uid}", "set IPCKIT_RUNTIME_DIR to a directory of your own"
    elif found.st_mode & 0o077:
        problem, hint = f"is open to others (mode {stat.S_IMODE(found.st_mode):04o})", f"chmod 700 {path}"
    else:
        return path
    raise errors.AccessDenied(f"the runtime directory {path} {problem}", hint=hint)


def path_for(url: Url, suffix: str) -> Path:
    """The file of a local endpoint: `scheme://name` in the runtime directory, with the suffix; or the path as given."""
    if url.hosts or not url.path:
        return runtime_dir() / (url.name + suffix)
    if "\0" in url.path or url.path.endswith("/"):
        raise errors.BadUrl("the path must name a file", url=url, hint=f"for example {url.scheme}:///run/app/name")
    return Path(url.path)


def _choose() -> Path:
    given = os.environ.get("IPCKIT_RUNTIME_DIR")
    if given:
        if not os.path.isabs(given):
            raise errors.ConfigError("IPCKIT_RUNTIME_DIR must be an absolute path")
        return Path(given)
    return _default()


def _default() -> Path:
    session = os.environ.get("XDG_RUNTIME_DIR", "")
    # After `su` or `sudo` the variable still names another user's session: what we made there would lock its owner out.
    if os.path.isabs(session):
        try:
            found = os.stat(session)
        except OSError:
            pass
        else:
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid():
                return Path(session) / "ipckit"
    return Path(f"/tmp/ipckit-{os.geteuid()}")
