"""A required package that cannot be imported is one line, whatever its reason; our modules stay usable as a library."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(tmp_path, stubs, *command):
    """Run Python with modules in place of packages; each raises when it is imported."""
    for name, statement in stubs.items():
        (tmp_path / f"{name}.py").write_text(statement)
    return subprocess.run([sys.executable, *map(str, command)], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})


@pytest.mark.parametrize("script, stubs, words", [
    ("train_manager", {"hnswlib": "import absent"}, "hnswlib cannot be imported (No module named 'absent')"),
    ("train_joint", {"hnswlib": "import absent"}, "hnswlib cannot be imported (No module named 'absent')"),
    ("memory", {"hnswlib": "raise ImportError('GLIBCXX_3\\nis old')"}, "hnswlib cannot be imported (GLIBCXX_3 is old)"),
    ("train_answer", {"torch": "raise OSError('libcudart.so: none')"}, "torch cannot be imported (libcudart.so: none)"),
    ("evaluate", {"transformers": "import nowhere", "hnswlib": "import nowhere", "tqdm": "import nowhere"},
     "tqdm, transformers, hnswlib cannot be imported (No module named 'nowhere')")])
def test_a_missing_package_is_one_line(tmp_path, script, stubs, words):
    found = run(tmp_path, stubs, ROOT / f"{script}.py")
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith(f"{script}.py: error: {words}") and found.stderr.count("\n") == 1
    assert "pip install -r requirements.txt" in found.stderr


def test_in_another_program_it_is_an_exception(tmp_path):
    program = "try:\n import memory\nexcept ImportError as error:\n print(error)"
    found = run(tmp_path, {"hnswlib": "import absent"}, "-c", program)
    assert (found.returncode, found.stdout) == (0, "No module named 'absent'\n")
