"""The rules of this repository that linters do not know; `make check` runs them.

A rule is a small function from sources to messages, each `path:line: what is wrong; what to do`.
"""

from __future__ import annotations

import ast
import graphlib
import math
import re
import statistics
import subprocess
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import subspan.methods

ROOT = Path(__file__).resolve().parents[1]

FILE_LINES, FILE_MEDIAN = 400, 200
FUNCTION_LINES, FUNCTION_MEDIAN, FUNCTION_P90 = 60, 8, 30

# Layer -> all it may import, itself included.
ONLY = {
    "shards": {"shards"},
    "linalg": {"linalg", "shards"},
    "select": {"select"},
    "codec": {"codec", "linalg", "shards"},
    "ops": {"ops", "linalg", "codec"},
}
# Layers -> what they may not import.
NEVER = {
    ("metric", "fit", "budget", "plan", "edit", "compress"): {"optim", "adapt", "methods", "hosts", "cli", "demo"},
    ("optim", "adapt"): {"methods", "hosts", "cli", "demo"},
}
# Layer -> the only ones that may import it; the root package re-exports what it likes.
USERS = {"methods": {"methods", "hosts", "cli", "demo"}}

LEFTOVER = re.compile(r"\b(NotImplementedError|TODO|FIXME)\b")
MACHINE = re.compile(r"(?<![\w.])/(home|root|Users)/\w|\b[A-Z]:\\Users\\")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


class Source(NamedTuple):
    """A Python file: its path from the root, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """`src/subspan/ops/base.py` is `subspan.ops.base`."""
        return ".".join(Path(self.path).with_suffix("").parts[1:]).removesuffix(".__init__")

    @property
    def layer(self) -> str:
        """The part of the package it belongs to: `ops`; empty for the root."""
        return (self.module.split(".") + [""])[1]

    def all(self, *kinds: type) -> list[Any]:
        """Every node of these kinds, in the order of the file."""
        found = (node for node in ast.walk(self.tree) if isinstance(node, kinds))
        return sorted(found, key=lambda node: (node.lineno, node.col_offset))

    def at(self, node: ast.AST, message: str) -> str:
        """A message about a node."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


def read(folder: Path, root: Path) -> list[Source]:
    """Parse every Python file of a folder."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))}
    return [Source(p.relative_to(root).as_posix(), text, ast.parse(text, str(p))) for p, text in texts.items()]


def body(node: Definition) -> list[ast.stmt]:
    """The statements after the docstring."""
    return node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body


def length(function: Function) -> int:
    """Lines of the signature and the body, docstring excluded."""
    rest = body(function)
    header = function.body[0].lineno - function.lineno
    return header + ((function.end_lineno or 0) - rest[0].lineno + 1 if rest else 0)


def called(node: ast.AST) -> str:
    """The last name of what is called, subscripted or named: `raises` for `pytest.raises(...)`."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def long_file(path: str, text: str) -> list[str]:
    """No file of the package is too long to read in one sitting."""
    lines = text.count("\n")
    return [f"{path}:1: {lines} lines, at most {FILE_LINES}; split the file"] if lines > FILE_LINES else []


def long_functions(source: Source) -> list[str]:
    """No function is too long to see at once."""
    return [
        source.at(f, f"{f.name} has {length(f)} lines, at most {FUNCTION_LINES}; split the function")
        for f in source.all(*FUNCTION)
        if length(f) > FUNCTION_LINES
    ]


def sizes(sources: Iterable[Source]) -> dict[str, float]:
    """Median length of the non-empty files, median and 90th percentile of the functions."""
    sources = list(sources)
    of_files = [s.text.count("\n") for s in sources if s.text.strip()] or [0]
    of_functions = sorted(length(f) for s in sources for f in s.all(*FUNCTION)) or [0]
    return {
        "median file": statistics.median(of_files),
        "median function": statistics.median(of_functions),
        "90th percentile of functions": of_functions[math.ceil(0.9 * len(of_functions)) - 1],
    }


