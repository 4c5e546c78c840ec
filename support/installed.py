"""Imported first by every script that needs all required packages: names those that cannot be imported, in one line."""
import importlib
import sys
from pathlib import Path

PACKAGES = ("numpy", "tqdm", "torch", "transformers", "hnswlib")


def missing_packages() -> dict[str, str]:
    """{package that cannot be imported: reason}"""
    missing = {}
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library is not there
            missing[name] = " ".join(str(error).split())
    return missing


if Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parents[1]:  # one of our scripts runs, not yours
    if missing := missing_packages():
        print(f"{Path(sys.argv[0]).name}: error: {', '.join(missing)} cannot be imported ({[*missing.values()][0]}): "
              "run pip install -r requirements.txt with Python 3.11 or newer; hnswlib needs a C++ compiler "
              "(README.md, Requirements)", file=sys.stderr)
        sys.exit(2)
