-- Withdraw blocks. KEYS: stores, own set, events, then one per block. ARGV: store, epoch, events kept, then hash per block.
-- An entry goes only if the caller's epoch published it. Returns how many went.
local names = {}
for i = 4, #KEYS do
  local entry = redis.call('HGET', KEYS[i], ARGV[1])
  if entry and string.match(entry, '^(%d+)') == ARGV[2] then
    redis.call('HDEL', KEYS[i], ARGV[1])
    redis.call('SREM', KEYS[2], ARGV[i])
    names[#names + 1] = ARGV[i]
  end
end
if #names > 0 then
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', 'del', table.concat(names), 'store', ARGV[1], 'epoch', ARGV[2])
end
return #names
