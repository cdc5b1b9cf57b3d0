"""The package's layout: rooms import downwards only, names and words have one home each."""

import ast
import re
from collections import Counter
from graphlib import CycleError, TopologicalSorter

import pytest
from helpers import ROOT

PACKAGE = ROOT / "arithmetic_llm"
# Each room may import from itself and from those before it. Modules at the top are the ground.
ROOMS = ("ground", "task", "corpus", "model", "training", "evaluation", "grpo", "study")
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
}
WORDS = re.compile("Evaluate:|</?think>|Expression now:|Final Result:|Error:|^Step ?$|Step [0-9[]")


def room_of(module):
    """``arithmetic_llm.task.text`` -> ``task``; a module at the top is the ground."""
    parts = module.split(".")
    return parts[1] if len(parts) > 2 else "ground"


def imports_of(source):
    """Modules of the package that a source imports, wherever it does, with their lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("arithmetic_llm"):
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            for module in {name if name in MODULES else node.module for name in named}:
                yield module, node
        elif isinstance(node, ast.Import):
            yield from ((a.name, node) for a in node.names if a.name.startswith("arithmetic_llm"))


def upward(module, source):
    """The lines that import from a room above the module's own."""
    rank = ROOMS.index(room_of(module))
    return [
        f"{module}:{node.lineno} imports {imported}"
        for imported, node in imports_of(source)
        if ROOMS.index(room_of(imported)) > rank
    ]


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_downwards_only(module):
    assert upward(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from arithmetic_llm.model.lora import add_lora",
        "def f():\n    from arithmetic_llm.model import lora",
        "if TYPE_CHECKING:\n    import arithmetic_llm.grpo.task",
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(line):
    found = upward("arithmetic_llm.corpus.draw", line)
    assert len(found) == 1
    assert found[0].startswith(f"arithmetic_llm.corpus.draw:{line.count(chr(10)) + 1} imports")


def test_no_circle():
    graph = {m: {name for name, _ in imports_of(p.read_text())} for m, p in MODULES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("module", MODULES)
def test_imports_of_the_package_stand_at_the_top(module):
    """Inside a function or a branch they hide a circle, or a room's need of another."""
    source = MODULES[module].read_text()
    lines = {node.lineno for _, node in imports_of(source)}
    at_top = {node.lineno for node in ast.parse(source).body}
    assert lines <= at_top, f"{module}: lines {sorted(lines - at_top)}"


def test_every_room_says_what_it_is():
    assert {room_of(module) for module in MODULES} == set(ROOMS)
    for room in ROOMS[1:]:
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))


def test_no_class_is_named_like_another():
    trees = [ast.parse(path.read_text()) for path in [*MODULES.values(), *ROOT.glob("*.py")]]
    names = Counter(n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def docstrings_of(tree):
    """The nodes of all docstrings, which may show what the model writes."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    holders = [node for node in ast.walk(tree) if isinstance(node, kinds) and node.body]
    return {id(node.body[0].value) for node in holders if isinstance(node.body[0], ast.Expr)}


def spelt(source):
    """The words of the model's language that a source spells, docstrings apart."""
    tree = ast.parse(source)
    apart = docstrings_of(tree)
    texts = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in apart
    ]
    return [word for text in texts for word in WORDS.findall(text)]


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {"arithmetic_llm.task.text"}))
def test_the_words_of_the_model_are_spelt_in_one_place(module):
    assert spelt(MODULES[module].read_text()) == []


def test_the_home_of_the_words_spells_them_all():
    found = spelt(MODULES["arithmetic_llm.task.text"].read_text())
    expected = {"Evaluate:", "<think>", "</think>", "Step", "Expression now:", "Final Result:"}
    assert expected <= {*found}


def test_the_task_and_corpora_need_no_torch():
    for module, path in MODULES.items():
        if room_of(module) in ("task", "corpus"):
            roots = {
                name.split(".")[0]
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in ([node.module] if isinstance(node, ast.ImportFrom) else [])
                or [alias.name for alias in node.names]
            }
            assert not roots & {"torch", "tokenizers", "numpy"}, module
