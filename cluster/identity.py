"""What every process of one deployment is told to find, trust and reach the others."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

APPROXIMATE = "-approximate"


@dataclass(frozen=True, slots=True)
class Identity:
    """The deployment as seen by one of its processes. The secret authorises every internal call; it is never logged."""

    namespace: str  # of this model and this secret: prefix of every key in Redis
    redis_url: str = field(repr=False)  # may hold a password
    secret: str = field(repr=False)
    host: str  # address that internal servers bind; empty: the node's own

    @property
    def deployment(self) -> str:
        """The namespace of exact KV, of workers, routers and orders."""
        return self.namespace.removesuffix(APPROXIMATE)

    @property
    def approximate(self) -> Identity:
        """The same where stores of approximate KV are found: apart from those of exact KV, in Redis and on disk."""
        return replace(self, namespace=f"{self.namespace}{APPROXIMATE}")
