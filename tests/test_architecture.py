"""The package's structure: floors, a spine that imports no wing, no circles, one name a thing."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
ROOT = REPOSITORY / "opennemo"
FLOORS = [
    {"errors"},
    {"files", "progress"},
    {"texts"},
    {"tokenizer", "kernels"},
    {"model"},
    {"train", "engine"},
    {"planning"},
    {"reply"},
    {"arguments", "opening"},
    {"llm", "rollouts"},
    {"serve", "terminal"},
    {"batch"},
    {"cluster"},
    {"data", "evals"},
    {"cli"},
]
FLOOR = {package: height for height, floor in enumerate(FLOORS) for package in floor}
# What makes the system work, in reading order; docs/reading-order.md has a paragraph for each.
SPINE = [
    "model/transformer",
    "model/attention",
    "model/formats",
    "model/quantization",
    "model/pages",
    "tokenizer/tekken",
    "tokenizer/bpe",
    "tokenizer/tokenizer",
    "tokenizer/messages",
    "tokenizer/calls",
    "tokenizer/chat",
    "engine/engine",
    "engine/token",
    "engine/params",
    "engine/sequence",
    "engine/kv_cache",
    "engine/scheduler",
    "engine/runner",
    "engine/sampler",
    "engine/local",
    "engine/loop",
    "reply",
    "opening",
    "llm",
    "train/config",
    "train/packing",
    "train/objectives",
    "train/optim",
    "train/trainer",
    "serve/service",
    "serve/protocols/stream",
    "serve/protocols/chat",
    "serve/app",
]
SPINE_BUDGET = 7_350
# What the spine does not need, directly or through others.
WINGS = {"batch", "cli", "cluster", "data", "evals", "planning", "terminal"}
# Lines of Python in the package. It falls; raise it only in the commit that needs it, saying why.
BUDGET = 36_700
# File names that two floors share on purpose: the same subject, seen from each.
SHARED_NAMES = {"__init__", "__main__", "chat", "export"}  # export: what version 0.1 named so
FORBIDDEN_NAMES = {"utils", "common", "base", "helpers", "core", "misc"}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def package_of(module: str) -> str:
    """The part of the package that a module belongs to; "" for the package itself."""
    return [*module.split("."), ""][1]


def imported_modules(path: Path) -> Iterator[str]:
    """The modules of the package that a file imports, at its top or inside its functions."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: use absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "opennemo":
                while name not in MODULES:
                    name = name.rpartition(".")[0]
                yield name


IMPORTS = {module: set(imported_modules(path)) - {module} for module, path in MODULES.items()}


def reachable(module: str) -> set[str]:
    """Every module that importing one may import."""
    seen, waiting = set(), [module]
    while waiting:
        if (current := waiting.pop()) not in seen:
            seen.add(current)
            waiting += IMPORTS[current]
    return seen


def n_lines(paths: Iterator[Path] | list[Path]) -> int:
    return sum(len(path.read_text("utf-8").splitlines()) for path in paths)


def test_every_module_has_a_floor_and_a_plain_name():
    for module, path in MODULES.items():
        if package_of(module) not in ("", "__main__"):
            assert package_of(module) in FLOOR, f"{path}: put {package_of(module)} on a floor"
        assert path.stem not in FORBIDDEN_NAMES, f"{path}: name it after what it does"


def test_imports_only_go_down():
    for module, others in IMPORTS.items():
        for other in others:
            here, there = package_of(module), package_of(other)
            if here in FLOOR and there in FLOOR and here != there:
                assert FLOOR[there] < FLOOR[here], f"{module} imports {other}, not below it"


def test_files_do_not_import_each_other_in_circles():
    for module, others in IMPORTS.items():
        for other in others:
            assert module not in reachable(other), f"{module} and {other} import each other"


def test_the_spine_imports_no_wing():
    for name in SPINE:
        module = f"opennemo.{name.replace('/', '.')}"
        wings = sorted(other for other in reachable(module) if package_of(other) in WINGS)
        assert not wings, f"{module} imports {', '.join(wings)}"


