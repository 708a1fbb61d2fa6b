"""A process killed at any moment leaves a run that goes on to the very same weights."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

N_KILLS = 20
# Imports take seconds and the run itself less, so one process imports, and forks one for each run.
SCRIPT = textwrap.dedent(
    """
    import os, pathlib, sys, torch, dmgen
    torch.set_num_threads(1)

    def run(out, n_steps):
        base = dmgen.TabularLM.random("abc.", 4, eos=".", seed=1)
        has_ab = dmgen.feature(lambda text: "ab" in text, name="ab")
        target = dmgen.EBM.fit(base, [dmgen.Moment(has_ab, 0.5)], n_samples=2000, seed=0)
        config = dmgen.TrainerConfig(
            batch_size=64, learning_rate=0.05, checkpoint_every=1, average_decay=0.9,
            backward_size=20, base_share=0.1, proposal_every=4,
        )
        sampler = dmgen.GDCpp(base.copy(), target, config)
        if any((out / "checkpoints").glob("step-*")):
            sampler.resume(out)
        elif (out / "metrics.jsonl").exists():
            (out / "metrics.jsonl").unlink()
        print("at", sampler.step, flush=True)
        sampler.train(n_steps - sampler.step, out=out)
        print("done", repr(sampler.policy.logits.sum().item()), flush=True)

    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(pathlib.Path(line.strip()), 120)
            os._exit(0)
        print("pid", pid, flush=True)
        print("ended", os.waitpid(pid, 0)[1], flush=True)
    """
)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_change_nothing(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    server = subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    def read(*words):
        """The value of the next line that begins with one of the words."""
        for line in server.stdout:
            word, _, value = line.strip().partition(" ")
            if word in words:
                return word, value
        raise AssertionError("the process is gone")

    def start(name):
        server.stdin.write(f"{tmp_path / name}\n")
        server.stdin.flush()
        pid = at = None
        while pid is None or at is None:
            word, value = read("pid", "at")
            pid, at = (int(value), at) if word == "pid" else (pid, int(value))
        return pid, at

    read("ready")
    start("whole")
    began = time.monotonic()
    expected = read("done")[1]
    seconds = time.monotonic() - began
    read("ended")
    begun_at = []
    for delay in torch.rand(N_KILLS, generator=torch.Generator().manual_seed(7)).tolist():
        pid, step = start("killed")
        begun_at.append(step)
        # A third of the run in all: it must not be over before the last kill, on a machine that
        # may be faster by then.
        time.sleep(delay * seconds / N_KILLS * 0.6)
        os.kill(pid, signal.SIGKILL)
        assert read("ended")[1] == str(signal.SIGKILL)
    start("killed")
    assert read("done")[1] == expected
    assert len(set(begun_at)) > 3  # the kills fell all along the run
    server.stdin.close()
    server.wait()
