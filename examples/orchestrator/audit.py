"""Reads the whole log, in order, as often as anybody asks. It has no group: it takes nothing from others, and holds nobody up."""

import ipckit
from planes import Event, configuration

planes, _ = configuration()
with ipckit.subscriber(planes.events, topics=[">"], type=Event) as log:
    for event in log:
        print(f"audit: {event.topic:14}{event.value.who.split()[0]:14}{event.value.about}")
        if event.topic == "run.ended":
            break
