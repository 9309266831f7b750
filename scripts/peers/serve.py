"""A worker's side of worker.py: answers "load" and "generate" with two functions of the peer's."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def serve(load: Callable[[dict], tuple[Any, int | None]], generate: Callable[[Any, dict], dict]) -> None:
    """Answer lines of stdin until it ends. load: -> a pipeline, and the bytes that its target's forward reads."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to the log
    pipelines: dict[str, Any] = {}
    sizes: dict[str, int | None] = {}
    for line in sys.stdin:
        message = json.loads(line)
        try:
            name = message["name"]
            if message["op"] == "load":
                if name not in pipelines:
                    pipelines[name], sizes[name] = load(message)
                answer = {"bytes": sizes[name]}
            else:
                answer = generate(pipelines[name], message)
        except Exception as error:  # the parent process raises it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
