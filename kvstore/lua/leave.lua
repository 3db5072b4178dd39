-- Stop being found at once. KEYS: stores. ARGV: store, epoch. The store stays in the list as one that died long ago, so
-- that others clear up what it does not clear up itself. A newer start of the store is left alone.
local epoch, address = string.match(redis.call('HGET', KEYS[1], ARGV[1]) or '', '^(%d+) %d+ (.*)$')
if epoch == ARGV[2] then
  redis.call('HSET', KEYS[1], ARGV[1], epoch .. ' 0 ' .. address)
end
