-- Read, with the server's time.
--   KEYS[1]  the record's key
-- Returns {the server's time in microseconds, the value or false}.
local t = redis.call('TIME')
return {t[1] * 1000000 + t[2], redis.call('GET', KEYS[1])}
