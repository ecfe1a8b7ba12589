"""Codecs of few bits: what they keep exactly, how far they are off, and how many bytes they take."""

import io
import itertools

import pytest
import torch
from torch.testing import assert_close

from subspan.codec import (
    DYNAMIC4,
    DYNAMIC8,
    LINEAR4,
    UNSIGNED8,
    Int4,
    Int4Rank1,
    Int8,
    by_block,
    dynamic,
    paired,
    require_block,
    smaller,
    unpaired,
)
from subspan.optim import Adam, Optim, stored

BLOCKS = {
    "int8": Int8(8),
    "int8-unsigned": Int8(8, signed=False),
    "int4": Int4(8),
    "int4-unsigned": Int4(8, signed=False),
}
CODECS = {**BLOCKS, "rank1": Int4Rank1(8)}
LEVELS = {**{name: codec.levels for name, codec in BLOCKS.items()}, "rank1": LINEAR4}
SIGNED = ("int8", "int4")
SHAPES = [(1,), (7,), (8,), (19,), (3, 5), (6, 16), (5, 19), (2, 3, 4, 9)]
every = pytest.mark.parametrize("name", CODECS)
blockwise = pytest.mark.parametrize("name", BLOCKS)


def draw(name, *shape, seed=0, dtype=torch.float64):
    """Entries over some powers of ten; none negative where the codec is for second moments."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, dtype=dtype, generator=generator) ** 3
    return x if name in SIGNED else x.abs()


def upright(x):
    """x with a positive largest entry in every block of 8."""
    x[..., ::8] = x.abs().max()
    return x


def scale_of(name, x, s):
    """What each entry's level is multiplied by."""
    if "row" in s:
        return torch.minimum(s["row"][..., :, None], s["col"][..., None, :])
    return s["absmax"].repeat_interleave(8, -1)[..., : x.shape[-1]]


def through(codec, x):
    return codec.decode(codec.encode(x))


