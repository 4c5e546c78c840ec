"""
Does training leak? Runs it for two hours and prints each minute's peak of resident memory and its open files, then how
much both grew after the first tenth: from the first fifth of the rest to its last the mean of the peaks has to stay
within 5 %, and no file may stay open. The peak is the kernel's own (VmHWM, set back every minute): what is resident at
one instant depends on where in a step the instant falls.

    OMP_NUM_THREADS=2 python tests/benchmarks/soak.py --hours 2 --algo grpo      # further flags: train_manager.py's
"""
import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--hours", type=float, default=2)
    parser.add_argument("--every", type=float, default=60, help="seconds between two measurements (60)")
    args, flags = parser.parse_known_args()
    out = Path(tempfile.gettempdir(), "soak")
    shutil.rmtree(out, ignore_errors=True)
    run = subprocess.Popen([sys.executable, ROOT / "train_manager.py", "--steps", "1000000", "--schedule", "constant",
                            "--eval", "0", "--out", out, *flags], stdout=subprocess.DEVNULL)
    begin, rows = time.monotonic(), []
    print("minutes  step  peak of memory (MB)  open files", flush=True)
    try:
        while run.poll() is None and time.monotonic() - begin < 3600 * args.hours:
            time.sleep(args.every)
            status = Path(f"/proc/{run.pid}/status").read_text()
            memory = int(status.split("VmHWM:")[1].split()[0]) / 1024
            Path(f"/proc/{run.pid}/clear_refs").write_text("5")
            step = (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0
            rows.append((memory, len(os.listdir(f"/proc/{run.pid}/fd"))))
            print(f"{(time.monotonic() - begin) / 60:7.1f} {step:5} {rows[-1][0]:20.0f} {rows[-1][1]:11}", flush=True)
    finally:
        run.send_signal(signal.SIGINT)
        print(f"exit code {run.wait()}")
    rest = np.array(rows[len(rows) // 10:])
    fifth = max(1, len(rest) // 5)  # of what is left: the last against the first
    first, last = rest[:fifth], rest[-fifth:]
    grown = last.max(axis=0) - first.max(axis=0)
    mean = last[:, 0].mean() / first[:, 0].mean() - 1
    print(f"after the first tenth: the minutes' peaks {100 * mean:+.1f} % in the mean, the highest "
          f"{100 * grown[0] / first[:, 0].max():+.1f} %; open files {grown[1]:+.0f}")


if __name__ == "__main__":
    main()
