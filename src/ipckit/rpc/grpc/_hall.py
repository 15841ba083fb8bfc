"""Which handler a path leads to: ours, those of user-compiled servicers, server reflection, health.

The shells say how a method of ours is handled (`make`), and what answers to a path that nobody has (`refuse`). Tables are
replaced, never changed, so that services come and go while the server runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grpc
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc
from grpc_reflection.v1alpha._base import BaseReflectionServicer

from ... import errors
from .._exposed import Exposed
from .._site import BUILT_IN, Site
from ..contract import Contract, contract_of
from ..events import Failure
from ..protobuf import MethodSchema, Schema, schema_of
from ._info import SCHEMA, Info

_REFLECTION = "grpc.reflection.v1alpha.ServerReflection"

Make = Callable[[Exposed, MethodSchema], Any]
Refuse = Callable[[Failure], Any]


class Hall(grpc.GenericRpcHandler):  # type: ignore[misc, unused-ignore]
    """A server's generic handler."""

    def __init__(
        self, site: Site, make: Make, refuse: Refuse, reflection: type[BaseReflectionServicer], health: Any
    ) -> None:
        self._site, self._make, self._refuse = site, make, refuse
        self._schemas: dict[str, Schema] = {}
        self._paths: dict[str, Any] = {}
        self._foreign: dict[str, list[Any]] = {}
        self._reflection = reflection
        self._health = _handlers_of(health_pb2_grpc.add_HealthServicer_to_server, health)
        self._reflecting: list[Any] = []
        self.expose(BUILT_IN, Info(site, lambda: self._schemas, self.foreign))

    def service(self, details: Any) -> Any:
        """Grpc asks this once for each call."""
        path = details.method
        found = self._paths.get(path)
        if found is not None:
            return found
        for handlers in (*self._foreign.values(), self._reflecting, self._health):
            for handler in handlers:
                found = handler.service(details)
                if found is not None:
                    return found
        target, _, rest = path[1:].partition(".")
        schema = self._schemas.get(target)
        if schema is not None:
            # The target decides: the class that serves it may be called otherwise than the client's contract.
            found = self._paths.get(f"/{schema.service}/{rest.rpartition('/')[2]}")
            if found is not None:
                return found
            return self._refuse(Failure(0, "UNKNOWN_METHOD", f"{target!r} has no method {path!r}"))
        return None  # for handlers that somebody added to the server underneath

    # -- services come and go ------------------------------------------------------------------------------------------

    def expose(self, target: str, service: Any) -> None:
        """Of ours, or the servicer that protoc's plugin made the base class of. Raises ConfigError."""
        add = _adder_of(service)
        if add is not None:
            self._withdraw(target)
            self._foreign = {**self._foreign, target: _handlers_of(add, service)}
        else:
            contract = contract_of(service)
            schema = SCHEMA if target == BUILT_IN else schema_of(contract, target)
            self._withdraw(target)
            self._site.services.expose(target, service)
            self._schemas = {**self._schemas, target: schema}
            self._paths = {**self._paths, **dict(self._ours(target, contract, schema))}
        self._reflect()

    def _ours(self, target: str, contract: Contract, schema: Schema) -> Iterator[tuple[str, Any]]:
        for name in contract.methods:
            method = schema.methods[name]
            yield method.path, self._make(self._site.find(target, name), method)

    def hide(self, target: str) -> None:
        """Raises UnknownTarget."""
        if not self._withdraw(target):
            raise errors.UnknownTarget(f"nothing is exposed as {target!r}", url=self._site.url, operation="hide")
        self._reflect()

    def _withdraw(self, target: str) -> bool:
        if target in self._foreign:
            self._foreign = {name: each for name, each in self._foreign.items() if name != target}
            return True
        schema = self._schemas.get(target)
        if schema is None:
            return False
        gone = {method.path for method in schema.methods.values()}
        self._paths = {path: each for path, each in self._paths.items() if path not in gone}
        self._schemas = {name: each for name, each in self._schemas.items() if name != target}
        if target != BUILT_IN:
            self._site.services.hide(target)
        return True

    def names(self) -> list[str]:
        """The services, as protobuf calls them."""
        foreign = [handler.service_name() for handlers in self._foreign.values() for handler in handlers]
        return sorted({*(schema.service for schema in self._schemas.values()), *foreign})

    def foreign(self) -> list[str]:
        """The names under which user-compiled servicers are exposed."""
        return list(self._foreign)

    def _reflect(self) -> None:
        names = (*self.names(), "grpc.health.v1.Health", _REFLECTION)
        servicer = self._reflection(names, _Pools(tuple(schema.pool for schema in self._schemas.values())))
        (handler,) = _handlers_of(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, servicer)
        self._reflecting = [handler, _as_version_1(handler)]


class _Call(NamedTuple):
    """What a handler looks for."""

    method: str


def _as_version_1(handler: Any) -> Any:
    """Reflection under the name that newer tools ask for first. Its bytes are those of v1alpha; grpcio has no messages for it."""
    info = handler.service(_Call(f"/{_REFLECTION}/ServerReflectionInfo"))
    return grpc.method_handlers_generic_handler("grpc.reflection.v1.ServerReflection", {"ServerReflectionInfo": info})


class _Pools:
    """What reflection asks of a DescriptorPool, over several: each contract has its own, servicers the default one."""

    def __init__(self, pools: tuple[Any, ...]) -> None:
        self._pools = (*pools, descriptor_pool.Default())  # type: ignore[no-untyped-call, unused-ignore]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*args: Any) -> Any:
            for pool in self._pools:
                try:
                    return getattr(pool, name)(*args)
                except KeyError:
                    continue
            raise KeyError(args)

        return ask


class _Collector:
    """Stands in for a server, where `add_..._to_server` puts its handlers."""

    def __init__(self) -> None:
        self.handlers: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        self.handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        """The same ones once more."""


def _handlers_of(add: Callable[[Any, Any], None], servicer: Any) -> list[Any]:
    collector = _Collector()
    add(servicer, collector)
    return collector.handlers


def _adder_of(service: Any) -> Callable[[Any, Any], None] | None:
    """The function that protoc's plugin wrote beside a base class of this servicer."""
    for base in type(service).__mro__:
        module = sys.modules.get(base.__module__)
        found = getattr(module, f"add_{base.__name__}_to_server", None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    return None
