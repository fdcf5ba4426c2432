"""A process that has imported what commands need, and forks one for each: `python -m kills.child [all]`.

It reads a request in a line of JSON, {"cwd", "words", "kind", "point", "exchange"}, and answers with another, {"code",
"out", "err", "calls"}. A fork takes milliseconds, where the imports take seconds. What is "warm" runs in the process
itself, so that forks find compiled kernels; but torch could not train in the fork of a process that has.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import tempfile
import threading
import traceback
from typing import Any

from kills.injector import Injector

MODULES = (
    *("lm_eval.models.huggingface", "matplotlib.pyplot", "peft", "safetensors.numpy", "safetensors.torch"),
    *("transformers.tokenization_utils_tokenizers", "transformers.models.llama.modeling_llama"),
    *("eval.harness", "eval.html", "finetune.strategies", "finetune.trainer"),
    *(
        "merge.tools.perplexity",
        "merge.tools.quantize",
        "merge.jobs.pipelines.run",
        "merge.tools.extract",
        "merge.tools.transplant.plan",
    ),
)


def main() -> None:
    for name in MODULES if sys.argv[1:] == ["all"] else ():
        importlib.import_module(name)
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if request["kind"] == "warm":
            run(request)
            os.chdir("/")
            print("{}", flush=True)
            continue
        assert threading.active_count() == 1, "a fork would lack the other threads"
        print(json.dumps(answer(request)), flush=True)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(here)
        in_fork(request, there)
    os.close(there)
    with open(here, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return json.loads(said) if said else {"code": os.waitstatus_to_exitcode(status), "out": "", "err": "", "calls": []}


def in_fork(request: dict[str, Any], pipe: int) -> None:
    """Runs the command, writes the answer, and ends the process."""
    from merge.output import workspace

    write, end = os.write, os._exit
    if not request["exchange"]:
        workspace.exchange = lambda one, other: False
    injector = Injector(request["cwd"], request["kind"], request["point"])
    injector.arm()
    code, out, err = run(request)
    data = json.dumps({"code": code, "out": out, "err": err, "calls": injector.calls}).encode()
    while data:
        data = data[write(pipe, data) :]
    end(0)


def run(request: dict[str, Any]) -> tuple[int, str, str]:
    from merge.cli import main as merge

    os.chdir(request["cwd"])
    tempfile.tempdir = os.path.join(request["cwd"], "tmp")
    os.environ.update(TMPDIR=tempfile.tempdir, MERGE_EVAL_CACHE="cache/answers.sqlite")
    sys.argv = ["merge", *request["words"]]
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            merge()
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
            code = 70
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    main()
