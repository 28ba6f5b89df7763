"""New weights in a server that goes on: from folders, in parts, refused, and which of them made a token."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from penstock.engine.weight_update import SHARED_MEMORY, SHORT_NAMES, tensor_checksum
from tests.engine_server.checkpoint import make_checkpoint
from tests.engine_server.running import Running, engine_of, running
from tests.engine_server.test_control import begin, state
from tests.engine_server.test_in_flight import CHAT, COMPLETIONS, LONG, Posted, busy

Tensors = dict[str, torch.Tensor]
BINARY = {"content-type": "application/octet-stream"}
GREEDY = LONG | {"return_token_ids": True, "max_tokens": 60}


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same model with other weights."""
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "other", seed=1)


@pytest.fixture
def fresh(checkpoint: Path) -> Iterator[Running]:
    """A server of the first checkpoint."""
    with running(engine_of(checkpoint)) as server:
        yield server


@pytest.fixture(scope="session")
def other_server(other: Path) -> Iterator[Running]:
    """A server that had the other weights from its start."""
    with running(engine_of(other)) as server:
        yield server


def continuation(server: Running, prompt: Any = "The quick brown", count: int = 60) -> list[int]:
    """Greedy token ids."""
    body = GREEDY | {"prompt": prompt, "max_tokens": count}
    ids: list[int] = server.post(COMPLETIONS, body)["choices"][0]["token_ids"]
    return ids


def version(server: Running) -> int:
    """As three places say it."""
    info = json.loads(server.send("GET", "/weight_info")[1])
    (gauge,) = (v for k, v in server.metrics().items() if k.startswith("penstock:weight_version{"))
    assert int(info["weight_version"]) == gauge == server.app.engine.weight_version
    return int(gauge)


def reload(server: Running, folder: Path | None) -> tuple[int, Any]:
    kwargs = {} if folder is None else {"weights_path": str(folder)}
    status, content = server.send("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
    return status, json.loads(content)


def refused(server: Running, path: str, body: Any = None, headers: dict[str, str] | None = None) -> str:
    """The message of a 400."""
    status, content = server.send("POST", path, body, headers)
    assert status == 400, content
    message: str = json.loads(content)["error"]["message"]
    return message


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def rewritten(folder: Path, target: Path, change: Callable[[Tensors], None], **config: Any) -> Path:
    """A copy of a checkpoint with other tensors and settings."""
    shutil.copytree(folder, target)
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    settings = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(settings))
    return target


# -- from a folder ---------------------------------------------------------------------------------


def test_reloaded_server_is_as_one_that_was_started_with_the_weights(
    fresh: Running, other_server: Running, checkpoint: Path, other: Path
) -> None:
    """Also for a prompt that was cached, and back again; a folder that is not named is the last one."""
    prompt = list(range(40, 104))
    old, new = continuation(fresh, prompt), continuation(other_server, prompt)
    assert old != new and version(fresh) == 0
    assert reload(fresh, other) == (200, {"results": [None]})
    assert (continuation(fresh, prompt), version(fresh)) == (new, 1)
    assert reload(fresh, None)[0] == 200
    assert (continuation(fresh, prompt), version(fresh)) == (new, 2)
    by_place = {"method": "reload_weights", "args": [None, str(checkpoint)]}
    assert fresh.post("/collective_rpc", by_place) == {"results": [None]}
    assert (continuation(fresh, prompt), version(fresh)) == (old, 3)


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def _reshaped(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)


def _surplus(tensors: Tensors) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(3, 4)


def _integers(tensors: Tensors) -> None:
    for name in tensors:
        tensors[name] = tensors[name].to(torch.int8)


