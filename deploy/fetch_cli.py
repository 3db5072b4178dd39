"""`tandem fetch`: a model onto this machine, before a worker needs it.

Every node of a cluster needs the model at the same path; this is what the setup commands of `deploy/cluster-*.yaml` and
the Dockerfile call. Starts nothing.
"""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.errors import StartupError
from deploy.terminal import console, fail


def fetch(
    model: Annotated[str, typer.Argument(help="as for `tandem serve`; empty: the demo model")] = "",
) -> None:
    """Download and convert a model as `tandem serve` would, and print its folder."""
    from deploy.models import resolve  # imports torch: seconds

    try:
        found = resolve(model, lambda fraction: None)
    except StartupError as error:
        fail(error.message)
    console.print(str(found.directory), markup=False, highlight=False, soft_wrap=True)
