"""Where an `OSError` becomes one of ours, for every transport that talks to the kernel itself.

except OSError as error:
raise map_oserror(error, url, "connect") from error
"""

from __future__ import annotations

import errno

from .. import errors

#: The connection broke: the peer, its machine, or the way to it is gone.
GONE = frozenset(
    {errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENETRESET}
    | {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ECONNREFUSED}
)

#: No resources now; later there may be.
SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

_LIMITS = {
    errno.EMFILE: "raise `ulimit -n`, or close what is not used",
    errno.ENFILE: "the system's table of files is full: fs.file-max",
    errno.EFBIG: "no file of this file system is as large",
    errno.ENOSPC: "the file system is full, or a quota is",
}


def map_oserror(error: OSError, url: object, operation: str) -> errors.IpcError:
    """What this means in our words. Raise it `from` the error."""
    code, text = error.errno or 0, error.strerror or str(error)
    if code in (errno.EACCES, errno.EPERM, errno.ELOOP):
        hint = "the mode or the owner forbids it" if code != errno.ELOOP else "a symbolic link stands in its place"
        return errors.AccessDenied(text, url=url, operation=operation, hint=hint)
    if code == errno.EADDRINUSE:
        return errors.AddressInUse("somebody listens there already", url=url, operation=operation)
    if code in (errno.ENAMETOOLONG, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL):
        return errors.BadUrl(text, url=url, operation=operation)
    if code in (errno.ENOENT, errno.ENOTDIR):
        return errors.BadUrl(text, url=url, operation=operation, hint="does the directory exist?")
    if code in SCARCE or code in _LIMITS:
        return errors.ResourceLimit(text, url=url, operation=operation, hint=_LIMITS.get(code))
    if code in GONE:
        return errors.PeerDied(text, url=url, operation=operation)
    return errors.IpcError(text, url=url, operation=operation)
