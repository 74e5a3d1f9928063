// Producer for celery_idem tasks in JavaScript, with Node's standard library. docs/reference/wire.md explains it.
// Every language hashes the same text. main.mjs checks this with vectors.json.
import { createHash, randomUUID } from "node:crypto";
import { connect } from "node:net";

const sha256 = (text) => createHash("sha256").update(text).digest();
const byBytes = (a, b) => Buffer.compare(Buffer.from(a), Buffer.from(b)); // the order of code points
const list = (texts) => `[${texts.join(",")}]`;

export function refuse(why) {
  throw new Error(why);
}

// --- canonical form: from a value to JSON text -------------------------------------------------------

const string = (text) => (/\p{Surrogate}/u.test(text) ? refuse("not valid Unicode") : JSON.stringify(text));

function object(pairs) { // each pair: a name and a canonical text
  const texts = new Map(pairs);
  if (texts.size < pairs.length) refuse("two names are the same in normal form");
  const names = [...texts.keys()].sort(); // by UTF-16, as RFC 8785 says
  return `{${names.map((name) => `${string(name)}:${texts.get(name)}`).join(",")}}`;
}

const tagged = (tag, text) => object([[tag, string(text)]]);

export function canonical(value, depth = 0) {
  if (value === null || typeof value === "boolean") return String(value);
  if (typeof value === "string") return string(value.normalize("NFC"));
  if (typeof value === "bigint" || Number.isInteger(value)) return number(BigInt(value), 0);
  if (typeof value === "number") return Number.isFinite(value) ? String(value) : refuse("NaN or infinite");
  const { __type__: type, __value__: inner } = value; // kombu's notation for a value that JSON cannot hold
  if (type === "decimal") return decimal(inner);
  if (depth >= 64) refuse("nested more than 64 levels deep");
  if (Array.isArray(value)) return list(value.map((item) => canonical(item, depth + 1)));
  if (inner !== undefined && Object.hasOwn(TYPES, type)) return TYPES[type](inner, depth + 1);
  return object(Object.entries(value).map(([name, item]) => {
    const normal = name.normalize("NFC");
    return [normal.startsWith("$") ? `$${normal}` : normal, canonical(item, depth + 1)];
  }));
}

function number(digits, power) { // digits × 10 ** power, but not a fraction that a double holds exactly
  if (digits === 0n) return "0";
  for (; digits % 10n === 0n; digits /= 10n) power++;
  const whole = power < 0 || power > 15 ? null : Number(digits * 10n ** BigInt(power));
  return Number.isSafeInteger(whole) ? String(whole) : tagged("$number", `${digits}E${power}`);
}

function decimal(text) {
  const [, sign, before, after = "", power = 0] =
    /^([+-]?)(\d+)(?:\.(\d+))?(?:E([+-]?\d+))?$/i.exec(text) ?? refuse("not a finite decimal");
  const digits = BigInt(before + after) * (sign === "-" ? -1n : 1n);
  const down = after.length - power;
  let [double, halves] = [Number(text), 0n];
  if (down > 0 && Number.isFinite(double) && !Number.isInteger(double)) {
    for (; !Number.isInteger(double); double *= 2) halves++;
    if (BigInt(double) * 10n ** BigInt(down) === digits * 2n ** halves) return String(Number(text));
  }
  return number(digits, -down);
}

function datetime(text) {
  const [, second, fraction = "", offset] =
    /^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,6}))?(Z|[+-]\d\d:\d\d)$/.exec(text) ?? refuse("not an instant");
  const micros = Number(fraction) ? `.${fraction.padEnd(6, "0")}` : "";
  return tagged("$datetime", `${new Date(second + offset).toISOString().slice(0, 19)}${micros}+00:00`);
}

