"""A contract as JSON: what `ipckit contract` prints, servers answer to `ipckit.describe`, and `compat` compares.

    {"service": "Shop", "methods": {"order": {"shape": "unary", "message": "Order", "result": <schema>,
                                              "parameters": [{"name": "order", "required": true, "schema": <schema>}]}},
     "$defs": {"Order": <schema>}}

Schemas are JSON Schema, without the words that are for people.
"""

from __future__ import annotations

import enum
import hashlib
import math
import operator
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from .contract import Contract, Parameter


class _Parameter(msgspec.Struct):
    name: str
    required: bool
    schema: dict[str, Any]


class _Method(msgspec.Struct):
    shape: str
    parameters: list[_Parameter]
    result: dict[str, Any]


class _Description(msgspec.Struct):
    methods: dict[str, _Method]
    definitions: dict[str, dict[str, Any]] = msgspec.field(name="$defs")


def read(found: Any) -> dict[str, Any]:
    """A description that came from elsewhere, as it is. Raises msgspec.ValidationError, a ValueError, for what is none."""
    msgspec.convert(found, _Description)
    description: dict[str, Any] = found
    return description


def fingerprint(description: dict[str, Any]) -> str:
    return hashlib.sha256(msgspec.json.encode(description, order="deterministic")).hexdigest()[:16]


def describe(contract: Contract) -> dict[str, Any]:
    order = sorted(contract.methods.values(), key=operator.attrgetter("name"))
    wanted = [kind for each in order for kind in (*(p.type for p in each.parameters), each.item, each.result)]
    schemas, components = msgspec.json.schema_components(wanted, ref_template="#/$defs/{name}")
    left = iter(schemas)
    methods: dict[str, Any] = {}
    for each in order:
        parameters = [
            {
                "name": parameter.name,
                "required": parameter.required,
                "schema": _plain(next(left)),
                **_default(parameter),
            }
            for parameter in each.parameters
        ]
        item, result = _plain(next(left)), _plain(next(left))
        methods[each.name] = {"shape": each.shape.value, "parameters": parameters, "result": result}
        if each.stream is not None:
            methods[each.name]["items"] = item
        if each.message is not None:
            methods[each.name]["message"] = each.message
        if each.options.idempotent:
            methods[each.name]["idempotent"] = True
    return {"service": contract.name, "methods": methods, "$defs": _plain(components)}


def _default(parameter: Parameter) -> dict[str, Any]:
    """The default, where JSON has it as it is: callers without the contract may have to fill a gap."""
    value = parameter.default
    finite = isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value))
    return {"default": value} if finite and not isinstance(value, enum.Enum) else {}


def _plain(schema: Any) -> Any:
    """Without the words that are for people: they may change and the contract is the same."""
    if isinstance(schema, dict):
        return {key: _plain(value) for key, value in schema.items() if key not in ("title", "description", "examples")}
    if isinstance(schema, list | tuple):
        return [_plain(value) for value in schema]
    return msgspec.to_builtins(schema)
