// Reads the record of an action from the bytes in a store. docs/explanation/record.md explains it.
import { refuse } from "./producer.mjs";

const STATES = [, "running", "scheduled", "released", "succeeded", "failed", "in_doubt", "cancelled", "accepted"];

export function unpack(packed, stamp) {
  let at = 27;
  const take = (size) => packed.subarray(at, (at += size));
  const hex = (size) => take(size).toString("hex");
  const [time, count] = [() => Number(take(8).readBigUInt64BE()), () => take(4).readUInt32BE()];
  const [text, blob] = [() => take(count()).toString(), () => hex(count())];
  const many = (read) => Array.from({ length: count() }, read);
  const note = () => ({ at: time(), by: text(), what: text(), evidence: text(), would: take(1)[0] || null, differs: many(text) });
  const parts = [
    [0, "lease", time],
    [1, "task_id", () => hex(16).replace(/^(.{8})(.{4})(.{4})(.{4})/, "$1-$2-$3-$4-")],
    [2, "task_id", text],
    [3, "fingerprint", blob],
    [4, "steps", () => many(() => ({ name: text(), payload: blob() }))],
    [5, "open_steps", () => many(text)],
    [6, "asking", () => hex(12)],
    [7, "reason", text],
    [8, "notes", () => many(note)],
    [9, "digests", blob],
    [12, "noticed", () => ({ at: time(), stamp: time() })],
    [13, "scope", () => hex(16)],
    [15, "", () => ({ recovery: { tries: take(1)[0], wait: time() }, place: text(), call: blob() })],
    [14, "replaced_by", text],
    [10, "missing", text],
    [11, "payload", () => hex(packed.length - at)],
  ];
  if (packed[12] !== 2) refuse(`format version ${packed[12]}`);
  const bits = packed.readUInt16BE(14);
  const record = { state: STATES[packed[13]], owner: packed.toString("hex", 0, 12) };
  record.attempts = packed.readUInt16BE(16);
  record.crashes = packed[18];
  record.fence = Number(packed.readBigUInt64BE(19)) || stamp;
  for (const [bit, name, read] of parts)
    if (bits & (1 << bit)) Object.assign(record, name ? { [name]: read() } : read());
  return record;
}
