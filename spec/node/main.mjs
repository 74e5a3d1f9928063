//   node main.mjs check ../vectors.json                   compares every vector
//   node main.mjs keys < calls                            a call in each line: prints its key and fingerprint
//   node main.mjs publish redis://host:6379/0 < calls     publishes them, and prints the messages' ids
//   node main.mjs look redis://host:6379/0 idem:KEY       prints the record of an action, or null
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { isDeepStrictEqual } from "node:util";
import { canonical, fingerprint, hashed, headers, key, publish, redis, scopeDigest } from "./producer.mjs";
import { unpack } from "./record.mjs";

const parse = (text) => JSON.parse(text, (_, value) => (value?.__type__ === "int" ? BigInt(value.__value__) : value));

function attempt(what) {
  try {
    return what();
  } catch (error) {
    return `refused: ${error.message}`;
  }
}

async function look(url, name) {
  const value = await redis(url, "GET", name);
  return value === null ? null : unpack(value.subarray(8), Number(value.readBigUInt64BE()));
}

function check(file) {
  const { values, refused, calls, records, message } = parse(readFileSync(file, "utf8"));
  const failures = [];
  const same = (name, found, expected) => isDeepStrictEqual(found, expected) || failures.push({ name, found, expected });
  for (const one of values) same(one.name, attempt(() => canonical(one.value)), one.canonical);
  for (const one of refused) same(one.name, attempt(() => canonical(parse(one.json))).slice(0, 8), "refused:");
  for (const one of calls) {
    const found = { hashed: hashed(one), key: key(one), fingerprint: fingerprint(one), scope_digest: scopeDigest(one) };
    for (const [what, value] of Object.entries(found)) same(`${one.name}: ${what}`, value, one[what]);
    same(`${one.name}: headers`, headers(one, message), one.headers);
  }
  for (const one of records) same(one.name, unpack(Buffer.from(one.packed, "hex"), one.stamp), one.record);
  for (const failure of failures) console.error(failure);
  console.log(`${values.length + refused.length + calls.length + records.length} vectors, ${failures.length} failures`);
  process.exitCode = failures.length ? 1 : 0;
}

const [command, ...words] = process.argv.slice(2);
if (command === "check") check(...words);
if (command === "look") console.log(JSON.stringify(await look(...words)));
if (command === "keys" || command === "publish")
  for await (const line of createInterface({ input: process.stdin })) {
    if (command === "publish") console.log(await publish(words[0], parse(line), words[1]));
    else console.log(attempt(() => `${key(parse(line))} ${fingerprint(parse(line))}`));
  }
