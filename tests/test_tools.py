"""Each rule of tools/check.py finds its bad example and leaves the good one alone."""

import ast
import importlib.util
import subprocess
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("tools_check", ROOT / "tools" / "check.py")
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)


def source(text, path="src/subspan/fit/x.py"):
    """A file of the package with this text."""
    text = textwrap.dedent(text)
    return check.Source(path, text, ast.parse(text))


def package(**files):
    """Files by path inside the package, `__` for a slash: `ops__base="import x"`."""
    return [source(text, f"src/subspan/{name.replace('__', '/', 1)}.py") for name, text in files.items()]


def init(folder, text):
    """The `__init__.py` of a package; of ours itself when the folder is empty."""
    return source(text, f"src/subspan/{folder}/__init__.py".replace("//", "/"))


LONG = "def f(x: int) -> int:\n" + '    """One.\n\n    Two.\n    """\n' + "    x += 1\n" * 58 + "    return x\n"

# rule, bad text, where and what it must say
BAD = [
    ("long_functions", LONG.replace("return", "x += 1\n    return"), ":1: f has 61 lines, at most 60"),
    ("untyped", "def f(a, *b: int, c: int, **d) -> int:\n    return 1\n", ":1: f: no type for a, d"),
    ("untyped", "class A:\n    def f(self, a: int):\n        return a\n", ":2: f: no type for the result"),
    (
        "untyped",
        "def f() -> int:\n    async def g(a): return a\n    return g\n",
        ":2: g: no type for a, the result",
    ),
    ("leftovers", "x = 1\nraise Not" + "ImplementedError\n", ":2: Not" + "ImplementedError"),
    ("leftovers", "x = 1  # TO" + "DO later\n", ":1: TO" + "DO"),
    ("leftovers", '"""\nFIX' + 'ME"""\n', ":2: FIX" + "ME"),
    ("local_imports", "def f() -> int:\n    if f:\n        import a\n    return 1\n", ":3: import inside"),
    (
        "local_imports",
        "class A:\n    def f(self) -> int:\n        from a import b\n        return b\n",
        ":3: import",
    ),
    ("hasattr_calls", "x = 1\nif hasattr(x, 'y'): x = 2\n", ":2: hasattr"),
    ("bare_asserts", "x = 1\nassert x\n", ":2: assert in the package"),
    ("bare_asserts", "assert x, 'a message is no excuse'\n", ":1: assert in the package"),
    ("idle_functions", "def f() -> None:\n    pass\n", ":1: f does nothing"),
    ("idle_functions", "class A:\n    def f(self) -> None:\n        '''Later.'''\n", ":2: f does nothing"),
    ("idle_functions", "def f() -> None:\n    ...\n    return None\n", ":1: f does nothing"),
    ("toothless_tests", "def test_a():\n    run()\n", ":1: test_a asserts nothing"),
    (
        "toothless_tests",
        "class TestA:\n    def test_a(self):\n        assert True\n",
        ":2: test_a asserts nothing",
    ),
    ("toothless_tests", "def help(): run()\ndef test_a():\n    help()\n", ":2: test_a asserts nothing"),
    ("silent_skips", "def test_a():\n    pytest.skip()\n", ":2: skip without a reason"),
    ("silent_skips", "def test_a():\n    pytest.skip('')\n", ":2: skip without a reason"),
    ("silent_skips", "@pytest.mark.skip\ndef test_a(): ...\n", ":1: skip without a reason"),
    ("silent_skips", "@pytest.mark.skipif(True)\ndef test_a(): ...\n", ":1: skipif without a reason"),
    ("silent_skips", "mark = pytest.mark.xfail(strict=True)\n", ":1: xfail without a reason"),
]

GOOD = [
    ("long_functions", LONG),
    ("untyped", "class A:\n    def f(self, a: int, *b: int, **c: int) -> None:\n        self.g = lambda x: x\n"),
    ("untyped", "class A:\n    @classmethod\n    def f(cls) -> int:\n        return 1\n"),
    ("leftovers", "def f(x: int) -> object:\n    return NotImplemented  # todos are lower case\n"),
    (
        "local_imports",
        "import a\nif a:\n    from b import c\ntry:\n    import d\nexcept ImportError:\n    d = None\n",
    ),
    ("hasattr_calls", "x.hasattr_free = getattr(x, 'y', None)\n"),
    ("bare_asserts", "if not x:\n    raise ValueError('assert')\n"),
    ("idle_functions", "class A(Protocol[T]):\n    def f(self) -> int:\n        '''One.'''\n"),
    ("idle_functions", "class A(ABC):\n    @abc.abstractmethod\n    def f(self) -> int: ...\n"),
    ("idle_functions", "class A:\n    if TYPE_CHECKING:\n        def f(self) -> int: ...\n"),
    ("idle_functions", "@overload\ndef f(a: int) -> int: ...\ndef f(a: int) -> int:\n    return a\n"),
    ("idle_functions", "def f() -> int:\n    '''Zero.'''\n    return 0\n"),
    ("toothless_tests", "def test_a():\n    with pytest.raises(KeyError, match='b'):\n        run()\n"),
    ("toothless_tests", "def test_a():\n    torch.testing.assert_close(a, b)\n"),
    ("toothless_tests", "def test_a():\n    for rule in rules:\n        check_contract(rule)\n"),
    ("toothless_tests", "def same(a, b):\n    assert a == b\ndef test_a():\n    same(1, 1)\n"),
    ("toothless_tests", "def helper():\n    run()\n"),
    ("silent_skips", "def test_a():\n    pytest.skip('no GPU')\n"),
    ("silent_skips", "@pytest.mark.skipif(gone, reason='the file is not in the wheel')\ndef test_a(): ...\n"),
    ("silent_skips", "def test_a(where):\n    pytest.skip(f'no {where}')\n    items.skip()\n"),
]


