"""Tensors held narrower in a file come back within the bound that was told, and what is too few stays as it is."""

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from subspan import io
from subspan.packed import BLOCK, KINDS, Packed, bound_of, pack, unpack


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some() -> dict[str, torch.Tensor]:
    tensors = {
        "u": rand(7, 130),
        "few": rand(3, 5, seed=2),
        "mu": rand(5, seed=1),
        "index": torch.arange(4),
        "zero": torch.zeros(3, 2),
    }
    return tensors | {"again": tensors["u"]}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_packed_is_read_within_its_bound(kind, tmp_path):
    tensors = some()
    packed = io.write_packed(tmp_path / "a", tensors, kind)
    assert isinstance(packed, Packed) and packed.bound == bound_of(kind)
    found = io.read_tensors(tmp_path / "a")
    assert found.keys() == tensors.keys() and found["again"] is found["u"]
    assert {t.dtype for name, t in found.items() if name != "index"} == {torch.float32}
    assert torch.equal(found["index"], tensors["index"]) and torch.equal(found["zero"], tensors["zero"])
    error = (found["u"] - tensors["u"]).abs()
    if kind == "int8":
        parts = tensors["u"].flatten().split(BLOCK)
        largest = torch.cat([part.abs().max().expand_as(part) for part in parts]).view(7, 130)
        assert bool((error <= largest / 254 * (1 + 1e-5)).all())
        assert all(torch.equal(found[name], tensors[name]) for name in ("mu", "few"))
    else:
        assert bool((error <= torch.finfo(getattr(torch, kind)).eps / 2 * tensors["u"].abs()).all())
        assert torch.equal(found["mu"], tensors["mu"].to(getattr(torch, kind)).float())
    told = max(
        float((found[n] - tensors[n]).double().norm() / tensors[n].double().norm()) for n in ("u", "mu", "few")
    )
    assert_close(packed.error, told, rtol=1e-6, atol=0)
    assert 0 < packed.error < 1e-2


@pytest.mark.parametrize(("kind", "most"), [("int8", 0.28), ("bfloat16", 0.51)])
def test_the_file_is_as_small_as_told(kind, most, tmp_path):
    tensors = {"u": rand(64, 1024), "v": rand(1024, 64, seed=1)}
    io.write_packed(tmp_path / "a", tensors, kind)
    io.write_tensors(tmp_path / "b", tensors)
    one, two = ((tmp_path / name).stat().st_size for name in "ab")
    assert one < most * two
    with safe_open(str(tmp_path / "a"), framework="pt") as file:
        assert file.metadata()["narrow"] == kind


def test_packing_again_what_was_packed_changes_nothing():
    for kind in KINDS:
        once = pack({"u": rand(6, 70)}, kind)
        again = pack(unpack(once.tensors, kind), kind)
        assert again.error < 1e-6 and all(torch.equal(t, once.tensors[key]) for key, t in again.tensors.items())


def test_bounds_say_what_they_are():
    assert bound_of("int8") == f"1/254 of the largest of its {BLOCK} neighbours"
    assert bound_of("bfloat16") == "3.9e-03 of itself" and bound_of("float16") == "4.9e-04 of itself"


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="'int3' is no way to store factors; use bfloat16, float16, int8"):
        pack({}, "int3")
    with pytest.raises(ValueError, match="u holds numbers that float16 cannot hold; use bfloat16"):
        pack({"u": torch.full((2, 2), 1e6)}, "float16")
    with pytest.raises(ValueError, match=r"u\.absmax is missing, of which u is made; copy or save it again"):
        unpack({"u.codes": torch.zeros(1, 1, dtype=torch.uint8)}, "int8")
