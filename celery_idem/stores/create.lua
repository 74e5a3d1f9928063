-- Create if absent.
--   KEYS[1]  the record's key
--   KEYS[2]  the index of what is open; may be left out
--   ARGV[1]  the packed record
--   ARGV[2]  how long to keep it, in milliseconds; "": for ever; "0": not at all
--   ARGV[3]  when to look at it, in microseconds from now; "": it is not open
-- Returns the server's time in microseconds when it was written;
-- else {the server's time, the value that stands there}.
local t = redis.call('TIME')
local now = t[1] * 1000000 + t[2]
local value = struct.pack('>I8', now) .. ARGV[1]
local written
if ARGV[2] == '' then
  written = redis.call('SET', KEYS[1], value, 'NX')
elseif ARGV[2] == '0' then -- which SET refuses
  written = redis.call('EXISTS', KEYS[1]) == 0
else
  written = redis.call('SET', KEYS[1], value, 'NX', 'PX', ARGV[2])
end
if written then
  if KEYS[2] and ARGV[3] ~= '' then
    redis.pcall('ZADD', KEYS[2], now + ARGV[3], KEYS[1]) -- a hint: an error here is no error of the write
  end
  return now
end
return {now, redis.call('GET', KEYS[1])}
