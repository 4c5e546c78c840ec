"""
Checks that a run which is killed at a random moment and resumed equals an uninterrupted run. Short runs of the default
size are killed, twenty by SIGKILL and twenty by SIGINT (Ctrl-C). Metrics without seconds, samples and adapter have to
be equal byte for byte.

    OMP_NUM_THREADS=1 python tests/benchmarks/kills.py                                     # half an hour
    python tests/benchmarks/kills.py --signals KILL --kills 3 --algo ppo --bank self       # flags of the script follow

The processes are forked from one that has imported everything, so that the moments fall into the run itself. A moment
is a fraction of the CPU time of the uninterrupted run, so other load on the machine does not shift it.
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
from matplotlib.backends import backend_agg  # noqa: F401, imported here because runs import it late
from transformers import LlamaForCausalLM  # noqa: F401

import train_manager
from support.cli import exit_cleanly
from support.run import read_rows

SHORT = ["--steps", "3", "--eval", "1", "--checkpoint-every", "1"]
EXITS = {"KILL": {-9, 0}, "INT": {130, 0}}  # 0: the run had ended before the signal


def start(flags, log):
    """Start a run and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["train_manager.py", *flags]
        exit_cleanly(lambda: train_manager.main(flags))
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait_until(child, seconds):
    """Wait until the process has used so many seconds of CPU time, or has ended."""
    while True:
        state, *numbers = Path(f"/proc/{child}/stat").read_text().rsplit(") ", 1)[1].split()
        if state == "Z" or sum(map(int, numbers[10:12])) / os.sysconf("SC_CLK_TCK") >= seconds:
            return
        time.sleep(0.003)


def results(folder):
    """Return the results of a run, without the seconds."""
    rows = [{**row, "seconds": 0} for row in read_rows(folder / "metrics.jsonl")]
    files = ("samples.jsonl", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")
    return [json.dumps(rows), *((folder / name).read_bytes() for name in files)]


def kill_and_resume(name, moment, flags, out, log):
    """Send SIGname to a run after `moment` seconds of CPU time and resume it. -> exit codes, steps at the kill"""
    child = start([*flags, "--out", str(out)], log)
    wait_until(child, moment)
    os.kill(child, getattr(signal, f"SIG{name}"))
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    num_steps = sum("eval" not in row for row in read_rows(out / "metrics.jsonl"))
    resumed = os.waitstatus_to_exitcode(os.waitpid(start([*flags, "--out", str(out), "--resume"], log), 0)[1])
    return killed, resumed, num_steps


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("--kills", type=int, default=20, help="kills by each signal (20)")
    parser.add_argument("--signals", nargs="+", choices=EXITS, default=["KILL", "INT"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "kills"), help="folder of the runs")
    args, flags = parser.parse_known_args()
    flags = [*SHORT, *flags]
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    log, rng = args.folder / "log.txt", random.Random(0)
    _, status, used = os.wait4(start([*flags, "--out", str(args.folder / "whole")], log), 0)
    assert status == 0, log.read_text()
    whole, seconds = results(args.folder / "whole"), used.ru_utime + used.ru_stime
    for name in args.signals:
        exits, num_equal = [], 0
        for i in range(args.kills):
            moment, out = rng.uniform(0, seconds), args.folder / f"{name}-{i}"
            killed, resumed, num_steps = kill_and_resume(name, moment, flags, out, log)
            is_equal = resumed == 0 and results(out) == whole
            exits.append(killed)
            num_equal += is_equal
            print(f"SIG{name} after {moment:.1f} of {seconds:.1f} s, at {num_steps} steps, exit {killed}: "
                  f"{'equal' if is_equal else 'NOT EQUAL'}", flush=True)
        print(json.dumps({"signal": name, "kills": args.kills, "equal": num_equal, "exits": exits}), flush=True)
        if num_equal < args.kills or not set(exits) <= EXITS[name]:
            sys.exit(f"see {args.folder}")


if __name__ == "__main__":
    main()
