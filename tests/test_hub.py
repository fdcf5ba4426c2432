"""A hub that answers, that breaks off within a file, that stays silent, no hub at all, and a damaged cache."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "a" * 40
Serve = Callable[..., dict[str, str]]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """serve(model, breaks="name") -> environment of a process for which the hub holds only org/m, the files of `model`.

    breaks: a file of which only the first half is ever sent.
    """
    started: list[ThreadingHTTPServer] = []

    def start(model: Path, breaks: str = "") -> dict[str, str]:
        files = {path.name: path.read_bytes() for path in model.iterdir()}

        class Hub(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer(body=False)

            def do_GET(self) -> None:
                self._answer(body=True)

            def _answer(self, body: bool) -> None:
                path = self.path.partition("?")[0]
                name = path.rpartition("/")[2]
                if path.startswith("/api/models/org/m/tree/"):
                    tree = [{"type": "file", "oid": _sha(b), "size": len(b), "path": n} for n, b in files.items()]
                    self._send(200, json.dumps(tree).encode(), body)
                elif path.startswith("/api/models/org/m"):
                    said = {"id": "org/m", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                    self._send(200, json.dumps(said).encode(), body)
                elif "/resolve/" in path and name in files:
                    self._send(200, files[name], body, half=name == breaks)
                else:
                    self._send(404, b"", body)

            def _send(self, status: int, content: bytes, body: bool, half: bool = False) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{_sha(content)}"')
                self.end_headers()
                if body:
                    self.wfile.write(content[: len(content) // 2] if half else content)
                self.close_connection = True

        server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        where = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "hub")}
        return where | {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("merge_method: passthrough\nmodels: [{model: org/m}]\n", encoding="utf-8")
    return path


def test_what_was_downloaded_is_there_without_a_network(
    tmp_path: Path, make_model: Any, run_cli: Any, serve: Serve, recipe: Path
) -> None:
    hub = serve(make_model(tmp_path / "m", shards=2))
    online = run_cli(["run", recipe, "-o", "online", "--quiet"], env=hub)
    assert online.code == 0, online.stderr
    offline = run_cli(["run", recipe, "-o", "offline", "--quiet"], env=hub | {"HF_HUB_OFFLINE": "1"})
    assert offline.code == 0, offline.stderr
    (snapshot,) = (tmp_path / "hub" / "hub" / "models--org--m" / "snapshots").iterdir()
    assert snapshot.name == COMMIT
    for name in ("model-00002-of-00002.safetensors", "tokenizer.json"):
        blob = (snapshot / name).resolve()
        kept = blob.read_bytes()
        blob.unlink()  # as when a cache is cleaned
        done = run_cli(["plan", recipe], env=hub | {"HF_HUB_OFFLINE": "1"})
        assert done.code == 1
        assert f"not complete in the Hugging Face cache: {snapshot} lacks {name}" in done.stderr
        blob.write_bytes(kept)
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    done = run_cli(["plan", recipe], env=hub | {"HF_HUB_OFFLINE": "1"})
    assert done.code == 1
    assert "lacks model-00001-of-00002.safetensors" in done.stderr


@pytest.fixture
def silent() -> Iterator[dict[str, str]]:
    """The environment of a process whose hub accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        yield {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}


# Asks a second time, for another model: that takes no time any more, and datasets are offline too.
_ASK = """
import merge.checkpoint.network as network
network.ANSWER_SECONDS = 0.2
import datasets
from merge.checkpoint.hub import locate
from merge.recipe.model import ModelRef
for name in ("org/a", "org/b"):
    try:
        locate(ModelRef(name, name))
    except Exception as error:
        print(error)
print(datasets.config.HF_HUB_OFFLINE, network.no_network())
"""


def test_a_hub_that_does_not_answer_is_asked_once_and_named(tmp_path: Path, silent: dict[str, str]) -> None:
    environment = os.environ | silent | {"HF_HOME": str(tmp_path)}
    # Libraries below wait ten seconds for each of several tries: without the question this would take minutes.
    done = subprocess.run([sys.executable, "-c", _ASK], env=environment, capture_output=True, text=True, timeout=60)
    first, second, last = done.stdout.splitlines()
    said = f"{silent['HF_ENDPOINT']} "
    assert first.startswith("org/a: not a local directory, and not in the Hugging Face cache (" + said), done.stderr
    assert second.startswith("org/b: not a local directory, and not in the Hugging Face cache (" + said)
    assert "within 0 s" in first or "timed out" in first
    assert last.startswith("True " + said)


@pytest.mark.parametrize("verb", ["plan", "eval", "finetune"])
def test_without_a_network_every_verb_says_so(
    tmp_path: Path, run_cli: Any, make_model: Any, recipe: Path, verb: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"  # closed in a moment: connections are refused
    away = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    make_model(tmp_path / "m")
    line = {
        "plan": ["plan", recipe],
        "eval": ["eval", "org/m", "--suite", "quickstart"],
        "finetune": ["finetune", "m", "--data", "org/rows", "-o", "out"],
    }
    done = run_cli(line[verb], env=away | {"NO_PROXY": "127.0.0.1"})
    assert done.code == (2 if verb == "finetune" else 1), done.stderr
    assert f"({endpoint} cannot be reached: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.full  # the client tries again for several seconds
def test_a_download_that_breaks_off_names_the_file_and_goes_on(
    tmp_path: Path, make_model: Any, run_cli: Any, serve: Serve, recipe: Path
) -> None:
    model = make_model(tmp_path / "m", shards=2)
    name = "model-00002-of-00002.safetensors"
    done = run_cli(["run", recipe, "-o", "out"], env=serve(model, breaks=name))
    assert done.code == 1
    assert "Traceback" not in done.stderr
    assert "merge: org/m: the download broke off (" in done.stderr
    assert f"not complete: {name}. Run the same command again" in done.stderr
    assert not (tmp_path / "out").exists()
    again = run_cli(["run", recipe, "-o", "out", "--quiet"], env=serve(model))
    assert again.code == 0, again.stderr