@pytest.mark.parametrize(("rule", "text", "message"), BAD)
def test_a_rule_finds_its_bad_example(rule, text, message):
    found = getattr(check, rule)(source(text))
    assert len(found) == 1 and found[0].startswith("src/subspan/fit/x.py" + message), found


@pytest.mark.parametrize(("rule", "text"), GOOD)
def test_a_rule_passes_its_good_example(rule, text):
    assert getattr(check, rule)(source(text)) == []


def test_every_rule_for_files_has_both_examples():
    rules = {rule.__name__ for rule in (*check.IN_SRC, *check.IN_TESTS)}
    assert {row[0] for row in BAD} == {row[0] for row in GOOD} == rules


def test_a_file_has_at_most_400_lines():
    assert check.long_file("src/a.html", "\n" * 400) == []
    assert check.long_file("src/a.html", "\n" * 401) == ["src/a.html:1: 401 lines, at most 400; split the file"]


def test_sizes_are_medians_and_the_nearest_rank():
    lengths = [2, 2, 3, 4, 5, 6, 7, 8, 30, 31]
    one = source("".join("def f():\n" + "    x\n" * (n - 1) for n in lengths))
    measured = {"median file": 98, "median function": 5.5, "90th percentile of functions": 30}
    assert check.sizes([one, source("")]) == measured
    assert check.sizes_on_target([one]) == []
    assert check.sizes([source("x = 1\n")])["median function"] == 0


def test_sizes_above_the_targets_are_problems():
    found = check.sizes_on_target([source("def f():\n" + "    x\n" * 200)])
    assert [line.partition(": ")[2] for line in found] == [
        "median file is 201 lines, at most 200",
        "median function is 201 lines, at most 8",
        "90th percentile of functions is 201 lines, at most 30",
    ]


def test_a_docstring_does_not_count_as_length():
    short = "def f(\n    a,\n):\n    x = 1\n    return x\n"
    documented = short.replace("):\n", '):\n    """One.\n\n    Two.\n    """\n\n')
    lengths = [check.length(source(text).tree.body[0]) for text in (short, documented, "def f(): pass\n")]
    assert lengths == [5, 5, 1]
    assert check.length(source('def f():\n    """Only this."""\n').tree.body[0]) == 1


PUBLIC = [
    init("", "from subspan.fit import Zig as Zig\n"),
    init("fit", "from .x import Zig as Zig\nfrom .x import Alias as Alias\nfrom .x import _hidden\n"),
    source("class Zig: ...\nAlias = int\nclass Unexported: ...\ndef _hidden(): ...\n"),
    *package(zag="@overload\ndef zag(a): ...\ndef zag(a):\n    '''Zag.'''\n    return a\ndef _zog(): ...\n"),
]


def test_public_is_what_packages_export_and_top_level_modules_define():
    assert set(check.public(PUBLIC)) == {"subspan.fit.x.Zig", "subspan.zag.zag"}
    assert check.public([init("cli", "from subspan.gone import Zig as Zig")]) == {}


def test_a_public_name_without_docstring_is_found_where_it_is_defined():
    assert check.undocumented(check.public(PUBLIC)) == [
        "src/subspan/fit/x.py:1: subspan.fit.x.Zig has no docstring"
    ]


def test_a_public_name_must_be_a_word_of_a_test():
    names = check.public(PUBLIC)
    assert check.unmentioned(names, ["Zig().go()", "import zag"]) == []
    assert check.unmentioned(names, ["Zigzag", "zag.Zig_"]) == [
        "src/subspan/fit/x.py:1: no test names subspan.fit.x.Zig"
    ]


LAYERS = [
    ("linalg", "select", "import subspan.select"),
    ("select", "linalg", "from subspan import linalg"),
    ("ops__base", "metric", "from subspan.metric import Near"),
    ("codec", "ops", "from . import ops"),
    ("metric", "optim", "from .optim import Step"),
    ("fit__svd", "adapt", "import subspan.adapt"),
    ("budget", "hosts", "from subspan import linalg, hosts"),
    ("plan", "cli", "from subspan import cli"),
    ("edit", "methods", "from subspan.methods import find"),
    ("compress", "methods", "from subspan.methods import find"),
    ("optim__rule", "methods", "from ..methods import find"),
    ("adapt__join", "demo", "import subspan.demo"),
    ("inspect__survey", "methods", "import subspan.methods"),
    ("io", "methods", "def f():\n    from subspan import methods"),
]
EMPTY = dict.fromkeys(
    ("linalg", "select", "codec", "ops", "metric", "optim", "adapt", "methods", "hosts", "cli", "demo"), ""
)


