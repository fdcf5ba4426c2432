"""Code from a model's directory: it runs if the user named the model, and otherwise nothing asks and nothing waits."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import make_tiny_llama, write_lines

from merge.checkpoint.trust import is_trusted, remember_name
from merge.errors import CheckpointError, MergeError
from merge.loading import CAUSAL, code_that_ran, load_config, load_model, load_tokenizer, model_from_config, trusting

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "plain")


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """A file that the code of the models below makes when it runs."""
    return tmp_path / "ran"


@pytest.fixture
def with_code(ready: Path, tmp_path: Path, ran: Path) -> Callable[..., Path]:
    """with_code("own", model_type="own", tokenizer=False): a model with an auto_map, and Python files beside it."""

    def make(name: str, model_type: str = "own", tokenizer: bool = False, repository: str = "") -> Path:
        path = tmp_path / name
        shutil.copytree(ready, path)
        code = f"with open({str(ran)!r}, 'a') as file:\n    file.write({name!r})\n"
        if tokenizer:
            change(path / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", None]})
            own = "from transformers import PreTrainedTokenizerFast\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
            (path / "own.py").write_text(code + own)
            return path
        classes = {"AutoConfig": "configuration_own.OwnConfig", CAUSAL: "modeling_own.Own"}
        auto_map = {key: f"{repository}{where}" for key, where in classes.items()}
        change(path / "config.json", model_type=model_type, architectures=["Own"], auto_map=auto_map)
        (path / "configuration_own.py").write_text(
            f"{code}from transformers import LlamaConfig\n\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        )
        (path / "modeling_own.py").write_text(
            f"{code}from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n\n"
            "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        )
        return path

    return make


@pytest.fixture
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(prompt: str = "") -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", asked)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.usefixtures("nobody_asks")
@pytest.mark.parametrize("kind", ["config", "model", "tokenizer"])
def test_code_does_not_run_and_the_error_names_file_key_and_flag(
    with_code: Callable[..., Path], ran: Path, kind: str
) -> None:
    path = with_code("own", tokenizer=kind == "tokenizer")
    file = "tokenizer_config.json" if kind == "tokenizer" else "config.json"
    load = {"config": load_config, "model": lambda path: load_model(CAUSAL, path), "tokenizer": load_tokenizer}[kind]
    with pytest.raises(CheckpointError, match=rf"{file}: auto_map: .* --trust-remote-code {path}$"):
        load(str(path))
    assert not ran.exists()


@pytest.mark.usefixtures("nobody_asks")
@pytest.mark.parametrize("tokenizer", [False, True])
def test_code_of_a_named_model_runs_and_is_on_record(
    with_code: Callable[..., Path], ran: Path, tokenizer: bool
) -> None:
    path, other = with_code("own", tokenizer=tokenizer), with_code("other")
    with trusting(str(path)):
        assert type(load_tokenizer(str(path)) if tokenizer else load_model(CAUSAL, str(path)).network)
        digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.glob("*.py"))}
        assert code_that_ran() == {str(path): digests}
        with pytest.raises(CheckpointError, match="--trust-remote-code"):
            load_config(str(other))
    assert "own" in ran.read_text()
    assert "other" not in ran.read_text()
    assert not code_that_ran()


@pytest.mark.usefixtures("nobody_asks")
@pytest.mark.parametrize("verb", ["perplexity", "memory"])
def test_results_as_json_have_the_record(
    with_code: Callable[..., Path], tmp_path: Path, call_cli: Callable[..., Any], verb: str
) -> None:
    path, text = with_code("own"), tmp_path / "text.txt"
    text.write_text("w1 w2 w3 w4 w5 w6")
    data = ["--data", text] if verb == "perplexity" else []
    done = call_cli([verb, path, *data, "--trust-remote-code", path, "--json"])
    assert done.code == 0, done.stderr
    record = json.loads(done.stdout)["trusted_code"]
    assert [sorted(files) for files in record.values()] == [["configuration_own.py", "modeling_own.py"]]


@pytest.mark.usefixtures("nobody_asks")
def test_an_architecture_of_transformers_loads_without_its_code_and_says_so(
    with_code: Callable[..., Path], ran: Path
) -> None:
    path = with_code("native", model_type="llama")
    notes: list[str] = []
    with trusting(say=notes.append):
        network = load_model(CAUSAL, str(path)).network
        load_tokenizer(str(path))
    assert type(network).__name__ == "LlamaForCausalLM"
    assert not ran.exists()
    assert [note.partition(": ")[0] for note in notes] == [f"{path}/config.json"]


@pytest.mark.usefixtures("nobody_asks")
def test_code_of_another_repository_needs_that_one_to_be_named_too(with_code: Callable[..., Path], ran: Path) -> None:
    path = with_code("own", repository="org/elsewhere--")
    with trusting(str(path)), pytest.raises(CheckpointError, match=r"--trust-remote-code org/elsewhere$"):
        load_config(str(path))
    assert not ran.exists()


@pytest.mark.usefixtures("nobody_asks")
def test_parts_of_a_composite_model_do_not_ask_either(ready: Path, tmp_path: Path, ran: Path) -> None:
    """transformers' composite classes make their parts without saying whether code may run."""
    from transformers import AutoModelForCausalLM, CLIPVisionConfig

    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    part = CLIPVisionConfig(auto_map={CAUSAL: "evil.Evil"})
    part._name_or_path = str(tmp_path)
    load_config(str(ready))
    with pytest.raises(ValueError, match=r"trust_remote_code|execute"):
        AutoModelForCausalLM.from_config(part)
    assert not ran.exists()


