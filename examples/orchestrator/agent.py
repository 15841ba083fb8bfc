"""Does what it is told on the control plane, with tools on the hot path."""

import os

import ipckit
from planes import Call, Control, Done, Event, configuration

planes, _ = configuration()
me = f"agent {os.getpid()}"
with (
    ipckit.connect(planes.control, type=Control, timeout=60) as orchestrator,
    ipckit.connect(planes.tools, type=Call, timeout=60) as tools,
    ipckit.publisher(planes.events, type=Event, on_full="drop_old", timeout=30) as events,
):
    for task in orchestrator:  # until it closes
        tools.send(Call("count", task.text), timeout=10)
        words = tools.recv(timeout=10).answer
        events.publish(Event(me, "count"), topic="tool.used")
        orchestrator.send(Done(task.number, f"{words} words"), timeout=10)
