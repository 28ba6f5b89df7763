"""`penstock train --demo`: the shipped model learns arithmetic by reinforcement learning, on this machine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import tyro
from rich.console import Console

from penstock.cli.generate import INTERRUPTED, terminated_as_interrupted
from penstock.cli.training_task import MOST_NEW_TOKENS, credit, held_out, measure, prompts, reward
from penstock.cli.training_view import View
from penstock.client import Client
from penstock.control.staged import HttpChunks
from penstock.errors import ConfigError, PenstockError
from penstock.fleet.monitor import OnOutage
from penstock.learner.chart import Panel, page, svg
from penstock.learner.grpo import Objective
from penstock.learner.learner import Learner, Optimization
from penstock.learner.metrics import (
    JsonlWriter,
    Metrics,
    TensorBoardWriter,
    WandbWriter,
    Writer,
    read_metrics,
)
from penstock.learner.training import Tally, Training, resume
from penstock.models import ARITHMETIC
from penstock.rollout.rollouts import Rollouts
from penstock.sample import SamplingParams
from penstock.servers.replicas import launch
from penstock.servers.spec import ServerSpec
from penstock.wire.loop import run

IN_FLIGHT: Final = 64
"""Requests an engine has at a time: its share of a batch of the default size."""
WARM_UP: Final = 10
"""Steps in which the learning rate rises."""
OUTAGE_TOLD: Final = 10.0
"""Seconds without an engine after which it is told."""

PANELS: Final = (
    Panel(
        title="Reward of what is sampled",
        lines={"trained_reward": "reward", "trained_answer": "right answers"},
        percent=True,
        smooth=True,
        top=1.0,
    ),
    Panel(
        title="Accuracy on held-out hard problems",
        lines={"accuracy": "greedy", "accuracy_sampled": "one sample at temperature 1"},
        percent=True,
        top=1.0,
    ),
    Panel(
        title="Staleness",
        lines={"staleness": "mean age of tokens, updates", "staleness_max": "oldest"},
        smooth=True,
    ),
    Panel(
        title="Waiting, share of the time",
        lines={"trainer_waits": "trainer for groups", "engines_wait": "engines for the trainer"},
        percent=True,
        top=1.0,
    ),
)


@dataclass(frozen=True)
class TrainArgs:
    """Reinforcement learning of the shipped arithmetic model: embedded engines sample solutions of hard
    problems, the reference learner trains on them at the same time.

    It can be stopped at any moment; the same command goes on from the last checkpoint.
    """

    demo: bool = False
    """Train the shipped model on arithmetic: what there is to train here."""
    out: Path = Path("demo-rl-out")
    """Folder of metrics.jsonl, training.svg, training.html, the checkpoints and the ledger of prompts."""
    steps: int = 500
    """Optimizer steps. The learning rate falls towards the last: a run goes on with the same number only."""
    seed: int = 0
    """Chooses the problems and the samples."""
    engines: int = 2
    """Embedded engines, a process and a thread each."""
    async_steps: int = 1
    """Updates the tokens of a batch may be old. 0: engines and trainer take turns."""
    groups: int = 16
    """Problems in a batch."""
    group_size: int = 8
    """Samples of a problem."""
    learning_rate: float = 4e-4
    """Of AdamW, reached after 10 steps; at the end it is a tenth of it."""
    threads: int = 1
    """CPU threads of the learner. Those that wait for a core which an engine has cost more than they give."""
    evaluate_every: int = 50
    """Steps between two measurements of the accuracy."""
    evaluate_on: int = 512
    """Held-out problems of the hard half it is measured on."""
    save_every: int = 10
    """Steps between two checkpoints."""
    tensorboard: bool = False
    """Write event files to OUT/tensorboard, too."""
    wandb: str | None = None
    """Report to this project of Weights & Biases, too."""


def main(argv: list[str]) -> int:
    """Run the command. Returns 0 when all steps are done, 130 when interrupted."""
    args = tyro.cli(TrainArgs, prog="penstock train", args=argv)
    _check(args)
    console = Console()
    try:
        return run(_train(args, console))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print(f"Stopped. The same command goes on from the last checkpoint in {args.out}.")
        return INTERRUPTED


def _check(args: TrainArgs) -> None:
    if not args.demo:
        raise ConfigError(
            "penstock train has one task, its demo: say --demo. For a task of your own see docs/learner.md."
        )
    for name in ("steps", "engines", "groups", "threads", "evaluate_every", "evaluate_on", "save_every"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")
    if args.group_size < 2:
        raise ConfigError("--group-size must be at least 2: a sample is compared with others.")


async def _train(args: TrainArgs, console: Console) -> int:
    torch.set_num_threads(args.threads)
    learner = Learner(
        ARITHMETIC,
        Objective(),
        Optimization(
            learning_rate=args.learning_rate,
            warm_up=WARM_UP,
            decay_steps=max(args.steps - WARM_UP, 1),
            betas=(0.9, 0.98),
        ),
        credit=credit,
    )
    folder = args.out / "checkpoints"
    step = resume(folder, learner)
    spec = ServerSpec(
        engine="embedded",
        model=str(ARITHMETIC),
        extra_args={"threads": 1, "max-num-seqs": IN_FLIGHT},
    )
    with terminated_as_interrupted(), Metrics(_writers(args, step)) as metrics:
        async with AsyncExitStack() as stack:
            with console.status(f"{args.engines} engines are starting"):
                launched = await stack.enter_async_context(
                    launch(
                        spec,
                        replicas=args.engines,
                        stagger=0.0,
                        adaptive=False,
                        max_in_flight=IN_FLIGHT,
                        on_outage=_notice(console),
                    )
                )
                client = await stack.enter_async_context(launched.client())
            tally = Tally()
            rollouts = await stack.enter_async_context(_rollouts(args, client, tally, step))
            training = Training(learner, rollouts, HttpChunks, folder, tally)
            return await _loop(args, training, rollouts, client, metrics, console)


def _notice(console: Console) -> OnOutage:
    """Says when no engine can be used, but not while they start."""

    def on_outage(seconds: float, error: PenstockError | None) -> None:
        if error is not None and seconds >= OUTAGE_TOLD:
            console.print(f"no engine has answered for {seconds:.0f} s: {error}", highlight=False)

    return on_outage


def _rollouts(args: TrainArgs, client: Client, tally: Tally, step: int | None) -> Rollouts:
    return Rollouts(
        client,
        reward=reward,
        prompts=prompts(args.seed),
        group_size=args.group_size,
        async_steps=args.async_steps,
        batch_groups=args.groups,
        params=SamplingParams(temperature=1.0, max_tokens=MOST_NEW_TOKENS),
        seed=args.seed,
        ledger=args.out / "ledger.sqlite",
        step=step or 0,
        curriculum=tally,
    )


async def _loop(
    args: TrainArgs,
    training: Training,
    rollouts: Rollouts,
    client: Client,
    metrics: Metrics,
    console: Console,
) -> int:
    asked = held_out(args.evaluate_on)
    await training.begin()
    with View(args.steps, rollouts, console) as view:
        if rollouts.step == 0:
            first = await measure(client, asked)
            metrics.write(0, first)
            view.add(0, first)
        else:
            for line in read_metrics(args.out / METRICS):
                view.add(line["step"], line)
        while rollouts.step < args.steps:
            figures = await training.step()
            assert figures is not None, "the problems have no end"
            balance = rollouts.balance()
            figures |= {
                "trainer_waits": balance.trainer_waits,
                "engines_wait": balance.engines_wait,
                "generation_rate": balance.generation_rate,
            }
            if rollouts.step % args.evaluate_every == 0 or rollouts.step == args.steps:
                figures |= await measure(client, asked)
            metrics.write(rollouts.step, figures)
            view.add(rollouts.step, figures)
            if "accuracy" in figures:
                _draw(args)
            if rollouts.step % args.save_every == 0 or rollouts.step == args.steps:
                await training.save()
    _tell(args, console)
    return 0


METRICS: Final = "metrics.jsonl"


def _writers(args: TrainArgs, step: int | None) -> list[Writer]:
    writers: list[Writer] = []
    if args.tensorboard:
        writers.append(TensorBoardWriter(args.out / "tensorboard"))
    if args.wandb is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        writers.append(WandbWriter(args.wandb, args.out, _settings(args)))
    return [JsonlWriter(args.out / METRICS, after=step), *writers]


def _settings(args: TrainArgs) -> dict[str, str]:
    return {name: str(value) for name, value in asdict(args).items()}


def _draw(args: TrainArgs) -> None:
    metrics = read_metrics(args.out / METRICS)
    minutes = sum(line.get("seconds") or 0.0 for line in metrics) / 60
    facts = {
        **_gains(args, metrics),
        "steps": f"{metrics[-1]['step']} of {args.steps}, in {minutes:.1f} minutes",
        "a step": f"{args.groups} problems, {args.group_size} samples of each",
        "engines, async_steps": f"{args.engines}, {args.async_steps}",
        "learning rate, seed": f"{args.learning_rate:g}, {args.seed}",
    }
    (args.out / "training.svg").write_text(svg(PANELS, metrics), encoding="utf-8")
    title = "An arithmetic model learns from rewards"
    (args.out / "training.html").write_text(page(title, PANELS, metrics, facts), encoding="utf-8")


def _gains(args: TrainArgs, metrics: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The accuracy, from first to last, and the standard error of the last."""
    gains = {}
    for name, called in (("accuracy", "greedy"), ("accuracy_sampled", "sampled at temperature 1")):
        found = [line[name] for line in metrics if line.get(name) is not None]
        error = math.sqrt(found[-1] * (1 - found[-1]) / args.evaluate_on)
        gains[f"{args.evaluate_on} held-out hard problems, {called}"] = (
            f"{found[0]:.1%} → {found[-1]:.1%} ± {error:.1%}"
        )
    return gains


def _tell(args: TrainArgs, console: Console) -> None:
    _draw(args)
    for what, gain in _gains(args, read_metrics(args.out / METRICS)).items():
        console.print(f"{what}: {gain}", highlight=False)
    for name in ("training.html", "training.svg", METRICS, "checkpoints"):
        console.print(f"  {args.out / name}", highlight=False)
