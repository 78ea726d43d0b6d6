"""A contender's process: builds cases and times repetitions as it is told, one JSON line each.

Imports nothing of the project: a peers' worker is a plain Python with torch's defaults.
"""

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


def timed(step: Callable[[], object], times: int) -> float:
    """Mean seconds of a call over `times` calls."""
    start = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - start) / times


def _answer(cases: dict[str, Callable[[], object]], request: dict[str, Any]) -> float | None:
    if "make" in request:
        module, function = request["make"].split(":")
        build = getattr(importlib.import_module(module), function)
        cases[request["case"]] = build(**request["arguments"])
        return None
    return timed(cases[request["run"]], request["times"])


def main() -> None:
    """Serve until the parent closes the pipe; what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cases: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        try:
            answer = {"value": _answer(cases, json.loads(line))}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # taking libraries down in order lasts seconds


if __name__ == "__main__":
    main()
