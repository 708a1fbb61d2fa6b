"""Start several processes that train one policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys


def launch(script, out, count):
    out.mkdir()
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(out)]
    if count > 1:
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
        command = [
            *launcher,
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--num_processes",
            str(count),
            "--main_process_port",
            "0",
            *command[1:],
        ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"rank-{r}.json").read_text()) for r in range(count)]
