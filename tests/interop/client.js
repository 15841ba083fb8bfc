// node client.js PORT|PATH PLOT: one connection that ends as the plot says. Prints how the other side ended.
'use strict';

const net = require('node:net');
const { GOODBYE, frame, read, where } = require('./frames.js');

const [place, plot] = process.argv.slice(2);
const bodies = [0, 1, 3, 4, 5, 65531, 65532, 65536, 1 << 20, 0, 7].map((size, index) => Buffer.alloc(size, index + 1));
const socket = net.connect(where(place));
let echoed = 0;

function finish() {
  console.log(`${echoed} echoed`);
  if (plot === 'goodbye') socket.end(GOODBYE);
  if (plot === 'end') socket.end();
  if (plot === 'torn') socket.end(Buffer.from([0, 0, 0, 9, 1, 2]));
  if (plot === 'oversize') socket.write(Buffer.from([0xff, 0xff, 0xff, 0xfe]));
  if (plot === 'kill') process.kill(process.pid, 'SIGKILL');
}

read(
  socket,
  (body) => {
    if (!body.equals(bodies[echoed])) throw new Error(`echo ${echoed} is not what was sent`);
    if (++echoed === bodies.length) finish();
  },
  (how) => {
    console.log(how);
    socket.end();
  },
);
socket.on('connect', () => {
  socket.setNoDelay(true);
  for (const body of bodies) socket.write(frame(body));
});