def sizes_on_target(sources: Iterable[Source]) -> list[str]:
    """Most files and functions are much shorter than the limit."""
    targets = zip(sizes(sources).items(), (FILE_MEDIAN, FUNCTION_MEDIAN, FUNCTION_P90), strict=True)
    return [f"src:1: {what} is {size:g} lines, at most {most}" for (what, size), most in targets if size > most]


def untyped(source: Source) -> list[str]:
    """Every argument and every result has a type."""
    found = []
    for f in source.all(*FUNCTION):
        a = f.args
        given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        missing = [g.arg for g in given if g.annotation is None and g.arg not in ("self", "cls")]
        missing += ["the result"] if f.returns is None else []
        if missing:
            found.append(source.at(f, f"{f.name}: no type for {', '.join(missing)}"))
    return found


def leftovers(source: Source) -> list[str]:
    """Nothing is announced instead of done."""
    return [
        f"{source.path}:{number}: {found[0]}; finish it, or leave it out"
        for number, line in enumerate(source.text.splitlines(), 1)
        for found in LEFTOVER.finditer(line)
    ]


def local_imports(source: Source) -> list[str]:
    """Imports stand at the top; one inside a function hides a cycle."""
    inner = {node for f in source.all(*FUNCTION) for node in ast.walk(f)}
    found = [node for node in source.all(ast.Import, ast.ImportFrom) if node in inner]
    return [source.at(node, "import inside a function; move it to the top") for node in found]


def hasattr_calls(source: Source) -> list[str]:
    """Parts meet in protocols, not by asking what they have."""
    found = [node for node in source.all(ast.Call) if called(node) == "hasattr"]
    return [source.at(node, "hasattr; require a protocol or a type instead") for node in found]


def bare_asserts(source: Source) -> list[str]:
    """Input is refused by an error that says what is allowed; python -O drops assertions."""
    found = source.all(ast.Assert)
    return [source.at(node, "assert in the package; raise an error naming value and remedy") for node in found]


def idle_functions(source: Source) -> list[str]:
    """A function does something, unless it only declares: in a Protocol, as abstract or for type checkers."""
    protocols = [c for c in source.all(ast.ClassDef) if "Protocol" in map(called, c.bases)]
    typing_only = [node for node in source.all(ast.If) if called(node.test) == "TYPE_CHECKING"]
    declared = {node for block in (*protocols, *typing_only) for node in block.body}
    marks = {"abstractmethod", "overload"}
    return [
        source.at(f, f"{f.name} does nothing; give it a body or remove it")
        for f in source.all(*FUNCTION)
        if f not in declared and not marks & set(map(called, f.decorator_list)) and all(map(idle, body(f)))
    ]


def idle(node: ast.stmt) -> bool:
    """Whether a statement has no effect: pass, `...`, `return`, `return None`."""
    value = getattr(node, "value", None)
    nothing = value is None or (isinstance(value, ast.Constant) and value.value in (None, ...))
    return isinstance(node, ast.Pass) or (isinstance(node, ast.Expr | ast.Return) and nothing)


def public(sources: Iterable[Source]) -> dict[str, tuple[Source, Definition]]:
    """Classes and functions that a package exports (`import Y as Y`) or a top-level module defines."""
    sources = list(sources)
    modules = {s.module: s for s in sources}
    found: dict[str, tuple[Source, Definition]] = {}
    for source in sources:
        if source.path.endswith("__init__.py"):
            named = [resolve(modules, module, name) for module, name in exports(source)]
        elif source.module.count(".") == 1:
            defined = [node.name for node in source.tree.body if isinstance(node, Definition)]
            named = [resolve(modules, source.module, name) for name in defined if name[0] != "_"]
        else:
            continue
        found |= {f"{s.module}.{node.name}": (s, node) for s, node in filter(None, named)}
    return found