def _nothing(tensors: Tensors) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (_without("model.layers.1.self_attn.k_proj.weight"), {}, "lacks 1 of"),
        (_without("lm_head.weight"), {}, "lm_head.weight"),
        (_reshaped, {}, "has shape [3, 4]"),
        (_surplus, {}, "which this architecture does not have"),
        (_integers, {}, "int8"),
        (_nothing, {"num_attention_heads": 2, "num_key_value_heads": 1}, "another model"),
        (_nothing, {"rope_theta": 500_000.0}, "its rope is"),
        (_nothing, {"tie_word_embeddings": True}, "its tie_word_embeddings is True"),
        (None, {}, "cannot be read"),
    ],
)
def test_checkpoint_that_does_not_fit_changes_nothing(
    server: Running,
    other: Path,
    tmp_path: Path,
    change: Callable[[Tensors], None] | None,
    config: dict[str, Any],
    message: str,
) -> None:
    before, count = continuation(server), version(server)
    folder = rewritten(other, tmp_path / "bad", change or _nothing, **config)
    if change is None:
        _truncate(folder)
    request = Posted(server, COMPLETIONS, GREEDY)
    status, answer = reload(server, folder)
    assert status == 400 and message in answer["error"]["message"], answer
    assert request.answer()["choices"][0]["token_ids"] == before
    assert (continuation(server), version(server)) == (before, count)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "JSON"),
        ([], "object"),
        ({}, "method"),
        ({"method": "nonsense"}, "nonsense"),
        ({"method": "reload_weights", "kwargs": {"weights_path": "/nowhere"}}, "does not exist"),
        ({"method": "reload_weights", "kwargs": {"weights_path": 7}}, "weights_path"),
        ({"method": "reload_weights", "kwargs": {"path": "x"}}, "'path'"),
        ({"method": "reload_weights", "args": [None, "x"], "kwargs": {"weights_path": "y"}}, "weights_path"),
        ({"method": "reload_weights", "args": [1, 2, 3, 4]}, "at most 3"),
        ({"method": "reload_weights", "args": [[]]}, "from a folder"),
        ({"method": "reload_weights", "kwargs": {"is_checkpoint_format": False}}, "checkpoint format"),
    ],
)
def test_wrong_call_is_refused(server: Running, body: Any, message: str) -> None:
    assert message in refused(server, "/collective_rpc", body)


def test_tied_embeddings_follow_in_both_their_places(checkpoint: Path, other: Path, tmp_path: Path) -> None:
    """Whether a checkpoint repeats them as output matrix or not."""
    untie = _without("lm_head.weight")
    first = rewritten(checkpoint, tmp_path / "first", untie, tie_word_embeddings=True)
    second = rewritten(other, tmp_path / "second", untie, tie_word_embeddings=True)
    third = rewritten(other, tmp_path / "third", _nothing, tie_word_embeddings=True)
    with running(engine_of(second)) as server:
        expected = continuation(server)
    for folder in (second, third):
        with running(engine_of(first)) as server:
            assert continuation(server) != expected
            assert reload(server, folder)[0] == 200
            assert continuation(server) == expected


