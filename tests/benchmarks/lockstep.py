"""
Banks of several conversations kept in lockstep against one after the other, by the tiny model; the same banks result.

    OMP_NUM_THREADS=1 python tests/benchmarks/lockstep.py [DIALOGUES]

The two take turns; printed are medians of three, in CPU seconds.
"""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data  # noqa: E402
from manager import build_banks  # noqa: E402
from memory import make_embedder  # noqa: E402
from policy import Policy  # noqa: E402


def main():
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 16
    policy, embedder = Policy.load(data.TINY), make_embedder("hash")
    dialogues = data.load("synthetic", "test", count=count, seed=1)

    def in_lockstep():
        return build_banks(policy, dialogues, embedder, extract=False)

    def one_by_one():
        return [build_banks(policy, [dialogue], embedder, extract=False)[0] for dialogue in dialogues]

    spent, banks = {in_lockstep: [], one_by_one: []}, {}
    for _ in range(3):
        for call, values in spent.items():
            start = time.process_time()
            built = call()
            values.append(time.process_time() - start)
            banks[call] = [[memory.text for memory in one.bank] for one in built]
    same = sum(a == b for a, b in zip(*banks.values(), strict=True))
    lockstep, single = (statistics.median(values) for values in spent.values())
    print(f"{count} conversations of {len(dialogues[0].turns)} turns: in lockstep {lockstep:.2f} s, one by one "
          f"{single:.2f} s, {single / lockstep:.2f} x; {same} of {count} banks are the same")


if __name__ == "__main__":
    main()
