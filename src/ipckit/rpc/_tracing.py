"""W3C trace context through every hop: a call carries on the trace of who makes it, and its handler runs inside it.

With OpenTelemetry the trace is the current span's, and a handler finds its caller's as the parent of what it starts. Without it,
a call that a handler makes is sent the `traceparent` that the handler was called with. OpenTelemetry is never imported from
here: in a program that has not imported it there is no span.
"""

from __future__ import annotations

import contextvars
import sys
from collections.abc import Mapping

from .context import CallContext, _current

_OPEN_TELEMETRY = "opentelemetry.trace"
_HOPS = ("traceparent", "tracestate")


def traced() -> bool:
    """Whether a call that is made now belongs to a trace."""
    if _current.get() is not None:
        return True
    trace = sys.modules.get(_OPEN_TELEMETRY)
    return trace is not None and trace.get_current_span().get_span_context().is_valid


def outgoing() -> dict[str, str]:
    """The headers of the trace that a call which is made now belongs to."""
    carrier: dict[str, str] = {}
    if _OPEN_TELEMETRY in sys.modules:
        from opentelemetry.propagate import inject

        inject(carrier)
    call = _current.get()
    if not carrier and call is not None:
        carrier = {name: call.metadata[name] for name in _HOPS if name in call.metadata}
    return carrier


def surroundings(call: CallContext) -> contextvars.Context:
    """Where the handler of this call runs: `current()` is the call, the current span its caller's."""
    made = contextvars.copy_context()
    made.run(enter, call)
    return made


def enter(call: CallContext) -> None:
    """The same for the context that this runs in, which is to be the call's own."""
    _current.set(call)
    if _OPEN_TELEMETRY in sys.modules and "traceparent" in call.metadata:
        _attach(call.metadata)


def _attach(metadata: Mapping[str, str]) -> None:
    from opentelemetry import context
    from opentelemetry.propagate import extract

    context.attach(extract(metadata))
