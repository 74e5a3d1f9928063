-- Create if absent; with a third key, write and publish a second value in the same step.
--   KEYS[1]  the record's key
--   KEYS[2]  the index of what is open; may be left out
--   KEYS[3]  the second value's key, which is its channel too; may be left out
--   ARGV[1]  the packed record
--   ARGV[2]  how long to keep it, in milliseconds; "": for ever; "0": not at all
--   ARGV[3]  when to look at it, in microseconds from now; "": it is not open
--   ARGV[4]  the second value
--   ARGV[5]  how long to keep that, in seconds; "": for ever
-- Returns the server's time in microseconds if it was written,
-- or else {the server's time, the stored value}.
local call, key, keep, due = redis.call, KEYS[1], ARGV[2], ARGV[3]
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
if KEYS[3] then
  if call('EXISTS', key) == 1 then
    return {now, call('GET', key)}
  end
  -- Before the record, as in replace.lua: if this is an error, nothing is written.
  if ARGV[5] == '' then
    call('SET', KEYS[3], ARGV[4])
  else
    call('SETEX', KEYS[3], ARGV[5], ARGV[4])
  end
  -- pcall: who waits for it looks at the value too, and what is written must not be left without its record.
  redis.pcall('PUBLISH', KEYS[3], ARGV[4])
end
local value = struct.pack('>I8', now) .. ARGV[1]
local written
if keep == '' then
  written = call('SET', key, value, 'NX')
elseif keep == '0' then -- SET refuses it
  written = call('EXISTS', key) == 0
else
  written = call('SET', key, value, 'NX', 'PX', keep)
end
if not written then
  return {now, call('GET', key)}
end
if due ~= '' and KEYS[2] then
  -- pcall, because the index is a hint, and must not fail the write. Redis formats a number more slowly than this.
  redis.pcall('ZADD', KEYS[2], string.format('%.0f', now + due), key)
end
return now
