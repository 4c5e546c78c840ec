"""
Is a run that is killed at a random moment and resumed equal to one that is not? Twenty times each with SIGKILL and with
SIGINT (Ctrl-C), on short runs of the default size; metrics, samples and adapter are compared to the byte.

    OMP_NUM_THREADS=1 python tests/benchmarks/kills.py                                     # half an hour
    python tests/benchmarks/kills.py --signals KILL --kills 3 --algo ppo --bank self       # further flags: the script's

The processes are forked from one that has imported everything, so that the moments fall into the run itself; a moment
is a share of the CPU time that the whole run took, whatever else the machine is doing.
"""
import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from matplotlib.backends import backend_agg  # noqa: F401, what a run imports late
from transformers import LlamaForCausalLM  # noqa: F401

import train_manager
from support.cli import exit_cleanly
from support.run import read_rows


def start(argv, log):
    """The process id of a run with these flags."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["train_manager.py", *argv]
        exit_cleanly(lambda: train_manager.main(argv))
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait_until(child, seconds):
    """Returns when the process has used so many seconds of CPU time, or has ended."""
    while True:
        state, *numbers = Path(f"/proc/{child}/stat").read_text().rsplit(") ", 1)[1].split()
        if state == "Z" or sum(map(int, numbers[10:12])) / os.sysconf("SC_CLK_TCK") >= seconds:
            return
        time.sleep(0.003)


def left(folder):
    """All that counts of a run, without the seconds."""
    rows = [{**row, "seconds": 0} for row in read_rows(folder / "metrics.jsonl")]
    files = ("samples.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")
    return [json.dumps(rows), *((folder / name).read_bytes() for name in files)]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signals", nargs="+", default=["KILL", "INT"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "kills"))
    args, flags = parser.parse_known_args()
    flags = ["--steps", "3", "--eval", "1", "--checkpoint-every", "1", *flags]
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    log, rng = args.folder / "log.txt", random.Random(0)
    _, status, used = os.wait4(start([*flags, "--out", str(args.folder / "whole")], log), 0)
    assert status == 0, log.read_text()
    whole, seconds = left(args.folder / "whole"), used.ru_utime + used.ru_stime
    for name in args.signals:
        ends, equal = [], 0
        for i in range(args.kills):
            out = args.folder / f"{name}-{i}"
            child, moment = start([*flags, "--out", str(out)], log), rng.uniform(0, seconds)
            wait_until(child, moment)
            os.kill(child, getattr(signal, f"SIG{name}"))
            ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            steps = sum("eval" not in row for row in read_rows(out / "metrics.jsonl"))
            code = os.waitpid(start([*flags, "--out", str(out), "--resume"], log), 0)[1]
            is_equal = code == 0 and left(out) == whole
            equal += is_equal
            print(f"SIG{name} after {moment:.1f} of {seconds:.1f} s, at {steps} steps, exit {ends[-1]}: "
                  f"{'equal' if is_equal else 'NOT EQUAL'}", flush=True)
        print(json.dumps({"signal": name, "kills": args.kills, "equal": equal, "exits": ends}), flush=True)
        if equal < args.kills or not set(ends) <= {-9, 0} | {130}:
            sys.exit(f"see {args.folder}")


if __name__ == "__main__":
    main()
