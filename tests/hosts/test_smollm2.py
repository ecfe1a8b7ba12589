"""WeLore on a real model, by its definition: normalise each spectrum, pool, cut at the quantile, count."""

import numpy as np
import pytest
import torch

from subspan import Err, Gram, Uniform, WeLore, sites, study
from subspan.budget import Ratio
from subspan.edit import shapes
from subspan.hosts import text
from subspan.hosts.score import perplexity
from subspan.metric import collect

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def spectra(smollm2):
    return {name: torch.linalg.svdvals(layer.weight.detach()) for name, layer in sites(smollm2.model).items()}


def test_the_sites_are_the_seven_matrices_of_thirty_blocks(smollm2):
    kinds = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    found = sites(smollm2.model)
    assert len(found) == 210
    assert {name.rpartition(".")[2] for name in found} == kinds


@pytest.mark.parametrize("err", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])
def test_welore_ranks_are_the_definition_to_the_integer(smollm2, spectra, err):
    t = {name: (s - s.min()).double() / (s.max() - s.min()).double() for name, s in spectra.items()}
    k = np.quantile(torch.cat(list(t.values())).numpy(), err)
    shape = shapes(sites(smollm2.model))
    ranks = WeLore(Err(err))(spectra, shape)
    assert ranks == {name: int((levels >= k).sum()) for name, levels in t.items()}
    full = sum(min(shape[name]) for name in ranks)
    assert abs(1 - sum(ranks.values()) / full - err) <= 1 / full


def test_whitened_truncation_attains_its_loss_on_real_activations(smollm2):
    """|(w - w_r) X|_F^2 is the sum of the discarded squares, and no token is left out."""
    name = "model.layers.7.mlp.down_proj"
    layer = sites(smollm2.model, name)[name]
    ids = text.encode(smollm2.tokenizer, text.prose())
    batches = list(text.windows(ids, 256, 8)[:, None])
    mean = collect(smollm2.model, batches, Gram(), {name: layer})[name]
    w = layer.weight.detach().double()
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for batch in batches:
            smollm2.model(batch)
    hook.remove()
    x = torch.cat(seen)
    torch.testing.assert_close(mean.double(), x.mT @ x / len(x), rtol=1e-4, atol=1e-6)

    net = torch.nn.Sequential(torch.nn.Linear(*w.T.shape, bias=False).double())
    net[0].weight.data.copy_(w)
    taken = study(net, Gram(), batches=[x])
    for rank in (16, 200, 500):
        op = taken.parts["0"].cut(rank).dense()
        lost = (x @ (w - op).mT).square().sum() / len(x)
        torch.testing.assert_close(lost, taken.parts["0"].s[rank:].square().sum(), rtol=1e-6, atol=0)


@pytest.mark.full
@pytest.mark.parametrize("err", [0.2, 0.3, 0.4, 0.5])
def test_welore_beats_uniform_under_the_gram_metric(smollm2, grams, err):
    taken, scored = grams
    ppl = {}
    for kind in (WeLore, Uniform):
        with taken.apply(smollm2.model, taken.plan(kind(Err(err)))):
            ppl[kind] = perplexity(smollm2.model, scored)
    assert ppl[WeLore] < ppl[Uniform]


@pytest.fixture(scope="module")
def grams(smollm2, spectra):
    ids = text.encode(smollm2.tokenizer, text.prose())
    scored, calibration = text.windows(ids, 512, 8), text.windows(ids, 512, 32, start=8 * 512)
    return study(smollm2.model, Gram(), batches=calibration[:, None], spectra=spectra), scored


@pytest.mark.parametrize("kind", [Uniform, WeLore])
def test_a_ratio_is_kept_to(smollm2, spectra, kind):
    shape = shapes(sites(smollm2.model))
    ranks = kind(Ratio(0.7))(spectra, shape)
    kept = sum(min(r * (m + n), m * n) for r, (m, n) in ((r, shape[name]) for name, r in ranks.items()))
    assert 0.69 < kept / sum(m * n for m, n in shape.values()) <= 0.7
