// Frames on a byte stream, written from docs/wire/stream.md: what a Node.js program needs to talk to ipckit.
'use strict';

const LIMIT = 16 << 20;
const GOODBYE = Buffer.alloc(4, 0xff);

function frame(body) {
  const header = Buffer.alloc(4);
  header.writeUInt32BE(body.length);
  return Buffer.concat([header, body]);
}

// Calls onFrame(body) for each frame, and onEnd('goodbye' | 'end' | 'torn') once.
function read(socket, onFrame, onEnd) {
  let buffer = Buffer.alloc(0);
  let over = false;
  const finish = (how) => {
    if (!over) onEnd(how);
    over = true;
  };
  socket.on('data', (chunk) => {
    buffer = Buffer.concat([buffer, chunk]);
    while (!over && buffer.length >= 4) {
      const length = buffer.readUInt32BE();
      if (length === 0xffffffff) return finish('goodbye');
      if (length > LIMIT) return socket.destroy(new Error(`a frame of ${length} bytes`));
      if (buffer.length < 4 + length) return;
      const body = buffer.subarray(4, 4 + length);
      buffer = buffer.subarray(4 + length);
      onFrame(body);
    }
  });
  socket.on('end', () => finish(buffer.length ? 'torn' : 'end'));
  socket.on('error', (error) => finish(error.code || error.message));
}

// net.connect and server.listen take a number as a port, and text as a path.
const where = (text) => (/^\d+$/.test(text) ? { host: '127.0.0.1', port: Number(text) } : { path: text });

module.exports = { GOODBYE, frame, read, where };
