"""What a load test with so many requests in flight needs of a machine, said before anything is started.

Pure: the machine's limits are handed in. It is reckoned with everything on this machine: generator, router
and scripted engines. The costs are those of docs/loadtest.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from penstock.errors import ConfigError
from penstock.wire.limits import SPARE_FILES

CHUNK_COST: Final = {"client": 15e-6, "router": 20e-6, "engine": 13e-6}
"""Seconds of CPU a piece of a stream costs each part."""
STREAM_MEMORY: Final = {"client": 32 << 10, "router": 32 << 10, "engine": 24 << 10}
"""Bytes a stream takes in each part, its socket's buffers included."""
PROCESS_MEMORY: Final = 48 << 20
"""Bytes a process of any part takes without streams."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large a load test is. Raises ConfigError."""

    requests: int
    """In flight at a time."""
    processes: int = 2
    """Of the generator."""
    router: bool = True
    router_processes: int = 1
    engines: int = 1
    gap: float = 0.1
    """Seconds between two pieces of a stream."""

    def __post_init__(self) -> None:
        if min(self.requests, self.processes, self.router_processes, self.engines) < 1:
            raise ConfigError("a load test has at least one request, process and engine")
        if not self.gap > 0:
            raise ConfigError(f"the time between two pieces of a stream must be positive, not {self.gap:g} s")

    @property
    def parts(self) -> dict[str, int]:
        """Processes of each part."""
        router = {"router": self.router_processes} if self.router else {}
        return {"client": self.processes, **router, "engine": self.engines}

    @property
    def files(self) -> dict[str, int]:
        """Open files that one process of each part needs. The router has two connections for each request."""
        return {
            part: -(-self.requests * (2 if part == "router" else 1) // count) + SPARE_FILES
            for part, count in self.parts.items()
        }

    @property
    def ports(self) -> int:
        """Local ports: connections to the address that gets the most."""
        return self.requests if self.router else -(-self.requests // self.engines)

    @property
    def memory(self) -> int:
        """Bytes, of all parts."""
        return sum(
            count * PROCESS_MEMORY + self.requests * STREAM_MEMORY[part] for part, count in self.parts.items()
        )

    @property
    def cores(self) -> float:
        """Cores that are busy with nothing but the pieces of streams."""
        return self.requests / self.gap * self.chunk_cost

    @property
    def chunk_cost(self) -> float:
        """Seconds of CPU for a piece of a stream in all parts."""
        return sum(CHUNK_COST[part] for part in self.parts)

    def shortest_gap(self, cores: float) -> float:
        """Seconds between two pieces of a stream below which so many cores do not suffice."""
        return self.requests * self.chunk_cost / cores

    def check_files(self, allowed: int) -> None:
        """Raises ConfigError where a process needs more open files than are allowed, -1 for no limit."""
        for part, needed in self.files.items():
            if allowed != -1 and needed > allowed:
                cure = f"raise the limit (as root: ulimit -Hn {needed})"
                if part == "router":
                    cure += f" or give --router-args processes={self.router_processes_for(allowed)}"
                raise ConfigError(
                    f"{self.requests:,} requests in flight need {needed:,} open files in a process of the "
                    f"{part} and this shell allows {allowed:,}: {cure}"
                )

    def router_processes_for(self, files: int) -> int:
        """Processes of the router that so many open files each are enough for."""
        return max(1, -(-2 * self.requests // max(1, files - SPARE_FILES)))
