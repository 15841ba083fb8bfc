"""What a client gives in place of a contract: an object of its class, or a function of its signature, that calls the server."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, Generic, ParamSpec, TypeVar, cast

from ._request import CallOptions
from .contract import Contract, Service

S = TypeVar("S")
P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class Remote(Service, Generic[P, R]):
    """A function of a server. Calling it is calling that; `close`, or the end of a `with` block, closes the connection."""

    def __init__(self, function: Callable[P, R], call: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self._call = call

    def __call__(self, *args: P.args, **named: P.kwargs) -> R:
        return cast("R", self._call(*args, **named))

    def close(self) -> Any:
        return _close(self)


def make_proxy(client: Any, contract: type[S], target: str, known: Contract, options: CallOptions) -> S:
    """Typed as `contract`, which is a class (or a function); the methods are the client's."""
    callers = {name: client._caller(target, method, options) for name, method in known.methods.items()}
    if isinstance(contract, types.FunctionType):
        proxy: Any = Remote(contract, callers[contract.__name__])
    else:
        proxy = object.__new__(_class_like(contract))  # without its constructor, which is the server's
        proxy.__dict__.update(callers)
    proxy.__dict__["_ipckit"] = (client, contract, target, known, options)
    return cast("S", proxy)


def _class_like(contract: type) -> type:
    bases = (contract,) if issubclass(contract, Service) else (contract, Service)
    kind: Any = type(contract.__name__, bases, {"__module__": contract.__module__, "close": _close})
    kind.__abstractmethods__ = frozenset()  # what is abstract there is answered by the server
    return cast("type", kind)


def _close(self: Any) -> Any:
    return self._ipckit[0].close()


def using(service: S, *, timeout: float | None = None, metadata: Mapping[str, str] | None = None) -> S:
    """The same client's object, whose calls have this deadline (seconds) and this metadata besides what they had."""
    try:
        made, contract, target, known, options = cast("Any", service)._ipckit
    except AttributeError:
        raise TypeError("using() takes what client(url, Contract) returned") from None
    proxy: S = make_proxy(made, contract, target, known, options.with_(timeout, metadata))
    return proxy
