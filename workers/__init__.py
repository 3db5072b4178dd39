"""One engine and the worker around it: sequence, scheduler, runner, model, sampling, loaders.

May import cluster, kvstore, kernels.
"""