def test_the_spine_can_be_read_in_an_afternoon():
    assert n_lines([ROOT / f"{name}.py" for name in SPINE]) <= SPINE_BUDGET
    guide = (REPOSITORY / "docs" / "reading-order.md").read_text("utf-8")
    places = [guide.find(f"`{name}.py`") for name in SPINE]
    assert -1 not in places, f"docs/reading-order.md leaves out {SPINE[places.index(-1)]}"
    assert places == sorted(places), "docs/reading-order.md has another order"


def test_the_package_keeps_to_its_budget():
    total = n_lines(list(MODULES.values()))
    assert total <= BUDGET, f"{total} lines of Python, allowed are {BUDGET}"


def test_one_name_stands_for_one_thing():
    classes, files = defaultdict(list), defaultdict(list)
    for module, path in MODULES.items():
        files[path.stem].append(module)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(module)
    twice = {name: where for name, where in classes.items() if len(where) > 1}
    assert not twice, f"classes of one name: {twice}"
    # The commands of `cli` are called after the parts that they call.
    at_home = {n: [m for m in w if package_of(m) != "cli"] for n, w in files.items()}
    twice = {n: w for n, w in at_home.items() if len(w) > 1 and n not in SHARED_NAMES}
    assert not twice, f"files of one name: {twice}"


def test_the_tokenizer_floor_is_free_of_torch():
    for module, path in MODULES.items():
        if package_of(module) == "tokenizer":
            assert "import torch" not in path.read_text("utf-8"), f"{path} imports torch"


def test_nothing_deserialises_code():
    for path in MODULES.values():
        text = path.read_text("utf-8")
        for word in ("import pickle", "torch.load(", "yaml.load(", "eval(", "exec("):
            assert word not in text.replace(".eval(", ""), f"{path}: {word}"


# Where the process as a whole may be changed, and why.
PROCESS_WIDE = {
    "opennemo.cli": "the command line owns the process",
    "opennemo.cluster.local_ray": "Ray reads its environment when it is imported, and logs a lot",
    "opennemo.cluster.session": "the same, for engines, and Ray's own handler of SIGTERM",
    "opennemo.cluster.replica": "a process of its own",
    "opennemo.data.workers": "processes of their own",
    "opennemo.engine.ranks": "processes of their own",
    "opennemo.evals.patches": "undone at the end of a block",
    "opennemo.tokenizer.corpus_encoder": "fastokens reads its threads while it is built",
    "opennemo.serve.logs": "called by a command or in a process of its own",
    "opennemo.serve.server": "a running server stops at a signal",
}
CHANGES = re.compile(
    r"os\.(chdir|putenv)\(|os\.environ(\[[^]]*\] *=[^=]| *\|=)|environ\.(setdefault|update)\("
    r"|warnings\.(filterwarnings|simplefilter)\(|signal\.signal\(|\.setLevel\(|logging\.basicConfig\("
    r"|sys\.modules\[[^]]*\] *=|set_num_threads\("
)


def test_the_process_is_changed_only_where_that_is_written_down():
    for module, path in MODULES.items():
        if any(module == name or module.startswith(f"{name}.") for name in PROCESS_WIDE):
            continue
        match = CHANGES.search(path.read_text("utf-8"))
        assert not match, f"{path} changes the process: {match.group()}"


def test_the_index_of_tests_names_every_file():
    index = (REPOSITORY / "tests" / "README.md").read_text("utf-8")
    for path in sorted((REPOSITORY / "tests").rglob("test_*.py")):
        name = path.relative_to(REPOSITORY / "tests").as_posix()
        assert f"`{name}`" in index, f"tests/README.md does not say what {name} holds"


# Names of other packages and of Python. Triton's kernels are compiled by name in one program.
FOREIGN = {"_exit", "_replace", "_attn_implementation", "_private", "_shutdown", "_run_exitfuncs"}
PROGRAMS = {"compile_kernels.py"}


def test_tests_reach_into_no_privates():
    paths = (REPOSITORY / "tests").rglob("*.py")
    for path in sorted(path for path in paths if path.name not in PROGRAMS):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opennemo"):
                names = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not names, f"{path}:{node.lineno} imports {names}"
            if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert own or node.attr in FOREIGN, f"{path}:{node.lineno} reaches for {node.attr}"
