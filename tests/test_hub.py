"""Where checkpoints come from: what is asked of the hub, and what is never taken from it."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from glm.errors import CheckpointError
from glm.hub import fetch

SRC = str(Path(__file__).parents[1])
GOLDEN = Path(__file__).parent / "goldens" / "hf_glm-base"
SHA = "0123456789abcdef0123456789abcdef01234567"
NATIVE = {
    "config.json": (GOLDEN / "config.json").read_bytes(),
    "model.safetensors": (GOLDEN / "model.safetensors").read_bytes(),
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"Apache-2.0",
    "modeling_chatglm.py": b"raise SystemExit('code of a stranger')",
    "pytorch_model.bin": b"a program",
    "onnx/model.safetensors": b"another format",
    "prepacked.safetensors": b"for the machine of a stranger",
    "README.md": b"words",
}
OLD = {"config.json": b"{}", "pytorch_model.bin": b"a program", "ice_text.model": b"", "quantization.py": b"code"}
REPOSITORIES = {"org/native": NATIVE, "org/old": OLD}


# --- folders and ids -----------------------------------------------------------------------------------------------


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(tmp_path) == tmp_path
    assert fetch(str(tmp_path), weights=False) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert fetch("~/mine") == tmp_path / "mine"


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "chatglm3", "a/b/c", "../x/y", "", "a/b c", "~no_such_user/x/y", "a/", "\0"]
)
def test_what_is_neither_folder_nor_id_is_one_error(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("nobody should be asked"))
    with pytest.raises(CheckpointError, match="no such folder"):
        fetch(source)


def test_a_file_or_a_revision_of_a_folder_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        fetch(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="revision"):
        fetch(tmp_path, revision="main")


def test_what_the_hub_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def snapshot_download(id: str, **how: Any) -> str:
        asked.append({"id": id, **how})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"org/name: has no \.safetensors.*glm convert org/name DST"):
        fetch("org/name")
    fetch("org/name", "v1", weights=False)
    fetch("org/name", bin=True)
    (tmp_path / "model-00001-of-00001.safetensors").touch()
    fetch("org/name", bin=True)
    assert [request["id"] for request in asked] == ["org/name"] * 5
    assert [request["revision"] for request in asked] == [None, "v1", None, None, None]
    patterns = [request["allow_patterns"] for request in asked]
    assert all(not pattern.endswith((".py", "*")) or "LICENSE" in pattern for each in patterns for pattern in each)
    assert [any(p.endswith(".bin") for p in each) for each in patterns] == [False, False, False, True, False]
    assert [any(p.endswith(".safetensors") for p in each) for each in patterns] == [True, False, True, False, True]
    assert all("prepacked.safetensors" in request["ignore_patterns"] for request in asked)


def test_whatever_goes_wrong_there_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot_download(*_: Any, **__: Any) -> str:
        raise RuntimeError("the sky is falling\nin many lines")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=r"^org/name: .*the sky is falling$"):
        fetch("org/name")


# --- a hub on this machine -----------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's interface as its client needs for a public repository."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0].strip("/")
        self.server.asked.append(path)  # type: ignore[attr-defined]
        for id, files in REPOSITORIES.items():
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            if path in (f"api/models/{id}", f"api/models/{id}/revision/main", f"api/models/{id}/revision/{SHA}"):
                listed = [{"rfilename": name} for name in files]
                return self.send(json.dumps({"id": id, "sha": SHA, "siblings": listed}).encode(), "json", body)
            if path.startswith(f"api/models/{id}/tree/"):
                return self.send(json.dumps(tree).encode(), "json", body)
            for name, data in files.items():
                if path in (f"{id}/resolve/main/{name}", f"{id}/resolve/{SHA}/{name}"):
                    return self.send(data, hashlib.sha1(data).hexdigest(), body)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()
        return None

    def send(self, data: bytes, tag: str, body: bool) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


CLIENT = """
import sys
from glm.errors import GLMError
from glm.hub import fetch
try:
    print(fetch(sys.argv[1], weights=sys.argv[2] != "texts", bin=sys.argv[2] == "bin"))
except GLMError as error:
    print(type(error).__name__, error)
"""


def client(home: Path, server: ThreadingHTTPServer | None, *arguments: str) -> str:
    """What `fetch` says in a process of its own, whose environment names the cache and the hub."""
    names = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    names |= {"PYTHONPATH": SRC, "HF_HOME": str(home)}
    if server is None:
        names["HF_HUB_OFFLINE"] = "1"
    else:
        names["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    ran = subprocess.run(
        [sys.executable, "-c", CLIENT, *arguments], env=names, capture_output=True, text=True, timeout=120, check=True
    )
    return ran.stdout.strip()


def test_a_repository_of_safetensors(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    folder = Path(client(tmp_path, server, "org/native", "weights"))
    assert folder.is_relative_to(tmp_path)
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "LICENSE"}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*")} == wanted
    assert (folder / "model.safetensors").read_bytes() == NATIVE["model.safetensors"]
    from glm.checkpoint import Checkpoint

    assert Checkpoint.open(folder).tensors  # links into the cache's blobs are no links outside
    asked = len(server.asked)  # type: ignore[attr-defined]
    assert Path(client(tmp_path, None, "org/native", "weights")) == folder
    assert len(server.asked) == asked  # type: ignore[attr-defined]


def test_a_repository_of_bin_files(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    said = client(tmp_path, server, "org/old", "weights")
    assert said.startswith("CheckpointError org/old: has no .safetensors files")
    assert "glm convert org/old" in said
    folder = Path(client(tmp_path, server, "org/old", "bin"))
    assert {path.name for path in folder.iterdir()} == {"config.json", "pytorch_model.bin", "ice_text.model"}


def test_texts_only(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    folder = Path(client(tmp_path, server, "org/native", "texts"))
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
    }


def test_what_is_not_there(tmp_path: Path, server: ThreadingHTTPServer) -> None:
    for source, where in (("org/none", server), ("org/none", None)):
        said = client(tmp_path, where, source, "weights")
        assert said.startswith("CheckpointError org/none: there is no such folder, and the hub does not give it")
        assert len(said.splitlines()) == 1
