"""Pushing to a hub that is a script here: one commit with all parts, and a clear end when it refuses."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from penstock.batch.hub import push
from penstock.cli.export import main
from penstock.errors import ConfigError, WriteFailed

SHA = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """The routes of the hub that an upload of small files takes."""

    files: dict[str, bytes]
    refuses: int
    tokens: set[str | None]

    def do_GET(self) -> None:
        if "/tree/" in self.path:
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": "0"}
                for path, data in self.files.items()
            ]
            return self.answer(200, listed)
        return self.answer(
            200, {"id": "me/traces", "sha": SHA, "siblings": [{"rfilename": p} for p in self.files]}
        )

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers["Authorization"])
        if self.refuses:
            return self.answer(self.refuses, {"error": "not today"})
        if self.path.endswith("/repos/create"):
            return self.answer(200, {"url": f"{constants.ENDPOINT}/datasets/me/traces", "id": "me/traces"})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return self.answer(200, {"files": modes})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
            return self.answer(
                200,
                {
                    "commitUrl": f"{constants.ENDPOINT}/datasets/me/traces/commit/{SHA}",
                    "commitOid": SHA,
                    "pullRequestUrl": None,
                },
            )
        return self.answer(404, {"error": f"no route {self.path}"})

    def answer(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *anything: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("Scripted", (Hub,), {"files": {}, "refuses": 0, "tokens": set()})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, name="hub")
        thread.start()
        # The library has read HF_ENDPOINT when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield handler
        server.shutdown()
        thread.join()


def folder_of(path: Path, parts: int) -> Path:
    path.mkdir()
    for i in range(parts):
        pq.write_table(pa.table({"n": [i]}), path / f"part-{i:05}.parquet")
    return path


def test_all_parts_are_there_in_one_commit_and_old_ones_are_not(hub: type[Hub], tmp_path: Path) -> None:
    push(folder_of(tmp_path / "three", 3), "me/traces")
    assert sorted(hub.files) == [f"data/part-0000{i}.parquet" for i in range(3)]
    assert hub.files["data/part-00002.parquet"] == (tmp_path / "three/part-00002.parquet").read_bytes()
    assert hub.tokens == {"Bearer hf_secret"}
    hub.files["README.md"] = b"# mine"
    push(folder_of(tmp_path / "two", 2), "me/traces")
    assert sorted(hub.files) == ["README.md", "data/part-00000.parquet", "data/part-00001.parquet"]


def test_a_push_that_fails_is_done_again_by_the_same_command(hub: type[Hub], tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text('{"q": "a", "generations": ["b"]}\n')
    words = [str(out), "--to", f"{tmp_path}/parts/", "--push-to-hub", "me/traces"]
    hub.refuses = 400
    with pytest.raises(
        WriteFailed, match=r"parts could not be pushed to me/traces .*; it is whole, and the same"
    ):
        main(words)
    hub.refuses = 0
    made = (tmp_path / "parts/part-00000.parquet").stat().st_ino
    assert main(words) == 0
    assert (tmp_path / "parts/part-00000.parquet").stat().st_ino == made
    assert list(hub.files) == ["data/part-00000.parquet"]


def test_a_hub_that_refuses_says_so_in_one_sentence(hub: type[Hub], tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "one", 1)
    hub.refuses = 403
    with pytest.raises(ConfigError, match="The hub does not let me/traces be written .*HF_TOKEN"):
        push(folder, "me/traces")
    with pytest.raises(ConfigError, match="is no name of a dataset"):
        push(folder, "me/too/deep")
    with pytest.raises(ConfigError, match="holds no Parquet files"):
        push(tmp_path, "me/traces")


def test_a_hub_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(WriteFailed, match="could not be pushed"):
        push(folder_of(tmp_path / "one", 1), "me/traces")
