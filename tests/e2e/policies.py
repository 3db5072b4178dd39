"""An autoscaling policy of an operator's own, as `autoscaling = "module:function"` names it.

Imported where the plan is made: its patience is set to seconds here, so that tests need not wait for minutes.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from cluster import autoscaling, drains
from cluster.pools import Demand, Member, Now, Spec

WANTED = "WORKERS_WANTED"  # names the file that says how many
DRAIN = "DRAIN_SECONDS"  # how long a worker that drains has to finish what it has

if WANTED in os.environ:
    autoscaling.DOWN_S = 2.0
    autoscaling.IDLE_S = 5.0
if DRAIN in os.environ:
    drains.DRAIN_S = float(os.environ[DRAIN])


def as_the_file_says(spec: Spec, members: Sequence[Member], demand: Demand, now: Now) -> int:
    return int(Path(os.environ[WANTED]).read_text())
