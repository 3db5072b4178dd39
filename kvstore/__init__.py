"""Where KV lives: hashing, layout, block pool, arena, store, handoff, Redis index.

May import cluster and kernels.
"""
