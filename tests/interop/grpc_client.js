// NODE_PATH=... node grpc_client.js PORT PROTO: @grpc/grpc-js calls every shape. Prints one JSON object of what came of it.
'use strict';

const grpc = require('@grpc/grpc-js');
const loader = require('@grpc/proto-loader');

const [port, proto] = process.argv.slice(2);
const { shop } = grpc.loadPackageDefinition(loader.loadSync(proto, { keepCase: true, longs: Number, defaults: true }));
const client = new shop.Shop(`127.0.0.1:${port}`, grpc.credentials.createInsecure());
const found = {};

const unary = (method, request, ...options) =>
  new Promise((resolve, reject) => {
    client[method](request, ...options, (error, reply) => (error ? reject(error) : resolve(reply)));
  });

const failing = (promise) => promise.then(() => null, (error) => error);

const items = (call) =>
  new Promise((resolve, reject) => {
    const got = [];
    call.on('data', (item) => got.push(item));
    call.on('error', reject);
    call.on('end', () => resolve(got));
  });

async function main() {
  found.price = (await unary('Price', { item: 'tea' })).result;
  found.priced = (await unary('Price', { item: 'tea', qty: 5 })).result;
  found.receipt = await unary('Order', { item: 'tea', qty: 2 });
  found.count = (await items(client.Count({ n: 4 }))).map((item) => item.result);

  found.total = await new Promise((resolve, reject) => {
    const call = client.Total((error, reply) => (error ? reject(error) : resolve(reply.result)));
    call.write({ item: 'a', qty: 2 });
    call.write({ item: 'b', qty: 3 });
    call.end();
  });

  const scaled = client.Scaled();
  const products = items(scaled);
  scaled.write({ by: 3, numbers: 1 });
  scaled.write({ numbers: 2 });
  scaled.end();
  found.scaled = (await products).map((item) => item.result);

  const metadata = new grpc.Metadata();
  metadata.set('who', 'node');
  found.who = (await unary('Who', {}, metadata)).result.who;

  const error = await failing(unary('Fail', {}));
  found.failure = [error.code, error.details, error.metadata.get('grpc-status-details-bin').length];
  found.late = (await failing(unary('Hold', {}, { deadline: Date.now() + 200 }))).code;

  const endless = client.Count({ n: 1 << 30 });
  found.cancelled = await new Promise((resolve) => {
    endless.once('data', () => endless.cancel());
    endless.on('error', (problem) => resolve(problem.code));
  });
  console.log(JSON.stringify(found));
  client.close();
}

main().catch((error) => {
  console.log(JSON.stringify({ error: String(error) }));
  process.exit(1);
});
