"""A process that joins the Ray cluster at an address, looks around, and says what it saw as one line of JSON.

Ray compares its own and Python's version when it is joined, so what it says when it refuses is worth showing.
"""

from __future__ import annotations

import json
import logging
import sys

import ray


def main(address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
        alive = [node for node in ray.nodes() if node["Alive"]]
        said = {"nodes": len(alive), "cpus": sum(node["Resources"].get("CPU", 0.0) for node in alive)}
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        said = {"error": str(error).strip().splitlines()[0]}
    sys.stdout.write(f"{json.dumps(said)}\n")


if __name__ == "__main__":
    main(sys.argv[1])
