"""Runs `merge`, which gets a signal once so many steps are done: python stopped_run.py SIGNAL STEPS NAME ARGUMENTS.

NAME is that of the recipe or stage whose steps are counted. The steps after that wait until the run is stopped, so that
no run ends before it was.
"""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

import merge.engine.carry
from merge.cli import main

honest = merge.engine.carry._run_step
number, steps, name = int(sys.argv.pop(1)), int(sys.argv.pop(1)), sys.argv.pop(1)
once = threading.Lock()


def run_step(context: Any, *step: Any) -> None:
    if context.plan.name == name and len(context.out.records) >= steps:
        if once.acquire(blocking=False):
            os.kill(os.getpid(), number)
        context.crew._stop.wait(60)
    honest(context, *step)


merge.engine.carry._run_step = run_step
main()
