"""Functions on tensors: a plain reference of each operation and the fast forms the engine calls.

    reference.py      every operation as plainly as it can be written, in fp64: what the others must give
    NAME.py           the operation the engine calls, and its form in torch for CPUs
    triton_NAME.py    its kernel for GPUs, imported only where `backend.py` says that one serves; `triton_attention.py`
                      and `triton_math.py` are what kernels share

Knows nothing of requests, blocks' owners or Ray, and imports nothing of ours.
"""
