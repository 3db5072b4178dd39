-- Who has a chain of blocks. KEYS: stores, then one per block in chain order. Stops at the first block that no live store
-- has under its current epoch. Returns {owners, blocks}: owners is store, address, epoch, store, ...; blocks is one string,
-- since parsing many small replies costs the caller more than the lookup: per block the places of its owners in that list
-- with their generations, as in "0:5,1:6;1:6". What is no entry of ours is passed over.
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local live = {}
local stores = redis.call('HGETALL', KEYS[1])
for i = 1, #stores, 2 do
  local epoch, deadline, address = string.match(stores[i + 1], '^(%d+) (%d+) (.*)$')
  if epoch and tonumber(deadline) > now then
    live[stores[i]] = {epoch = epoch, address = address}
  end
end
local owners, blocks, count = {}, {}, 0
for i = 2, #KEYS do
  local found = {}
  local entries = redis.call('HGETALL', KEYS[i])
  for j = 1, #entries, 2 do
    local epoch, generation = string.match(entries[j + 1], '^(%d+) (%d+)$')
    local store = live[entries[j]]
    if store and store.epoch == epoch then
      if not store.place then
        store.place = count
        count = count + 1
        owners[#owners + 1] = entries[j]
        owners[#owners + 1] = store.address
        owners[#owners + 1] = epoch
      end
      found[#found + 1] = store.place .. ':' .. generation
    end
  end
  if #found == 0 then
    break
  end
  blocks[#blocks + 1] = table.concat(found, ',')
end
return {owners, table.concat(blocks, ';')}