const TYPES = {
  datetime,
  date: (text) => tagged("$date", text),
  time: (text) => tagged("$time", text),
  uuid: ({ hex }) => tagged("$uuid", hex.replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-")),
  bytes: (text) => tagged("$bytes", Buffer.from(text).toString("base64")),
  base64: (text) => tagged("$bytes", text),
  // The following types are never in a message. Only arguments in Python have them.
  ip: (text) => tagged("$ip", text),
  timedelta: (microseconds) => tagged("$timedelta", microseconds),
  secret: (value, depth) => tagged("$secret", sha256(canonical(value, depth)).toString("hex")),
  set: (items, depth) => {
    const texts = new Set(items.map((item) => canonical(item, depth)));
    return object([["$set", list([...texts].sort(byBytes))]]);
  },
};

// --- calls: from arguments to key, fingerprint and headers -----------------------------------------

const json = (value) => (value === null ? "null" : typeof value === "string" ? string(value) : String(value));
const label = (value) => json(value === undefined ? null : String(value).normalize("NFC"));

function bind({ parameters, args, kwargs }) {
  const given = args.map((value, at) => [parameters[at][0], value]);
  return new Map([...parameters.filter((one) => one.length > 1), ...given, ...Object.entries(kwargs)]);
}

export function hashed(call) {
  const bound = bind(call);
  const names = call.idempotency_key !== undefined ? [] : (call.intent ?? [...bound.keys()]);
  const fields = object(names.map((name) => [name, canonical(bound.get(name))]));
  const labels = [call.scope, call.occurrence, call.idempotency_key].map(label);
  const parts = ["1", json(call.namespace), json(call.task), json(String(call.intent_version)), ...labels, fields];
  return list(call.part_of && call.idempotency_key === undefined ? [...parts, label(call.part_of)] : parts);
}

export const key = (call) => `${call.task}:${sha256(hashed(call)).toString("hex").slice(0, 32)}`;

export function fingerprint(call) {
  const bound = bind(call);
  const names = call.idempotency_key === undefined ? (call.must_match ?? []) : [...bound.keys()];
  return [...names].sort(byBytes).map((name) => {
    const parts = ["1", json(call.task), json(name)];
    const value = sha256(list([...parts, canonical(bound.get(name))]));
    return sha256(list(parts)).toString("hex").slice(0, 8) + value.toString("hex").slice(0, 16);
  }).join("");
}

export const scopeDigest = ({ namespace, scope }) =>
  scope === undefined ? "" : sha256(list(["1", json(namespace), label(scope)])).toString("hex").slice(0, 32);

export function headers(call, message) {
  const found = {};
  if (call.intent !== undefined) found["idem-key"] = key(call); // without it the worker derives the key
  const labels = {
    "idem-scope": call.scope,
    "idem-occurrence": call.occurrence,
    "idempotency-key": call.idempotency_key,
    "idem-part-of": call.part_of,
  };
  for (const [name, value] of Object.entries(labels)) if (value !== undefined) found[name] = String(value).normalize("NFC");
  return Object.keys(found).length ? { ...found, "idem-message": message } : found;
}

// --- Celery's message on a Redis broker ------------------------------------------------------------

function body(value) { // JSON in which an integer of any size keeps all its digits
  if (typeof value === "bigint" || Number.isInteger(value)) return String(BigInt(value));
  if (value === null || typeof value !== "object") return JSON.stringify(value);
  if (Array.isArray(value)) return list(value.map(body));
  return `{${Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}:${body(item)}`).join(",")}}`;
}

export async function publish(url, call, queue = "celery") {
  const id = randomUUID();
  const message = {
    body: Buffer.from(body([call.args, call.kwargs, {}])).toString("base64"),
    "content-type": "application/json",
    "content-encoding": "utf-8",
    headers: { task: call.task, id, root_id: id, lang: "js", ...headers(call, id) },
    properties: {
      correlation_id: id,
      body_encoding: "base64",
      delivery_info: { exchange: "", routing_key: queue },
      delivery_tag: randomUUID(),
    },
  };
  await redis(url, "LPUSH", queue, JSON.stringify(message));
  return id;
}

export function redis(url, ...command) {
  const { hostname, port, pathname, username, password } = new URL(url);
  const commands = [["SELECT", pathname.slice(1) || "0"], command];
  if (password) commands.unshift(["AUTH", ...[username || "default", password].map(decodeURIComponent)]);
  const sent = commands.map((words) =>
    `*${words.length}\r\n${words.map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`).join("")}`);
  return new Promise((resolve, reject) => {
    let received = Buffer.alloc(0);
    const socket = connect(port || 6379, hostname, () => socket.write(sent.join("")));
    socket.on("error", reject).on("close", () => reject(new Error("Redis closed the connection")));
    socket.on("data", (data) => {
      received = Buffer.concat([received, data]);
      for (let at = 0, replies = 1; ; replies++) {
        const end = received.indexOf("\r\n", at);
        if (end < 0) return;
        const [kind, rest] = [received.toString("latin1", at, at + 1), received.toString("utf8", at + 1, end)];
        const size = kind === "$" ? Number(rest) : -1;
        at = end + 2 + (size < 0 ? 0 : size + 2);
        if (received.length < at) return;
        if (kind === "-") reject(new Error(rest));
        else if (replies === commands.length) resolve(size < 0 ? null : received.subarray(end + 2, at - 2));
        else continue;
        return void socket.destroy();
      }
    });
  });
}
