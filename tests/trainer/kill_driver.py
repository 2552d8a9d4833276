"""Runs the real trainer process once a folder and kills it at a named point, then runs it again.

`python kill_driver.py FOLDER=POINT ...`; each run is a fork of this process, which has imported
torch already, so that a dozen runs take seconds. POINT is MODULE:CLASS.METHOD, killed as it
returns, or `nowhere`. Prints one line of exit statuses a folder.
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sys
from typing import Any

import alembic.command  # noqa: F401 - imported late by the trainer: once here, not in each fork
import transformers.models.qwen2.modeling_qwen2  # noqa: F401 - the same

from trainer import __main__ as process


def kill_after(point: str) -> None:
    module, _, path = point.partition(":")
    owner_name, _, method_name = path.partition(".")
    owner = getattr(importlib.import_module(module), owner_name)
    method = getattr(owner, method_name)

    @functools.wraps(method)
    def killed(*args: Any, **kwargs: Any) -> None:
        method(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, method_name, killed)


def run(folder: str, point: str | None) -> int:
    pid = os.fork()
    if pid == 0:
        os.environ["HONE_CONFIG"] = f"{folder}/hone.toml"
        sys.argv = ["trainer", "--once"]
        if point is not None:
            kill_after(point)
        process.main()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        folder, _, point = argument.partition("=")
        first = None if point == "nowhere" else run(folder, point)
        print(first, run(folder, None), flush=True)
