"""The structure of the code: which module may import which, and how long files, functions and signatures may be."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {  # every file of the top folder, in reading order: the stages that it may import
    "memory": set(),
    "policy": {"memory"},
    "manager": {"memory", "policy"},
    "answer": {"memory", "policy", "manager"},
    "grpo": {"policy"},
    "ppo": {"policy"},
    "sft": {"policy"},
    "train_manager": {"memory", "policy", "manager", "answer", "grpo", "ppo", "sft"},
    "train_answer": {"memory", "policy", "manager", "answer", "grpo", "ppo", "sft"},
    "train_joint": {"memory", "policy", "grpo", "train_manager", "train_answer"},
    "evaluate": {"memory", "policy", "manager", "answer", "train_manager", "train_answer"},
}
ALGORITHMS = ("grpo", "ppo", "sft")
OPTIONAL = {"matplotlib", "nltk", "openai", "peft", "sentence_transformers", "readline"}  # imported where they are used
LOSSES = {"grpo_loss", "ppo_loss"}  # pure functions of tensors, with one parameter for each symbol of the equation
MAX_LINES, MAX_FUNCTION, MAX_LOOP, MAX_PARAMETERS = 400, 40, 60, 7
FILES = sorted(path.relative_to(ROOT).as_posix() for folder in ("", "data", "support", "support/tiny_model", "tests")
               for path in (ROOT / folder).glob("*.py"))
CODE = [name for name in FILES if not name.startswith("tests/")]


def parse(name):
    return ast.parse((ROOT / name).read_text())


def modules_of(tree):
    """The full names of all imported modules; for "from a import b" both a and a.b, as b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def functions_of(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_the_top_folder_holds_the_stages_only():
    assert {path.stem for path in ROOT.glob("*.py")} == set(STAGES)


@pytest.mark.parametrize("name", CODE)
def test_a_module_imports_only_what_comes_before_it(name):
    ours = {module.partition(".")[0] for module in modules_of(parse(name))} & {*STAGES, "data", "support"}
    if "/" not in name:
        allowed = {"data", "support"} | STAGES[Path(name).stem]
    elif name.startswith("support/tiny_model/"):
        allowed = {"data", "support", *STAGES}
    else:
        allowed = {"data"} if name.startswith("data/") else {"data", "support"}
    assert ours <= allowed, f"{name} imports {', '.join(sorted(ours - allowed))}"
    if not name.startswith("support/tiny_model/"):
        assert not any(module.startswith("support.tiny_model") for module in modules_of(parse(name)))


@pytest.mark.parametrize("name", CODE)
def test_only_optional_packages_are_imported_inside_functions(name):
    inside = {module for function in functions_of(parse(name)) for module in modules_of(function)}
    assert {module.partition(".")[0] for module in inside} <= OPTIONAL, name


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_algorithms_know_nothing_of_several_processes(name):
    tree = parse(f"{name}.py")
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {function.name for function in functions_of(parse("support/distributed.py"))}
    assert not words & (names | {"dist", "distributed"})
    assert not any("distributed" in module for module in modules_of(tree))


@pytest.mark.parametrize("name", FILES)
def test_files_are_short(name):
    assert len((ROOT / name).read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", CODE)
def test_functions_are_short(name):
    limit = MAX_LOOP if name == "support/loop.py" or Path(name).stem in ALGORITHMS else MAX_FUNCTION
    lengths = {function.name: function.end_lineno - function.lineno + 1 for function in functions_of(parse(name))}
    assert not {function: length for function, length in lengths.items() if length > limit}, name


@pytest.mark.parametrize("name", CODE)
def test_functions_have_few_parameters(name):
    counts = {}
    for function in functions_of(parse(name)):
        arguments = function.args
        names = [one.arg for one in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
        counts[function.name] = len(names) - (names[:1] in (["self"], ["cls"]))
    assert not {function: count for function, count in counts.items()
                if count > MAX_PARAMETERS and function not in LOSSES}, name
