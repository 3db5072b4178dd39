-- Withdraw blocks. KEYS: stores, own set, events, sequence, then one per block. ARGV: store, epoch, events kept, then hash
-- per block. An entry goes only if the caller's epoch published it. Returns how many went.
local names, gone = {}, 0
for i = 5, #KEYS do
  local name = ARGV[i - 1]
  local entry = redis.call('HGET', KEYS[i], ARGV[1])
  if entry and string.match(entry, '^(%d+)') == ARGV[2] then
    redis.call('HDEL', KEYS[i], ARGV[1])
    gone = gone + redis.call('SREM', KEYS[2], name)
    names[#names + 1] = name
  end
end
if #names > 0 then
  local n = redis.call('INCR', KEYS[4])
  redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[3], '*', 'n', n, 'del', table.concat(names), 'store', ARGV[1], 'epoch', ARGV[2])
end
return gone
