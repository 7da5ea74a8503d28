"""The architecture, checked from the syntax trees: who may import whom, and the rules of the house that can be counted.

The table itself is ``layers.py``.
"""

import ast
import builtins
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from layers import MAY_CATCH_EVERYTHING, NO_TORCH, ROOMS

ROOT = Path(__file__).parents[2]

MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_JOB_LINES = 60, 400, 60
OTHER_PEOPLES_BASES = {
    "Protocol",
    "Exception",
    "nn.Module",
    "torch.Generator",
    "torch.Tensor",
    "torch.nn.Module",
    "torch.autograd.Function",
    "TorchDispatchMode",
    "Generic",
    "BaseModel",
    "UserCallback",
    "HttpToolsProtocol",
}

OURS = {"raydream", "jobs", "serve"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- reading the tree -----------------------------------------------------------------------------------------------


@cache
def modules() -> dict[str, Path]:
    """Dotted name to file; a package's own file that only has a docstring is ``package.__init__``."""
    found = {}
    for path in sorted([*ROOT.glob("raydream/**/*.py"), *ROOT.glob("jobs/*.py"), *ROOT.glob("serve/*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        package = name.removesuffix(".__init__")
        has_code = name != package and len(tree_of(path).body) > 1
        found[package if has_code or package == "raydream" else name] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def lines() -> list[tuple[str, frozenset[str]]]:
    return [(names, frozenset(packages.split())) for room in ROOMS.values() for names, packages in room]


@cache
def line_of(module: str) -> int | None:
    """The line of the table that names a module; an exact name goes before a pattern."""
    exact = [i for i, (names, _) in enumerate(lines()) if module in names.split()]
    return next(iter(exact + [i for i, (names, _) in enumerate(lines()) if _matches(module, names)]), None)


def _matches(module: str, names: str) -> bool:
    return any(fnmatchcase(module, name) for name in names.split())


def imports_of(module: str, only_at_import: bool = False) -> set[str]:
    """Everything that a module imports by its full name, inside functions too unless ``only_at_import``.

    What stands under ``if TYPE_CHECKING`` counts as inside a function: it does not run.
    """
    skipped = (ast.FunctionDef, ast.AsyncFunctionDef) if only_at_import else ()

    def walk(node: ast.AST) -> Iterator[str]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}: relative import in line {child.lineno}"
                yield from (resolve(child.module or "", alias.name) for alias in child.names)
            elif isinstance(child, ast.If) and only_at_import and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            elif not isinstance(child, skipped):
                yield from walk(child)

    return set(walk(tree_of(modules()[module])))


def resolve(package: str, name: str) -> str:
    """``from package import name`` is a module of ours, or something inside one."""
    return f"{package}.{name}" if f"{package}.{name}" in modules() else package


def our_imports(module: str, only_at_import: bool = False) -> set[str]:
    return {name for name in imports_of(module, only_at_import) if name.split(".")[0] in OURS}


def foreign_packages(module: str, only_at_import: bool = False) -> set[str]:
    top = {name.split(".")[0] for name in imports_of(module, only_at_import)}
    return top - set(sys.stdlib_module_names) - OURS


def functions(module: str) -> Iterator[tuple[str, Function]]:
    """All functions and methods with their full names."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Function]]:
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, Function | ast.ClassDef)
            name = f"{prefix}.{child.name}" if isinstance(child, Function | ast.ClassDef) else prefix
            if isinstance(child, Function):
                yield name, child
            yield from walk(child, name if named else prefix)

    return walk(tree_of(modules()[module]), module)


def classes(module: str) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree_of(modules()[module])) if isinstance(node, ast.ClassDef)]


# --- who may import whom --------------------------------------------------------------------------------------------


def test_every_module_has_a_line_and_every_line_a_module() -> None:
    homeless = [module for module in modules() if line_of(module) is None]
    assert not homeless, "give them a line in ROOMS, below everything that they import"
    named = [name for names, _ in lines() for name in names.split()]
    assert sorted(set(named)) == sorted(named), "a module stands in two lines"
    gone = [name for name in named if not any(fnmatchcase(module, name) for module in modules())]
    assert not gone, "these lines name nothing that exists"


def test_a_module_imports_only_what_stands_above_it() -> None:
    wrong = []
    for module in modules():
        for imported in sorted(our_imports(module)):
            here, there = line_of(module), line_of(imported)
            if here is not None and there is not None and there > here:
                wrong.append(f"{module} imports {imported}")
    assert not wrong


def test_a_module_imports_only_the_packages_of_its_line() -> None:
    wrong = []
    for module in modules():
        line = line_of(module)
        allowed = lines()[line][1] if line is not None else frozenset()
        wrong += [f"{module} imports {package}" for package in sorted(foreign_packages(module) - allowed)]
    assert not wrong


def test_no_line_allows_what_nobody_imports() -> None:
    for i, (names, allowed) in enumerate(lines()):
        used = set().union(*(foreign_packages(module) for module in modules() if line_of(module) == i))
        assert allowed <= used, f"{names}: {sorted(allowed - used)}"


def test_imports_go_in_no_circle() -> None:
    """Also within a line, and also by way of imports inside functions."""
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for imported in sorted(our_imports(module) & modules().keys()):
                visit(imported, (*way, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def no_torch_modules() -> list[str]:
    return [module for module in modules() if any(fnmatchcase(module, name) for name in NO_TORCH)]


@pytest.mark.parametrize("forbidden", ["torch", "ray", "diffusers", "transformers"])
def test_nothing_heavy_comes_with_the_settings(forbidden: str) -> None:
    """What the modules of NO_TORCH import while they are imported, and what those import, and so on."""
    for module in no_torch_modules():
        reached, open_ends = {module}, [module]
        while open_ends:
            for imported in our_imports(open_ends.pop(), only_at_import=True) & modules().keys():
                if imported not in reached:
                    reached.add(imported)
                    open_ends.append(imported)
        found = [name for name in reached if forbidden in foreign_packages(name, only_at_import=True)]
        assert not found, f"{module} reaches {found}"


def test_a_web_server_validates_a_run_without_torch() -> None:
    """The same from outside: other people's packages may bring torch along too."""
    names = [module.removesuffix(".__init__") for module in no_torch_modules()]
    program = f"import sys, {', '.join(names)}; print([m for m in ('torch', 'ray', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_front_door_opens_when_asked_and_brings_nothing_before() -> None:
    program = "import sys, raydream.config; print(len([m for m in sys.modules if 'raydream.runs' in m]), end=' ')"
    program += "; print(callable(raydream.generate), 'torch' in sys.modules); raydream.nothing"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["0", "True", "False"]
    assert "module 'raydream' has no attribute 'nothing'" in done.stderr


def test_numerics_do_not_know_ray() -> None:
    """They are tested, profiled and run on a GPU box that has no Ray."""
    knowing = {module for module in modules() if foreign_packages(module) & {"ray", "deepspeed"}}
    rooms = ("raydream.cluster.", "raydream.views.", "raydream.train.", "raydream.bench.", "serve.")
    assert not [module for module in knowing if not module.startswith(rooms)]
    assert "raydream.cluster.ray_runtime" in knowing


def room_of(module: str) -> str:
    """The package below ``raydream`` that a module is in; the few beside the packages are the ground, or the edge."""
    parts = module.split(".")
    if parts[0] != "raydream":
        return parts[0]
    is_package = len(parts) > 2 or (ROOT / "raydream" / parts[-1]).is_dir()
    at_the_edge = any(module in names.split() for names, _ in ROOMS["the API and the command line"])
    return parts[1] if is_package else "the API and the command line" if at_the_edge else "the ground"


def test_a_room_imports_only_rooms_above_it() -> None:
    order = list(ROOMS)
    wrong = set()
    for module in modules():
        if module == "raydream" or module.endswith("__init__"):
            continue
        for names, _ in ROOMS[room_of(module)]:
            if module in names.split():
                break
        else:
            assert module.startswith("jobs."), f"{module} stands in another room's table"
        for imported in our_imports(module) & modules().keys() - {"raydream"}:
            here, there = room_of(module), room_of(imported)
            if order.index(there) > order.index(here):
                wrong.add(f"{module} imports {imported}")
    assert not wrong


# --- rules that can be counted --------------------------------------------------------------------------------------


def test_functions_and_files_are_short() -> None:
    long = []
    for module, path in modules().items():
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        limit = MAX_JOB_LINES if module.startswith("jobs.") else MAX_FILE_LINES
        if num_lines > limit:
            long.append(f"{module}: {num_lines} lines")
        for name, function in functions(module):
            size = (function.end_lineno or 0) - function.lineno + 1
            if size > MAX_FUNCTION_LINES:
                long.append(f"{name}: {size} lines")
    assert not long


def test_no_function_takes_arguments_without_names() -> None:
    wrong = [name for module in modules() for name, function in functions(module) if function.args.kwarg is not None]
    assert not wrong, "**kwargs hide what a function takes"


def test_no_class_of_ours_inherits_from_another() -> None:
    ours = {node.name for module in modules() for node in classes(module)}
    wrong = []
    for module in modules():
        for node in classes(module):
            for base in map(ast.unparse, node.bases):
                if base.split("[")[0].split(".")[-1] in ours:
                    wrong.append(f"{module}.{node.name}({base})")
    assert not wrong, "a class is a Protocol or final"


def test_bases_come_from_a_short_list() -> None:
    """Besides the list, Python's own errors: a mistake of the user is a ValueError."""
    wrong = []
    for module in modules():
        for node in classes(module):
            for base in map(ast.unparse, node.bases):
                if base.partition("[")[0] not in OTHER_PEOPLES_BASES and not hasattr(builtins, base):
                    wrong.append(f"{module}.{node.name}({base})")
    assert not wrong


def catches_everything(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds)


def test_everything_is_caught_only_where_a_stranger_may_fail() -> None:
    found = set()
    for module, path in modules().items():
        total = sum(isinstance(n, ast.ExceptHandler) and catches_everything(n) for n in ast.walk(tree_of(path)))
        inside = {
            name
            for name, function in functions(module)
            if any(isinstance(n, ast.ExceptHandler) and catches_everything(n) for n in ast.walk(function))
        }
        assert bool(total) == bool(inside), f"{module} catches everything outside any function"
        found |= inside
    assert found == set(MAY_CATCH_EVERYTHING)


def test_no_test_file_imports_another() -> None:
    """What two of them need lies in ``tests/support``."""
    words = re.compile(r"^\s*(from|import) (test_|tests\b)", re.MULTILINE)
    assert [path.name for path in ROOT.glob("tests/**/*.py") if words.search(path.read_text(encoding="utf-8"))] == []


def test_undefined_names_are_found() -> None:
    """Shapes in annotations are strings that a checker could take for names; that must not switch its checks off."""
    code = "def twice(x: int) -> int:\n    return x * factor\n"
    words = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "-"]
    done = subprocess.run(words, input=code, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "F821" in done.stdout
    assert "disable_error_code" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]


def test_no_star_imports_and_no_work_at_import() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.ClassDef, ast.If, *Function.__args__)
    for module, path in modules().items():
        for node in ast.walk(tree_of(path)):
            assert not (isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)), module
        for node in tree_of(path).body:
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert isinstance(node, allowed) or is_text, f"{module}: line {node.lineno} does something at import"
            if isinstance(node, ast.If):
                condition = ast.unparse(node.test)
                assert condition in ("TYPE_CHECKING", "__name__ == '__main__'"), f"{module}: {condition}"


def test_what_is_public_says_what_it_is_for() -> None:
    silent = []
    for module, path in modules().items():
        tree = tree_of(path)
        if ast.get_docstring(tree) is None:
            silent.append(module)
        for node in tree.body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if not node.name.startswith("_") and ast.get_docstring(node) is None:
                silent.append(f"{module}.{node.name}")
    assert not silent


# --- the checks themselves can fail ---------------------------------------------------------------------------------


def test_the_reader_sees_imports_wherever_they_stand() -> None:
    assert "raydream.cluster.ray_runtime" in imports_of("raydream.runs")  # inside a function
    assert "raydream.cluster.ray_runtime" not in imports_of("raydream.runs", only_at_import=True)
    assert "raydream.distill.loop" not in imports_of("raydream.runs", only_at_import=True)  # under TYPE_CHECKING
    assert "raydream.backend.cpu_render" in imports_of("raydream.backend.cpu")  # from package import module
    assert "triton" in foreign_packages("raydream.backend.cuda_field")
    assert (
        line_of("raydream.backend.cpu_raster")
        == line_of("raydream.backend.cpu_field")
        != line_of("raydream.backend.cuda")
    )
    assert line_of("raydream.scene.field") > line_of("raydream.config.run")  # type: ignore[operator]
