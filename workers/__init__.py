"""One engine, which decides and computes, and the worker around it, which talks to everybody else.

    decides              engine  scheduler  in_flight  sequence  step                           synchronous; one thread
                         fetching  foresight  draw  offering  sightings
    computes             runner (the seam)  model  attention  cache  rope  sampling;  sim
      on CPUs            model_runner  batch  segments
      on GPUs            gpu_runner  device (what only a GPU has)  device_batch  decode_graphs  gpu_memory  gpu_profile
    in shards            shard  links  process_links  exchange  vocabulary
                         lead  follower  step_plan  control  assembly
    serves               worker  registration  streams  cache_changes  gpus  tracing
                         transfers  handoffs  tier_link  tier  offload  node_store  tasks  counters
    copies blocks        block_mover (the seam)  all_shards  shard_peers  shard_answers;  shard_blocks (the others' end)
    encodes KV           stored_blocks  device_blocks  quantization
    reads models         architecture  weights  slices  checkpoint  digest  model_cache  safetensors_writer
                         gguf  gguf_config  gguf_tensors  gguf_tokenizer

A new policy goes into `scheduler` or `fetching` (pure), a new device behind `runner`, a new transfer beside `handoffs`.
May import cluster, kvstore, kernels; never ray or router.
"""
