-- Announce blocks. KEYS: stores, own set, events, then one per block. ARGV: store, epoch, events kept, then hash and generation per block.
-- Returns 1, or 0 and changes nothing when the caller's epoch is not the store's current one.
local current = redis.call('HGET', KEYS[1], ARGV[1])
if not current or string.match(current, '^(%d+)') ~= ARGV[2] then
  return 0
end
local names = {}
for i = 4, #KEYS do
  local name = ARGV[2 * i - 4]
  redis.call('HSET', KEYS[i], ARGV[1], ARGV[2] .. ' ' .. ARGV[2 * i - 3])
  redis.call('SADD', KEYS[2], name)
  names[#names + 1] = name
end
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', 'put', table.concat(names), 'store', ARGV[1], 'epoch', ARGV[2])
return 1