def same(a, b):
    """Whether two encodings are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def merged(many):
    return {key: torch.stack([s[key] for s in many]) for key in many[0]}


@pytest.mark.parametrize(
    ("levels", "lowest", "least"),
    [(DYNAMIC8, -0.99296875, 5.5e-7), (UNSIGNED8, 0, 3.25e-7), (DYNAMIC4, -0.8875, 5.5e-3)],
)
def test_the_dynamic_map_has_the_papers_ends_and_is_ascending(levels, lowest, least):
    assert len(levels) in (16, 256) and all(a < b for a, b in itertools.pairwise(levels))
    assert levels[0] == pytest.approx(lowest, rel=1e-15) and levels[-1] == 1.0
    assert 0.0 in levels and min(a for a in levels if a > 0) == pytest.approx(least, rel=1e-15)


def test_the_levels_of_one_power_of_ten_are_centres_of_equal_bins():
    for e in range(7):
        inside = [a for a in UNSIGNED8 if 0.1 < a * 10**e < 1]
        assert len(inside) == 2 ** (7 - e)
        edges = torch.linspace(0.1, 1, len(inside) + 1, dtype=torch.float64) * 10.0**-e
        assert_close(torch.tensor(inside, dtype=torch.float64), (edges[1:] + edges[:-1]) / 2, rtol=1e-14, atol=0)


def test_a_signed_map_is_symmetric_but_for_one():
    for bits in (4, 8):
        inner = [a for a in dynamic(bits, signed=True) if a != 1.0]
        assert [-a for a in reversed(inner)] == inner


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_at_most_half_the_widest_gap(name, shape):
    levels, x = LEVELS[name], draw(name, *shape)
    s = CODECS[name].encode(x)
    # an entry below the lowest level, to which the range [-1, 1] or [0, 1] reaches, is off by up to the distance
    end = levels[0] - (-1 if name in SIGNED else 0)
    worst = max(*(abs(b - a) / 2 for a, b in itertools.pairwise(levels)), end)
    error = (CODECS[name].decode(s) - x).abs()
    assert (error <= worst * scale_of(name, x, s) * (1 + 1e-12)).all()
    assert error.max() > 0 or x.numel() == 1


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_the_level_is_the_nearest_one(name, shape):
    x = draw(name, *shape, seed=1)
    s = CODECS[name].encode(x)
    every_value = torch.tensor(LEVELS[name], dtype=x.dtype) * scale_of(name, x, s).unsqueeze(-1)
    best = (every_value - x.unsqueeze(-1)).abs().amin(-1)
    assert_close((CODECS[name].decode(s) - x).abs(), best, rtol=1e-9, atol=1e-15)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_level_times_a_maximum_is_kept_exactly(name, dtype):
    values = 0.3 * torch.tensor(LEVELS[name], dtype=dtype)
    x = torch.cat([values.unsqueeze(-1), values[-1].expand(len(values), 1)], -1)
    assert torch.equal(through(CODECS[name], x), x)


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_a_second_encoding_changes_nothing(name, shape):
    codec, x = CODECS[name], upright(draw(name, *shape))
    s = codec.encode(x)
    assert same(codec.encode(codec.decode(s)), s)


@pytest.mark.parametrize("name", SIGNED)
def test_only_a_largest_entry_below_zero_shrinks_by_the_lowest_level(name):
    x = torch.tensor([-2.0, 0.5, 1.0])
    s = CODECS[name].encode(x)
    again = CODECS[name].encode(CODECS[name].decode(s))
    assert torch.equal(s["absmax"], torch.tensor([2.0]))
    assert torch.equal(again["absmax"], -2 * torch.tensor(LEVELS[name][:1]))


@every
def test_the_largest_entry_of_a_block_is_kept_exactly(name):
    x = draw(name, 6, 19).abs()
    assert torch.equal(through(CODECS[name], x).amax(-1), x.amax(-1))


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_a_power_of_two_passes_through(name, shape):
    x = draw(name, *shape)
    a, b = CODECS[name].encode(x), CODECS[name].encode(x * 2.0**-40)
    assert torch.equal(a["codes"], b["codes"])
    assert torch.equal(CODECS[name].decode(b), CODECS[name].decode(a) * 2.0**-40)


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_zeros_are_kept_exactly_beside_others(name, shape):
    zeros = torch.zeros(shape)
    assert torch.equal(through(CODECS[name], zeros), zeros)
    x = draw(name, 4, 16)
    x[1] = 0  # a row of blocks, or a row maximum
    assert torch.equal(through(CODECS[name], x)[1], torch.zeros(16, dtype=x.dtype))


@pytest.mark.parametrize("name", ["int4-unsigned", "rank1"])
def test_without_a_level_of_zero_no_entry_beside_others_becomes_zero(name):
    x = draw(name, 5, 19)
    x[:, ::2] *= 1e-9
    s = CODECS[name].encode(x)
    assert (CODECS[name].decode(s) >= scale_of(name, x, s) / 16).all()
    assert (through(Int8(8, signed=False), x) == 0).any()  # the 8-bit map has one


def test_rank_one_maxima_fit_where_blocks_do_not():
    row, col = draw("rank1", 12, seed=2), draw("rank1", 16, seed=3)
    x = torch.outer(10.0 ** torch.arange(12.0).double(), torch.ones(16).double()) * 7
    assert torch.equal(through(Int4Rank1(), x), x)
    x = torch.minimum(row[:, None], col)
    assert_close(through(Int4Rank1(), x), x, rtol=1e-15, atol=0)
    assert (through(Int4(8, signed=False), x) - x).abs().max() > 1e-2


@pytest.mark.parametrize("shape", [(5, 7), (8, 16), (3, 19)])
@every
def test_a_batch_is_encoded_as_its_members(name, shape):
    x = draw(name, 4, *shape)
    assert same(CODECS[name].encode(x), merged([CODECS[name].encode(part) for part in x]))
    assert torch.equal(CODECS[name].decode(CODECS[name].encode(x))[2], through(CODECS[name], x[2]))


@blockwise
@pytest.mark.parametrize("width", [5, 8, 19])
def test_some_rows_are_encoded_as_that_part_of_the_whole(name, width):
    x = draw(name, 9, width)
    whole, part = CODECS[name].encode(x), CODECS[name].encode(x[2:6])
    assert same({key: value[2:6] for key, value in whole.items()}, part)


@blockwise
def test_a_row_is_encoded_as_a_vector_and_whole_blocks_as_their_part(name):
    x = draw(name, 3, 37)
    whole = CODECS[name].encode(x)
    assert same({key: value[1] for key, value in whole.items()}, CODECS[name].encode(x[1]))
    assert torch.equal(through(CODECS[name], x)[:, 8:24], through(CODECS[name], x[:, 8:24]))


@every
def test_a_transposed_view_is_encoded_as_its_values(name):
    x = draw(name, 2, 19, 6).mT
    before = x.clone()
    assert same(CODECS[name].encode(x), CODECS[name].encode(x.contiguous()))
    assert torch.equal(x, before)


@every
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_those_of_zeros_also_without_memory(name, shape):
    s = CODECS[name].encode(draw(name, *shape))
    blank = CODECS[name].encode(torch.empty(shape, dtype=torch.float64, device="meta"))
    assert {k: (v.shape, v.dtype) for k, v in blank.items()} == {k: (v.shape, v.dtype) for k, v in s.items()}
    assert CODECS[name].decode(blank).shape == CODECS[name].decode(s).shape == shape


@pytest.mark.parametrize(
    ("codec", "bytes_"),
    [
        (Int8(), 48 * 512 + 48 * 2 * 4),
        (Int8(signed=False), 48 * 512 + 48 * 2 * 4),
        (Int4(), 48 * 512 // 2 + 48 * 4 * 4),
        (Int4Rank1(), 48 * 512 // 2 + (48 + 512) * 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes(codec, bytes_, dtype):
    s = codec.encode(torch.ones(48, 512, dtype=dtype))
    assert sum(v.untyped_storage().nbytes() for v in s.values()) == bytes_


@pytest.mark.parametrize("n", [1, 2, 127, 128, 129, 301])
def test_an_odd_row_costs_one_half_byte_more(n):
    s = Int4().encode(torch.ones(3, n))
    assert sum(v.untyped_storage().nbytes() for v in s.values()) == 3 * (-(-n // 2) + 4 * -(-n // 128))


@every
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_entry_is_not_hidden(name, bad):
    x = draw(name, 4, 19)
    x[1, 10] = bad
    finite = torch.isfinite(through(CODECS[name], x))
    assert not finite[1, 10] and finite[[0, 2, 3], :10].all()
    if name != "rank1":
        assert not finite[1, 8:16].any() and finite[1, :8].all() and finite[1, 16:].all()
    elif bad != bad:
        assert not finite[1].any() and not finite[:, 10].any()


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_encoded_as_its_values_in_float32(name, dtype):
    x = draw(name, 3, 19).to(dtype)
    assert same(CODECS[name].encode(x), CODECS[name].encode(x.float()))


@pytest.mark.parametrize("codec", [Int8(), Int4(), Int4Rank1()])
def test_scalars_are_refused(codec):
    with pytest.raises(ValueError, match=r"stores rows, not a tensor of shape \(\)"):
        codec.encode(torch.tensor(1.0))


@pytest.mark.parametrize("kind", [Int8, Int4, Int4Rank1])
def test_empty_blocks_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}: block=0 holds no entry"):
        kind(0)


ADAM8 = stored(Adam(), mu=Int8(), nu=Int8(signed=False))
ADAM4 = stored(Adam(), mu=Int4(), nu=Int4Rank1())


def share(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


ROWS, COLS = 100 ** share(16, 1), 100 ** share(1, 300)
CURVATURES = {"entries": 100 ** share(16, 300), "columns": COLS.repeat(16, 1), "both": torch.minimum(ROWS, COLS)}


def descend(rule, curvature, *, seed=1, dtype=torch.float64):
    """Weights after 200 steps on a quadratic with its minimum at 0, the noise of gradients in its own measure."""
    p = torch.nn.Parameter(torch.randn(16, 300, generator=torch.Generator().manual_seed(0)).to(dtype))
    noise = torch.Generator().manual_seed(seed)
    opt = Optim([("w", p)], rule, lr=0.02)
    for _ in range(200):
        at = p.detach() + torch.randn(16, 300, generator=noise, dtype=torch.float64)
        p.grad = (CURVATURES[curvature] * at).to(dtype)
        opt.step()
    return p.detach().double()


CLOSE = [
    (ADAM8, "entries", torch.float64),
    (ADAM8, "entries", torch.float32),
    (ADAM4, "both", torch.float64),
    (ADAM4, "both", torch.float32),
    (stored(Adam(), nu=Int4Rank1()), "columns", torch.float64),
]


@pytest.mark.parametrize(("rule", "curvature", "dtype"), CLOSE)
def test_few_bits_move_weights_less_than_another_draw_of_the_noise(rule, curvature, dtype):
    exact, other = (descend(Adam(), curvature, seed=seed) for seed in (1, 2))
    assert 0 < (descend(rule, curvature, dtype=dtype) - exact).norm() < (other - exact).norm()


def test_blocks_cannot_follow_columns_of_unequal_size_in_four_bits():
    exact, other = (descend(Adam(), "columns", seed=seed) for seed in (1, 2))
    by_blocks = descend(stored(Adam(), nu=Int4(signed=False)), "columns")
    assert (by_blocks - exact).norm() > (other - exact).norm()


@pytest.mark.parametrize(("codec", "levels"), [(Int8(64), DYNAMIC8), (Int4(64), DYNAMIC4)])
def test_a_moving_average_stays_within_the_sum_of_its_roundings(codec, levels):
    """Each rounding is at most half a gap of its block's maximum, and fades by b1 a step."""
    b1, half = 0.9, max(levels[0] + 1, *((b - a) / 2 for a, b in itertools.pairwise(levels)))
    gradients = draw("int8", 200, 4, 64)
    exact, s, bound = (
        torch.zeros(4, 64).double(),
        codec.encode(torch.zeros(4, 64).double()),
        torch.zeros(4, 1).double(),
    )
    for g in gradients:
        kept = codec.decode(s)
        assert ((kept - exact).abs() <= bound * (1 + 1e-9)).all()
        exact, now = b1 * exact + (1 - b1) * g, b1 * kept + (1 - b1) * g
        s = codec.encode(now)
        bound = b1 * bound + half * s["absmax"]


