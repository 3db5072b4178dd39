"""`tandem bench --device cuda`, or `python -m deploy.bench.cuda`: kernels and engine on a GPU, against its limits.

Needs torch, triton and numpy, and no installation: it runs from a checkout. `units.py` says what is measured, `run.py`
runs it, one process per unit and each within its time, and `plan.py` is the dry run that needs no GPU.
"""