def test_weights_in_half_precision_are_cast(checkpoint: Path, other: Path, tmp_path: Path) -> None:
    def halve(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    folder = rewritten(other, tmp_path / "half", halve, torch_dtype="bfloat16")
    with running(engine_of(folder)) as server:
        expected = continuation(server)
    with running(engine_of(checkpoint)) as server:
        assert reload(server, folder)[0] == 200
        assert continuation(server) == expected


def test_sleep_of_level_2_needs_new_weights(
    fresh: Running, other_server: Running, checkpoint: Path, other: Path
) -> None:
    expected = continuation(other_server)
    fresh.post("/sleep?level=2", None)
    request = Posted(fresh, COMPLETIONS, GREEDY)
    assert "asleep" in reload(fresh, other)[1]["error"]["message"]
    assert fresh.post("/wake_up?tags=weights", None)["status"] == "sleeping"
    assert reload(fresh, other)[0] == 200
    assert busy(fresh) == 1 and state(fresh) == (True, True)
    assert fresh.post("/wake_up", None)["status"] == "awake"
    assert request.answer()["choices"][0]["token_ids"] == expected
    fresh.post("/sleep?level=2", None)
    assert fresh.post("/wake_up", None)["status"] == "awake"
    held = Posted(fresh, COMPLETIONS, GREEDY)
    fresh.wait_until(lambda: busy(fresh) == 1, "held until there are weights")
    partial = [{"name": "model.norm.weight", "dtype": "F32", "shape": [64]}]
    transfer(fresh, {"model.norm.weight": torch.ones(64)}, start={"tensors": partial}, finish=False)
    assert "all are needed" in refused(fresh, "/finish_weight_update")
    fresh.post("/abort_weight_update", None)
    assert held.is_alive()
    assert reload(fresh, other)[0] == 200
    assert held.answer()["choices"][0]["token_ids"] == expected


# -- versions --------------------------------------------------------------------------------------


def test_each_token_knows_the_weights_that_made_it(
    fresh: Running, other_server: Running, other: Path
) -> None:
    """A request is frozen, its cache dropped, the weights replaced: the rest is what they make of it all."""
    prompt = list(range(40, 60))
    before = continuation(fresh, prompt, 400)
    request = begin(fresh, prompt=prompt, return_weight_versions=True)
    fresh.post("/pause?mode=keep", None)
    assert reload(fresh, other)[0] == 200
    fresh.post("/resume", None)
    (choice,) = request.answer()["choices"]
    ids, ((first, old), (change, new)) = choice["token_ids"], choice["weight_versions"]
    assert (first, old, new) == (0, 0, 1) and 5 < change < 400 == len(ids)
    assert ids[:change] == before[:change]
    assert ids[change:] == continuation(other_server, prompt + ids[:change], 400 - change)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_versions_are_streamed_with_their_tokens(fresh: Running, other: Path, path: str) -> None:
    """While two samples run on through a replacement; on a busy machine they may be too fast for it."""
    prompt: dict[str, Any] = {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "user"}]}
    body = prompt | {"n": 2, "seed": 1, "max_tokens": 400, "ignore_eos": True, "stream": True}
    for before in range(5):
        enough = fresh.metric("generation_tokens_total") + 20
        request = Posted(fresh, path, body | {"return_weight_versions": True, "return_token_ids": True})
        while fresh.metric("generation_tokens_total") < enough and request.is_alive():
            pass
        assert reload(fresh, other)[0] == 200
        request.join(30)
        samples = streamed_versions(request.content)
        for made_by in samples:
            assert made_by == sorted(made_by) and set(made_by) <= {before, before + 1}
        if all(len(set(made_by)) == 2 for made_by in samples):
            return
    raise AssertionError("no sample ran through a replacement")


def streamed_versions(content: bytes) -> list[list[int]]:
    """Of the 400 tokens of each of two samples, by their events, each of which is checked."""
    counts, versions = [0, 0], [[], []]  # type: tuple[list[int], list[list[int]]]
    for event in content.decode().split("\n\n")[:-2]:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        index, ids = choice["index"], choice.get("token_ids") or []
        spans = choice.get("weight_versions", [])
        assert bool(spans) == bool(ids)
        ends = [*(span[0] for span in spans[1:]), counts[index] + len(ids)]
        for (first, number), until in zip(spans, ends, strict=False):
            assert first == len(versions[index])
            versions[index] += [number] * (until - first)
        counts[index] += len(ids)
    assert counts == [400, 400] == [len(made_by) for made_by in versions]
    return versions


def test_versions_are_given_only_when_asked_for(server: Running) -> None:
    assert "weight_versions" not in server.post(COMPLETIONS, GREEDY)["choices"][0]
    asked = server.post(COMPLETIONS, GREEDY | {"return_weight_versions": True})["choices"][0]
    assert asked["weight_versions"] == [[0, version(server)]]


def test_request_that_waited_through_a_change_knows_only_the_new_version(fresh: Running, other: Path) -> None:
    fresh.post("/pause", None)
    request = Posted(fresh, COMPLETIONS, GREEDY | {"return_weight_versions": True})
    fresh.wait_until(lambda: busy(fresh) == 1, "held")
    reload(fresh, other)
    fresh.post("/resume", None)
    assert request.answer()["choices"][0]["weight_versions"] == [[0, 1]]


def test_version_can_be_set(fresh: Running, other: Path) -> None:
    request = begin(fresh, return_weight_versions=True)
    answer = fresh.post("/update_weight_version", {"new_version": "7"})
    assert answer == {"success": True, "new_version": "7"}
    assert version(fresh) == 7
    spans = request.answer()["choices"][0]["weight_versions"]
    assert [number for _, number in spans] == [0, 7]
    reload(fresh, other)
    assert version(fresh) == 8
    for wrong in ({}, {"new_version": "default"}, {"new_version": -1}, {"new_version": None}, b"{"):
        refused(fresh, "/update_weight_version", wrong)
    assert version(fresh) == 8


# -- sent in parts ---------------------------------------------------------------------------------


