// NODE_PATH=... node grpc_server.js PROTO: a stock server of shop.Shop by @grpc/grpc-js. Prints its port, and serves until its input ends.
'use strict';

const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const { shop } = grpc.loadPackageDefinition(
  loader.loadSync(process.argv[2], { keepCase: true, longs: Number, defaults: true, oneofs: true }),
);
const server = new grpc.Server();
server.addService(shop.Shop.service, {
  Price: (call, done) => done(null, { result: call.request.item.length * (call.request._qty ? call.request.qty : 1) }),
  Order: (call, done) => done(null, { lines: [call.request], total: call.request.qty * 3 }),
  Count: (call) => {
    for (let number = 0; number < call.request.n; number++) call.write({ result: number });
    call.end();
  },
  Total: (call, done) => {
    let total = 0;
    call.on('data', (order) => (total += order.qty));
    call.on('end', () => done(null, { result: total }));
  },
  Scaled: (call) => {
    let by = 0;
    call.on('data', (message) => {
      if (message.by) by = message.by;
      if (message._numbers) call.write({ result: message.numbers * by });
    });
    call.on('end', () => call.end());
  },
  Fail: (call, done) => done({ code: grpc.status.NOT_FOUND, details: 'no such thing' }),
  Who: (call, done) => done(null, { result: { who: call.metadata.get('who')[0] } }),
  Hold: () => {},
});
server.bindAsync('127.0.0.1:0', grpc.ServerCredentials.createInsecure(), (error, port) => {
  if (error) throw error;
  console.log(port);
});
process.stdin.resume();
process.stdin.on('end', () => server.forceShutdown());
