"""From HTTP to workers and back: API, text, admission, placement, dispatch.

May import cluster and the pure parts of kvstore.
"""
