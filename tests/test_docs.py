"""What the documentation says is run: code, commands, targets, docstrings, and the generated table."""

import doctest
import importlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

import subspan.methods
from subspan.cli import main

ROOT = Path(__file__).parents[1]
REQUIRED = ["README.md", "docs/methods.md"]
PAGES = sorted({*REQUIRED, *(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))})
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
MODULES = sorted(
    ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "src" / "subspan").rglob("*.py")
    if path.stem != "__main__"
)
SHELLS = ("bash", "console")
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text and the line where the text begins."""

    language: str
    text: str
    line: int


def blocks(text):
    """All fenced blocks of a page."""
    found = FENCE.finditer(text)
    return [Block(m[2], textwrap.dedent(m[3]), text.count("\n", 0, m.start(3)) + 1) for m in found]


def commands(block):
    """The commands of a shell block without prompts; a line that ends in a backslash goes on."""
    if block.language not in SHELLS:
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    return [re.sub(r"^\s*\$\s+|^\s+", "", line) for line in lines]


def run_here(line, where):
    """Run a `subspan` command inside this process: to import torch for each one would take most of the time."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out), pytest.raises(SystemExit) as left:
        main(shlex.split(line)[1:])
    assert not left.value.code, f"{where}: {line}\n{out.getvalue()}"


def run_command(line, folder, where):
    """Run a line as a user would, with this environment's `subspan` first in the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [shutil.which("bash"), "-euo", "pipefail", "-c", line], cwd=folder, env={**os.environ, "PATH": path},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{where}: {line}\n{done.stdout}\n{done.stderr}"


def run_page(text, page, folder):
    """Run a page's Python and its `subspan` commands in order, in one folder and one namespace.

    The first command runs in a shell, so that the installed program is tried too.
    """
    names, ran = {"__name__": page}, []
    for block in blocks(text):
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), names)
            ran.append("python")
        for line in commands(block):
            if line.startswith("subspan "):
                where = f"{page}:{block.line}"
                run_here(line, where) if any(old != "python" for old in ran) else run_command(line, folder, where)
                ran.append(line)
    return ran


def load(name):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", REQUIRED)
def test_required_pages_exist(page):
    assert (ROOT / page).is_file()


def test_the_table_of_methods_is_what_the_tool_writes():
    page = load("docs").page(subspan.methods.methods().values())
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page, "stale: run `make docs`"
    assert all(f"\n| {name} | " in page and f"\n- **{name}**: " in page for name in subspan.methods.methods())


@pytest.mark.parametrize("page", PAGES)
def test_code_and_commands_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text(encoding="utf-8")
    ran = run_page(text, page, tmp_path)
    assert ran.count("python") == len(re.findall("^ *```python", text, re.MULTILINE))
    assert "$ subspan" not in "".join(b.text for b in blocks(text) if b.language not in SHELLS)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_names_its_language(page):
    languages = {block.language for block in blocks((ROOT / page).read_text(encoding="utf-8"))}
    assert languages <= {"python", "text", "json", "toml", *SHELLS}


@pytest.mark.parametrize("page", PAGES)
def test_make_lines_name_targets(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    made = [line for block in blocks(text) for line in commands(block) if line.startswith("make ")]
    words = {word for line in made for word in line.partition("#")[0].split()[1:]}
    assert {word for word in words if word[0] != "-" and "=" not in word} <= TARGETS


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(importlib.import_module(name)).failed == 0


SAMPLE = """text
```python
one = 1
```
```console
$ make venv check JOBS=2  # both
$ printf one > first.txt
output
```
```text
subspan is no command here
```
- an item
  ```python
  one += 1
  ```
```python
assert one == 2
raise KeyError("reached")
```
"""


def test_blocks_are_found_with_their_lines():
    found = blocks(SAMPLE)
    assert [b.language for b in found] == ["python", "console", "text", "python", "python"]
    assert [b.line for b in found] == [3, 6, 11, 15, 18]
    assert found[3].text == "one += 1\n"
    assert commands(found[1])[:2] == ["make venv check JOBS=2  # both", "printf one > first.txt"]
    assert commands(found[2]) == []
    assert commands(Block("bash", "subspan a \\\n  b\n", 1)) == ["subspan a    b"]


def test_a_page_keeps_its_namespace_and_fails_where_its_code_fails(tmp_path):
    with pytest.raises(KeyError, match="reached") as failed:
        run_page(SAMPLE, "page.md", tmp_path)
    assert failed.traceback[-1].lineno + 1 == SAMPLE[: SAMPLE.index("raise")].count("\n") + 1


def test_commands_share_a_folder_and_their_failure_is_an_error(tmp_path):
    run_command("printf one > first.txt", tmp_path, "page.md:1")
    run_command("grep one first.txt", tmp_path, "page.md:2")
    with pytest.raises(AssertionError, match=r"page\.md:3: false"):
        run_command("false | cat", tmp_path, "page.md:3")
