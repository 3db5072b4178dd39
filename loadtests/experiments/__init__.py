"""Results of the field, reproduced in shape on the simulator: each is one command that prints its table.

    python -m loadtests.experiments.ladder           the more the router knows, the sooner the first token (Mooncake)
    python -m loadtests.experiments.cache            what a cache of a size is worth (Mooncake)
    python -m loadtests.experiments.disaggregation   what separate pools are worth as the ITL SLO tightens (DistServe)
    python -m loadtests.experiments.ppd              who computes the prompt of a conversation's next turn (PPD)

All take --trace, a file or a text such as `agents:rate=6`; runs.py is what they share, docs/simulator.md has numbers.
"""
