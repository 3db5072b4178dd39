"""The cluster in virtual time: discrete events around the very policies that the real one runs.

trace, transform, generators     what arrives
conversation, traffic, hardware  turns of a conversation; what a trace asks for; what a GPU can do
settings, events, histogram      what a run is told; virtual time; distributions
job, arrivals, router            one request; when they come; gate, placement and legs around the real policies
fleet, controller                who is there and what is known of them; the plan's eyes and hands
worker, scheduler, batch         steps in time; the engine's rules; sequences that decode together
network, stores                  links that transfers share; the block stores
simulation, results, load        `simulate`; its figures; how busy a trace keeps a fleet
report, plots, search            tables and pages of results; the cheapest cluster that meets an SLO
"""
