"""Hands out tasks on the control plane, and says so on the event plane."""

import ipckit
from planes import Control, Event, Task, ask, configuration

planes, run = configuration()
with (
    ipckit.publisher(planes.events, type=Event, on_full="drop_old", timeout=30) as events,
    ipckit.listen(planes.control, type=Control, timeout=30) as listener,
):
    agents = [listener.accept(timeout=60) for _ in range(run["agents"])]
    for number, text in enumerate(run["tasks"]):
        events.publish(Event("orchestrator", text), topic="task.assigned")
        done = ask(agents[number % len(agents)], Task(number, text))
        events.publish(Event("orchestrator", done.result), topic="task.done")
        print(f"task {done.number}: {done.result}", flush=True)
    for agent in agents:
        agent.close()  # their loops end
    events.publish(Event("orchestrator", "all done"), topic="run.ended")
