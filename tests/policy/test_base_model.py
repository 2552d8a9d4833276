"""Resolving the model setting, and a digest that changes exactly when the function may."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from policy.base_model import BaseModelError, base_model_digest, resolve_base_model


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 8}))
    save_file({"a": np.arange(8, dtype=np.float32)}, folder / "model-1.safetensors")
    save_file({"b": np.arange(4, dtype=np.float32)}, folder / "model-2.safetensors")
    return folder


def test_digest_follows_the_config_and_the_weights_only(tmp_path: Path) -> None:
    one, two = write_model(tmp_path / "one"), write_model(tmp_path / "two")
    digest = base_model_digest(one)
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64
    (two / "README.md").write_text("notes")
    os.utime(two / "config.json", (0, 0))
    assert base_model_digest(two) == digest

    weights = bytearray((two / "model-2.safetensors").read_bytes())
    weights[-1] ^= 1
    (two / "model-2.safetensors").write_bytes(weights)
    changed = base_model_digest(two)
    (two / "config.json").write_text('{"model_type": "llama"}')
    assert len({digest, changed, base_model_digest(two)}) == 3


def test_resolves_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_model(tmp_path / "models/mine")
    monkeypatch.chdir(tmp_path)
    model = resolve_base_model("models/mine")
    assert model.path == folder  # absolute: other processes have other working directories
    assert model.digest == base_model_digest(folder)


def test_resolves_a_cached_hugging_face_id_without_the_network(tmp_path: Path) -> None:
    repository = tmp_path / "models--acme--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = write_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    code = "from policy.base_model import *; print(resolve_base_model('acme/tiny').path)"
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "HF_HUB_CACHE": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(printed.stdout.strip()) == folder


class _Hub(BaseHTTPRequestHandler):
    """As much of Hugging Face as the download of one model asks for."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/api/models/acme/tiny/revision/main":
            self._answer(json.dumps({"id": "acme/tiny", "sha": self.commit}).encode())
        elif path == f"/api/models/acme/tiny/tree/{self.commit}":
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": "0" * 40}
                for file in self.folder.iterdir()
            ]
            self._answer(json.dumps(files).encode())
        elif (file := self.folder / Path(path).name).is_file():
            self._answer(file.read_bytes())
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def test_a_download_leaves_no_thread_behind(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    handler = type("Hub", (_Hub,), {"folder": folder})
    code = """
import threading
from policy.base_model import *
print(resolve_base_model("acme/tiny").digest, *(t.name for t in threading.enumerate()))
"""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as hub:
        threading.Thread(target=hub.serve_forever).start()
        printed = subprocess.run(
            [sys.executable, "-c", code],
            env={
                **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
                "PYTHONPATH": str(Path(__file__).parents[2]),
                "HF_HOME": str(tmp_path / "home"),
                "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
                "NO_PROXY": "127.0.0.1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        hub.shutdown()
    assert printed.stdout.split() == [base_model_digest(folder), "MainThread"], printed.stderr


def test_says_what_is_wrong_with_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BaseModelError, match=r"expected 'config.json' and '\*.safetensors'"):
        resolve_base_model(str(tmp_path))
    with pytest.raises(BaseModelError, match=r"no such folder here.*expected 'pocket'"):
        resolve_base_model("../no/such/folder")
