"""Reads the whole log, in order, as often as anybody asks. It has no group: it takes nothing from others, and holds nobody up."""

import ipckit
from planes import Event, configuration

ENOUGH = 2.0  # seconds without another event: that was all

planes, _ = configuration()
with ipckit.subscriber(planes.events, topics=[">"], type=Event) as log:
    try:
        while True:
            event = log.recv(timeout=ENOUGH)
            print(f"audit: {event.topic:14}{event.value.who.split()[0]:14}{event.value.about}")
    except ipckit.errors.Timeout:
        pass
