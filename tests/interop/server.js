// node server.js PORT|PATH: echoes, until a message says otherwise. Prints where it listens, and how each connection ended.
'use strict';

const net = require('node:net');
const { GOODBYE, frame, read, where } = require('./frames.js');

const server = net.createServer((socket) => {
  read(
    socket,
    (body) => {
      const plot = body.toString('latin1', 0, 10);
      if (plot === 'goodbye') return socket.end(GOODBYE);
      if (plot === 'end') return socket.end();
      if (plot === 'oversize') return socket.write(Buffer.from([0xff, 0xff, 0xff, 0xfe]));
      if (plot === 'kill') return process.kill(process.pid, 'SIGKILL');
      socket.write(frame(body));
    },
    (how) => {
      console.log(how);
      socket.end();
    },
  );
});
server.listen(where(process.argv[2]), () => {
  const address = server.address();
  console.log(typeof address === 'string' ? address : address.port);
});
