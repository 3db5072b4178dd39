-- Who has a chain of blocks. KEYS: stores, then one per block in chain order. Stops at the first block that no live store
-- has under its current epoch. Returns per block a list of {store, address, epoch, generation}.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local live = {}
local stores = redis.call('HGETALL', KEYS[1])
for i = 1, #stores, 2 do
  local epoch, deadline, address = string.match(stores[i + 1], '^(%d+) (%d+) (.*)$')
  if tonumber(deadline) > now then
    live[stores[i]] = {epoch, address}
  end
end
local found = {}
for i = 2, #KEYS do
  local owners = {}
  local entries = redis.call('HGETALL', KEYS[i])
  for j = 1, #entries, 2 do
    local epoch, generation = string.match(entries[j + 1], '^(%d+) (%d+)$')
    local store = live[entries[j]]
    if store and store[1] == epoch then
      owners[#owners + 1] = {entries[j], store[2], epoch, generation}
    end
  end
  if #owners == 0 then
    break
  end
  found[#found + 1] = owners
end
return found
