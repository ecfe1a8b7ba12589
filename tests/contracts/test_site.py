"""A site is a matrix: what each kind of layer does to its inputs is w x + bias, before and after it is swapped."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from subspan import site
from subspan.compress import study
from subspan.edit import edit, matrices, shapes, sites
from subspan.inspect import survey
from subspan.metric import Fisher, Gram, Plain, collect
from subspan.ops import Dense, LowRank, OpConv, OpEmbedding, OpLayer, OpLinear
from subspan.ops.experts import Stacked, expert_layers, form, stacked, transposed, unstacked
from subspan.ops.layer import Window, filled


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def drawn(module: nn.Module) -> nn.Module:
    """The module in float64, each parameter drawn anew."""
    module.double().eval()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(rand(*p.shape, seed=i))
    return module


# name -> (a layer, an input)
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(5, 7), lambda: rand(2, 3, 5)),
    "linear, no bias": (lambda: nn.Linear(5, 7, bias=False), lambda: rand(2, 3, 5)),
    "conv1d of transformers": (lambda: Conv1D(7, 5), lambda: rand(2, 3, 5)),
    "conv1d": (lambda: nn.Conv1d(3, 6, 4, stride=2, padding=1), lambda: rand(2, 3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 6, (2, 3), stride=(2, 1), padding=(0, 2)), lambda: rand(2, 3, 8, 9)),
    "conv2d, patches": (lambda: nn.Conv2d(3, 6, 4, stride=4, bias=False), lambda: rand(2, 3, 8, 8)),
    "conv2d, dilated": (lambda: nn.Conv2d(3, 6, 3, dilation=(2, 1), padding="same"), lambda: rand(2, 3, 7, 6)),
    "conv2d, even same": (lambda: nn.Conv2d(3, 6, (4, 2), padding="same"), lambda: rand(2, 3, 7, 6)),
    "conv2d, valid": (lambda: nn.Conv2d(3, 6, 2, padding="valid"), lambda: rand(2, 3, 4, 5)),
    "conv2d, reflect": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), lambda: rand(2, 3, 4, 5)),
    "conv2d, circular": (
        lambda: nn.Conv2d(3, 6, 3, padding=(2, 1), padding_mode="circular"), lambda: rand(2, 3, 4, 5)
    ),
    "conv2d, one image": (lambda: nn.Conv2d(3, 6, 2), lambda: rand(3, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 5, (2, 1, 2), padding=1), lambda: rand(2, 2, 3, 3, 4)),
}  # fmt: skip


@pytest.fixture(params=LAYERS)
def layer(request) -> tuple[nn.Module, Tensor]:
    build, inputs = LAYERS[request.param]
    return drawn(build()), inputs()


def full_rank(w: Tensor) -> LowRank:
    u, s, v = torch.linalg.svd(w.detach(), full_matrices=False)
    return LowRank(u * s, v)


# ---- a layer is a matrix ----


def test_a_layer_multiplies_its_rows_by_its_matrix(layer):
    module, x = layer
    kind, w, b = site.of(module), site.matrix(module), site.bias(module)
    wanted = kind.rows(module, x) @ w.mT + (0 if b is None else b)
    assert_close(kind.outputs(module, module(x)), wanted, rtol=1e-12, atol=1e-12)


def test_the_matrix_lies_in_the_memory_of_the_parameter(layer):
    module, _ = layer
    w, p = site.matrix(module), site.parameter(module)
    assert p is module.weight
    assert w.data_ptr() == p.data_ptr() and sorted(w.detach().flatten()) == sorted(p.detach().flatten())


@pytest.mark.parametrize("op", [Dense, full_rank, lambda w: full_rank(w.mT).T], ids=["dense", "uv", "any op"])
def test_a_layer_with_its_own_matrix_as_an_op_does_the_same(layer, op):
    module, x = layer
    new = site.of(module).rebuild(module, op(site.matrix(module).detach()), site.bias(module))
    assert isinstance(new, OpLayer)
    assert_close(new(x), module(x), rtol=1e-12, atol=1e-12)
    assert_close(new.weight, module.weight.mT if isinstance(module, Conv1D) else module.weight)


def test_an_op_made_plain_is_the_layer_of_the_same_type(layer):
    module, x = layer
    op = LowRank(rand(site.matrix(module).shape[0], 2), rand(2, site.matrix(module).shape[1], seed=1))
    new = site.of(module).rebuild(module, op, site.bias(module))
    back = new.plain(op.dense())
    assert type(back) is type(module) and back.state_dict().keys() == module.state_dict().keys()
    assert repr(back) == repr(module)
    assert_close(back(x), new(x), rtol=1e-12, atol=1e-12)


def test_statistics_are_those_of_the_rows(layer):
    module, x = layer
    rows = site.of(module).rows(module, x)
    mean = collect(nn.Sequential(module), [x], Gram(), {"0": module})["0"]
    assert_close(mean, rows.mT @ rows / len(rows), rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_the_matrix(layer):
    module, x = layer
    w = site.matrix(module).detach().requires_grad_()
    b = site.bias(module)
    (site.of(module).rows(module, x) @ w.mT + (0 if b is None else b.detach())).square().sum().backward()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    mean = collect(nn.Sequential(module), [x], Fisher(), {"0": module}, loss=loss)["0"]
    assert_close(mean, w.grad.square().sum(0), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_under_the_gram_metric_the_predicted_error_is_that_of_the_outputs(layer):
    module, x = layer
    model = nn.Sequential(module)
    before = site.of(module).outputs(module, module(x)) - (0 if module.bias is None else module.bias)
    taken = study(model, Gram(), select="0", batches=[x])
    plan = taken.plan(lambda spectra, shapes: {"0": 2})
    taken.apply(model, plan)
    after = site.of(module).outputs(module, model(x)) - (0 if module.bias is None else module.bias)
    assert float((after - before).norm() / before.norm()) == pytest.approx(plan.sites["0"].error, rel=1e-9)
    assert plan.sites["0"].shape == tuple(site.matrix(module).shape)


def test_convolutions_of_one_input_share_statistics_only_if_their_windows_are_equal():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 4, 3)
            self.c = nn.Conv2d(2, 3, 3, stride=2)

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.a(x), self.b(x), self.c(x)]

    model, x = drawn(Twins()), rand(2, 2, 6, 7)
    found = collect(model, [x], Gram(), dict(model.named_children()))
    assert found["a"] is found["b"]
    for name in "ac":
        rows = Window.of(model.get_submodule(name)).rows(x)
        assert_close(found[name], rows.mT @ rows / len(rows), rtol=1e-12, atol=1e-12)


# ---- embeddings ----


def test_an_embedding_looks_up_rows_of_its_op():
    table, ids = drawn(nn.Embedding(9, 4, padding_idx=2)), torch.tensor([[1, 2, 8], [0, 0, 5]])
    op = LowRank(rand(9, 2), rand(2, 4))
    new = site.of(table).rebuild(table, op, None)
    assert isinstance(new, OpEmbedding) and new.padding_idx == 2
    assert_close(new(ids), op.dense()[ids])
    assert_close(OpEmbedding(Dense(op.dense()))(ids), op.dense()[ids])
    back = new.plain(new.weight)
    assert repr(back) == repr(table) and torch.equal(back(ids), op.dense()[ids])


def test_an_embedding_is_compressed_only_by_name_and_has_no_inputs_to_weigh():
    model, ids = drawn(nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 3))), torch.tensor([[1, 2, 8]])
    assert list(sites(model)) == list(sites(model, "*")) == list(sites(model, "!2")) == ["1"]
    assert list(sites(model, "0|1")) == ["0", "1"] and list(sites(model, lambda name: name == "0")) == ["0"]
    with pytest.raises(ValueError, match=r"0 is an embedding.*no inputs.*Gram.*leave it out with '!0'.*plain"):
        study(model, Gram(), select="0|1", batches=[ids])
    taken = study(model, Plain(), select="0")
    taken.apply(model, taken.plan(lambda spectra, shapes: {"0": 2}))
    u, s, v = torch.linalg.svd(taken.witness.sites["0"].weight.detach(), full_matrices=False)
    assert_close(model[0](ids), ((u[:, :2] * s[:2]) @ v[:2])[ids], rtol=1e-12, atol=1e-12)


# ---- what is refused ----


def test_a_convolution_in_groups_is_refused_with_the_remedy():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 4))
    assert list(sites(model)) == ["1"]
    with pytest.raises(ValueError, match=r"0 is a convolution in 2 groups.*leave it out with '!0'"):
        sites(model, "0")


def test_a_table_that_rescales_its_rows_is_refused():
    with pytest.raises(ValueError, match=r"0 rescales its rows to max_norm.*leave it out with '!0'"):
        sites(nn.Sequential(nn.Embedding(4, 4, max_norm=1.0), nn.Linear(4, 4)), "0")


class Shifted(nn.Embedding):
    """One whose forward is its own, so that its rows are not what it looks up."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 1)


