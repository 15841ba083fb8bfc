"""Does what it is told on the control plane, with tools on the hot path."""

import os

import ipckit
from planes import Control, Event, Tools, configuration

planes, _ = configuration()
me = f"agent {os.getpid()}"
with (
    ipckit.client(planes.control, Control, timeout=60) as control,
    ipckit.client(planes.tools, Tools, timeout=60) as tools,
    ipckit.publisher(planes.events, type=Event, on_full="drop_old", timeout=30) as events,
):
    while (task := control.next(me)) is not None:
        words = tools.count(task.text)
        events.publish(Event(me, "count"), topic="tool.used")
        control.done(me, task.number, f"{words} words")
