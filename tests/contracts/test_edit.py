"""An edit swaps the chosen layers and nothing else, and its undo puts the very same objects back."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from subspan.adapt import Adapted, Adapter, Add, ZeroLowRank, adapt
from subspan.edit import edit, linears, replace, shapes, sharers, sites


def llama(tied: bool) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=20, num_key_value_heads=1, tie_word_embeddings=tied, **sizes)
        ).eval()


class Shared(nn.Module):
    """One Linear object under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.other = nn.Linear(4, 4)


def nested() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))


def named() -> nn.Module:
    return nn.ModuleDict({"enc": nn.Linear(4, 3), "act": nn.ReLU(), "dec": nn.Linear(3, 4)})


# name -> (the model, the sites taken by default)
BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
BLOCKS = tuple(f"model.layers.{i}.{name}" for i in range(2) for name in BLOCK)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "nested": (nested, ("0", "1.0", "1.2")),
    "named": (named, ("enc", "dec")),
    "llama-tied": (lambda: llama(True), BLOCKS),
    "llama-untied": (lambda: llama(False), BLOCKS),
    "one object twice": (Shared, ("other",)),
}


@pytest.fixture(params=MODELS)
def row(request) -> tuple[nn.Module, tuple[str, ...]]:
    build, default = MODELS[request.param]
    return build(), default


def objects(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))


def unchanged(model: nn.Module, before: list[tuple[str, nn.Module]]) -> bool:
    after = objects(model)
    return [n for n, _ in after] == [n for n, _ in before] and all(a is b for (_, a), (_, b) in zip(after, before))


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0 * x


def zero(name: str, layer: nn.Module) -> nn.Module:
    return Zero()


def test_default_sites_are_the_linear_layers_of_the_blocks(row):
    model, default = row
    assert tuple(sites(model)) == default
    assert all(sites(model)[name] is model.get_submodule(name) for name in default)


def test_an_edit_swaps_the_sites_and_only_these(row):
    model, default = row
    before = objects(model)
    done = edit(model, None, zero)
    assert tuple(done) == default
    for name, module in before:
        inside = any(name == site or name.startswith(site + ".") for site in default)
        if not inside:
            assert model.get_submodule(name) is module
    assert all(isinstance(model.get_submodule(name), Zero) for name in default)


def test_undo_puts_the_same_objects_back_in_the_same_order(row):
    model, _ = row
    before, tensors = objects(model), [id(p) for p in model.parameters()]
    done = edit(model, None, zero)
    assert not unchanged(model, before)
    done.undo()
    assert unchanged(model, before)
    assert [id(p) for p in model.parameters()] == tensors
    assert tuple(done) == ()


def test_a_context_undoes_even_after_an_error(row):
    model, _ = row
    before = objects(model)
    with pytest.raises(RuntimeError, match="in between"), edit(model, None, zero):
        assert not unchanged(model, before)
        raise RuntimeError("in between")
    assert unchanged(model, before)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_half_way_leaves_the_model_untouched(row, error):
    model, default = row
    before, calls = objects(model), []

    def make(name: str, layer: nn.Module) -> nn.Module:
        calls.append(name)
        if len(calls) == min(3, len(default)):
            raise error("half-way")
        return Zero()

    with pytest.raises(error, match="half-way"):
        edit(model, None, make)
    assert calls == list(default)[:3]
    assert unchanged(model, before)


def test_a_make_that_returns_no_module_leaves_the_model_untouched():
    model = nested()
    before = objects(model)
    with pytest.raises((TypeError, AttributeError)):
        edit(model, None, lambda name, layer: None if name == "1.2" else Zero())
    assert unchanged(model, before)


@pytest.mark.parametrize("training", [False, True])
def test_the_new_module_has_the_mode_of_the_old(training):
    model = nested().train(training)
    model[1][0].train(not training)
    edit(model, None, zero)
    assert [model[0].training, model[1][0].training, model[1][2].training] == [training, not training, training]


def test_make_gets_the_name_and_the_layer():
    model, seen = nested(), {}
    edit(model, "1.*", lambda name, layer: seen.setdefault(name, layer))
    assert seen == {"1.0": model[1][0], "1.2": model[1][2]}


# ---- choosing ----


@pytest.mark.parametrize("select", ["*.zz", lambda name: False])
def test_no_match_lists_the_names(select):
    with pytest.raises(ValueError, match=r"matches no nn\.Linear; there are: 0, 1\.0, 1\.2"):
        edit(nested(), select, zero)


@pytest.mark.parametrize("select,wanted", [("1.*", ["1.0", "1.2"]), ("!0", ["1.0", "1.2"]), ("0", ["0"])])
def test_a_pattern_chooses(select, wanted):
    assert list(edit(nested(), select, zero)) == wanted


def test_names_choose_modules_of_any_kind():
    model = nested()
    relu = model[1][1]
    with edit(model, ["1.1"], zero):
        assert isinstance(model[1][1], Zero)
    assert model[1][1] is relu


@pytest.mark.parametrize("names", [["zz"], ["0", "1.7"], ["0.weight"]])
def test_an_unknown_name_is_an_error_that_names_it(names):
    model = nested()
    before = objects(model)
    with pytest.raises(ValueError, match=names[-1]):
        edit(model, names, zero)
    assert unchanged(model, before)


def test_a_model_without_linear_says_what_it_has():
    with pytest.raises(ValueError, match=r"Sequential has no nn\.Linear; its layers are: Conv1d, LayerNorm"):
        sites(nn.Sequential(nn.Conv1d(2, 2, 1), nn.LayerNorm(2), nn.ReLU()))