@pytest.mark.parametrize("rule", [ADAM8, ADAM4], ids=["8", "4"])
def test_encoded_state_continues_from_a_file(rule):
    p = torch.nn.Parameter(draw("int8", 5, 19))
    opt = Optim([("w", p)], rule, lr=0.1)
    gradients = draw("int8", 6, 5, 19, seed=1)
    for g in gradients[:3]:
        p.grad = g.clone()
        opt.step()
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    q = torch.nn.Parameter(p.detach().clone())
    again = Optim([("w", q)], rule, lr=0.1)
    again.load_state_dict(torch.load(file, weights_only=True))
    for g in gradients[3:]:
        p.grad, q.grad = g.clone(), g.clone()
        opt.step()
        again.step()
    assert torch.equal(p, q)
    assert "mu.codes" in again.state[q] and again.state[q]["mu.codes"].dtype == torch.uint8


@pytest.mark.parametrize("shape", SHAPES)
def test_paired_codes_come_apart_again(shape):
    """Sixteen codes, two a byte, and a row of odd length keeps its last one alone."""
    codes = torch.randint(0, 16, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    kept = paired(codes)
    assert kept["codes"].shape[-1] == shape[-1] // 2 and kept["tail"].shape[-1] == shape[-1] % 2
    assert torch.equal(unpaired(kept, tuple(float(i) for i in range(16)), torch.float64), codes.double())


def test_by_block_divides_each_block_by_its_largest_magnitude():
    x = draw("int8", 3, 19)
    x[1, 8:16] = 0
    absmax, share = by_block(x, 8, "here")
    for start, column in ((0, 0), (8, 1), (16, 2)):
        part = x[:, start : start + 8]
        assert torch.equal(absmax[:, column], part.abs().amax(-1))
        assert torch.equal(share[:, start : start + 8], part / absmax[:, [column]].clamp_min(1e-300))
    with pytest.raises(ValueError, match=r"here stores rows, not a tensor of shape \(\)"):
        by_block(torch.tensor(1.0), 8, "here")


def test_smaller_is_the_minimum_of_a_row_and_a_column():
    row, col = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.5, 4.0])
    assert torch.equal(smaller(row, col), torch.tensor([[1.0, 0.5, 1.0], [2.0, 0.5, 3.0]]))


def test_a_block_of_nothing_is_refused():
    with pytest.raises(ValueError, match="Int4: block=0 holds no entry; give 1 or more"):
        require_block("Int4", 0)
