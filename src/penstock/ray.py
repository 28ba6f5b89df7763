"""Generation as a step of a Ray Data pipeline: `dataset.map_batches(penstock.ray.Generate, …)`.

Guarantees: rows come back in their order, each with its own columns and the results'; a sample that fails is
told in the column `failures` and takes no other one with it. What every row would meet alike (a column that
is not there, no permission, no engine) ends the pipeline with one sentence.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from itertools import count
from typing import TYPE_CHECKING, Any, Final, get_args

import orjson

from penstock.batch.engines import only_model
from penstock.batch.generation import Generation, GenerationSettings, LengthPolicy
from penstock.batch.job import is_hopeless
from penstock.batch.steps import Steps
from penstock.batch.trace import Trace, failure_class
from penstock.client import Client
from penstock.errors import ConfigError, PenstockError, ResponseError, SampleFailed, TransportError
from penstock.prompt import Prompt, PromptFormat, Template
from penstock.sample import SamplingParams

if TYPE_CHECKING:
    import pyarrow as pa

RESULTS: Final = ("generations", "finish_reasons", "reasonings", "api_metadata", "failures")
"""The columns that are added: each a list with an element a sample, in order."""


class Generate:
    """Generates for each row of a batch, with one client per actor, in the event loop that Ray keeps for it.

        dataset.map_batches(
            penstock.ray.Generate,
            fn_constructor_kwargs={"base_url": "http://gpu-1:8000", "sampling": {"max_tokens": 512}},
            batch_format="pyarrow",
            batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=4),
        )

    Ray has four batches of a block in an actor's hands at a time, so that the last long samples of one do not
    leave the engines idle.

    base_url: running servers; engines: instead of them, the name of those that `penstock serve --ray`
    registered. model: None, the only one they serve. prompt_column, prompt_template, system_prompt,
    num_generations, sampling, rollout, validate, length_policy: as of `penstock generate`. max_in_flight:
    requests in flight per endpoint and actor; below it the limit is found. client: further options of
    `penstock.Client`. Raises ConfigError for what cannot work.

    A batch may be a pyarrow Table, a dict of arrays, or a DataFrame, and is returned as what it was. The
    results are the columns of `RESULTS`: `generations`, None where a sample failed; `finish_reasons`;
    `reasonings`; `api_metadata` (tokens, endpoint, latency); `failures`, None where it did not.
    """

    def __init__(
        self,
        base_url: str | Sequence[str] = (),
        *,
        engines: str | None = None,
        model: str | None = None,
        prompt_column: str = "prompt",
        prompt_template: str | None = None,
        system_prompt: str | None = None,
        num_generations: int = 1,
        sampling: SamplingParams | Mapping[str, Any] | None = None,
        rollout: str | None = None,
        validate: str | None = None,
        length_policy: LengthPolicy = "keep",
        max_in_flight: int = 512,
        client: Mapping[str, Any] | None = None,
    ) -> None:
        if bool(base_url) == (engines is not None):
            raise ConfigError("Say where to generate: base_url or engines.")
        if num_generations < 1:
            raise ConfigError(f"num_generations must be at least 1, not {num_generations}.")
        self._form = PromptFormat(
            prompt_column=prompt_column,
            template=None if prompt_template is None else Template(prompt_template),
            system_prompt=system_prompt,
        )
        self._samples = num_generations
        self._settings = GenerationSettings(
            params=_sampling(sampling), rollout=rollout, validate=validate, length_policy=length_policy
        )
        if length_policy not in get_args(LengthPolicy):
            raise ConfigError(
                f"length_policy must be {', '.join(get_args(LengthPolicy))}, not {length_policy!r}."
            )
        self._settings.check()
        self._where = (base_url, engines, model)
        self._options = {"max_in_flight": max_in_flight, "adaptive": True, **(client or {})}
        self._positions = count()
        self._stack = AsyncExitStack()
        self._opening: asyncio.Task[Generation] | None = None

    async def __call__(self, batch: Any) -> Any:
        """The batch with the results. It may be called again before it has returned."""
        rows = _rows(batch)
        if taken := [name for name in RESULTS if rows and name in rows[0]]:
            raise ConfigError(f"The column {taken[0]!r} is one of the result's own; rename it.")
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        generation = await asyncio.shield(self._opening)
        return _with_results(batch, await self._all(generation, rows))

    async def close(self) -> None:
        """Closes the connections. Where Ray ends the actor it is not needed."""
        await self._stack.aclose()

    async def _open(self) -> Generation:
        base_url, engines, model = self._where
        where: Any = base_url
        options = self._options
        if engines is not None:
            from penstock.cluster.follow import fleet

            where, options = await self._stack.enter_async_context(fleet(engines, **options)), {}
        client = await self._stack.enter_async_context(Client(where, model=model, **options))
        if client.model is None:
            client.model = await only_model(client)
        return self._settings.generation(client)

    async def _all(self, generation: Generation, rows: list[dict[str, Any]]) -> dict[str, list[list[Any]]]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._row(generation, row)) for row in rows]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        results = [task.result() for task in tasks]
        return {name: [result[name] for result in results] for name in RESULTS}

    async def _row(self, generation: Generation, row: dict[str, Any]) -> dict[str, list[Any]]:
        """The results of one row. Raises what every row would meet."""
        where = f"row {next(self._positions)}"
        line = orjson.dumps(row, default=str)
        if self._form.prompt_column is not None and self._form.prompt_column not in row:
            self._form.messages(where, row)  # raises: it is missing in all of them
        try:
            prompt = self._form.prompt(0, where, line)
        except ConfigError as error:
            return _results([error] * self._samples)
        return _results(
            await asyncio.gather(*(_sample(generation, prompt, index) for index in range(self._samples)))
        )


async def _sample(generation: Generation, prompt: Prompt, index: int) -> Trace | PenstockError:
    """Raises what every sample would meet."""
    try:
        return await generation(prompt, index, Steps([], _forget))
    except (ResponseError, TransportError, SampleFailed) as error:
        if is_hopeless(error):
            raise
        return error


def _forget(payload: bytes) -> None:
    """A step of a rollout: a batch that is done again is done from its beginning."""


def _results(samples: Sequence[Trace | PenstockError]) -> dict[str, list[Any]]:
    traces = [None if isinstance(sample, PenstockError) else sample for sample in samples]
    return {
        "generations": [None if trace is None or trace.dropped else trace.text for trace in traces],
        "finish_reasons": [trace and trace.finish_reason for trace in traces],
        "reasonings": [trace and trace.reasoning for trace in traces],
        "api_metadata": [trace and _metadata(trace) for trace in traces],
        "failures": [
            f"{failure_class(sample)}: {sample}" if isinstance(sample, PenstockError) else None
            for sample in samples
        ],
    }


def _metadata(trace: Trace) -> dict[str, Any]:
    """Every field, so that all rows have the same."""
    return {name: getattr(trace.metadata, name) for name in trace.metadata.__struct_fields__}


def _sampling(given: SamplingParams | Mapping[str, Any] | None) -> SamplingParams:
    if isinstance(given, SamplingParams):
        return given
    try:
        return SamplingParams(**(given or {}))
    except TypeError as error:
        raise ConfigError(f"sampling: {error}.") from None


def _rows(batch: Any) -> list[dict[str, Any]]:
    """A batch of any of Ray's formats as rows of plain Python values. Raises ConfigError."""
    if hasattr(batch, "to_pylist"):
        rows: list[dict[str, Any]] = batch.to_pylist()
        return rows
    if isinstance(batch, Mapping):
        columns = {name: _plain(values) for name, values in batch.items()}
    elif hasattr(batch, "columns"):
        columns = {str(name): _plain(batch[name]) for name in batch.columns}
    else:
        raise ConfigError(f"A batch must be a Table, a dict or a DataFrame, not {type(batch).__name__}.")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _plain(values: Any) -> list[Any]:
    listed = values.tolist() if hasattr(values, "tolist") else list(values)
    return [value.tolist() if hasattr(value, "tolist") else value for value in listed]


