"""Codes, decoded values and Adam's steps equal those of bitsandbytes and of the authors of 4-bit states."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from subspan.codec import DYNAMIC4, DYNAMIC8, LINEAR4, UNSIGNED8, Int4, Int4Rank1, Int8
from subspan.optim import Adam, Optim, stored

HERE = Path(__file__).parent
ENCODINGS = {
    "adam8bit/signed": (Int8(), DYNAMIC8, 1),
    "adam8bit/unsigned": (Int8(signed=False), UNSIGNED8, 2),
    "adam4bit/exp_avg": (Int4(), DYNAMIC4, 1),
    "adam4bit/exp_avg_sq": (Int4Rank1(), LINEAR4, 2),
}
RULES = {
    "adam8bit": stored(Adam(), mu=Int8(), nu=Int8(signed=False)),
    "adam4bit": stored(Adam(), mu=Int4(), nu=Int4Rank1()),
}
# the programs build their levels in float32, a rounding or two from the formula's
ULPS = 2**-22


def recorded(file):
    with np.load(HERE / f"{file}.npz") as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data.files}


def codes(s):
    """One code an entry: the low half byte comes first."""
    if "tail" not in s:
        return s["codes"]
    return torch.stack([s["codes"] & 15, s["codes"] >> 4], -1).flatten(-2)


@pytest.mark.parametrize("name", ENCODINGS)
def test_codes_and_values_equal_the_authors(name):
    file, which = name.split("/")
    codec, levels, power = ENCODINGS[name]
    data = recorded(file)
    s = codec.encode(data["g"][0] ** power)
    assert_close(torch.tensor(levels), data[f"{which}.levels"], rtol=ULPS, atol=0)
    assert torch.equal(codes(s).int(), data[f"{which}.codes"].int())
    assert_close(codec.decode(s), data[f"{which}.decoded"], rtol=ULPS, atol=0)


@pytest.mark.parametrize("file", RULES)
def test_eight_steps_equal_the_authors(file):
    data = recorded(file)
    p = torch.nn.Parameter(data["w0"].clone())
    opt = Optim([("w", p)], RULES[file], lr=0.01)
    full = torch.nn.Parameter(data["w0"].clone())
    exact = Optim([("w", full)], Adam(), lr=0.01)
    for g, theirs in zip(data["g"], data["w"], strict=True):
        p.grad, full.grad = g.clone(), g.clone()
        opt.step()
        exact.step()
        assert_close(p.detach(), theirs, rtol=0, atol=1e-6)
    # what is stored in few bits moves weights by far more than the tolerance, or the equality would say nothing
    assert (full.detach() - data["w"][-1]).abs().median() > 1e-4
