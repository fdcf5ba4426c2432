"""The program of a worker process: `python -m merge.workers.process`, spoken to by merge.workers.processes.

Lines of JSON. In: an assignment, then lists of step numbers. Out: {"step", "record"} for each finished step, {"done"}
after each list, {"error", "message"} and the end, and {"alive"} every few seconds. It ends when its input does.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time

from merge.errors import MergeError
from merge.jsontext import parse_json
from merge.workers.assigned import AssignedSteps, Assignment

_SIGN_OF_LIFE = 2.0  # seconds
_lock = threading.Lock()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the run, which ends its workers
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    lines: queue.Queue[str] = queue.Queue()

    def say(**answer: object) -> None:
        with _lock:
            answers.write(json.dumps(answer) + "\n")
            answers.flush()

    def listen() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # the run is gone

    def live() -> None:
        while True:
            time.sleep(_SIGN_OF_LIFE)
            say(alive=True)

    for function in (listen, live):
        threading.Thread(target=function, daemon=True).start()
    try:
        with AssignedSteps(
            Assignment.from_json(lines.get()), lambda index, record: say(step=index, record=record)
        ) as assigned:
            say(done=True)
            while True:
                assigned.run([int(step) for step in parse_json(lines.get())])
                say(done=True)
    except MergeError as error:
        say(error=type(error).__name__, message=str(error))
    except MemoryError:
        say(error="MergeError", message="a worker ran out of memory. Give a smaller --max-ram or fewer workers.")


if __name__ == "__main__":
    main()
