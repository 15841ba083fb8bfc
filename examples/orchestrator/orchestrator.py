"""Hands out tasks on the control plane, and says so on the event plane."""

from collections import deque
from threading import Event as Flag
from threading import Lock

import ipckit
from planes import Control, Event, Task, configuration


class Orchestrator(Control):
    """Called by all agents at once, each on a thread of its own."""

    def __init__(self, tasks: list[str], agents: int, events: ipckit.Publisher[Event]) -> None:
        self.all_home = Flag()
        self._waiting = deque(Task(number, text) for number, text in enumerate(tasks))
        self._at_work = agents
        self._lock = Lock()
        self._events = events

    def next(self, agent: str) -> Task | None:
        with self._lock:
            if not self._waiting:
                self._at_work -= 1
                if not self._at_work:
                    self.all_home.set()
                return None
            task = self._waiting.popleft()
        self._events.publish(Event("orchestrator", task.text), topic="task.assigned")
        return task

    def done(self, agent: str, number: int, result: str) -> None:
        self._events.publish(Event(agent, result), topic="task.done")
        print(f"task {number}: {result}", flush=True)


planes, run = configuration()
with (
    ipckit.publisher(planes.events, type=Event, on_full="drop_old", timeout=30) as events,
    ipckit.Server(planes.control, timeout=30) as server,
):
    orchestrator = Orchestrator(run["tasks"], run["agents"], events)
    server.expose("control", orchestrator)
    if not orchestrator.all_home.wait(timeout=90):
        raise SystemExit("an agent did not come back")
    server.shutdown(drain=10)  # the last of them still hears that nothing is left
    events.publish(Event("orchestrator", "all done"), topic="run.ended")