def exports(source: Source) -> list[tuple[str, str]]:
    """The module and the name of each explicit re-export."""
    imports = source.all(ast.ImportFrom)
    return [
        (base(source, node), alias.name) for node in imports for alias in node.names if alias.asname == alias.name
    ]


def resolve(modules: Mapping[str, Source], module: str, name: str) -> tuple[Source, Definition] | None:
    """Where a name is defined, through re-exports; None for a constant, an alias or a module."""
    if module not in modules or f"{module}.{name}" in modules:
        return None
    source = modules[module]
    for node in reversed(source.tree.body):  # the last one wins, as in Python: overloads come before it
        if isinstance(node, Definition) and node.name == name:
            return source, node
        if isinstance(node, ast.ImportFrom) and any(name == (a.asname or a.name) for a in node.names):
            return resolve(modules, base(source, node), name)
    return None


def undocumented(names: Mapping[str, tuple[Source, Definition]]) -> list[str]:
    """Every public name says in a sentence what it is."""
    return [s.at(n, f"{name} has no docstring") for name, (s, n) in names.items() if not ast.get_docstring(n)]


def unmentioned(names: Mapping[str, tuple[Source, Definition]], tests: Iterable[str]) -> list[str]:
    """Every public name is named by a test."""
    words = {word for text in tests for word in re.findall(r"\w+", text)}
    tested = {name: at for name, at in names.items() if not protocol(at[1])}  # its implementations are the tests
    return [s.at(n, f"no test names {name}") for name, (s, n) in tested.items() if n.name not in words]


def protocol(node: Definition) -> bool:
    """Whether it is a class that only says what others must do."""
    return isinstance(node, ast.ClassDef) and any(ast.unparse(parent) == "Protocol" for parent in node.bases)


def base(source: Source, node: ast.ImportFrom) -> str:
    """The absolute module of a `from ... import`."""
    if not node.level:
        return node.module or ""
    package = source.module.split(".")
    up = node.level - source.path.endswith("__init__.py")
    return ".".join(package[: len(package) - up] + ([node.module] if node.module else []))


def imported(source: Source, modules: Container[str]) -> list[tuple[ast.stmt, str]]:
    """Our modules that a file imports, each with the statement."""
    found = [(node, alias.name) for node in source.all(ast.Import) for alias in node.names]
    for node in source.all(ast.ImportFrom):
        package = base(source, node)
        inside = [f"{package}.{alias.name}" for alias in node.names]
        found += [(node, name if name in modules else package) for name in inside]
    return [(node, name) for node, name in dict.fromkeys(found) if name in modules]


def layers(sources: Iterable[Source]) -> list[str]:
    """Imports point down the layers."""
    modules = {s.module: s for s in sources}
    return [
        source.at(node, f"{source.layer} may not import {name}")
        for source in modules.values()
        for node, name in imported(source, modules)
        if not allowed(source.layer, modules[name].layer)
    ]


def allowed(layer: str, other: str) -> bool:
    """Whether a layer may import another one."""
    never = {name for group, names in NEVER.items() if layer in group for name in names}
    users = USERS.get(other, {layer})
    return other in ONLY.get(layer, {other}) and other not in never and (layer in users or layer == "")


