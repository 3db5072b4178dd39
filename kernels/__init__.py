"""Functions on tensors: a plain reference of each operation and the fast form the engine calls."""
