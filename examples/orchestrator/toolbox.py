"""The tools, as near to the agents as can be: one Unix socket, one thread for each agent."""

from threading import Thread

import ipckit
from planes import Call, configuration

TOOLS = {"count": lambda text: str(len(text.split())), "shout": str.upper}


def serve(agent: ipckit.Channel[Call]) -> None:
    with agent:
        for call in agent:  # until it closes
            call.answer = TOOLS[call.tool](call.text)
            agent.send(call, timeout=10)


planes, _ = configuration()
with ipckit.listen(planes.tools, type=Call) as listener:
    while True:
        Thread(target=serve, args=[listener.accept()], daemon=True).start()
