"""What a server exposes: services by target, and every method that a call may name, ready to be called.

The tables are replaced, never changed: a call that looks something up while another thread exposes needs no lock.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from .. import errors
from .contract import Contract, Method, Service, Wire, contract_of, rpc

#: A call that takes longer than this, in seconds, is not one for the thread that receives.
SHORT = 0.0005
#: So many short ones in a row, and the method is tried there again.
_REFORMED = 64
#: The target that every server has besides its own.
BUILT_IN = "ipckit"


class Exposed:
    """A method of an exposed service.

    Attributes:
        quick: it may run on the thread that receives.
        open: it is what the server says about itself to whoever connects: interceptors are not asked.
    """

    __slots__ = ("_short", "contract", "function", "method", "open", "quick", "target", "trusted", "wire")

    def __init__(self, target: str, contract: Contract, method: Method, function: Callable[..., Any]) -> None:
        self.target = target
        self.contract = contract
        self.method = method
        self.function = function
        self.wire: Wire = method.wire("msgpack", named=False)
        may = method.plain and not method.coroutine and not method.shape.streams_in and not method.shape.streams_out
        self.open = target == BUILT_IN and not method.shape.streams_out
        self.trusted = may and method.options.inline is not False
        self.quick = self.trusted
        self._short = 0

    def overstayed(self) -> None:
        """It held up the thread that receives."""
        if self.method.options.inline is None:
            self.quick, self._short = False, 0

    def took(self, seconds: float) -> None:
        """On a thread of its own."""
        self._short = self._short + 1 if seconds < SHORT else 0
        if self._short >= _REFORMED:
            self.quick, self._short = self.trusted, 0


class Services:
    """Targets and their methods. `find` and `table` take `target.method`, or `target.MessageType`."""

    def __init__(self) -> None:
        self.contracts: Mapping[str, Contract] = {}
        self.table: Mapping[bytes, Exposed] = {}
        self.pushed: frozenset[str] = frozenset()  # types of messages that are pushed
        self.expose(BUILT_IN, _BuiltIn(self))

    def expose(self, target: str, service: Any) -> None:
        """It replaces what had the name. Raises ConfigError for annotations that cannot be read, and for a class."""
        contract = servable(service)
        table = {}
        for name, method in (*contract.messages.items(), *contract.methods.items()):
            function = service if _is_function(service) else getattr(service, method.name)
            table[f"{target}.{name}".encode()] = Exposed(target, contract, method, function)
        self.table = {**self._without(target), **table}
        self.contracts = {**self.contracts, target: contract}

    def hide(self, target: str) -> None:
        """Raises UnknownTarget."""
        if target not in self.contracts or target == BUILT_IN:
            raise errors.UnknownTarget(f"nothing is exposed as {target!r}")
        self.table = self._without(target)
        self.contracts = {name: each for name, each in self.contracts.items() if name != target}

    def _without(self, target: str) -> dict[bytes, Exposed]:
        return {key: each for key, each in self.table.items() if each.target != target}

    def find(self, target: str, method: str) -> Exposed | None:
        found = self.table.get(f"{target}.{method}".encode())
        if found is None and method.startswith(f"{target}."):  # a message type that is qualified: calculator.AddRequest
            found = self.table.get(method.encode())
        return found

    def fingerprints(self) -> dict[str, str]:
        """The contracts of what is exposed, by target."""
        return {name: each.fingerprint for name, each in self.contracts.items() if name != BUILT_IN}

    def register(self, name: str) -> None:
        """Messages of this type are pushed."""
        self.pushed |= {name}

    def message_types(self) -> list[str]:
        """The message types that something answers to, methods that take no message, and the types that are pushed."""
        names = {
            method.message if method.message in contract.messages else method.name
            for target, contract in self.contracts.items()
            for method in contract.methods.values()
            if target != BUILT_IN or method.message in contract.messages
        }
        return sorted(self.pushed | names)

    def is_registered(self, name: str) -> bool:
        """Something answers to this message type or method, or it is pushed."""
        return name in self.pushed or any(contract.find(name) for contract in self.contracts.values())


def servable(service: Any) -> Contract:
    """The contract of what can be exposed. Raises ConfigError."""
    if isinstance(service, type):
        raise errors.ConfigError(f"{service.__name__} is a class", hint=f"expose an instance: {service.__name__}(...)")
    return contract_of(service)


def _is_function(service: Any) -> bool:
    return isinstance(service, types.FunctionType | types.MethodType)


class HealthCheck(msgspec.Struct):
    """The question whether a server is well: `ipckit` answers to it."""


class HealthStatus(msgspec.Struct):
    status: str = "ok"


class _BuiltIn(Service):
    """The target `ipckit`: what the server says about itself."""

    def __init__(self, services: Services) -> None:
        self._services = services

    @rpc(idempotent=True, inline=True)
    def describe(self, target: str) -> dict[str, Any]:
        """The contract of a target. Raises UnknownTarget."""
        found = self._services.contracts.get(target)
        if found is None:
            raise errors.UnknownTarget(f"nothing is exposed as {target!r}")
        return found.describe()

    @rpc(idempotent=True, inline=True)
    def health(self, check: HealthCheck) -> HealthStatus:
        """It listens, and answers."""
        return HealthStatus()

    @rpc(idempotent=True, inline=True)
    def targets(self) -> dict[str, str]:
        """What is exposed, with the fingerprints of the contracts."""
        return self._services.fingerprints()