def _with_results(batch: Any, results: dict[str, list[list[Any]]]) -> Any:
    """A batch of the same format with the results' columns."""
    if hasattr(batch, "to_pylist"):
        for name, column in _arrow(results).items():
            batch = batch.append_column(name, column)
        return batch
    if isinstance(batch, Mapping):
        return {**batch, **{name: _objects(column) for name, column in results.items()}}
    return batch.assign(**{name: _objects(column) for name, column in results.items()})


def _arrow(results: dict[str, list[list[Any]]]) -> dict[str, pa.Array]:
    """Typed columns: the same in every batch, also where one holds only None."""
    import pyarrow as pa

    text, number = pa.list_(pa.string()), pa.int64()
    metadata = pa.struct(
        {
            "prompt_tokens": number, "completion_tokens": number, "total_tokens": number,
            "model": pa.string(), "id": pa.string(), "endpoint": pa.string(), "attempts": number,
            "latency": pa.float64(), "requests": number,
        }
    )  # fmt: skip
    types = dict.fromkeys(RESULTS, text) | {"api_metadata": pa.list_(metadata)}
    return {name: pa.array(column, types[name]) for name, column in results.items()}


def _objects(column: list[list[Any]]) -> Any:
    """An array with a list in each place, which numpy would else make a matrix of."""
    import numpy as np

    array = np.empty(len(column), dtype=object)
    for place, value in enumerate(column):
        array[place] = value
    return array
