-- Remove what a dead store, or an earlier start of a living one, left. KEYS: stores, own set, events, sequence, then one
-- per block. ARGV: store, events kept, then hash per block. Returns how many went. A dead store that has nothing left is
-- forgotten itself, which is what a call without blocks is for.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local epoch, deadline = string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^(%d+) (%d+)')
local dead = not epoch or tonumber(deadline) < now
local names = {}
for i = 5, #KEYS do
  local name = ARGV[i - 2]
  local entry = redis.call('HGET', KEYS[i], ARGV[1])
  if not entry or dead or string.match(entry, '^(%d+)') ~= epoch then
    redis.call('HDEL', KEYS[i], ARGV[1])
    redis.call('SREM', KEYS[2], name)
    names[#names + 1] = name
  end
end
if #names > 0 then
  local n = redis.call('INCR', KEYS[4])
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[2], '*', 'n', n, 'del', table.concat(names), 'store', ARGV[1])
end
if dead and redis.call('SCARD', KEYS[2]) == 0 then
  redis.call('HDEL', KEYS[1], ARGV[1])
end
return #names
