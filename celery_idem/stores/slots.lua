-- Read the index of what is open in many slots of one node. A script that declares no keys may read several slots.
--   ARGV[1]   the index's key without the slot's tag
--   ARGV[2]   the latest time to look, in microseconds; "+inf": any
--   ARGV[3…]  tags of the slots
-- Returns {the tag, {a name, its score, …}} for each tag with entries, and {the tag} for a slot that is not here.
local found = {}
for n = 3, #ARGV do
  local entries = redis.pcall('ZRANGEBYSCORE', ARGV[1] .. ':{' .. ARGV[n] .. '}', '-inf', ARGV[2], 'WITHSCORES')
  if entries.err then
    found[#found + 1] = {ARGV[n]}
  elseif #entries > 0 then
    found[#found + 1] = {ARGV[n], entries}
  end
end
return found