def describe(tensors: Tensors) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": SHORT_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        for name, tensor in tensors.items()
    ]


def transfer(
    server: Running, tensors: Tensors, *, start: Any = None, finish: Any = None, chunk: int = 5
) -> Any:
    """Sends tensors over HTTP, `chunk` at a time; the answer to the finish, unless that is False."""
    server.post("/init_weight_transfer_engine", {"init_info": {"backend": "http"}})
    assert server.post("/start_weight_update", start) == {"message": "Weight update started"}
    names = list(tensors)
    for at in range(0, len(names), chunk):
        part = save({name: tensors[name] for name in names[at : at + chunk]})
        assert server.post("/update_weights", part, BINARY) == {"message": "Weights updated"}
    return None if finish is False else server.post("/finish_weight_update", finish)


@pytest.mark.parametrize("declared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_sent_over_http(
    checkpoint: Path, other: Path, tmp_path: Path, declared: bool, dtype: torch.dtype
) -> None:
    sent = {name: tensor.to(dtype) for name, tensor in tensors_of(other).items()}

    def cast(tensors: Tensors) -> None:
        tensors |= sent

    with running(engine_of(rewritten(other, tmp_path / "cast", cast))) as server:
        expected = continuation(server)
    with running(engine_of(checkpoint)) as server:
        old = continuation(server)
        start = {"version": 5, "tensors": describe(sent)} if declared else None
        transfer(server, sent, start=start, finish=False)
        assert (continuation(server), version(server)) == (old, 0), "nothing is in place before the end"
        checksum = tensor_checksum(sent)
        answer = server.post("/finish_weight_update", {"checksum": checksum})
        number = 5 if declared else 1
        assert answer == {
            "message": "Weight update finished",
            "weight_version": str(number),
            "checksum": checksum,
        }
        assert (continuation(server), version(server)) == (expected, number)
        assert transfer(server, sent, finish={"weight_version": "9"})["weight_version"] == "9"
        assert server.post("/shutdown_weight_transfer_engine", None)
        assert "not initialized" in refused(server, "/start_weight_update")


def test_only_what_is_declared_is_replaced(fresh: Running, other: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    part = {name: tensors_of(other)[name]}
    folder = rewritten(Path(fresh.app._root), tmp_path / "mixed", lambda tensors: tensors.update(part))
    with running(engine_of(folder)) as server:
        expected = continuation(server)
    assert continuation(fresh) != expected
    transfer(fresh, part, start={"tensors": describe(part)})
    assert continuation(fresh) == expected


def test_update_that_is_not_whole_changes_nothing(fresh: Running, other: Path) -> None:
    old, sent = continuation(fresh), tensors_of(other)
    last = {"model.norm.weight": sent.pop("model.norm.weight")}
    transfer(fresh, sent, finish=False)
    assert "lacks 1 of" in refused(fresh, "/finish_weight_update")
    assert "under way" in refused(fresh, "/start_weight_update")
    assert "under way" in refused(fresh, "/shutdown_weight_transfer_engine")
    name, tensor = "model.norm.weight", last["model.norm.weight"]
    surprise = {"surprise": torch.ones(1)}
    for bad, message in (
        (save(surprise | last), "does not have"),
        (save({name: tensor[:-1].clone()}), "has shape [63]"),
        (save({name: tensor.to(torch.int32)}), "int32"),
        (save(last | {"lm_head.weight": sent["lm_head.weight"]}), "twice"),
        (save(last)[:-1], "cannot be read"),
        (b"", "cannot be read"),
    ):
        assert message in refused(fresh, "/update_weights", bad, BINARY)
    assert "lacks 1 of" in refused(fresh, "/finish_weight_update")
    fresh.post("/update_weights", save(last), BINARY)
    assert "has checksum" in refused(fresh, "/finish_weight_update", {"checksum": "00"})
    assert (continuation(fresh), version(fresh)) == (old, 0)
    assert fresh.post("/abort_weight_update", None) == {"message": "Weight update aborted"}
    assert "No weight update" in refused(fresh, "/finish_weight_update")
    assert (continuation(fresh), version(fresh)) == (old, 0)
    transfer(fresh, sent | last)
    assert version(fresh) == 1 and continuation(fresh) != old


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"tensors": [{"name": "surprise", "dtype": "F32", "shape": [1]}]}, "does not have"),
        ({"tensors": [{"name": "model.norm.weight", "dtype": "F32", "shape": [65]}]}, "has shape [65]"),
        ({"tensors": [{"name": "model.norm.weight", "dtype": "I8", "shape": [64]}]}, "I8"),
        ({"tensors": [{"name": "model.norm.weight", "dtype": "F32", "shape": [64]}] * 2}, "twice"),
        ({"tensors": [{"name": "model.norm.weight", "dtype": "F32", "shape": [-64]}]}, "shape"),
        ({"tensors": [{"name": "model.norm.weight"}]}, "dtype"),
        ({"version": "x"}, "version"),
        (b"{", "JSON"),
    ],
)
def test_start_that_cannot_be_is_refused(server: Running, start: Any, message: str) -> None:
    server.post("/init_weight_transfer_engine", {"init_info": {"backend": "http"}})
    assert message in refused(server, "/start_weight_update", start)
    assert "No weight update" in refused(server, "/update_weights", save({"a": torch.ones(1)}), BINARY)