@pytest.mark.parametrize(
    "module", [Shifted(4, 4), nn.ConvTranspose2d(2, 2, 2), nn.Bilinear(2, 3, 4), nn.LayerNorm(3), nn.ReLU()]
)
def test_what_is_no_matrix_is_no_site(module):
    assert site.kind_of(module) is None and site.sites_of("x", module) == {}


def test_a_model_of_convolutions_says_how_to_choose_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.ReLU())
    with pytest.raises(ValueError, match=r"no nn\.Linear; its layers are: Conv2d; name some of them, such as '0'"):
        sites(model)
    assert list(sites(model, "*")) == ["0"]


def test_a_tied_table_is_refused_by_either_name():
    model = nn.ModuleDict({"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["table"].weight
    for name, other in (("table", "head"), ("head", "table")):
        with pytest.raises(ValueError, match=rf"{name} shares its weight with {other}.*tied='share'"):
            sites(model, name)
    assert list(sites(model, "table", tied="share")) == ["table"]


# ---- experts ----

E, H, INNER = 3, 5, 4


class Experts(nn.Module):
    """Experts as 3-D parameters; every token goes to one of them."""

    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.num_experts, self.is_transposed = E, turned
        up, down = (E, 2 * INNER, H), (E, H, INNER)
        self.up = nn.Parameter(torch.empty(*(up if not turned else (E, H, 2 * INNER))))
        self.down = nn.Parameter(torch.empty(*(down if not turned else (E, INNER, H))))
        self.position = nn.Parameter(torch.empty(1, 7, H))

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for token, row in enumerate(x):
            up, down = self.up[token % E], self.down[token % E]
            if self.is_transposed:
                up, down = up.mT, down.mT
            gate, inner = (up @ row).chunk(2)
            rows.append(row + down @ (torch.tanh(gate) * inner))
        return torch.stack(rows)


class Mixture(nn.Module):
    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts(turned) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture(params=[False, True], ids=["out by in", "in by out"])
def mixture(request) -> Mixture:
    return drawn(Mixture(request.param))


X = rand(6, H)
NAMES = [f"layers.{i}.{e}.{key}" for i in range(2) for key in ("up", "down") for e in range(E)]


def test_every_expert_is_a_site_of_its_own(mixture):
    found = sites(mixture)
    assert list(found) == NAMES
    assert shapes(found) == {name: (8, 5) if name.endswith("up") else (5, 4) for name in NAMES}
    w, p = found["layers.1.2.up"].weight, mixture.layers[1].up
    assert torch.equal(w, p[2].mT if transposed(mixture.layers[1]) else p[2])
    assert w.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
    assert list(survey(mixture).rows) == NAMES


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_experts_cut_are_experts_with_truncated_weights(mixture, rank):
    wanted = copy.deepcopy(mixture)
    with torch.no_grad():
        for module in matrices(wanted).values():
            u, s, v = torch.linalg.svd(site.matrix(module), full_matrices=False)
            site.matrix(module).copy_((u[:, :rank] * s[:rank]) @ v[:rank])
    taken = study(mixture)
    plan = taken.plan(lambda spectra, shapes: dict.fromkeys(shapes, rank))
    before = mixture(X)
    with taken.apply(mixture, plan):
        assert_close(mixture(X), wanted(X), rtol=1e-12, atol=1e-12)
        assert plan.bytes[1] == sum(8 * p.numel() for p in mixture.parameters())
        assert_close(mixture.layers[0].up, wanted.layers[0].up.detach(), rtol=1e-12, atol=1e-12)
        assert_close(copy.deepcopy(mixture)(X), wanted(X), rtol=1e-12, atol=1e-12)
    assert torch.equal(mixture(X), before) and type(mixture.layers[0]) is Experts
    assert list(mixture.state_dict()) == list(wanted.state_dict())


def test_experts_that_were_not_chosen_keep_every_bit(mixture):
    before = {name: site.matrix(m).detach().clone() for name, m in matrices(mixture).items()}
    taken = study(mixture, select="layers.1.*.up|!layers.1.0.up")
    plan = taken.plan(lambda spectra, shapes: dict.fromkeys(shapes, 2))
    taken.apply(mixture, plan)
    assert plan.bytes[1] == sum(8 * p.numel() for p in mixture.parameters())
    layers = expert_layers(mixture.layers[1], "up")
    assert [type(layer.op) for layer in layers] == [Dense, LowRank, LowRank]
    assert torch.equal(layers[0].op.dense(), before["layers.1.0.up"])
    # what is still a parameter can be compressed in turn
    assert list(sites(mixture)) == [name for name in NAMES if name not in {f"layers.1.{e}.up" for e in range(E)}]
    again = study(mixture, select="layers.1.*.down")
    again.apply(mixture, again.plan(lambda spectra, shapes: dict.fromkeys(shapes, 4)))
    for e in range(E):
        assert torch.equal(mixture.layers[1].down[e].mT if transposed(mixture.layers[1])
                           else mixture.layers[1].down[e], before[f"layers.1.{e}.down"])  # fmt: skip


def test_a_stacked_module_forms_a_product_once_a_call_and_learns(mixture, monkeypatch):
    taken = study(mixture)
    taken.apply(mixture, taken.plan(lambda spectra, shapes: dict.fromkeys(shapes, 2)))
    owner, made = mixture.layers[0], []
    assert isinstance(owner, Stacked) and isinstance(owner, Experts)
    monkeypatch.setattr("subspan.ops.experts.form", lambda o, key: made.append(key) or form(o, key))
    owner(X)
    assert sorted(made) == ["down", "up"]
    factor = owner.get_submodule("1.up").op.u
    factor.requires_grad_()
    plain = unstacked(owner, {key: form(owner, key) for key in ("up", "down")})
    plain.up.requires_grad_()
    owner(X).square().sum().backward()
    plain(X).square().sum().backward()
    grad = plain.up.grad[1].mT if transposed(owner) else plain.up.grad[1]
    assert_close(factor.grad, grad @ owner.get_submodule("1.up").op.v.mT, rtol=1e-12, atol=1e-12)


def test_a_stacked_module_can_be_stacked_again_and_made_plain(mixture):
    owner = mixture.layers[0]
    wanted = owner(X)

    def layers(key: str) -> list[OpLayer]:
        return [OpLinear(Dense(site.matrix(site.Expert(owner, key, e)).detach())) for e in range(E)]

    once = stacked(owner, {"up": layers("up")})
    twice = stacked(once, {"down": layers("down")})
    back = unstacked(twice, {key: form(twice, key) for key in ("up", "down")})
    assert all(torch.equal(m(X), wanted) for m in (once, twice, back))
    assert type(back) is Experts and set(back.state_dict()) == set(owner.state_dict())
    assert set(twice.state_dict()) == {"position", *(f"{e}.{k}.op.w" for e in range(E) for k in ("up", "down"))}
    assert "up" in dict(owner.named_parameters())


def test_the_fisher_metric_of_an_expert_is_that_of_its_slice(mixture):
    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).square().sum()

    found = collect(mixture, [X], Fisher(), sites(mixture), loss=loss)
    loss(mixture, X).backward()
    for name, module in sites(mixture).items():
        owner, key, index = module.owner, module.key, module.index
        grad = getattr(owner, key).grad[index]
        assert_close(found[name], (grad.mT if transposed(owner) else grad).square().sum(0))


def test_an_expert_can_only_be_swapped_for_an_op(mixture):
    before = dict(mixture.named_modules())
    for make in (lambda name, old: nn.Identity(), lambda name, old: OpLinear(Dense(old.weight), torch.zeros(8))):
        with pytest.raises(
            ValueError, match=r"layers\.0\.1\.up is one expert.*leave it out with '!layers\.0\.1\.up'"
        ):
            edit(mixture, ["layers.0.1.up"], make)
    with pytest.raises(ValueError, match=r"no module 'layers\.0\.3\.up' to swap"):
        edit(mixture, ["layers.0.3.up"], lambda name, old: old)
    assert dict(mixture.named_modules()) == before


@pytest.mark.parametrize("count", [None, 2])
def test_a_3d_parameter_of_a_module_that_counts_no_experts_is_no_site(count):
    model = Mixture()
    for layer in model.layers:
        layer.num_experts = count
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        sites(model)


def test_parts_that_others_are_made_of():
    made = filled(nn.Linear(3, 2), torch.ones(2, 3), torch.zeros(2))
    assert torch.equal(made(torch.ones(3)), torch.full((2,), 3.0))
    with pytest.raises(TypeError, match="derive from OpLinear"):
        OpLayer(Dense(torch.ones(2, 2))).plain(torch.ones(2, 2))
    window = Window(1, (2,), (1,), "same", (1,), "zeros")
    assert window.sides == [0, 1] and window.padded(torch.ones(1, 1, 2)).tolist() == [[[1, 1, 0]]]
    conv = OpConv(Dense(torch.ones(1, 2)), window=window)
    assert conv(torch.ones(1, 1, 3)).tolist() == [[[2, 2, 1]]]
    assert site.conv1d() is Conv1D


KINDS = {
    site.LinearKind: nn.Linear(2, 2),
    site.Conv1DKind: Conv1D(2, 2),
    site.ConvKind: nn.Conv3d(2, 2, 1),
    site.EmbeddingKind: nn.Embedding(2, 2),
    site.ExpertKind: site.Expert(Mixture().layers[0], "up", 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_is_of_one_kind(kind):
    module = KINDS[kind]
    assert [type(k) for k in site.KINDS if k.holds(module)] == [kind]
    assert type(site.kind_of(module)) is type(site.of(module)) is kind and issubclass(kind, site.Kind)
    blind = kind is site.EmbeddingKind
    assert bool(site.of(module).blind(module)) is blind
    if blind:
        with pytest.raises(ValueError, match=r"x is .* and 'Gram' is read off inputs; leave it out with '!x'"):
            site.require_inputs({"x": module}, "Gram")
    site.require_matrices({"x": module})


def test_other_layers_pass_for_linear_ones():
    class Own(nn.Module):
        weight = nn.Parameter(torch.ones(2, 3))

    assert site.kind_of(Own()) is None and site.matrix(Own()) is Own.weight and site.bias(Own()) is None


def test_experts_are_picked_out_and_a_conv1d_needs_its_library(monkeypatch):
    found = matrices(nn.ModuleList([Mixture(), nn.Linear(2, 2)]))
    assert [name for name, _ in site.experts_of(found)] == [f"0.{name}" for name in NAMES]
    op = site.OpConv1D(Dense(torch.ones(2, 3)))
    monkeypatch.setattr(site, "TRANSFORMERS", "not.loaded")
    with pytest.raises(RuntimeError, match=r"not\.loaded is not loaded.*import transformers first"):
        op.plain(torch.ones(2, 3))