def test_a_model_that_is_itself_the_layer_is_refused():
    """There is no parent to put the new module into: pretending to have swapped it would be silent."""
    layer = nn.Linear(4, 4)
    before = list(layer.state_dict())
    with pytest.raises(ValueError, match=r"itself|wrap|Sequential"):
        edit(layer, None, zero)
    assert list(layer.state_dict()) == before


def test_shapes_are_out_by_in():
    assert shapes(sites(named())) == {"enc": (3, 4), "dec": (4, 3)}
    assert all(tuple(m.weight.shape) == shapes({name: m})[name] for name, m in linears(llama(True)).items())


# ---- tied weights ----


class Untied(nn.Module):
    """Two Linear objects with one weight, and a third alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight


TIES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "head and embedding": (lambda: llama(True), "lm_head", "model.embed_tokens"),
    "two layers": (Untied, "first", "second"),
    "two layers, the other": (Untied, "second", "first"),
    "one object twice": (Shared, "first", "second"),
}


@pytest.fixture(params=TIES)
def tie(request) -> tuple[nn.Module, str, str]:
    build, name, other = TIES[request.param]
    return build(), name, other


@pytest.mark.parametrize("select", ["name", "*"])
def test_a_tied_weight_is_refused_with_both_names_and_the_remedy(tie, select):
    model, name, other = tie
    before = objects(model)
    pair = (
        rf"{name} shares its weight with {other}" if select == "name" else rf"({name}|{other}) shares its weight"
    )
    with pytest.raises(ValueError, match=rf"{pair}.*leave it out with '!.*tied='share'"):
        edit(model, name if select == "name" else "*", zero)
    assert unchanged(model, before)


def test_share_changes_one_holder_and_leaves_the_other(tie):
    model, name, other = tie
    weight, elsewhere = model.get_submodule(name).weight, model.get_submodule(other)
    done = edit(model, name, zero, tied="share")
    assert isinstance(model.get_submodule(name), Zero)
    assert model.get_submodule(other) is elsewhere and elsewhere.weight is weight
    done.undo()
    assert model.get_submodule(name).weight is weight


def test_sharers_names_all_holders(tie):
    model, name, other = tie
    assert set(sharers(model)[id(model.get_submodule(name).weight)]) == {name, other}


def test_nothing_is_shared_in_a_plain_model():
    assert sharers(nested()) == {} and sharers(llama(False)) == {}


class OnlyTied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False)
        self.head.weight = self.embed.weight


def test_a_model_of_tied_layers_only_is_refused_and_the_remedy_works():
    with pytest.raises(ValueError, match=r"shares its weight.*tied='share'"):
        sites(OnlyTied())
    assert list(sites(OnlyTied(), tied="share")) == ["head"]


# ---- edits on edits ----


def again(model: nn.Module, name: str) -> Iterator[object]:
    yield edit(model, [name], zero)
    yield edit(model, [name], lambda _, old: nn.Sequential(old))


def test_an_earlier_edit_is_not_undone_under_a_later_one():
    model = nested()
    before = objects(model)
    first, second = again(model, "0")
    with pytest.raises(RuntimeError, match=r"0 was changed again.*undo the later edit first"):
        first.undo()
    assert isinstance(model[0], nn.Sequential) and isinstance(model[0][0], Zero)
    second.undo()
    first.undo()
    assert unchanged(model, before)


def test_a_refused_undo_changes_nothing_at_all():
    model = nested()
    first = edit(model, None, zero)
    second = edit(model, ["1.2"], lambda _, old: nn.Sequential(old))
    now = objects(model)
    with pytest.raises(RuntimeError, match=r"1\.2 was changed again"):
        first.undo()
    assert unchanged(model, now)
    second.undo()
    first.undo()


def test_an_edit_inside_what_was_taken_away_refuses_to_undo():
    model = nested()
    first = edit(model, ["0"], lambda _, old: nn.Sequential(old, nn.Linear(4, 4)))
    second = edit(model, ["0.1"], zero)
    first.undo()
    with pytest.raises(RuntimeError, match=r"0\.1 was changed again"):
        second.undo()
    assert isinstance(model[0], nn.Linear)


def test_edits_of_different_sites_undo_in_any_order():
    model = nested()
    before = objects(model)
    first, second = edit(model, ["0"], zero), edit(model, ["1.0"], zero)
    first.undo()
    second.undo()
    second.undo()
    assert unchanged(model, before)


def test_replace_sets_a_submodule_by_its_dotted_name():
    model, new = nested(), Zero()
    replace(model, "1.2", new)
    assert model[1][2] is new


def test_a_convolution_in_groups_is_taken_where_the_caller_adapts_it():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 4), nn.Embedding(4, 4, max_norm=1.0))
    with pytest.raises(ValueError, match=r"0 is a convolution in 2 groups.*leave it out with '!0'"):
        sites(model, "0|1")
    found = sites(model, "0|1", grouped="take")
    assert found == {"0": model[0], "1": model[1]}
    with pytest.raises(ValueError, match="2 rescales its rows to max_norm"):
        sites(model, "0|2", grouped="take")
    before = model[0](torch.ones(1, 4, 5, 5))
    edit(model, list(found), adapt(Adapter(ZeroLowRank(2), Add())))
    assert torch.equal(model[0](torch.ones(1, 4, 5, 5)), before)
    assert [isinstance(layer, Adapted) for layer in model] == [True, True, False]
