"""
Checks that training does not leak. Trains for two hours, and prints the peak of resident memory of each minute and the
number of open files, then the growth of both. The first tenth of the minutes is ignored. Between the first and the last
fifth of the rest, the mean peak has to stay within 5 % and the number of open files must not grow. The peak is the
kernel's (VmHWM, reset every minute): memory at a single instant depends on the position within a step.

    OMP_NUM_THREADS=2 python tests/benchmarks/soak.py --hours 2 --algo grpo      # flags of train_manager.py follow
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


def measure(pid):
    """Return the peak of memory in MB since the last call, and the number of open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # resets VmHWM
    return int(status.split("VmHWM:")[1].split()[0]) / 1024, len(os.listdir(f"/proc/{pid}/fd"))


def watch(run, out, seconds, interval):
    """Measure a run until it ends or `seconds` have passed, then stop it. -> (measurements, 2)"""
    begin, rows = time.monotonic(), []
    print("minutes  step  peak of memory (MB)  open files", flush=True)
    try:
        while run.poll() is None and time.monotonic() - begin < seconds:
            time.sleep(interval)
            rows.append(measure(run.pid))
            metrics = out / "metrics.jsonl"
            step = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
            print(f"{(time.monotonic() - begin) / 60:7.1f} {step:5} {rows[-1][0]:20.0f} {rows[-1][1]:11}", flush=True)
    finally:
        run.send_signal(signal.SIGINT)
        print(f"exit code {run.wait()}")
    return np.array(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--hours", type=float, default=2, help="duration (2)")
    parser.add_argument("--every", type=float, default=60, help="seconds between two measurements (60)")
    args, flags = parser.parse_known_args()
    out = Path(tempfile.gettempdir(), "soak")
    shutil.rmtree(out, ignore_errors=True)
    run = subprocess.Popen([sys.executable, ROOT / "train_manager.py", "--steps", "1000000", "--schedule", "constant",
                            "--eval", "0", "--out", out, *flags], stdout=subprocess.DEVNULL)
    rows = watch(run, out, 3600 * args.hours, args.every)
    rest = rows[len(rows) // 10:]
    fifth = max(1, len(rest) // 5)
    first, last = rest[:fifth], rest[-fifth:]
    mean_growth = last[:, 0].mean() / first[:, 0].mean() - 1
    memory_growth = last[:, 0].max() - first[:, 0].max()
    file_growth = last[:, 1].min() - first[:, 1].min()  # the minimum, as some files are open for a moment only
    print(f"growth after the first tenth: mean of the peaks {100 * mean_growth:+.1f} %, highest peak "
          f"{100 * memory_growth / first[:, 0].max():+.1f} %, open files {file_growth:+.0f}")
    if abs(mean_growth) > 0.05 or file_growth > 0:
        sys.exit("memory or the number of open files is not constant")


if __name__ == "__main__":
    main()
