"""What receivers and subscribers have in common: parcels are taken from an intake, and become messages.

One that cannot be decoded costs no other. It is told by an error that has the message as it came (`error.undecoded`), so that
it can be settled; what was taken before it in the same batch is returned first, and the next call raises.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from . import errors
from ._spi import Intake, SpinningIntake, Steps, Want
from ._url import Url
from .message import Parcel

M = TypeVar("M")
#: Makes the message of a shell from a value and its parcel. Given with each call: kept here, it would keep its shell alive.
Wrap: TypeAlias = Callable[[Any, Parcel], M]


class Taking:
    """The receiving verbs as steps over an Intake."""

    __slots__ = ("_decode", "_intake", "_kept", "_look", "_url")

    def __init__(self, intake: Intake, url: Url, decode: Callable[[bytes], Any]) -> None:
        self._intake, self._url, self._decode = intake, url, decode
        self._look = intake.spin_get if isinstance(intake, SpinningIntake) else intake.try_get
        self._kept: Parcel | None = None  # the one that ended a batch

    def recv(self, wrap: Wrap[M]) -> Steps[M]:
        parcel = yield from self._next()
        self._hand_out(parcel)
        return self._message(parcel, wrap)

    def recv_many(self, limit: int, wrap: Wrap[M]) -> Steps[list[M]]:
        if limit < 1:
            raise errors.BadOption(f"limit must be 1 or more, not {limit}", url=self._url, operation="recv_many")
        messages = [(yield from self.recv(wrap))]
        while len(messages) < limit:
            try:
                parcel = self._intake.try_get()
            except errors.IpcError:
                break  # sticky: the next call raises it, after these were delivered
            if parcel is None:
                break
            try:
                messages.append(self._message(parcel, wrap))
            except Exception:  # a codec may raise anything
                self._kept = parcel
                break
            self._hand_out(parcel)
        return messages

    def _next(self) -> Steps[Parcel]:
        while True:
            parcel, self._kept = self._kept, None
            if parcel is not None or (parcel := self._look()) is not None:
                return parcel
            wait = self._intake.arm(Want.RECV)
            if (parcel := self._intake.try_get()) is not None:
                return parcel
            yield wait

    def _hand_out(self, parcel: Parcel) -> None:
        """It is the user's from now on."""

    def _message(self, parcel: Parcel, wrap: Wrap[M]) -> M:
        try:
            value = self._decode(parcel.body)
        except (errors.CodecError, errors.SchemaError) as error:
            if error.url is None:
                error.url, error.operation = str(self._url), "recv"
            error.undecoded = wrap(parcel.body, parcel)
            raise
        return wrap(value, parcel)
