"""`penstock.ray.Generate`: batches of every format, failures as data, and a real Ray Data pipeline."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvloop

from penstock.errors import ConfigError, RequestRejected
from penstock.ray import RESULTS, Generate
from tests.chat_server import ChatServer, answer_to
from tests.cluster.ray_cluster import local_cluster

pa = pytest.importorskip("pyarrow")


def apply(batch: Any, server: ChatServer, **settings: Any) -> Any:
    async def scenario() -> Any:
        step = Generate(server.url, **settings)
        try:
            return await step(batch)
        finally:
            await step.close()

    return uvloop.run(asyncio.wait_for(scenario(), 60))


def refuse_three(message: str, asked: int) -> tuple[int, str] | None:
    return (400, "too long") if message == "3" else None


def test_a_table_comes_back_in_order_with_failures_as_a_column() -> None:
    table = pa.table({"prompt": [*map(str, range(6)), None], "score": [0.5] * 7})
    with ChatServer(refuse_three) as server:
        made = apply(table, server, num_generations=2)
    assert made.column_names == ["prompt", "score", *RESULTS]
    rows = made.to_pylist()
    assert [row["prompt"] for row in rows] == [*map(str, range(6)), None]
    assert rows[4]["generations"] == [answer_to("4")] * 2 and rows[4]["failures"] == [None, None]
    assert rows[4]["reasonings"] == ["hm", "hm"] and rows[4]["finish_reasons"] == ["stop", "stop"]
    assert [one["endpoint"] for one in rows[4]["api_metadata"]] == [server.url] * 2
    assert rows[3]["generations"] == [None, None]
    assert rows[3]["failures"] == ["RequestRejected: 400: too long"] * 2
    assert "must hold text" in rows[6]["failures"][0], "a row without a prompt"


def test_the_columns_have_the_same_types_whatever_is_in_them() -> None:
    with ChatServer(lambda message, asked: (400, "no")) as server:
        failed = apply(pa.table({"prompt": ["a"]}), server).schema
    with ChatServer() as server:
        assert apply(pa.table({"prompt": ["a"]}), server).schema == failed


def test_arrays_and_frames_come_back_as_what_they_were() -> None:
    np, pd = pytest.importorskip("numpy"), pytest.importorskip("pandas")
    with ChatServer() as server:
        arrays = apply({"prompt": np.array(["a", "b"]), "x": np.ones((2, 3))}, server, num_generations=3)
        assert arrays["x"].shape == (2, 3)
        assert list(arrays["generations"]) == [[answer_to("a")] * 3, [answer_to("b")] * 3]
        frame = apply(pd.DataFrame({"prompt": ["a", "b"]}), server)
        assert list(frame["generations"]) == [[answer_to("a")], [answer_to("b")]]


def test_chats_templates_and_sampling() -> None:
    with ChatServer() as server:
        made = apply(pa.table({"prompt": ["x"], "n": [7]}), server, prompt_template="{prompt}-{n}",
                     system_prompt="be brief", sampling={"max_tokens": 5})  # fmt: skip
        assert made.to_pylist()[0]["generations"] == [answer_to("x-7")]
        assert server.requests[-1]["max_tokens"] == 5
        assert server.requests[-1]["messages"][0] == {"role": "system", "content": "be brief"}
        chat = [[{"role": "user", "content": "hi"}]]
        assert apply(pa.table({"prompt": chat}), server).to_pylist()[0]["generations"] == [answer_to("hi")]


def test_what_every_row_would_meet_is_raised() -> None:
    table = pa.table({"prompt": ["a", "b"]})
    with ChatServer(lambda message, asked: (401, "who are you?")) as server:
        with pytest.raises(RequestRejected, match="who are you"):
            apply(table, server)
        with pytest.raises(ConfigError, match="did you mean 'prompt'"):
            apply(table, server, prompt_column="promt")
        with pytest.raises(ConfigError, match="'generations' is one of the result's own"):
            apply(pa.table({"prompt": ["a"], "generations": ["x"]}), server)
    with pytest.raises(ConfigError, match="base_url or engines"):
        Generate()
    with pytest.raises(ConfigError, match="length_policy must be"):
        Generate("http://x", length_policy="kep")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sampling"):
        Generate("http://x", sampling={"temprature": 1})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_pipeline_of_ray_data() -> None:
    ray = pytest.importorskip("ray")
    with local_cluster(nodes=2, cpus=4), ChatServer(refuse_three, latency=0.1) as server:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True
        rows = (
            ray.data.range(200)
            .map(lambda row: {"id": row["id"], "prompt": str(row["id"])})
            .map_batches(
                Generate,
                fn_constructor_kwargs={"base_url": server.url, "num_generations": 2},
                batch_format="pyarrow",
                batch_size=16,
                compute=ray.data.ActorPoolStrategy(size=2),
            )
            .take_all()
        )
        assert server.asked.total() == 400, "each sample is asked for once"
        assert server.peak > 2 * 16, "several batches are in flight"
    assert [row["id"] for row in rows] == list(range(200))
    assert all(row["generations"] == [answer_to(row["prompt"])] * 2 for row in rows if row["id"] != 3)
    assert rows[3]["failures"] == ["RequestRejected: 400: too long"] * 2
