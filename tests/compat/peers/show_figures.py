"""Two versions' figures by the trainer's own sinks: `show_figures.py wandb|trackio FOLDER`."""

import sys
from pathlib import Path

from trainer.sinks import Shown, open_sink

kind, folder = sys.argv[1:]
shown = Shown(open_sink(kind, Path(folder), "hone-compat"))
for version in ("line@v1", "line@v2"):
    shown("line", version, [(1, {"kl": 0.0, "entropy": 3.4375}), (2, {"kl": 0.5, "entropy": 3.25})])
shown.close()
print("shown: ok")