@pytest.mark.parametrize(("name", "target", "text"), LAYERS)
def test_an_import_up_the_layers_is_found(name, target, text):
    found = check.layers(package(**{**EMPTY, name: text}))
    layer = name.partition("__")[0]
    assert len(found) == 1 and found[0].endswith(f": {layer} may not import subspan.{target}"), found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("linalg", "import torch.linalg, select"),
        ("ops__basic", "from subspan import linalg\nfrom .base import hold"),
        ("optim__rules", "from subspan.codec import Store\nfrom subspan import metric"),
        ("cli__plan", "from subspan.methods import find"),
        ("hosts__trainer", "from subspan.methods import find"),
        ("methods__extra", "from subspan import optim, adapt, methods"),
    ],
)
def test_an_import_down_the_layers_is_not(name, text):
    assert check.layers(package(**{**EMPTY, name: text})) == []


def test_the_root_package_may_export_methods():
    assert check.layers([*package(methods=""), init("", "from subspan.methods import find as find")]) == []


def test_a_cycle_is_found_with_its_modules():
    files = {"a": "from subspan import b", "b": "from subspan.c import d", "c": "import subspan.a"}
    (found,) = check.cycles(package(**files))
    assert "import cycle" in found and all(f"subspan.{name}" in found for name in "abc")
    assert check.cycles(package(**{**files, "c": "import a"})) == []


def test_a_module_may_be_re_exported_by_its_package():
    inner = package(ops__base="", ops__basic="from subspan.ops.base import hold")
    outer = init("ops", "from subspan.ops.base import hold as hold\nfrom .basic import x as x")
    assert check.cycles([outer, *inner]) == []


def test_a_module_that_imports_its_own_package_is_a_cycle():
    outer = init("ops", "from subspan.ops.base import hold as hold")
    assert len(check.cycles([outer, *package(ops__base="from subspan.ops import hold")])) == 1


def test_a_transcript_must_exist(tmp_path):
    (tmp_path / "one.npz").touch()
    status = {"one": "transcript", "two": "limits", "three": "transcript"}
    (found,) = check.missing_transcripts(status, tmp_path)
    assert found.startswith("tests/reference/three.npz:1: no such file, but method three")


@pytest.mark.parametrize("path", ["/{}/me/x", "see '/{}/me'", "file:///{}/me", "=/{}/x"])
@pytest.mark.parametrize("folder", ["ho" + "me", "ro" + "ot", "Us" + "ers"])
def test_paths_of_one_machine_are_found(path, folder):
    (found,) = check.machine_paths("a.md", "fine\n" + path.format(folder))
    assert (
        found
        == f"a.md:2: /{folder}/{path.format(folder).partition(f'/{folder}/')[2][0]}... is a path of one machine"
    )


def test_other_paths_are_not():
    fine = "https://example.org/ho" + "me/page src/ro" + "ot/x ~/x /tmp/x /ho" + "me/ $ROOT/x"
    assert check.machine_paths("a.md", fine) == []
    assert check.machine_paths("LICENSE", (ROOT / "LICENSE").read_text()) == []
    assert len(check.machine_paths("a.md", "C:" + r"\Users\me")) == 1


def git(folder, *words):
    """Run git there."""
    subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True)


def test_tracked_is_text_that_git_does_not_ignore(tmp_path):
    git(tmp_path, "init")
    files = {".gitignore": "out/\n", "a.py": "x", "out/b.py": "x", "c.npz": "PK\0", "d/é.md": "ü"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    git(tmp_path, "add", "a.py")
    assert check.tracked(tmp_path) == {".gitignore": "out/\n", "a.py": "x", "d/é.md": "ü"}


def test_the_gate_lists_problems_and_fails_then_passes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check.subspan.methods, "methods", dict)
    git(tmp_path, "init")
    (tmp_path / "tests").mkdir()
    (tmp_path / "src" / "subspan").mkdir(parents=True)
    module, test = tmp_path / "src" / "subspan" / "zig.py", tmp_path / "tests" / "test_zig.py"
    module.write_text("def zig(a) -> int:\n    return 1\n")
    test.write_text("def test_zog():\n    zog()\n")
    assert check.main(tmp_path) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[:-1] == [
        "src/subspan/zig.py:1: zig: no type for a",
        "tests/test_zig.py:1: test_zog asserts nothing; state what must hold",
        "src/subspan/zig.py:1: subspan.zig.zig has no docstring",
        "src/subspan/zig.py:1: no test names subspan.zig.zig",
    ]
    assert printed[-1].startswith("check: 4 problems in 1 files; median file 2, ")
    module.write_text('def zig(a: int) -> int:\n    """One."""\n    return 1\n')
    test.write_text("def test_zig():\n    assert zig(2) == 1\n")
    assert check.main(tmp_path) == 0
    assert capsys.readouterr().out.startswith("check: no problems in 1 files; ")
