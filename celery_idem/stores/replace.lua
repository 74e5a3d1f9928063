-- Replace if unchanged; with a third key, write and publish a second value in the same step.
--   KEYS[1]  the record's key
--   KEYS[2]  the index of what is open; may be left out
--   KEYS[3]  the second value's key, which is its channel too; may be left out
--   ARGV[1]  the stamp and owner it must still have (the first 20 bytes of the value)
--   ARGV[2]  the new packed record
--   ARGV[3]  how long to keep it, in milliseconds; "": for ever; "0": delete it
--   ARGV[4]  when to look at it, in microseconds from the new stamp; "": it is not open
--   ARGV[5]  the second value
--   ARGV[6]  how long to keep that, in seconds; "": for ever
-- Returns the new stamp, in microseconds, when it was written;
-- else {the server's time, the value that stands there, or false}.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
if redis.call('GETRANGE', KEYS[1], 0, #ARGV[1] - 1) ~= ARGV[1] then
  return {now, redis.call('GET', KEYS[1])}
end
if KEYS[3] then
  -- Before the record: a server that is full, or does not allow it, answers with an error here. Nothing is written then.
  if ARGV[6] == '' then
    redis.call('SET', KEYS[3], ARGV[5])
  else
    redis.call('SETEX', KEYS[3], ARGV[6], ARGV[5])
  end
  redis.call('PUBLISH', KEYS[3], ARGV[5])
end
local stamp = math.max(now, struct.unpack('>I8', ARGV[1]) + 1)
local value = struct.pack('>I8', stamp) .. ARGV[2]
if ARGV[3] == '0' then
  redis.call('DEL', KEYS[1])
elseif ARGV[3] == '' then
  redis.call('SET', KEYS[1], value)
else
  redis.call('SET', KEYS[1], value, 'PX', ARGV[3])
end
-- A hint: an error here is no error of the write.
if not KEYS[2] then
  return stamp
elseif ARGV[4] == '' then
  redis.pcall('ZREM', KEYS[2], KEYS[1])
else
  redis.pcall('ZADD', KEYS[2], stamp + ARGV[4], KEYS[1])
end
return stamp
