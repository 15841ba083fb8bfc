// NODE_PATH=... node nats_client.js URL NAME: the nats package lists the instances of a micro service and calls it. Prints one JSON object.
'use strict';

const { connect } = require('nats');
const [servers, name] = process.argv.slice(2);

async function every(answers) {
  const found = [];
  for await (const each of await answers) found.push(each);
  return found;
}

async function main() {
  const connection = await connect({ servers });
  const client = connection.services.client();
  const found = { ids: (await every(client.ping(name))).map((each) => each.id) };
  found.everybody = (await every(client.ping())).map((each) => each.name);
  const [info] = await every(client.info(name, found.ids[0]));
  found.endpoints = info.endpoints.map((each) => each.name).sort();
  const { subject } = info.endpoints.find((each) => each.name === 'shop_add');
  found.sums = [];
  for (let number = 0; number < 40; number += 1) {
    found.sums.push((await connection.request(subject, JSON.stringify({ a: number, b: 1 }))).json());
  }
  const { headers } = await connection.request(subject, '{}');
  found.refused = [headers.get('Nats-Service-Error-Code'), headers.get('Nats-Service-Error')];
  const stats = await every(client.stats(name));
  found.counts = stats.map((each) => each.endpoints.find((endpoint) => endpoint.name === 'shop_add').num_requests);
  console.log(JSON.stringify(found));
  await connection.close();
}

main().catch((error) => {
  console.log(JSON.stringify({ error: String(error) }));
  process.exit(1);
});