def test_tensor_comes_as_it_was_declared(fresh: Running) -> None:
    info = {"name": "model.norm.weight", "dtype": "torch.float32", "shape": [64]}
    transfer(fresh, {}, start={"tensors": [info]}, finish=False)
    half = save({"model.norm.weight": torch.ones(64, dtype=torch.float16)})
    assert "came as F16" in refused(fresh, "/update_weights", half, BINARY)
    undeclared = save({"model.layers.0.input_layernorm.weight": torch.ones(64)})
    assert "not declared" in refused(fresh, "/update_weights", undeclared, BINARY)


@pytest.mark.parametrize("init", [{}, {"init_info": {}}, {"init_info": {"backend": "nccl"}}, b"{"])
def test_backend_has_to_be_known(server: Running, init: Any) -> None:
    refused(server, "/init_weight_transfer_engine", init)


def test_update_waits_for_weights_that_are_awake(fresh: Running, other: Path, other_server: Running) -> None:
    transfer(fresh, tensors_of(other), finish=False)
    fresh.post("/sleep?level=2", None)
    assert "asleep" in refused(fresh, "/finish_weight_update")
    fresh.post("/wake_up", None)
    fresh.post("/finish_weight_update", None)
    assert continuation(fresh) == continuation(other_server)


def test_weights_in_shared_memory(fresh: Running, other: Path, other_server: Running, tmp_path: Path) -> None:
    sent = tensors_of(other)
    name = f"penstock-test-{tmp_path.name}-{id(fresh)}"
    infos, content = [], bytearray()
    for info, tensor in zip(describe(sent), sent.values(), strict=True):
        infos.append(info | {"offset": len(content)})
        content += tensor.numpy().tobytes()
    file = SHARED_MEMORY / name
    try:
        file.write_bytes(content)
        fresh.post("/init_weight_transfer_engine", {"init_info": {"backend": "shm"}})
        fresh.post("/start_weight_update", None)
        assert "not http" in refused(fresh, "/update_weights", save(sent), BINARY)
        beyond = infos[0] | {"offset": len(content) - 4}
        negative = infos[0] | {"offset": -1}
        for wrong, message in (
            ({"name": name, "tensors": [beyond]}, "beyond the end"),
            ({"name": name, "tensors": [negative]}, "offset"),
            ({"name": name, "tensors": [infos[0], infos[0]]}, "twice"),
            ({"name": "../etc/passwd", "tensors": infos}, "no name"),
            ({"name": name + "x", "tensors": infos}, "cannot be opened"),
            ({"tensors": infos}, "name"),
        ):
            assert message in refused(fresh, "/update_weights", {"update_info": wrong})
        for part in (infos[:7], infos[7:]):
            fresh.post("/update_weights", {"update_info": {"name": f"/{name}", "tensors": part}})
        file.write_bytes(b"")  # what was taken in is the engine's own
        answer = fresh.post("/finish_weight_update", {"weight_version": 3})
    finally:
        file.unlink(missing_ok=True)
    assert (answer["weight_version"], answer["checksum"]) == ("3", tensor_checksum(sent))
    assert continuation(fresh) == continuation(other_server)


