"""Where KV lives once it has left, or before it reaches, a worker's cache.

    names and bytes      hashing  layout  part  blocks recency (a worker's pool)  copying  prefix_map
    a store's state      slabs  ledger  eviction  tiers  chain  limits           no sockets
    a store's memory     arena  presence  disk  block_file  write_behind
    a store's calls      server  handoff_verbs  block_verbs  operator_verbs  frames  buffers
    its users            client  connections  reputation  writer  slab_writer  reader  arrival  locate  fetcher
    the index in Redis   index  publisher  mirror  redis_server

A new way to move bytes goes behind `fetcher`, a new call into one of the verbs, a new rule of who may have which slab
into `slabs` or `ledger`. May import cluster and kernels; never torch, ray, workers or router.
"""
