"""The machines one engine runs on, and which of them this one is: from Slurm's environment or a list.

Pure: mappings and text in, `Nodes` out. Every node runs the same program with the same model and sizes; the
first of them, the head, has rank 0 and serves the requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final, Self

from penstock.errors import ConfigError

MAX_HOSTS: Final = 100_000
"""A list that names more is a slip of the keyboard."""

INIT_PORT: Final = 20000
"""Port of the head at which nodes meet, where none is named."""

_RANGE: Final = re.compile(r"(\d+)(?:-(\d+))?\Z")
_HOST: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?\Z")


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Machines by name or address, the head first. Raises ConfigError when this is none of them."""

    hosts: tuple[str, ...]
    rank: int
    """Place of this machine in `hosts`, from 0."""
    port: int = INIT_PORT
    """Of the head: SGLang's processes meet there, or Ray's."""
    ray_address: str | None = None
    """A Ray cluster that runs already (`auto`, or HOST:PORT); None: vLLM's is started here."""

    def __post_init__(self) -> None:
        if not self.hosts:
            raise ConfigError("An engine on several nodes needs the names of its hosts.")
        if len(set(self.hosts)) < len(self.hosts):
            raise ConfigError(f"A host is named twice: {', '.join(self.hosts)}.")
        if not 0 <= self.rank < len(self.hosts):
            raise ConfigError(
                f"The node rank must be between 0 and {len(self.hosts) - 1} with {len(self.hosts)} hosts, "
                f"not {self.rank}."
            )
        if not 0 < self.port < 65536:
            raise ConfigError(f"The nodes' port must be between 1 and 65535, not {self.port}.")

    @property
    def count(self) -> int:
        return len(self.hosts)

    @property
    def is_head(self) -> bool:
        return self.rank == 0

    @property
    def head(self) -> str:
        """HOST:PORT at which the nodes meet."""
        host = self.hosts[0]
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @classmethod
    def from_slurm(cls, environment: Mapping[str, str], *, port: int = INIT_PORT) -> Self:
        """The nodes of the Slurm job this process is a task of, one task a node. Raises ConfigError."""
        nodelist = environment.get("SLURM_JOB_NODELIST") or environment.get("SLURM_NODELIST")
        if not nodelist:
            raise ConfigError("SLURM_JOB_NODELIST is not set: this is no Slurm job; name the hosts.")
        hosts = expand(nodelist)
        count = _number(environment, "SLURM_NNODES", len(hosts))
        if count != len(hosts):
            raise ConfigError(f"SLURM_NNODES is {count}, but SLURM_JOB_NODELIST names {len(hosts)} hosts.")
        tasks = _number(environment, "SLURM_NTASKS", count)
        if count > 1 and "SLURM_PROCID" not in environment:
            raise ConfigError("SLURM_PROCID is not set: start one task a node (srun --ntasks-per-node=1).")
        if tasks > count:
            raise ConfigError(f"{tasks} tasks run on {count} nodes: start one a node (--ntasks-per-node=1).")
        return cls(hosts=hosts, rank=_number(environment, "SLURM_PROCID", 0), port=port)

    @classmethod
    def from_hosts(
        cls,
        hosts: Sequence[str],
        *,
        here: Sequence[str] = (),
        rank: int | None = None,
        port: int = INIT_PORT,
    ) -> Self:
        """Nodes by a list, which may use Slurm's brackets. here: names and addresses of this machine; when
        no rank is given, exactly one of the hosts has to be among them. Raises ConfigError."""
        listed = tuple(host for item in hosts for host in expand(item))
        if rank is None:
            own = {name for given in here for name in (given, given.partition(".")[0])}
            found = [place for place, host in enumerate(listed) if own & {host, host.partition(".")[0]}]
            if len(found) != 1:
                many = "several of" if found else "none of"
                raise ConfigError(f"This machine is {many} {', '.join(listed)}: give its node rank.")
            rank = found[0]
        return cls(hosts=listed, rank=rank, port=port)


def expand(nodelist: str) -> tuple[str, ...]:
    """The hosts of a list as Slurm writes it: `gpu[01-03,7],login` is gpu01, gpu02, gpu03, gpu7, login.

    Numbers keep their leading zeros, several brackets in a name are combined. Raises ConfigError.
    """
    hosts: list[str] = []
    for part in _split(nodelist, nodelist):
        for host in _combined(part, nodelist):
            if not _HOST.match(host) and not is_address(host):
                raise ConfigError(f"{nodelist!r} is no list of hosts: {host!r} is no name.")
            hosts.append(host)
            if len(hosts) > MAX_HOSTS:
                raise ConfigError(f"{nodelist!r} names more than {MAX_HOSTS:,} hosts.")
    return tuple(hosts)


def is_address(host: str) -> bool:
    """Whether it is an IP address, not a name."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _split(text: str, whole: str) -> Iterator[str]:
    """Parts between commas that are in no brackets."""
    depth, part = 0, ""
    for letter in text:
        if letter == "," and not depth:
            yield part.strip()
            part = ""
            continue
        depth += (letter == "[") - (letter == "]")
        if depth not in (0, 1):
            raise ConfigError(f"{whole!r} is no list of hosts: its brackets do not match.")
        part += letter
    if depth:
        raise ConfigError(f"{whole!r} is no list of hosts: its brackets do not match.")
    yield part.strip()


def _combined(part: str, whole: str) -> Iterator[str]:
    before, opened, rest = part.partition("[")
    if not opened:
        yield part
        return
    # An address of IPv6 stands in brackets too.
    inside, _, after = rest.partition("]")
    if ":" in inside:
        yield inside
        return
    numbers = [number for item in inside.split(",") for number in _numbers(item.strip(), whole)]
    for number in numbers:
        for tail in _combined(after, whole):
            yield before + number + tail


def _numbers(item: str, whole: str) -> Iterator[str]:
    match = _RANGE.match(item)
    if match is None:
        raise ConfigError(f"{whole!r} is no list of hosts: {item!r} is neither a number nor a range.")
    first, last = match[1], match[2] or match[1]
    if int(last) < int(first) or int(last) - int(first) >= MAX_HOSTS:
        raise ConfigError(f"{whole!r} is no list of hosts: {item!r} is no range.")
    for number in range(int(first), int(last) + 1):
        yield str(number).zfill(len(first))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    value = environment.get(name)
    if value is None:
        return default
    if not (value.isascii() and value.isdigit()):
        raise ConfigError(f"{name} must be a number, not {value!r}.")
    return int(value)
