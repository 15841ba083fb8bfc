"""What the NATS server says goes to the client's parser where it arrives.

nats-py puts it into an `asyncio.StreamReader` and wakes a task that parses it: one more turn of the loop, with its system call,
between a message and whoever waits for it. `shorten` makes the reader hand it to the parser at once, whenever its own way would
give the same: the client's task sleeps in `read`, and nothing lies there unread. The rest goes that way as ever: errors, which
the client answers with waits of its own, the end of the stream, and everything where a reader like this is not to be found.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ._bridge import Home, rest_of


def shorten(client: Any, home: Home) -> None:
    """After the client has connected, on its loop."""
    reader = getattr(getattr(client, "_transport", None), "_io_reader", None)
    parser = getattr(client, "_ps", None)
    if isinstance(reader, asyncio.StreamReader) and hasattr(reader, "_waiter") and hasattr(parser, "buf"):
        reader.feed_data = _Shortcut(client, reader, parser, home).feed  # type: ignore[method-assign,assignment]


class _Shortcut:
    def __init__(self, client: Any, reader: Any, parser: Any, home: Home) -> None:
        self._client, self._reader, self._parser = client, reader, parser
        self._long_way = reader.feed_data
        self._home = home
        self._held = bytearray()  # came while the parser waits for something
        self._rest: asyncio.Task[None] | None = None

    def feed(self, data: bytes) -> None:
        """As `StreamReader.feed_data`; called by the transport."""
        if self._rest is not None:
            self._held += data
        elif self._straight(data):
            self._parse(data)
            self._home.roused()  # the parser is done, and no task is active: the shortest way to those it was for
        else:
            self._long_way(data)

    def _straight(self, data: bytes) -> bool:
        asleep = self._reader._waiter is not None
        # An error may not hide behind what came before: neither in this data nor on both sides of its beginning.
        return bool(asleep and self._client.is_connected and b"-ERR" not in data and not self._in_a_line())

    def _in_a_line(self) -> bool:
        return bool(self._parser.buf) and self._parser.state == 1

    def _parse(self, data: bytes) -> None:
        parsing = self._parser.parse(data)
        try:
            waited = parsing.send(None)
        except StopIteration:
            return
        except Exception as error:
            self._reader.set_exception(error)  # the client's task finds it, and does what it does then
            return
        transport = self._reader._transport
        transport.pause_reading()

        async def rest() -> None:
            try:
                await rest_of(parsing, waited)
            except Exception as error:
                self._reader.set_exception(error)
            finally:
                self._rest = None
                transport.resume_reading()
                held, self._held = self._held, bytearray()
                if held:
                    self.feed(bytes(held))

        self._rest = asyncio.get_running_loop().create_task(rest())
