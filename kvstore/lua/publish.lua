-- Announce blocks. KEYS: stores, own set, events, sequence, then one per block. ARGV: store, epoch, events kept, then hash
-- and generation per block. Returns how many were new in the own set, or -1 and changes nothing when the caller's epoch is
-- not the store's current one.
local current = redis.call('HGET', KEYS[1], ARGV[1])
if not current or string.match(current, '^(%d+)') ~= ARGV[2] then
  return -1
end
local names, new = {}, 0
for i = 5, #KEYS do
  local name = ARGV[2 * i - 6]
  redis.call('HSET', KEYS[i], ARGV[1], ARGV[2] .. ' ' .. ARGV[2 * i - 5])
  new = new + redis.call('SADD', KEYS[2], name)
  names[#names + 1] = name
end
local n = redis.call('INCR', KEYS[4])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', 'n', n, 'put', table.concat(names), 'store', ARGV[1], 'epoch', ARGV[2])
return new
