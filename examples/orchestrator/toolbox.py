"""The tools, as near to the agents as can be: calls over one Unix socket."""

import ipckit
from planes import Tools, configuration


class Toolbox(Tools):
    def count(self, text: str) -> int:
        return len(text.split())

    def shout(self, text: str) -> str:
        return text.upper()


planes, _ = configuration()
with ipckit.Server(planes.tools) as server:
    server.expose("tools", Toolbox())
    server.wait()
