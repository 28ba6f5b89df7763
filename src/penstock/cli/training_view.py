"""What is shown of a training run: a live panel on a terminal, else a line of plain text now and then."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from statistics import fmean
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from penstock.rollout.rollouts import Rollouts

INTERVAL: Final = 0.5
"""Seconds between two pictures on a terminal."""
LOG_EVERY: Final = 5
"""Steps between two lines where there is no terminal; a measurement of the accuracy is always told."""
BARS: Final = "▁▂▃▄▅▆▇█"
SPARKS: Final = 40
"""Characters a curve has at most."""


class View:
    """Shows the figures of each step, and between them what the rollouts wait for. Needs a running loop."""

    def __init__(self, steps: int, rollouts: Rollouts, console: Console) -> None:
        self._steps = steps
        self._rollouts = rollouts
        self._console = console
        self._began = monotonic()
        self._lines: list[Mapping[str, Any]] = []
        self._live: Live | None = None
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
            self._task = asyncio.get_running_loop().create_task(self._redraw(), name="penstock training view")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None and self._live is not None:
            self._task.cancel()
            self._live.update(self._panel(), refresh=True)
            self._live.stop()

    def add(self, step: int, figures: Mapping[str, Any]) -> None:
        """The figures of a step."""
        self._lines.append({**figures, "step": step})
        if self._live is None and (step % LOG_EVERY == 0 or figures.get("accuracy") is not None):
            facts = ", ".join(f"{name} {value}" for name, value in self._facts())
            self._console.print(facts, highlight=False, soft_wrap=True)

    async def _redraw(self) -> None:
        assert self._live is not None
        while True:
            self._live.update(self._panel(), refresh=True)
            await asyncio.sleep(INTERVAL)

    def _facts(self) -> list[tuple[str, str]]:
        last: Mapping[str, Any] = self._lines[-1] if self._lines else {"step": 0}
        accuracies = series(self._lines, "accuracy")
        minutes, seconds = divmod(round(monotonic() - self._began), 60)
        return [
            ("step", f"{last['step']}/{self._steps}"),
            ("time", f"{minutes}:{seconds:02}"),
            ("reward", _percent(last.get("trained_reward"))),
            ("accuracy", f"{_percent(accuracies[0])} → {_percent(accuracies[-1])}" if accuracies else "–"),
            ("staleness", "–" if last.get("staleness") is None else f"{last['staleness']:.2f}"),
            ("trainer waits", _percent(last.get("trainer_waits"))),
            ("engines wait", _percent(last.get("engines_wait"))),
        ]

    def _panel(self) -> Group:
        facts, balance = self._facts(), self._rollouts.balance()
        table = Table.grid(padding=(0, 2))
        table.add_row(*(Text(name, style="dim") for name, _ in facts))
        table.add_row(*(Text(value, style="bold") for _, value in facts))
        curves = Table.grid(padding=(0, 2))
        for name, called in (("trained_reward", "reward"), ("accuracy", "accuracy")):
            curves.add_row(Text(called, style="dim"), Text(spark(series(self._lines, name)), style="green"))
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=self._steps, completed=self._rollouts.step))
        now = f"{balance.in_flight} samples in flight, {balance.ready} groups ready. {balance.advice}"
        return Group(bar, table, curves, Text(now, style="dim"))


def series(lines: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A figure wherever there is one."""
    return [float(line[name]) for line in lines if line.get(name) is not None]


def spark(values: Sequence[float]) -> str:
    """A curve from 0 to 1 as text; of many values means of neighbours."""
    size = max(1, -(-len(values) // SPARKS))
    means = [fmean(values[start : start + size]) for start in range(0, len(values), size)]
    return "".join(BARS[min(int(max(mean, 0.0) * len(BARS)), len(BARS) - 1)] for mean in means)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
