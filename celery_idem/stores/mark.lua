-- Correct an entry of the index, if the record was not written since.
--   KEYS[1]  the record's key
--   KEYS[2]  the index of what is open
--   ARGV[1]  the stamp that the record must still have (the first 8 bytes of the value); "": there must be none
--   ARGV[2]  when to look at it, in microseconds from that stamp; "": it is not open
local stamp = redis.pcall('GETRANGE', KEYS[1], 0, 7)
if type(stamp) == 'table' then -- another program's list or hash
  stamp = ''
end
if stamp ~= ARGV[1] then
  return 0
end
if ARGV[2] == '' then
  return redis.call('ZREM', KEYS[2], KEYS[1])
end
return redis.call('ZADD', KEYS[2], struct.unpack('>I8', stamp) + ARGV[2], KEYS[1])
