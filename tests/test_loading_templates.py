"""Chat templates are rendered as transformers renders them, and none takes more than its time, memory or length."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from tiny_llama import make_tiny_llama, write_lines

from merge.chat import render as templates
from merge.chat.named import NAMED
from merge.chat.render import BoundedTemplate, TemplateLimit, syntax_error
from merge.errors import MergeError
from merge.loading import load_tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief. \ud83d\ude00 <b>"},
    {"role": "user", "content": "What is 1 + 1?\n", "weight": 0.5, "tool_calls": None},
    {"role": "assistant", "content": " 2 ", "thinking": {"steps": [1, 2], "sure": True}},
]
MANY_THINGS = """
{%- set ns = namespace(turn=0, open=false) %}
{% for message in messages if message.role != 'system' %}
  {%- set ns.turn = ns.turn + 1 %}
    {{- loop.index ~ '/' ~ loop.length }} {{ message['content'] | trim | upper }}
{% if loop.last %}{% generation %}{{ message.content }}{% endgeneration %}{% endif %}
{% if ns.turn > 10 %}{% break %}{% endif %}
{% endfor %}
{{ tools | tojson(indent=2) }} {{ messages[2].thinking | tojson }} {{ dict(a=1) }} {{ ns.turn }}
{% macro shout(text) %}{{ text }}!{% endmacro %}{{ shout('a') }} {{ missing is defined }}
{{- strftime_now('%%') }} {{ bos_token }} {{ messages | length }} {{ messages | map(attribute='role') | join(',') }}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.2)


@pytest.mark.parametrize("template", [*NAMED.values(), MANY_THINGS])
def test_the_text_is_that_of_transformers(template: str) -> None:
    from transformers.utils import chat_template_utils

    own = chat_template_utils._cached_compile_jinja_template(template)
    data = {"messages": MESSAGES, "tools": [{"name": "a", "é": [1.5, None]}], "bos_token": "<s>", "eos_token": "</s>"}
    for prompt in (False, True):
        assert BoundedTemplate(template).render(**data, add_generation_prompt=prompt) == own.render(
            **data, add_generation_prompt=prompt
        )


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system role') }}",
        "{{ messages[9].role }}",
        "{{ ''.__class__.__mro__ }}",
        "{% set ns = namespace(a=1) %}{% set ns._a = 1 %}",
        "{{ namespace(_a=1) }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_transformers_refuses_is_refused(template: str) -> None:
    from transformers.utils import chat_template_utils

    for render in (
        BoundedTemplate(template).render,
        chat_template_utils._cached_compile_jinja_template(template).render,
    ):
        with pytest.raises(TemplateError):
            render(messages=MESSAGES)


def test_transformers_renders_here(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(str(model))
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    monkeypatch.setattr(BoundedTemplate, "render", lambda self, **data: f"bounded {len(data['messages'])}")
    assert expected.endswith(" 2 <end>")
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "bounded 3"


ENDLESS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
TOO_LONG = "it takes more than 0.2 seconds of processor time"
TOO_MUCH = "it takes more than 512 MiB of memory"
TOO_EITHER = "it takes more than "
DOUBLE = "{% set x %}{{ x }}{{ x }}{% endset %}"


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("template", "said"),
    [
        (ENDLESS, TOO_LONG),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}", TOO_LONG),
        ("{{ 3 ** (10 ** 8) }}", TOO_LONG),
        ("{{ 'a' * 10 ** 10 }}", TOO_MUCH),
        ("{{ '%3000000000d' % 1 }}", TOO_MUCH),
        ("{{ 'a'.center(10 ** 10) }}", TOO_MUCH),
        ("{{ ('x' * 99999) | join('y' * 99999) }}", TOO_MUCH),
        ("{{ [1] * 10 ** 9 }}", TOO_MUCH),
        (f"{{% set x = 'x' * 99 %}}{DOUBLE * 40}{{{{ x }}}}", TOO_EITHER),
        (
            f"{{% for i in range(17) %}}{'x' * 10**6}{{% endfor %}}",
            "it wrote 17,000,000 characters",
        ),
        ("{{" * 50_000, "it nests too deep"),
        ("{% if 1 %}" * 20_000, "it nests too deep"),
        (f"{{{{ {'(' * 30_000}1{')' * 30_000} }}}}", "it nests too deep"),
        ("a\n{% for %}", "line 2 of the template"),
    ],
)
def test_bounds(template: str, said: str) -> None:
    with pytest.raises(TemplateError) as caught:
        BoundedTemplate(template).render(messages=[])
    assert said in str(caught.value)


@pytest.mark.usefixtures("short")
def test_a_template_that_was_ended_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    template = f"{ENDLESS} again"
    with pytest.raises(TemplateLimit):
        BoundedTemplate(template).render(messages=[])
    monkeypatch.setattr(templates, "SECONDS", 1e6)
    with pytest.raises(TemplateLimit):
        BoundedTemplate(template).render(messages=[])
    assert BoundedTemplate("{{ messages }}").render(messages=[]) == "[]"


def test_a_process_that_died_is_started_again() -> None:
    assert BoundedTemplate("a").render() == "a"
    process = templates._worker()._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(TemplateLimit, match="ended with exit code -9"):
        BoundedTemplate("b").render()
    assert BoundedTemplate("c").render() == "c"


def test_the_process_ends_with_the_one_that_asked() -> None:
    code = (
        "from merge.chat.render import BoundedTemplate, _worker\n"
        "BoundedTemplate('a').render()\nprint(_worker()._process.pid, flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert not done.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_syntax_errors_have_a_line() -> None:
    assert syntax_error(NAMED["chatml"]) is None
    assert syntax_error("{{ a }}\n{% generation %}{% endgeneration %}\n{% oh %}") == (
        "line 3 of the template: Encountered unknown tag 'oh'."
    )


VERBS = {
    "generate": ["generate", "endless", "--prompt", "ab", "--chat"],
    "finetune": ["finetune", "--model", "endless", "--data", "chat.jsonl", "-o", "out"],
    "eval": ["eval", "endless", "--tasks", "task.jsonl", "--chat-template", "--cache", "answers"],
    "recipe": ["plan", "recipe.yaml"],
}


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("template", "said"), [(ENDLESS, TOO_LONG), ("{{" * 50_000, "it nests too deep")])
def test_every_verb_that_renders_says_what_is_too_much(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, template: str, said: str
) -> None:
    import shutil

    from merge.cli import cli

    if verb == "recipe" and said == TOO_LONG:
        pytest.skip("a recipe's template is compiled and not rendered")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "endless")
    Path("endless/chat_template.jinja").write_text(template)
    write_lines(
        Path("chat.jsonl"), [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    )
    write_lines(Path("task.jsonl"), [{"question": "a", "choices": ["b", "c"], "answer": 0}])
    recipe = "merge_method: linear\nmodels: [{model: endless, parameters: {weight: 1}}]\n"
    Path("recipe.yaml").write_text(f"{recipe}chat_template: {json.dumps(template)}\n")
    with pytest.raises(MergeError) as caught:
        cli(VERBS[verb], standalone_mode=False)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 500
