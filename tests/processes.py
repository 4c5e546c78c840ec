"""Scripts in two processes under torchrun."""
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]


def torchrun(*command, **options):
    """Start a script in two processes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             *map(str, command)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            **options)


def finished(process):
    """Wait until the processes have ended."""
    out, err = process.communicate(timeout=900)
    return SimpleNamespace(returncode=process.returncode, out=out, err=err)
