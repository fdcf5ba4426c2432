"""Renders chat templates in a separate process, which may be killed: `python -P template_worker.py`, see templates.py.

Reads requests from stdin and writes answers to stdout, each JSON behind its length in 4 bytes. A template that takes
too much processor time ends this process, one that takes too much memory gets MemoryError. The Jinja environment is
that of transformers (utils/chat_template_utils.py), which the tests compare it with. Nothing of this project is
imported: the process has to start quickly, and to be small.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError, TemplateSyntaxError


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %}, by which transformers finds what the assistant said; rendered as is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

    def _said(self, caller: Any) -> Any:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """namespace() without names that begin with an underscore."""

    def __init__(self, /, *mappings: object, **names: object) -> None:
        super().__init__(*mappings, **names)
        for name in dict(*mappings, **names):
            _check_public(name)

    def __setitem__(self, name: str, value: object) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no name that begins with an underscore, such as {name[:40]}")


class _Dict:
    """dict() without the attributes of the class."""

    def __call__(self, *mappings: Any, **names: Any) -> dict[Any, Any]:
        return dict(*mappings, **names)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    """{"text": ...}, or {"error": ..., "is_template": whether Jinja raised it}."""
    try:
        template = _compiled(request["template"])
        if request["data"] is None:  # only whether it can be compiled
            return {"text": ""}
        text = template.render(**request["data"])
        if len(text) > request["most"]:
            return {"error": f"it wrote {len(text):,} characters; at most {request['most']:,} are allowed"}
        return {"text": text}
    except TemplateSyntaxError as error:
        return {"error": f"line {error.lineno} of the template: {error.message}"}
    except TemplateError as error:
        return {"error": error.message or type(error).__name__}
    except MemoryError:
        return {"error": f"it takes more than {request['memory'] >> 20:,} MiB of memory"}
    except RecursionError:
        return {"error": "it nests too deep"}
    except Exception as error:  # of the template's own expressions, as transformers would raise it
        return {"error": str(error) or type(error).__name__, "is_template": False}


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asked; this one ends with its pipe
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(4)) == 4:
        request = json.loads(source.read(int.from_bytes(head, "little")).decode("utf-8", "surrogatepass"))
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], resource.getrlimit(resource.RLIMIT_AS)[1]))
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])  # then SIGPROF, which ends the process
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        found = json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")
        sink.write(len(found).to_bytes(4, "little") + found)
        sink.flush()


if __name__ == "__main__":
    _main()
