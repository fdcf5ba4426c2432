"""Backends that ask a server: whose answers are remembered, what is said if it is not there, and the numbers of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401 - registers lm-eval's own before those below
import pytest
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from tiny_llama import make_tiny_llama

from eval.harness import evaluate
from eval.memory import Memory
from eval.models import subjects
from eval.results import ModelScores
from eval.settings import Settings
from eval.tasks import resolve
from merge.errors import MergeError, UsageError


@register_model("tests-served")
class Served(LM):  # type: ignore[misc]
    """A server's model: every log-likelihood is a number that the server was started with."""

    served = 0.0

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return [(-self.served - len(request.args[1]), False) for request in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
        return ["blue" for _ in requests]


@register_model("tests-chat")
class Chat(Served):
    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        raise NotImplementedError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model")


@pytest.fixture
def judge(tmp_path: Path, model: Path) -> Callable[..., ModelScores]:
    """judge(rows, backend, key=value ...) -> what the backend's model makes of the rows."""

    def run(rows: list[dict[str, Any]], backend: str, **more: Any) -> ModelScores:
        file = tmp_path / "items.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings = Settings(backend=backend, model_args=more)
        with Memory(tmp_path / "answers.sqlite") as memory:
            return evaluate(subjects([str(model)]), resolve([str(file)], None), settings, memory).models[0]

    return run


CHOICES = [
    {"question": "red green", "choices": ["blue", "stone"], "answer": 0},
    {"question": "old quick", "choices": ["dog", "cats"], "answer": 1},
]
WRITTEN = [{"question": "red green", "answer": "blue"}]


def test_models_behind_one_address_share_no_answers(judge: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Served, "served", 1.0)
    assert [judge(CHOICES, "tests-served").asked for _ in range(2)] == [4, 0]
    monkeypatch.setattr(Served, "served", 2.0)  # another model is served there now
    assert judge(CHOICES, "tests-served").asked == 4
    monkeypatch.setattr(Served, "served", 1.0)
    assert judge(CHOICES, "tests-served").remembered == 4


def test_what_only_writes_is_asked_every_time(judge: Any) -> None:
    """There is nothing to tell one such model from another by."""
    assert [judge(WRITTEN, "tests-chat").asked for _ in range(2)] == [1, 1]


def test_an_unknown_backend_has_suggestions(judge: Any) -> None:
    with pytest.raises(UsageError, match=r"--backend local-completion: .*did you mean .local-completions."):
        judge(CHOICES, "local-completion")


@pytest.fixture
def address(model: Path) -> Iterator[str]:
    """An OpenAI-compatible server of the model."""
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    class Completions(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send_error(404)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps({"choices": [self._one(*each) for each in enumerate(asked["prompt"])]}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _one(self, index: int, tokens: list[int]) -> dict[str, Any]:
            with torch.no_grad():
                table = torch.log_softmax(loaded(torch.tensor([tokens])).logits[0], -1)
            top = [None, *({"": float(row.max())} for row in table)]
            said = [None, *(float(table[i - 1, token]) for i, token in enumerate(tokens) if i), 0.0]
            return {"index": index, "logprobs": {"token_logprobs": said, "top_logprobs": top}}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/completions"
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore")  # of aiohttp and tenacity
def test_local_completions_is_as_the_model_itself(judge: Any, address: str) -> None:
    pytest.importorskip("tenacity")  # lm-eval[api]
    served = [judge(CHOICES, "local-completions", base_url=address) for _ in range(2)]
    assert [each.asked for each in served] == [4, 0]
    assert served[0].tasks == served[1].tasks == judge(CHOICES, "hf").tasks
    with pytest.raises(MergeError, match=r"model: the server does not answer .*ConnectionError"):
        judge(CHOICES, "local-completions", base_url="http://127.0.0.1:9/v1/completions")
