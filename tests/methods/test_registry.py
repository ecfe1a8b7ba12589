"""Every published method is a value: it prints as itself, has a source, and is found by its name."""

import ast
import importlib
import inspect
import json
import pkgutil
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

import subspan
from subspan.adapt import Adapter
from subspan.compress import Compression
from subspan.heal import Factors
from subspan.methods import Method, build, find, method, methods
from subspan.optim import Recipe, Sgd

REFERENCE = Path(__file__).parents[1] / "reference"
NAMES = sorted(methods())
# Where a kind's parts live: it decides when two packages use one word.
HOME = {
    "optimizer": "subspan.optim",
    "adapter": "subspan.adapt",
    "compression": "subspan.compress",
    "healing": "subspan.heal",
}
KINDS = {"adapter": Adapter, "compression": Compression, "healing": Factors}


def public_names(kind):
    """What `from subspan.x import *` over all x would give, the kind's own package last."""
    parts = [m.name for m in pkgutil.iter_modules(subspan.__path__) if m.name not in ("cli", "demo", "hosts")]
    names = {}
    for module in (*(importlib.import_module(f"subspan.{part}") for part in parts),
                   importlib.import_module(HOME[kind])):  # fmt: skip
        names |= {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return names


def same(a, b):
    """Equality of values; the modules among their parts have none of their own."""
    if isinstance(a, nn.Module):
        return repr(a) == repr(b) and {**a.state_dict()} == {**b.state_dict()} == {}
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return a == b


def preset(record):
    """The function that `record` was published from, as a tree."""
    return ast.parse(textwrap.dedent(inspect.getsource(record.build))).body[0]


def test_every_module_of_presets_is_imported_by_the_package():
    folder = Path(inspect.getfile(subspan.methods)).parent
    written = {path.stem for path in folder.glob("*.py")} - {"__init__", "registry"}
    assert {m.build.__module__.rpartition(".")[2] for m in methods().values()} == written


def test_a_kind_has_its_methods_and_together_they_are_all():
    kinds = {kind: methods(kind) for kind in HOME}
    assert all(m.kind == kind for kind, found in kinds.items() for m in found.values())
    assert {name: m for found in kinds.values() for name, m in found.items()} == methods()
    assert all(kinds.values())


@pytest.mark.parametrize("name", NAMES)
def test_defaults_build_a_value_of_the_kind(name):
    record = find(name)
    value = record.build()
    if record.kind == "optimizer":
        value = value.rule if isinstance(value, Recipe) else value
        state = value.init(torch.zeros(6, 4), 0)
        assert (state or value == Sgd()) and all(isinstance(x, torch.Tensor) for x in state.values())
        assert all(any(k == n or k.startswith(f"{n}.") for k in state) for n in value.degree)
    else:
        assert isinstance(value, KINDS[record.kind])


@pytest.mark.parametrize("name", NAMES)
def test_the_printed_value_is_the_value(name):
    record = find(name)
    value = build(name)
    assert repr(value) == repr(build(name)) == record.value
    assert same(eval(repr(value), public_names(record.kind)), value)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_json_with_the_promised_keys(name):
    row = find(name).row()
    assert list(row) == ["name", "kind", "paper", "reference", "status", "value"]
    assert json.loads(json.dumps(row)) == row and row["name"] == name
    assert row["paper"] and find(name).summary.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_transcript_means_that_there_is_one(name):
    record = find(name)
    assert record.status in ("transcript", "limits", "unverified")
    assert (REFERENCE / f"{name}.npz").is_file() == (record.status == "transcript")


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_few_lines_without_a_decision(name):
    function = preset(find(name))
    statements = function.body[1:]
    assert statements and function.end_lineno - statements[0].lineno < 12
    decisions = (ast.If, ast.IfExp, ast.Match, ast.While, ast.For, ast.Try)
    assert [node for node in ast.walk(function) if isinstance(node, decisions)] == []


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_keyword_only_typed_and_have_defaults(name):
    for argument in inspect.signature(find(name).build).parameters.values():
        assert argument.kind is argument.KEYWORD_ONLY
        assert inspect.Parameter.empty not in (argument.annotation, argument.default)


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_is_named_with_the_known_ones(name):
    with pytest.raises(ValueError, match=f"{name} takes no 'bogus'; it takes: ") as refused:
        build(name, bogus=1)
    assert all(argument in str(refused.value) for argument in inspect.signature(find(name).build).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_an_argument_that_is_none_means_the_default(name):
    arguments = dict.fromkeys(inspect.signature(find(name).build).parameters)
    assert same(build(name, bogus=None, **arguments), build(name))


def test_an_unknown_name_is_answered_with_what_exists():
    with pytest.raises(ValueError, match="unknown method 'nonesuch'") as refused:
        find("nonesuch")
    assert all(name in str(refused.value) for name in NAMES)


def test_a_name_of_another_kind_is_not_found():
    with pytest.raises(ValueError, match=r"unknown adapter method 'galore'; there are: .*lora"):
        find("galore", "adapter")


def test_a_name_is_published_once():
    before = methods()
    assert "svd" in before

    def svd():
        """Another one."""

    with pytest.raises(ValueError, match=r"'svd' is already registered by subspan\.methods\.compression"):
        method(kind="compression", paper="none", status="unverified")(svd)
    assert methods() == before and isinstance(find("svd"), Method)
