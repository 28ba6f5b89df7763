"""Rewards as a command line names them: `math:1.0,format(answer_tags=false):gate,judge(url=…):0.5?`.

An item is a reward's name or `module:function`; options in parentheses, a value with commas or parentheses in
quotes; behind a colon its weight (1 unless told) or `gate`; `?` when the sum may go without it. `parse` is
pure; `open_rewards` makes the rewards and owns what they need: workers, connections.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from penstock.client import Client
from penstock.errors import ConfigError
from penstock.fleet.fleet import Fleet
from penstock.rollout.rewards.code import Code
from penstock.rollout.rewards.combine import Combined, Part
from penstock.rollout.rewards.judge import RUBRIC, Judge
from penstock.rollout.rewards.judge import TIMEOUT as JUDGE_TIMEOUT
from penstock.rollout.rewards.offloaded import LIMIT, InWorker, Matches, Math
from penstock.rollout.rewards.plain import ExactMatch, Format, Length, Numeric, Overlong
from penstock.rollout.rewards.sandbox import Limits
from penstock.rollout.rewards.service import TIMEOUT as SERVICE_TIMEOUT
from penstock.rollout.rewards.service import Service
from penstock.rollout.rewards.workers import Workers
from penstock.rollout.score import Reward
from penstock.sample import SamplingParams

_NAME: Final = re.compile(r"\s*([A-Za-z_][\w.]*(?::(?!gate\b)[A-Za-z_]\w*)?)\s*")
_OPTION: Final = re.compile(r"\s*([A-Za-z_]\w*)\s*=\s*(?:'([^']*)'|\"([^\"]*)\"|([^,()'\"]*[^,()'\"\s]))\s*")
_WEIGHT: Final = re.compile(r":\s*(gate\b|[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_OPTIONAL: Final = re.compile(r"\?\s*")


class RewardSpec(msgspec.Struct, frozen=True):
    """One item of the text."""

    name: str
    options: dict[str, str] = {}
    weight: float = 1.0
    optional: bool = False
    gate: bool = False


class _Opened(msgspec.Struct, frozen=True):
    """What rewards are made with."""

    workers: Workers
    stack: AsyncExitStack


class _Kind(msgspec.Struct, frozen=True, kw_only=True):
    async def make(self, opened: _Opened) -> Reward:
        raise NotImplementedError


class _Math(_Kind, frozen=True, kw_only=True):
    column: str = "answer"
    limit: float = LIMIT

    async def make(self, opened: _Opened) -> Reward:
        return Math(opened.workers, column=self.column, limit=self.limit)


class _Regex(_Kind, frozen=True, kw_only=True):
    pattern: str
    limit: float = LIMIT

    async def make(self, opened: _Opened) -> Reward:
        return Matches(opened.workers, pattern=self.pattern, limit=self.limit)


class _Code(_Kind, frozen=True, kw_only=True):
    column: str = "tests"
    partial: bool = False
    wall: float = Limits().wall
    cpu: int = Limits().cpu
    memory: int = Limits().memory

    async def make(self, opened: _Opened) -> Reward:
        limits = Limits(wall=self.wall, cpu=self.cpu, memory=self.memory)
        code = Code(opened.workers, column=self.column, partial=self.partial, limits=limits)
        await code.check()
        return code


class _Service(_Kind, frozen=True, kw_only=True):
    url: str
    path: str = "/score"
    batch: int = 1
    timeout: float = SERVICE_TIMEOUT

    async def make(self, opened: _Opened) -> Reward:
        fleet = await opened.stack.enter_async_context(Fleet(self.url.split()))
        service = Service(fleet, path=self.path, batch=self.batch, timeout=self.timeout)
        return await opened.stack.enter_async_context(service)


class _Judge(_Kind, frozen=True, kw_only=True):
    url: str
    model: str | None = None
    template: str | None = None
    """Path of a file."""
    votes: int = 1
    temperature: float | None = None
    timeout: float = JUDGE_TIMEOUT

    async def make(self, opened: _Opened) -> Reward:
        template = RUBRIC if self.template is None else _read(self.template)
        client = await opened.stack.enter_async_context(Client(self.url.split(), model=self.model))
        params = None if self.temperature is None else SamplingParams(temperature=self.temperature)
        return Judge(client, template=template, votes=self.votes, params=params, timeout=self.timeout)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the judge's template {path} cannot be read ({error})") from None


class _Function(msgspec.Struct, frozen=True, kw_only=True):
    limit: float = LIMIT


KINDS: Final[dict[str, type[msgspec.Struct]]] = {
    "exact": ExactMatch,
    "numeric": Numeric,
    "math": _Math,
    "regex": _Regex,
    "format": Format,
    "length": Length,
    "overlong": Overlong,
    "code": _Code,
    "service": _Service,
    "judge": _Judge,
}
"""The rewards by name; their fields are the options."""


def parse(text: str) -> tuple[RewardSpec, ...]:
    """The items of a text. Raises ConfigError, which says where the text goes wrong."""
    specs, place = [], 0
    while True:
        spec, place = _item(text, place)
        specs.append(spec)
        if place == len(text):
            return tuple(specs)
        if text[place] != ",":
            raise _unreadable(text, place, "a weight, or a comma before the next reward")
        place += 1


def _item(text: str, place: int) -> tuple[RewardSpec, int]:
    name = _NAME.match(text, place)
    if name is None:
        raise _unreadable(text, place, "the name of a reward")
    options, place = _options(text, name.end())
    weight = _WEIGHT.match(text, place)
    place = weight.end() if weight else place
    gate = weight is not None and weight[1] == "gate"
    optional = _OPTIONAL.match(text, place)
    number = 1.0 if weight is None or gate else float(weight[1])
    spec = RewardSpec(name[1], options, number, optional is not None, gate)
    return spec, optional.end() if optional else place


def _options(text: str, place: int) -> tuple[dict[str, str], int]:
    options: dict[str, str] = {}
    if not text.startswith("(", place):
        return options, place
    while True:
        option = _OPTION.match(text, place + 1)
        if option is None:
            raise _unreadable(text, place + 1, "an option, name=value")
        if option[1] in options:
            raise ConfigError(f"in the rewards {text!r} the option {option[1]!r} is given twice")
        options[option[1]] = next(value for value in option.groups()[1:] if value is not None)
        place = option.end()
        if not text.startswith((",", ")"), place):
            raise _unreadable(text, place, "a comma or )")
        if text[place] == ")":
            blank = re.compile(r"\s*").match(text, place + 1)
            assert blank is not None
            return options, blank.end()


def _unreadable(text: str, place: int, wanted: str) -> ConfigError:
    rest = repr(text[place:]) if text[place:].strip() else "its end"
    return ConfigError(f"in the rewards {text!r} there must be {wanted} at {rest}")


def configured(spec: RewardSpec) -> msgspec.Struct:
    """The options of an item, converted. Raises ConfigError for a name or an option that there is not."""
    module, colon, _ = spec.name.partition(":")
    if colon and module in KINDS:
        raise ConfigError(f"behind the reward {module!r} there must be a weight or `gate`, not {spec.name!r}")
    kind = _Function if colon else KINDS.get(spec.name)
    if kind is None:
        hint = _nearest(spec.name, list(KINDS))
        raise ConfigError(f"there is no reward {spec.name!r}{hint}; there are {', '.join(KINDS)}")
    fields = kind.__struct_fields__
    for option in spec.options:
        if option not in fields:
            known = f"; it has {', '.join(fields)}" if fields else "; it has none"
            raise ConfigError(
                f"the reward {spec.name!r} has no option {option!r}{_nearest(option, list(fields))}{known}"
            )
    try:
        return msgspec.convert(spec.options, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the options of the reward {spec.name!r} cannot be used: {error}") from None


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def names(specs: Sequence[RewardSpec]) -> list[str]:
    """What the parts are called: by the reward, the second of a kind with -2 behind it, and so on."""
    given = [spec.name for spec in specs]
    before = [given[:number].count(name) for number, name in enumerate(given)]
    return [f"{name}-{count + 1}" if count else name for name, count in zip(given, before, strict=True)]


@asynccontextmanager
async def open_rewards(text: str, *, workers: int | None = None) -> AsyncIterator[Combined]:
    """The rewards that a text names, as one, while it is open. workers: processes at most, by default one for
    each core; they are started when they are needed. Raises ConfigError."""
    specs = parse(text)
    settings = [configured(spec) for spec in specs]
    async with AsyncExitStack() as stack:
        opened = _Opened(await stack.enter_async_context(Workers(workers)), stack)
        parts = [
            Part(
                name=name,
                reward=await _reward(spec.name, given, opened),
                weight=spec.weight,
                optional=spec.optional,
                gate=spec.gate,
            )
            for name, spec, given in zip(names(specs), specs, settings, strict=True)
        ]
        yield Combined(parts)


async def _reward(name: str, given: Any, opened: _Opened) -> Reward:
    if isinstance(given, _Function):
        return InWorker(opened.workers, function=name, limit=given.limit)
    if isinstance(given, _Kind):
        return await given.make(opened)
    reward: Reward = given  # one that computes here is its own options
    return reward
