"""Everybody, as processes, in no particular order: `python run.py planes.toml`."""

import subprocess
import sys

from planes import configuration

_, run = configuration()
running: list[subprocess.Popen] = []


def start(name: str) -> subprocess.Popen:
    running.append(subprocess.Popen([sys.executable, f"{name}.py", sys.argv[1]]))
    return running[-1]


try:
    start("toolbox")  # serves whoever comes, for ever
    for process in [start(name) for name in ["orchestrator", *["agent"] * run["agents"], "metrics"]]:
        if process.wait(timeout=120):
            sys.exit(f"failed: {process.args}")
    start("audit").wait(timeout=60)
finally:
    for process in running:
        process.terminate()
        process.wait()