def cycles(sources: Iterable[Source]) -> list[str]:
    """No module imports itself by a detour."""
    modules = {s.module: s for s in sources}
    graph = {name: {other for _, other in imported(s, modules)} for name, s in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as problem:
        round_trip = problem.args[1]
        return [f"{modules[round_trip[0]].path}:1: import cycle {' <- '.join(round_trip)}; a wrong layer"]
    return []


def toothless_tests(source: Source) -> list[str]:
    """Every test function asserts something, itself or through a helper of its file."""
    helpers = {f.name for f in source.all(*FUNCTION) if any(asserts(node) for node in ast.walk(f))}
    tests = [f for f in source.all(*FUNCTION) if f.name.startswith("test")]
    idle_tests = [f for f in tests if not any(asserts(node, helpers) for node in ast.walk(f))]
    return [source.at(f, f"{f.name} asserts nothing; state what must hold") for f in idle_tests]


def asserts(node: ast.AST, helpers: Container[str] = ()) -> bool:
    """An assert of something, or a call of `raises`, `assert_...`, `check_...` or a helper."""
    if isinstance(node, ast.Assert):
        return not isinstance(node.test, ast.Constant)
    name = called(node) if isinstance(node, ast.Call) else ""
    return name in helpers or name.startswith(("raises", "assert_", "check_"))


def silent_skips(source: Source) -> list[str]:
    """Whoever skips a test says why."""
    calls = source.all(ast.Call)
    marks = {call.func for call in calls}
    silent = [node for node in source.all(ast.Attribute) if node not in marks]
    silent += [call for call in calls if not reason(call)]
    return [
        source.at(node, f"{called(node)} without a reason")
        for node in silent
        if called(node) in ("skip", "skipif", "xfail") and "pytest" in ast.unparse(node)
    ]


def reason(call: ast.Call) -> bool:
    """Whether a skip has a non-empty reason; the first argument is one, except for skipif."""
    given = [k.value for k in call.keywords if k.arg == "reason"]
    given += call.args[:1] if called(call) == "skip" else []
    return any(not isinstance(value, ast.Constant) or value.value for value in given)


def missing_transcripts(status: Mapping[str, str], folder: Path) -> list[str]:
    """A method said to equal recorded steps has the recording."""
    return [
        f"tests/reference/{name}.npz:1: no such file, but method {name} has status transcript; record it"
        for name, value in status.items()
        if value == "transcript" and not (folder / f"{name}.npz").is_file()
    ]


def machine_paths(path: str, text: str) -> list[str]:
    """Nothing points into somebody's home folder."""
    return [
        f"{path}:{number}: {found[0]}... is a path of one machine"
        for number, line in enumerate(text.splitlines(), 1)
        for found in MACHINE.finditer(line)
    ]


def tracked(root: Path) -> dict[str, str]:
    """Text files that git knows or would offer to add, by path."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = {}
    for name in filter(None, listed.split("\0")):
        data = (root / name).read_bytes() if (root / name).is_file() else b""
        if b"\0" not in data[:8000]:
            found[name] = data.decode("utf-8", errors="replace")
    return found


IN_SRC = (long_functions, untyped, leftovers, local_imports, hasattr_calls, bare_asserts, idle_functions)
IN_TESTS = (toothless_tests, silent_skips)


def problems(root: Path, sources: Sequence[Source], tests: Sequence[Source]) -> list[str]:
    """What all rules say."""
    texts = tracked(root)
    names = public(sources)
    status = {name: m.status for name, m in subspan.methods.methods().items()}
    return [
        *(p for path, text in texts.items() if path.startswith("src/") for p in long_file(path, text)),
        *(p for source in sources for rule in IN_SRC for p in rule(source)),
        *(p for source in tests for rule in IN_TESTS for p in rule(source)),
        *(p for path, text in texts.items() for p in machine_paths(path, text)),
        *sizes_on_target(sources),
        *undocumented(names),
        *unmentioned(names, [t.text for t in tests]),
        *layers(sources),
        *cycles(sources),
        *missing_transcripts(status, root / "tests" / "reference"),
    ]


def main(root: Path = ROOT) -> int:
    """Print what is wrong, or one line when all is well."""
    sources, tests = read(root / "src", root), read(root / "tests", root)
    found = problems(root, sources, tests)
    print("\n".join(found), end="\n" * bool(found))
    measured = ", ".join(f"{what} {size:g}" for what, size in sizes(sources).items())
    print(f"check: {len(found) or 'no'} problems in {len(sources)} files; {measured} lines; "
          f"{len(public(sources))} public names, {len(subspan.methods.methods())} methods")  # fmt: skip
    return min(len(found), 1)


if __name__ == "__main__":
    sys.exit(main())
