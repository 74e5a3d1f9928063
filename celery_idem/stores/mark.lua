-- Correct entries of an index, except those whose record was written since.
--   KEYS[1]   the index of what is open
--   KEYS[2…]  the records' keys
--   ARGV      for each record, two:
--             the stamp that it must still have (the first 8 bytes of the value); "": there must be none
--             when to look at it, in microseconds from that stamp; "": it is not open
local call = redis.call
for n = 2, #KEYS do
  local key, was, due = KEYS[n], ARGV[2 * n - 3], ARGV[2 * n - 2]
  local stamp = redis.pcall('GETRANGE', key, 0, 7)
  if type(stamp) == 'table' then -- another program's list or hash
    stamp = ''
  end
  if stamp == was then
    if due == '' then
      call('ZREM', KEYS[1], key)
    else
      call('ZADD', KEYS[1], string.format('%.0f', (was == '' and 0 or struct.unpack('>I8', was)) + due), key)
    end
  end
end
return 0
