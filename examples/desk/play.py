"""The demo's processes, left running to play with: `python -m examples.desk.play`.

The desk fills itself with customers, whose names are printed; nothing is sent to the agent but what
you send. Ends at Ctrl-C. Its record stays in the folder and is taken up again by the next start.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import time
from pathlib import Path

from rich.console import Console

from examples.desk.stack import Stack
from examples.desk.tasks import Task, draw_task
from examples.desk.traffic import Owner

console = Console()


async def seed(desk_url: str, count: int) -> list[Task]:
    """Put `count` customers with orders on the desk."""
    owner, rng = Owner(desk_url), random.SystemRandom()
    tasks: list[Task] = []
    try:
        while len(tasks) < count:
            task = draw_task(rng)
            if await owner.seed(task):
                tasks.append(task)
    finally:
        await owner.aclose()
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description="Leave the desk and Hone running.")
    parser.add_argument("--folder", type=Path, default=Path("var/play"))
    parser.add_argument("--hone-port", type=int, default=8321)
    parser.add_argument("--desk-port", type=int, default=8400)
    options = parser.parse_args()
    with Stack(options.folder, hone_port=options.hone_port, desk_port=options.desk_port) as stack:
        stack.wait_hone()
        tasks = asyncio.run(seed(stack.desk_url, 5))
        console.print(f"Hone serves at {stack.hone_url}, the desk at {stack.desk_url}/docs\n")
        console.print("Customers wait at the desk. They would ask:")
        for task in tasks:
            console.print(f"  {task.request}", highlight=False)
        console.print("\nAsk the agent, tell it how it went, and look:")
        console.print(
            f"  curl -s {stack.hone_url}/v1/chat/completions -H 'content-type: application/json'"
            f' -d \'{{"model": "agent:desk", "messages": [{{"role": "user", "content": '
            f'"{tasks[0].request}"}}]}}\'\n'
            "  .venv/bin/hone episodes\n"
            "  .venv/bin/hone feedback EPISODE 1\n"
            "  .venv/bin/hone status\n",
            highlight=False,
            soft_wrap=True,
        )
        console.print(f"Logs are in {options.folder}. Ctrl-C stops everything.")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            console.print("stopping ...")


if __name__ == "__main__":
    main()