def test_an_attention_of_the_hub_is_refused(ready: Path, tmp_path: Path) -> None:
    path = shutil.copytree(ready, tmp_path / "kernel")
    change(path / "config.json", attn_implementation="org/attention")
    with pytest.raises(CheckpointError, match='attn_implementation: "org/attention" is code of the hub'):
        load_config(str(path))


def test_names_stand_for_directories_snapshots_and_what_was_made_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    old, new = (cache / "models--org--name" / "snapshots" / commit for commit in ("aa", "bb"))
    (cache / "models--org--name" / "refs").mkdir(parents=True)
    (cache / "models--org--name" / "refs" / "main").write_text("bb")
    elsewhere = tmp_path / "models--org--name" / "snapshots" / "bb"
    made = tmp_path / "temporary"
    for trusted, expected in {
        (): [],
        ("org/name",): [old, new],
        ("org/name@main",): [new],
        ("org/name@aa",): [old],
        ("org",): [],
        (str(tmp_path / "temporary"),): [made],
        ("recipe.yaml",): [made],
    }.items():
        with trusting(*trusted):
            remember_name(str(made), "recipe.yaml")
            assert [path for path in (old, new, elsewhere, made) if is_trusted(str(path))] == expected, trusted


VERBS = {
    "generate": ["generate", "MODEL", "--prompt", "ab"],
    "classify": ["classify", "MODEL", "--text", "ab"],
    "perplexity": ["perplexity", "MODEL", "--data", "text.jsonl"],
    "statistics": ["statistics", "MODEL", "--data", "text.jsonl", "-o", "out"],
    "memory": ["memory", "MODEL"],
    "quantize": ["quantize", "MODEL", "-o", "out", "--to", "nf4"],
    "finetune": ["finetune", "--model", "MODEL", "--data", "text.jsonl", "-o", "out"],
    "eval": ["eval", "MODEL", "--data", "text.jsonl", "--cache", "answers"],
}


@pytest.mark.usefixtures("nobody_asks")
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_runs_code_or_asks(
    with_code: Callable[..., Path], tmp_path: Path, ran: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge.cli import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MERGE_EVAL_TMP", str(tmp_path))
    with_code("own")
    write_lines(Path("text.jsonl"), [{"text": "abc def"}] * 4)
    with pytest.raises(MergeError, match=r"config\.json: auto_map: .*--trust-remote-code"):
        cli([word if word != "MODEL" else "own" for word in VERBS[verb]], standalone_mode=False)
    assert not ran.exists()
    assert not Path("out").exists()


def test_the_flag_lets_a_named_model_run_its_code(
    with_code: Callable[..., Path], tmp_path: Path, ran: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merge.cli import cli

    monkeypatch.chdir(tmp_path)
    with_code("own")
    cli(["generate", "own", "--prompt", "ab", "--max-tokens", "1", "--trust-remote-code", "own"], standalone_mode=False)
    assert ran.exists()


# What loads models, tokenizers, configs, processors, adapters, or pickles.
LOADERS = {"from_pretrained", "from_config", "_from_config", "get_class_from_dynamic_module", "load_peft_weights"}
CLASSES = ("Auto", "Peft", "pipeline")
PICKLES = {("torch", "load"), ("pickle", "load"), ("pickle", "loads"), ("joblib", "load"), ("np", "load")}


def loading_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a file that loads by transformers or peft, or unpickles."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
            if node.func.attr in LOADERS or (owner, node.func.attr) in PICKLES:
                yield node.lineno, node.func.attr
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("transformers", "peft"):
            for name in node.names:
                if name.name.startswith(CLASSES) or name.name in LOADERS:
                    yield node.lineno, name.name
        if isinstance(node, ast.Import) and any(
            name.name.split(".")[0] in ("transformers", "peft") for name in node.names
        ):
            yield node.lineno, "import of the whole library"
        if isinstance(node, ast.Call) and any(word.arg == "trust_remote_code" for word in node.keywords):
            yield node.lineno, "trust_remote_code"


def test_one_place_loads() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for folder in ("merge", "finetune", "eval", "recipes", "benchmarks")
        for file in sorted((ROOT / folder).rglob("*.py"))
        if (ROOT / "merge" / "loading") not in file.parents
        for line, what in loading_calls(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not found, "load through merge.loading:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "AutoModel.from_pretrained(x)",
        "import transformers",
        "from transformers import AutoTokenizer",
        "from transformers import pipeline",
        "from peft import PeftModel",
        "torch.load(x)",
        "f(trust_remote_code=True)",
        "getattr(m, kind).from_config(c)",
    ],
)
def test_what_loads_is_found(code: str) -> None:
    assert list(loading_calls(ast.parse(code)))


def test_a_model_of_a_config_asks_nothing(with_code: Callable[..., Path], ran: Path, nobody_asks: None) -> None:
    path = with_code("own")
    with trusting(str(path)):
        config = load_config(str(path))
    ran.unlink()
    with pytest.raises(CheckpointError, match="auto_map"):
        model_from_config(CAUSAL, config, str(path))
    assert not ran.exists()
