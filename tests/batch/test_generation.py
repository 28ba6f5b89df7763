"""How one sample is made: chat, rollout functions, validation, lengths; against engines over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from penstock.batch.generation import GenerationSettings, sample_seed
from penstock.batch.rollout import RolloutClient
from penstock.batch.steps import Steps
from penstock.batch.trace import Failure, Trace, decode_trace, encode_trace, row_line
from penstock.client import Client
from penstock.errors import ConfigError, ConnectFailed, RequestRejected, RolloutFailed, SampleRejected
from penstock.fleet.retry import Retry
from penstock.prompt import PromptFormat
from penstock.sample import Sample, SamplingParams
from tests.scripted import Call, ScriptedEngine, Step, answer, chat_body, echo, http, refuse, run

Row = dict[str, Any]
FORM = PromptFormat(prompt_column="q")


def generated(
    settings: GenerationSettings,
    *,
    script: tuple[Step, ...] = (),
    default: Step | None = None,
    steps: Steps | None = None,
    row: Row | None = None,
    index: int = 0,
    side: dict[str, Step] | None = None,
) -> tuple[Trace, list[Call]]:
    """The trace of one sample of one row, and the requests it took."""

    async def scenario() -> tuple[Trace, list[Call]]:
        async with ScriptedEngine(script, default or echo()) as engine:
            if side is not None:
                engine.side |= side
            async with Client(engine.url, model="m") as client:
                prompt = FORM.prompt(0, "here", orjson.dumps(row or {"q": "why?"}))
                trace = await settings.generation(client)(prompt, index, steps or Steps())
                assert decode_trace(encode_trace(trace)).text == trace.text
                return trace, engine.calls

    return run(scenario())


def contents(calls: list[Call]) -> list[str]:
    return [call.json["messages"][-1]["content"] for call in calls]


def counting() -> Step:
    """Answers with the number of the request."""
    count = iter(range(1000))

    async def step(call: Call) -> None:
        await call.write(http(200, chat_body(f"answer {next(count)}")))

    return step


# -- plain ----------------------------------------------------------------------------------------


def test_a_sample_is_the_answer_to_the_rows_messages_with_a_seed_of_its_own() -> None:
    settings = GenerationSettings(params=SamplingParams(seed=7, temperature=0.5))
    trace, calls = generated(settings)
    other, others = generated(settings, index=1)
    assert trace.text == other.text == "why?"
    assert calls[0].json["temperature"] == 0.5
    assert trace.provenance.seed == calls[0].json["seed"] != others[0].json["seed"]
    assert trace.provenance.finished > 1.7e9
    again, _ = generated(settings)
    assert again.provenance.seed == trace.provenance.seed


def test_the_seed_follows_the_row_and_not_its_place() -> None:
    line = b'{"q": "why?"}'
    first, second = FORM.prompt(0, "a", line), FORM.prompt(9, "b", line)
    assert sample_seed(1, first, 0) == sample_seed(1, second, 0) != sample_seed(2, first, 0)


def test_reasoning_is_one_field_however_the_engine_gives_it() -> None:
    def answering(**message: str | None) -> Step:
        choice = {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}

        async def step(call: Call) -> None:
            await call.write(http(200, chat_body(choices=[choice])))

        return step

    ways: list[dict[str, str | None]] = [
        {"content": "4", "reasoning": "2+2"},
        {"content": "4", "reasoning_content": "2+2"},
        {"content": "<think>2+2</think>4"},
        {"content": "2+2\n</think>4"},
    ]
    for way in ways:
        trace, _ = generated(GenerationSettings(), script=(answering(**way),))
        assert trace.reasoning == "2+2"
        assert trace.text == way["content"]  # as the engine returned it
    cut, _ = generated(GenerationSettings(), script=(answering(content=None, reasoning="2+"),))
    assert (cut.reasoning, cut.text) == ("2+", "")


# -- rollouts -------------------------------------------------------------------------------------


async def three_turns(row: Row, client: RolloutClient) -> str:
    messages = client.messages
    for turn in range(3):
        sample = await client.chat(messages, temperature=0.1 * turn)
        messages += [
            {"role": "assistant", "content": sample.text},
            {"role": "user", "content": f"turn {turn} said {sample.text}"},
        ]
    return sample.text


def test_a_rollout_of_several_turns_is_one_sample_with_the_sums() -> None:
    settings = GenerationSettings(rollout=three_turns, params=SamplingParams(max_tokens=5, temperature=1.0))
    trace, calls = generated(settings, default=counting())
    assert trace.text == "answer 2"
    assert [len(call.json["messages"]) for call in calls] == [1, 3, 5]
    assert [call.json["temperature"] for call in calls] == [0.0, 0.1, 0.2]
    assert all(call.json["max_tokens"] == 5 and call.json["model"] == "m" for call in calls)
    assert len({call.headers["x-session-id"] for call in calls}) == 1
    metadata = trace.metadata
    assert (metadata.requests, metadata.prompt_tokens, metadata.completion_tokens) == (3, 9, 6)
    assert trace.finish_reason == "stop"


def test_a_rollout_that_goes_on_gets_its_finished_steps_from_the_journal() -> None:
    settings = GenerationSettings(rollout=three_turns)
    whole = Steps()
    first, _ = generated(settings, default=counting(), steps=whole)
    assert len(whole.done) == 3
    for kept in range(4):
        steps = Steps(whole.done[:kept])
        trace, calls = generated(settings, default=counting(), steps=steps)
        assert len(calls) == 3 - kept
        assert len(steps.done) == 3
    assert (trace.text, trace.metadata.requests) == (first.text, 3)


def test_a_step_whose_request_differs_is_asked_anew_with_all_that_follows() -> None:
    settings = GenerationSettings(rollout=three_turns)
    steps = Steps()
    generated(settings, default=counting(), steps=steps)
    _, calls = generated(settings, default=counting(), steps=Steps(list(steps.done)), row={"q": "what?"})
    assert len(calls) == 3
    damaged = [steps.done[0], b'{"request": "torn', steps.done[2]]
    _, calls = generated(settings, default=counting(), steps=Steps(damaged))
    assert len(calls) == 2  # the second, and the third since its conversation holds another answer


async def best_of(row: Row, client: RolloutClient) -> Row:
    samples = await asyncio.gather(*(client.chat(client.messages) for _ in range(4)))
    return {"text": samples[0].text, "others": [sample.text for sample in samples[1:]]}


def test_the_same_request_side_by_side_is_sampled_as_often_and_replays() -> None:
    settings = GenerationSettings(rollout=best_of, params=SamplingParams(seed=3))
    steps = Steps()
    trace, calls = generated(settings, default=counting(), steps=steps)
    assert len({call.json["seed"] for call in calls}) == 4
    again, more = generated(settings, default=echo(), steps=Steps(steps.done[1:]))
    assert len(more) == 1
    assert more[0].json["seed"] in {call.json["seed"] for call in calls}
    assert len(drawn(trace) & drawn(again)) == 3


def drawn(trace: Trace) -> set[str]:
    return {trace.text, *orjson.loads(bytes((trace.columns or {})["others"]))}


async def with_a_tool(row: Row, client: RolloutClient) -> Row:
    found = await client.step("search", look_up, row["q"])
    sample = await client.chat([{"role": "user", "content": f"{row['q']} {found['hits']}"}])
    return {"text": sample.text, "hits": found["hits"], "finish_reason": "done"}


looked_up: list[str] = []


async def look_up(query: str) -> Row:
    looked_up.append(query)
    return {"hits": len(looked_up)}


def test_a_step_of_python_is_journalled_too_and_a_mapping_makes_columns() -> None:
    settings = GenerationSettings(rollout=with_a_tool)
    looked_up.clear()
    steps = Steps()
    trace, _ = generated(settings, steps=steps)
    again, calls = generated(settings, steps=steps)
    assert len(looked_up) == 1
    assert not calls
    assert again.text == trace.text == "why? 1"
    line = row_line(b'{"q": "why?"}', [trace, again])
    assert orjson.loads(line)["hits"] == [1, 1]
    assert orjson.loads(line)["finish_reasons"] == ["done", "done"]


async def calling(row: Row, client: RolloutClient) -> str:
    tools = {"tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}]}
    sample = await client.chat(client.messages, extra_body=tools)
    assert sample.tool_calls is not None
    call = sample.tool_calls[0]
    answer = {"role": "tool", "tool_call_id": call["id"], "content": str(eval(call["function"]["arguments"]))}
    asked = {"role": "assistant", "content": sample.text, "tool_calls": sample.tool_calls}
    return (await client.chat([*client.messages, asked, answer])).text


def test_a_tool_that_the_model_calls_is_called_in_python() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "2 + 3"}}
    choice = {"message": {"content": None, "tool_calls": [call]}, "finish_reason": "tool_calls"}

    async def wanting(call: Call) -> None:
        await call.write(http(200, chat_body(choices=[choice])))

    steps = Steps()
    trace, calls = generated(GenerationSettings(rollout=calling), script=(wanting,), steps=steps)
    assert trace.text == "5"
    assert calls[1].json["messages"][1]["tool_calls"] == [call]
    again, calls = generated(GenerationSettings(rollout=calling), steps=Steps(steps.done[:1]))
    assert (again.text, len(calls)) == ("5", 1)


async def forgetful(row: Row, client: RolloutClient) -> str:
    forgotten.append(asyncio.create_task(client.chat(client.messages)))
    return "done"


forgotten: list[asyncio.Task[Sample]] = []


def test_what_a_forgotten_task_asks_is_no_step_of_a_sample_that_is_done() -> None:
    steps = Steps()

    async def scenario() -> None:
        async with ScriptedEngine(default=echo()) as engine, Client(engine.url, model="m") as client:
            generation = GenerationSettings(rollout=forgetful).generation(client)
            await generation(FORM.prompt(0, "here", b'{"q": "why?"}'), 0, steps)
            with pytest.raises(ConfigError, match="has ended"):
                await forgotten.pop()

    run(scenario())
    assert not steps.done


def returning(result: Any) -> Callable[..., Any]:
    async def rollout(row: Row, client: RolloutClient) -> Any:
        if isinstance(result, BaseException):
            raise result
        return result

    return rollout


@pytest.mark.parametrize(
    ("result", "name", "says"),
    [
        (ValueError("no such word"), "ValueError", "no such word"),
        (KeyError("x"), "KeyError", "x"),
        (TimeoutError(), "TimeoutError", "TimeoutError"),
        (ConfigError("bad"), "ConfigError", "bad"),
        (asyncio.CancelledError(), "CancelledError", "cancelled by itself"),
        (["a"], "TypeError", "must return text, a Sample or a mapping"),
        (None, "TypeError", "NoneType"),
        ({"text": 3}, "TypeError", "must be text"),
        ({"text": "x", 1: "y"}, "TypeError", "is no text"),
        ({"text": "x", "y": object()}, "TypeError", "is not JSON"),
    ],
)
def test_what_a_rollout_does_wrong_fails_its_sample_by_name(result: Any, name: str, says: str) -> None:
    with pytest.raises(RolloutFailed, match=says) as caught:
        generated(GenerationSettings(rollout=returning(result)))
    prompt = FORM.prompt(0, "here", b'{"q": "why?"}')
    assert Failure.of(prompt, 0, caught.value).error == name


@pytest.mark.parametrize("name", ["q", "generations"])
def test_a_column_whose_name_is_taken_ends_the_job_for_it_would_be_so_in_every_row(name: str) -> None:
    with pytest.raises(ConfigError, match=f"a column '{name}', which .*: rename it"):
        generated(GenerationSettings(rollout=returning({"text": "x", name: 1})))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_ends_a_program_passes_through(error: BaseException) -> None:
    async def scenario() -> None:
        async with Client("127.0.0.1:9", model="m") as client:
            generation = GenerationSettings(rollout=returning(error)).generation(client)
            prompt = FORM.prompt(0, "here", b'{"q": "why?"}')
            with pytest.raises(type(error)):
                await generation(prompt, 0, Steps())

    run(scenario())


async def patient(row: Row, client: RolloutClient) -> str:
    for _ in range(3):
        try:
            return (await client.chat(client.messages)).text
        except RequestRejected:
            continue
    raise RuntimeError("never")


def test_a_rollout_may_try_again_itself_and_an_engines_refusal_keeps_its_type() -> None:
    trace, calls = generated(GenerationSettings(rollout=patient), script=(refuse(400), refuse(422)))
    assert (trace.text, len(calls)) == ("why?", 3)
    with pytest.raises(RequestRejected) as caught:
        generated(GenerationSettings(rollout=three_turns), script=(refuse(401, "no key"),))
    assert caught.value.status == 401


async def misspelled(row: Row, client: RolloutClient) -> str:
    return (await client.chat(client.messages, temprature=0.1)).text  # type: ignore[call-arg]


async def wants_several(row: Row, client: RolloutClient) -> str:
    return (await client.chat(client.messages, n=2)).text  # type: ignore[call-arg]


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(RolloutFailed, match="did you mean 'temperature'"):
        generated(GenerationSettings(rollout=misspelled))
    with pytest.raises(RolloutFailed, match=r"asyncio\.gather"):
        generated(GenerationSettings(rollout=wants_several))


async def silent(row: Row, client: RolloutClient) -> Sample:
    return await client.complete("once", max_tokens=None, stop=("x",))


def test_a_text_is_completed_and_a_default_can_be_taken_back() -> None:
    body = orjson.dumps({"choices": [{"text": " upon a time", "finish_reason": "length"}], "model": "m"})

    async def step(call: Call) -> None:
        await call.write(http(200, body))

    settings = GenerationSettings(rollout=silent, params=SamplingParams(max_tokens=5))
    trace, calls = generated(settings, script=(step,))
    assert calls[0].path == "/v1/completions"
    assert "max_tokens" not in calls[0].json
    assert calls[0].json["stop"] == ["x"]
    assert (trace.text, trace.finish_reason) == (" upon a time", "length")


def test_engines_that_are_not_there_stop_more_than_the_sample() -> None:
    async def scenario() -> None:
        async with Client("127.0.0.1:9", model="m", retry=Retry(outage=0)) as client:
            generation = GenerationSettings(rollout=three_turns).generation(client)
            with pytest.raises(ConnectFailed):
                await generation(FORM.prompt(0, "here", b'{"q": "why?"}'), 0, Steps())

    run(scenario())


# -- validation -----------------------------------------------------------------------------------


def test_a_rejected_sample_is_made_again_with_another_seed() -> None:
    seen: list[str] = []

    def validate(sample: Sample, row: Row) -> bool | str:
        seen.append(sample.text)
        return True if sample.text == "answer 2" else "not the third"

    settings = GenerationSettings(validate=validate, params=SamplingParams(seed=5))
    steps = Steps()
    trace, calls = generated(settings, default=counting(), steps=steps)
    assert seen == ["answer 0", "answer 1", "answer 2"]
    assert (trace.text, trace.provenance.tries, trace.metadata.requests) == ("answer 2", 3, 1)
    assert len({call.json["seed"] for call in calls}) == 3
    # A run that goes on does not pay again for what was rejected.
    again, calls = generated(settings, script=(answer("answer 2"),), steps=Steps(steps.done[:2]))
    assert (again.text, again.provenance.tries, len(calls)) == ("answer 2", 3, 1)


def test_a_sample_that_is_rejected_each_time_has_failed_and_says_why() -> None:
    async def validate(sample: Sample, row: Row) -> bool | str:
        return f"{row['q']} is not {sample.text}"

    settings = GenerationSettings(validate=validate, max_validate_attempts=2)
    with pytest.raises(SampleRejected, match=r"all 2 tries: why\? is not answer 1"):
        generated(settings, default=counting())


def test_a_validate_of_a_rollout_gets_what_it_returned() -> None:
    def validate(result: Row, row: Row) -> bool:
        return bool(result["hits"] >= 2)

    looked_up.clear()
    trace, _ = generated(GenerationSettings(rollout=with_a_tool, validate=validate))
    assert trace.provenance.tries == 2
    assert orjson.loads(row_line(b'{"q": "why?"}', [trace]))["hits"] == [2]


def test_a_validate_that_says_nothing_ends_the_job_and_one_that_raises_fails_the_sample() -> None:
    with pytest.raises(ConfigError, match="must return True, False or the reason"):
        generated(GenerationSettings(validate=lambda sample, row: None))
    with pytest.raises(RolloutFailed, match="division"):
        generated(GenerationSettings(validate=lambda sample, row: 1 / 0 > 0))


# -- lengths --------------------------------------------------------------------------------------


def cut_off(text: str, **fields: Any) -> Step:
    choice = {"index": 0, "message": {"content": text}, "finish_reason": "length", **fields}

    async def step(call: Call) -> None:
        usage = {"prompt_tokens": 3, "completion_tokens": 4}
        await call.write(http(200, chat_body(choices=[choice], usage=usage)))

    return step


def test_a_sample_that_was_cut_off_is_kept_or_left_out() -> None:
    kept, _ = generated(GenerationSettings(), script=(cut_off("abc"),))
    assert (kept.dropped, kept.finish_reason) == (False, "length")
    dropped, _ = generated(GenerationSettings(length_policy="drop"), script=(cut_off("abc"),))
    assert dropped.dropped
    line = orjson.loads(row_line(b'{"q": "why?"}', [kept, dropped]))
    assert line["generations"] == ["abc"]
    assert len(line["finish_reasons"]) == len(line["api_metadata"]) == 1


def test_a_sample_that_was_cut_off_is_continued_from_its_text() -> None:
    settings = GenerationSettings(length_policy="continue", params=SamplingParams(max_tokens=4))
    trace, calls = generated(settings, script=(cut_off("one two"), cut_off(" three")))
    assert trace.text == "one two threeone two three"  # the last engine echoes the last message
    assert trace.finish_reason == "stop"
    second = calls[1].json
    assert second["messages"][-1] == {"role": "assistant", "content": "one two"}
    assert second["continue_final_message"] is True
    assert second["max_tokens"] == 4
    assert (trace.metadata.requests, trace.metadata.attempts) == (3, 3)
    assert trace.metadata.completion_tokens == 10


def test_a_sample_is_continued_so_often_and_then_kept() -> None:
    settings = GenerationSettings(
        length_policy="continue", max_continues=2, params=SamplingParams(max_tokens=4)
    )
    trace, calls = generated(settings, default=cut_off("x"))
    assert (trace.text, trace.finish_reason, len(calls)) == ("xxx", "length", 3)


def test_a_stop_string_across_the_seam_ends_the_sample() -> None:
    settings = GenerationSettings(
        length_policy="continue", params=SamplingParams(max_tokens=4, stop=("</answer>",))
    )
    trace, calls = generated(settings, script=(cut_off("42</ans"), cut_off("wer> and more")))
    assert (trace.text, trace.finish_reason, len(calls)) == ("42", "stop", 2)


def test_where_token_ids_are_refused_the_text_is_continued() -> None:
    settings = GenerationSettings(length_policy="continue", params=SamplingParams(max_tokens=4))
    script = (refuse(400, "unknown field"), cut_off("one"))
    trace, calls = generated(settings, script=script)
    assert trace.text == "oneone"
    assert [call.json.get("return_token_ids") for call in calls] == [True, None, None]


CONTEXT = "This model's maximum context length is 100 tokens."
REFUSALS = {
    "vllm 0.8": f"{CONTEXT} However, you requested 160 tokens (60 in the messages, 100 in the completion).",
    "vllm 0.9": f"'max_tokens' or 'max_completion_tokens' is too large: 100. {CONTEXT[:-1]} and your request "
    "has 60 input tokens (100 > 100 - 60).",
    "vllm 0.32": f"{CONTEXT} However, you requested 99 output tokens and your prompt contains at least 2 "
    "input tokens, for a total of at least 101 tokens.",
    "value": "max_tokens=101 cannot be greater than max_model_len=100. Please request fewer output tokens.",
    "sglang": "Requested token count exceeds the model's maximum context length of 101 tokens. You requested "
    "a total of 160 tokens: 60 tokens from the input messages and 100 tokens for the completion.",
}


def tokenized(count: int) -> dict[str, Step]:
    async def step(call: Call) -> None:
        await call.write(http(200, orjson.dumps({"tokens": list(range(count)), "count": count})))

    return {"/tokenize": step}


@pytest.mark.parametrize("engine", REFUSALS)
def test_max_tokens_is_fitted_to_the_context(engine: str) -> None:
    settings = GenerationSettings(params=SamplingParams(max_tokens=99))
    trace, calls = generated(settings, script=(refuse(400, REFUSALS[engine]),), side=tokenized(60))
    assert [call.json["max_tokens"] for call in calls] == [99, 40]
    assert trace.provenance.max_tokens == 40
    assert trace.text == "why?"


def test_without_tokenize_the_engine_takes_what_is_left() -> None:
    settings = GenerationSettings(params=SamplingParams(max_tokens=99))
    trace, calls = generated(
        settings, script=(refuse(400, REFUSALS["vllm 0.32"]),), side={"/tokenize": refuse(404)}
    )
    assert "max_tokens" not in calls[1].json
    assert trace.text == "why?"


@pytest.mark.parametrize("rollout", [None, three_turns])
def test_a_prompt_that_leaves_no_room_fails_as_the_engine_said(rollout: Any) -> None:
    message = f"{CONTEXT} However, your prompt contains 200 input tokens, which exceeds this limit."
    settings = GenerationSettings(params=SamplingParams(max_tokens=9), rollout=rollout)
    with pytest.raises(RequestRejected, match="your prompt contains 200"):
        generated(settings, default=refuse(400, message))


def test_a_refusal_that_only_quotes_such_a_sentence_is_no_length() -> None:
    settings = GenerationSettings(params=SamplingParams(max_tokens=9))
    with pytest.raises(RequestRejected, match="bad word"):
        generated(settings, script=(refuse(400, f"bad word in: {REFUSALS['vllm 0.8']}"),))


# -- settings -------------------------------------------------------------------------------------


def not_async(row: Row, client: RolloutClient) -> str:
    return ""


def test_what_cannot_work_is_said_in_a_sentence() -> None:
    for settings, says in [
        (GenerationSettings(rollout=not_async), "must be `async def`"),
        (GenerationSettings(rollout="penstock.nowhere:f"), "cannot be imported"),
        (GenerationSettings(rollout="nowhere.py:f"), "there is no file"),
        (GenerationSettings(rollout="tests.batch.test_generation:three_turn"), "did you mean 'three_turns'"),
        (GenerationSettings(rollout="three_turns"), "write module:function"),
        (GenerationSettings(validate="math:pi"), "is a float"),
        (GenerationSettings(length_policy="continue"), "needs --max-tokens"),
        (GenerationSettings(max_validate_attempts=0), "at least 1"),
    ]:
        with pytest.raises(ConfigError, match=says):
            settings.check()


def test_the_fingerprint_holds_what_makes_the_text_and_nothing_else() -> None:
    assert GenerationSettings(model="m", params=SamplingParams(top_p=0.9)).fingerprint == {
        "model": "m",
        "top_p": 0.9,
    }
    name = "tests.batch.test_generation:three_turns"
    given = GenerationSettings(rollout=three_turns, length_policy="drop", max_validate_attempts=9).fingerprint
    assert given == GenerationSettings(rollout=name, length_policy="drop").fingerprint
    assert given["rollout"] == name


def test_a_function_of_a_file_is_found_with_what_lies_beside_it(tmp_path: Any) -> None:
    (tmp_path / "beside_it.py").write_text("WORD = 'found'\n")
    (tmp_path / "json.py").write_text(
        "import beside_it\nasync def rollout(row, client):\n    return beside_it.WORD\n"
    )
    path = f"{tmp_path}/json.py:rollout"
    settings = GenerationSettings(rollout=path)
    trace, _ = generated(settings)
    assert trace.text == "found"
    assert settings.fingerprint["rollout"] == "json.py:rollout"
    assert orjson.loads(b"1") == 1
