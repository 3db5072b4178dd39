-- Remove what a dead store, or an earlier start of a living one, left. KEYS: stores, own set, events, then one per block.
-- ARGV: store, events kept, then hash per block. Returns how many went.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local current = redis.call('HGET', KEYS[1], ARGV[1]) or '0 0 '
local epoch, deadline = string.match(current, '^(%d+) (%d+)')
local names = {}
for i = 4, #KEYS do
  local name = ARGV[i - 1]
  local entry = redis.call('HGET', KEYS[i], ARGV[1])
  if not entry or tonumber(deadline) < now or string.match(entry, '^(%d+)') ~= epoch then
    redis.call('HDEL', KEYS[i], ARGV[1])
    redis.call('SREM', KEYS[2], name)
    names[#names + 1] = name
  end
end
if #names > 0 then
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[2], '*', 'del', table.concat(names), 'store', ARGV[1])
end
return #names