def test_weights_in_files(fresh: Running, other: Path, other_server: Running, tmp_path: Path) -> None:
    sent = tensors_of(other)
    names = sorted(sent)
    paths = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path, part in zip(paths, (names[:7], names[7:]), strict=True):
        save_file({name: sent[name] for name in part}, path)
    fresh.post("/init_weight_transfer_engine", {"init_info": {"backend": "disk"}})
    fresh.post("/start_weight_update", None)
    for file in ("/no/such/file", __file__):
        assert "cannot be read" in refused(fresh, "/update_weights", {"update_info": {"path": file}})
    fresh.post("/update_weights", {"update_info": {"path": str(paths[0])}})
    checksum = tensor_checksum(sent)
    question = {"update_info": {"checksum": checksum}}
    assert "lacks" in refused(fresh, "/update_weights", question)
    fresh.post("/update_weights", {"update_info": {"path": str(paths[1])}})
    assert "has checksum" in refused(fresh, "/update_weights", {"update_info": {"checksum": "00"}})
    fresh.post("/update_weights", question)
    for path in paths:
        path.unlink()
    assert fresh.post("/finish_weight_update", None)["checksum"] == checksum
    assert continuation(fresh) == continuation(other_server)


def test_changes_are_put_over_what_they_are_changes_of(fresh: Running, other: Path) -> None:
    sent = tensors_of(other)
    name = "model.norm.weight"
    part = {name: sent[name] + 1}
    start = {"base": "first", "tensors": describe(part)}
    fresh.post("/init_weight_transfer_engine", {"init_info": {"backend": "http"}})
    assert "send all tensors" in refused(fresh, "/start_weight_update", start)
    transfer(fresh, sent, finish={"content": "first"})
    transfer(fresh, part, start=start, finish={"content": "second"})
    assert "are second" in refused(fresh, "/start_weight_update", start)
    digests = fresh.post("/weight_checker", {"action": "checksum"})["checksums"]
    assert digests.keys() == {f"dp0:pp0:pcp0:tp0:{name}" for name in sent}
    for key, tensor in (sent | part).items():
        assert digests[f"dp0:pp0:pcp0:tp0:{key}"] == sha256(tensor.numpy().tobytes()).hexdigest()
    assert "action" in refused(fresh, "/weight_checker", {"action": "reset"})
    reload(fresh, other)
    assert "not those of an update" in refused(fresh, "/start_weight_update", start | {"base": "second"})
    transfer(fresh, sent, finish={"content": "third"})
    fresh.post("/sleep?level=2", None)
    assert "asleep" in refused(fresh, "/weight_checker", {"action": "checksum"})
    fresh.post("/wake_up", None)
    assert "not those of an update" in refused(fresh, "/start_weight_update", start | {"base": "third"})


def test_only_memory_without_a_name_is_read_from_another_process(fresh: Running, tmp_path: Path) -> None:
    fresh.post("/init_weight_transfer_engine", {"init_info": {"backend": "shm"}})
    fresh.post("/start_weight_update", None)
    info = {"name": "model.norm.weight", "dtype": "F32", "shape": [64], "offset": 0}
    with (tmp_path / "secret").open("w+b") as secret:
        for name, message in (
            (f"/proc/{os.getpid()}/fd/{secret.fileno()}", "is no shared memory"),
            (f"/proc/{os.getpid()}/fd/99999", "cannot be opened"),
            (f"/proc/{os.getpid()}/environ", "no name"),
        ):
            body = {"update_info": {"name": name, "tensors": [info]}}
            assert message in refused(fresh, "/update_weights", body)


def test_checksum_is_what_it_says() -> None:
    """Against its definition, written out by hand."""
    from hashlib import blake2b

    tensors = {"b": torch.tensor([[1.0, 2.0]], dtype=torch.float16), "a": torch.tensor(1.5)}
    content = b"a\0F32\0\0" + b"\x00\x00\xc0\x3f" + b"b\0F16\x001,2\0" + b"\x00\x3c\x00\x40"
    assert tensor_checksum(tensors) == blake2b(content, digest_size=32).hexdigest()
    transposed = {"a": torch.arange(6.0).view(2, 3).t()}
    assert tensor_checksum(transposed) == tensor_checksum({"a": transposed["a"].clone()})
    assert tensor_checksum({"a": tensors["b"]}) != tensor_checksum({"a": tensors["b"].view(2)})
