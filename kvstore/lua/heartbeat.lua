-- Say that a store lives. KEYS: stores, own set, events, sequence. ARGV: store, epoch, address, ttl ms, grace ms, claim
-- (1: this start is the newest), ms for which events outlive the last heartbeat of all.
-- Returns {state, blocks in the own set, stores that have been dead for longer than the grace}. State: 0 a newer start of
-- the store has taken over, 1 all is well, 2 the store was unknown (so are its blocks, then).
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local current = redis.call('HGET', KEYS[1], ARGV[1])
local epoch = current and string.match(current, '^(%d+) ')
if ARGV[6] == '0' and epoch and epoch ~= ARGV[2] then
  return {0, 0, {}}
end
redis.call('HSET', KEYS[1], ARGV[1], string.format('%s %.0f %s', ARGV[2], now + ARGV[4], ARGV[3]))
redis.call('PEXPIRE', KEYS[3], ARGV[7])
redis.call('PEXPIRE', KEYS[4], ARGV[7])
local dead = {}
local stores = redis.call('HGETALL', KEYS[1])
for i = 1, #stores, 2 do
  if (tonumber(string.match(stores[i + 1], '^%d+ (%d+) ')) or 0) + ARGV[5] < now then
    dead[#dead + 1] = stores[i]
  end
end
return {epoch == ARGV[2] and 1 or 2, redis.call('SCARD', KEYS[2]), dead}
