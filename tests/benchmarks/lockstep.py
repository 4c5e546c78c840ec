"""
Compares building the banks of several conversations in lockstep with building them one after the other, by the tiny
model. Both ways give the same banks.

    OMP_NUM_THREADS=1 python tests/benchmarks/lockstep.py [DIALOGUES]

The two take turns. The output shows medians of three rounds, in seconds of CPU time.
"""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
from manager import Manager, build_banks  # noqa: E402
from memory import make_embedder  # noqa: E402
from policy import Policy  # noqa: E402

ROUNDS = 3


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    manager, embedder = Manager(Policy.load(data.TINY)), make_embedder("hash")
    dialogues = data.load("synthetic", "test", count=count, seed=1)

    def in_lockstep():
        return build_banks(manager, dialogues, embedder)

    def one_by_one():
        return [build_banks(manager, [dialogue], embedder)[0] for dialogue in dialogues]

    spent, banks = {in_lockstep: [], one_by_one: []}, {}
    for _ in range(ROUNDS):
        for call, seconds in spent.items():
            start = time.process_time()
            builds = call()
            seconds.append(time.process_time() - start)
            banks[call] = [[memory.text for memory in build.bank] for build in builds]
    num_equal = sum(a == b for a, b in zip(*banks.values(), strict=True))
    lockstep, single = (statistics.median(seconds) for seconds in spent.values())
    print(f"{count} conversations of {len(dialogues[0].turns)} turns: in lockstep {lockstep:.2f} s, one by one "
          f"{single:.2f} s, {single / lockstep:.2f} times as long; {num_equal} of {count} banks are equal")


if __name__ == "__main__":
    main()
