-- Replace if unchanged; with a third key, write and publish a second value in the same step.
--   KEYS[1]  the record's key
--   KEYS[2]  the index of what is open; may be left out
--   KEYS[3]  the second value's key, which is its channel too; may be left out
--   ARGV[1]  the stamp and owner it must still have (the first 20 bytes of the value)
--   ARGV[2]  the new packed record
--   ARGV[3]  how long to keep it, in milliseconds; "": for ever; "0": delete it; "-1": what is left of its time
--   ARGV[4]  when to look at it, in microseconds from the new stamp; "": it is not open
--   ARGV[5]  the second value
--   ARGV[6]  how long to keep that, in seconds; "": for ever
-- Returns the new stamp, in microseconds, if it was written,
-- or else {the server's time, the stored value or false}.
local call, key, old, keep, due = redis.call, KEYS[1], ARGV[1], ARGV[3], ARGV[4]
local t = call('TIME')
local now = t[1] * 1000000 + t[2]
if call('GETRANGE', key, '0', '19') ~= old then -- text, because Redis formats numbers slowly
  return {now, call('GET', key)}
end
if KEYS[3] then
  -- Before the record: if the server is full, or does not allow it, this is an error, and nothing is written.
  if ARGV[6] == '' then
    call('SET', KEYS[3], ARGV[5])
  else
    call('SETEX', KEYS[3], ARGV[6], ARGV[5])
  end
  -- pcall: who waits for it looks at the value too, and what is written must not be left without its record.
  redis.pcall('PUBLISH', KEYS[3], ARGV[5])
end
local stamp = math.max(now, struct.unpack('>I8', old) + 1)
local value = struct.pack('>I8', stamp) .. ARGV[2]
if keep == '0' then
  call('DEL', key)
elseif keep == '' then
  call('SET', key, value)
elseif keep == '-1' then
  call('SET', key, value, 'KEEPTTL')
else
  call('SET', key, value, 'PX', keep)
end
-- pcall, because the index is a hint, and must not fail the write.
if not KEYS[2] then
  return stamp
elseif due == '' then
  redis.pcall('ZREM', KEYS[2], key)
else
  redis.pcall('ZADD', KEYS[2], string.format('%.0f', stamp + due), key)
end
return stamp
