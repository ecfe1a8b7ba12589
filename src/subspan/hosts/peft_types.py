"""The types of adapters that PEFT 0.21.2 and we share: fields, tensor names, and our op for them.

A new type is one more row of `TYPES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from subspan.adapt import Add, Join, Rescale, Rotate
from subspan.adapt.multiply import divisors
from subspan.adapt.starts import near_factor
from subspan.hosts.peft_given import Config, Given
from subspan.hosts.peft_parts import (
    EDGE,
    HADA,
    LOKR,
    BlockSeries,
    Slots,
    Written,
    dense_of,
    lokr_shapes,
    oft_block,
    paired,
    split,
    write_adalora,
    write_loha,
    write_lokr,
    write_oft,
    write_randlora,
    write_shira,
    write_vera,
)
from subspan.ops import (
    BlockCayley,
    Dense,
    Diag,
    Entries,
    Hadamard,
    Kron,
    LinOp,
    LowRank,
    Product,
    Stacked,
    Transposed,
    Zero,
)

Shapes = dict[str, tuple[int, ...]]
Sizes = Mapping[str, tuple[int | None, int | None]]
LORA_HARMLESS = frozenset({
    "lora_dropout", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "velora_config",
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One type of adapter as PEFT keeps it.

    `rank` and `alpha` are the names of the config's fields, `fields` are the others that are understood, and
    `harmless` those that only matter while training. `names` are all tensors that a site may have, `wanted` those
    it must have, given the ones it has; `shapes` are theirs at a layer (m, n), `sizes` the (m, n) that tensors
    alone tell, None for what they do not. `options` takes what else matters out of a config, and raises ValueError
    for what is not read.
    """

    label: str
    method: str
    names: tuple[str, ...]
    shapes: Callable[[Config, str, int, int], Shapes]
    sizes: Callable[[Mapping[str, Tensor]], tuple[int | None, int | None]]
    read: Callable[[Given], tuple[LinOp, Join]]
    holds: Callable[[LinOp, Join], bool]
    write: Callable[[Slots], Written] | None
    rank: str | None = "r"
    default: int = 8
    alpha: str | None = None
    default_alpha: float = 8
    patterns: bool = False
    fields: frozenset[str] = frozenset()
    harmless: frozenset[str] = frozenset()
    shared: tuple[str, ...] = ()
    wanted: Callable[[Set[str], Config], Set[str]] | None = None
    options: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda _: {}
    args: Callable[[Config, Sizes], dict[str, Any]] = lambda *_: {}
    turns: bool = False

    def must(self, have: Set[str], config: Config) -> Set[str]:
        """The tensors that a site must have, given the ones it has."""
        return self.wanted(have, config) if self.wanted else set(self.names)


def layout_of(op: LinOp, join: Join) -> str | None:
    """The type of PEFT that an op and its join are, None for none of them; LORA is told by `factor_of`.

    >>> layout_of(Zero(2, 2), Rotate(2))
    'OFT'
    """
    return next((kind for kind, layout in TYPES.items() if layout.write and layout.holds(op, join)), None)


def _sum(join: Join) -> bool:
    return type(join) is Add


def _lora(given: Given) -> tuple[LinOp, Join]:
    op, mu = given.pair("lora_B.weight", "lora_A.weight"), given.parts.get("lora_magnitude_vector")
    return op, given.add if mu is None else Rescale(given.add.scale, nn.Parameter(mu))


def _lora_shapes(config: Config, site: str, m: int, n: int) -> Shapes:
    rank = config.rank_of(site)
    return {"lora_B.weight": (m, rank), "lora_A.weight": (rank, n), "lora_magnitude_vector": (m,)}


def _loha_shapes(config: Config, site: str, m: int, n: int) -> Shapes:
    rank = config.rank_of(site)
    return dict(zip(HADA, 2 * ((m, rank), (rank, n)), strict=True))


def _loha(given: Given) -> tuple[LinOp, Join]:
    return Hadamard(given.pair(*HADA[:2]), given.pair(*HADA[2:])), given.add


def _lokr_wanted(have: Set[str], config: Config) -> Set[str]:
    return {end for name in LOKR for end in ((name,) if name in have else (f"{name}_a", f"{name}_b"))}


def _lokr_sizes(parts: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    sizes = [
        (len(parts.get(name, parts.get(f"{name}_a", ()))), parts.get(name, parts.get(f"{name}_b")))
        for name in LOKR
    ]
    m, n = 1, 1
    for rows, last in sizes:
        m, n = m * rows, n * (0 if last is None else last.shape[-1])
    return m, n


def _lokr_shapes(config: Config, site: str, m: int, n: int) -> Shapes:
    factor, both = config.options["factor"], config.options["both"]
    return lokr_shapes(m, n, rank=config.rank_of(site), factor=factor, both=both)


def kron_of(given: Given) -> Kron:
    """The Kronecker product of a site, each side a matrix or a product."""
    sides = [
        Dense(given.train(name)) if name in given.parts else given.pair(f"{name}_a", f"{name}_b") for name in LOKR
    ]
    return Kron(*sides)


def _lokr_options(found: Mapping[str, Any]) -> dict[str, Any]:
    factor = found.get("decompose_factor", -1)
    if isinstance(factor, bool) or not isinstance(factor, int) or (factor < 1 and factor != -1):
        raise ValueError(f"decompose_factor is {factor!r}; it must be -1 or a positive whole number")
    return {"factor": factor, "both": bool(found.get("decompose_both"))}


def _lokr_args(config: Config, shapes: Sizes) -> dict[str, Any]:
    factor = config.options["factor"]
    sizes = {size for shape in shapes.values() for size in shape if size is not None}
    same = all(split(size, factor) == near_factor(size, factor) for size in sizes)
    return {"rank": config.rank, "alpha": config.alpha, **config.options} if same else {}


def _vera(given: Given) -> tuple[LinOp, Join]:
    left, right = given.shared["vera_B"][: given.m], given.shared["vera_A"][:, : given.n]
    outer, inner = (Diag(given.train(f"vera_lambda_{end}")) for end in "bd")
    return Product([outer, dense_of(left), inner, dense_of(right)]), Add()


def _vera_shapes(config: Config, site: str, m: int, n: int) -> Shapes:
    return {"vera_lambda_b": (m,), "vera_lambda_d": (config.rank,)}


def _projected(found: Mapping[str, Any]) -> dict[str, Any]:
    if not found.get("save_projection", True):
        raise ValueError(
            "save_projection is False, so the random matrices are not in the folder, and only peft on the machine "
            "that drew them has the same; load it there and save it with save_projection=True"
        )
    return {}


def _oft_options(found: Mapping[str, Any]) -> dict[str, Any]:
    blocks, block = found.get("r", 0), found.get("oft_block_size")
    if not isinstance(block, int) or not isinstance(blocks, int) or min(blocks, block) != 0 or blocks + block < 1:
        raise ValueError(
            f"r is {blocks!r} and oft_block_size {block!r}; one must be 0 and the other positive "
            "(peft before 0.14 wrote another OFT, which is not read)"
        )
    if not found.get("use_cayley_neumann", True):
        return {"blocks": blocks, "block": block, "terms": 0}
    # Written into every config since 0.18.0, where the series changed.
    if not found.get("peft_version"):
        raise ValueError(
            "use_cayley_neumann is True and peft_version is missing: peft before 0.18.0 summed another series, "
            "which is not read; train it again with a newer peft"
        )
    terms = found.get("num_cayley_neumann_terms", 5)
    if isinstance(terms, bool) or not isinstance(terms, int) or terms < 1:
        raise ValueError(f"num_cayley_neumann_terms is {terms!r}; it must be a positive whole number")
    return {"blocks": blocks, "block": block, "terms": terms}


def _oft_shapes(config: Config, site: str, m: int, n: int) -> Shapes:
    size = oft_block(n, blocks=config.options["blocks"], block=config.options["block"])
    return {"oft_R.weight": (n // size, size * (size - 1) // 2)}


def _oft_sizes(parts: Mapping[str, Tensor]) -> tuple[int | None, int | None]:
    blocks, numbers = parts["oft_R.weight"].shape
    return None, blocks * ((1 + math.isqrt(1 + 8 * numbers)) // 2)


def _oft(given: Given) -> tuple[LinOp, Join]:
    q, terms = given.train("oft_R.weight"), given.config.options["terms"]
    turn = BlockSeries(q, terms) if terms else BlockCayley(q)
    return Zero(given.m, given.n).to(q), Rotate(max(turn.size, 2), turn)


def _oft_args(config: Config, shapes: Sizes) -> dict[str, Any]:
    blocks, block = config.options["blocks"], config.options["block"]
    inputs = [n for _, n in shapes.values() if n is not None]
    fits = not blocks and all(
        oft_block(n, blocks=0, block=block) == max(d for d in divisors(n) if d <= block) for n in inputs
    )
    return {"block": block} if fits and not config.options["terms"] else {}


def _shira_shapes(config: Config, site: str, m: int, n: int) -> Shapes:
    count = config.rank * (m + n)
    return {"shira_weight": (count,), "shira_indices": (2, count)}


def _shira(given: Given) -> tuple[LinOp, Join]:
    rows, columns = given.parts["shira_indices"].long()
    index = rows * given.n + columns
    inside = bool(((rows >= 0) & (rows < given.m) & (columns >= 0) & (columns < given.n)).all())
    if not inside or len(index.unique()) < len(index):
        raise ValueError(
            f"{given.site}: shira_indices name an entry twice, or one outside ({given.m}, {given.n}); "
            "copy or save the folder again"
        )
    return Entries(index, given.train("shira_weight"), given.m, given.n), Add()


def _randlora_shapes(config: Config, site: str, m: int, n: int) -> Shapes:
    bases = math.ceil(min(m, n) / config.rank)
    return {"randlora_lambda": (config.rank, bases), "randlora_gamma": (bases, min(m, n))}


def _randlora(given: Given) -> tuple[LinOp, Join]:
    long, short = max(given.m, given.n), min(given.m, given.n)
    rank, bases = given.parts["randlora_lambda"].shape
    # As large as a layer, so layers share it.
    name = f"randlora_B of {bases}"
    if name not in given.shared:
        given.shared[name] = paired(given.shared["randlora_B"][:, :bases].flatten(1), rank)
    left = given.shared[name][:long]
    rows, columns = nn.Parameter(given.parts["randlora_lambda"].mT.contiguous()), given.train("randlora_gamma")
    one = dense_of(given.shared["randlora_A"][:, 0, :short])
    tall = Product([dense_of(left), Stacked(one, rows, columns)])
    return tall if given.m >= given.n else Transposed(tall), given.add


def _is_randlora(op: LinOp, join: Join) -> bool:
    tall = op.op if isinstance(op, Transposed) else op
    return _sum(join) and isinstance(tall, Product) and len(tall.ops) == 2 and isinstance(tall.ops[1], Stacked)


def _adalora_options(found: Mapping[str, Any]) -> dict[str, Any]:
    pattern, top = found.get("rank_pattern") or {}, found.get("init_r", 12)
    ranks = {}
    for name, kept in pattern.items():
        if not isinstance(kept, list) or len(kept) != top:
            raise ValueError(f"rank_pattern has {name!r}: {kept!r}; it must list init_r = {top} true or false")
        ranks[name.partition(".lora_E")[0]] = sum(map(bool, kept))
    return {"ranks": ranks}


def _adalora_shapes(config: Config, site: str, m: int, n: int) -> Shapes:
    named = config.options["ranks"].items()
    # A prefix or root that was told makes a site's name longer or shorter than the config's.
    like = (kept for name, kept in named if f".{name}".endswith(f".{site}") or f".{site}".endswith(f".{name}"))
    rank = next(like, config.rank)
    return {"lora_A": (rank, n), "lora_B": (m, rank), "lora_E": (rank, 1)}


def _adalora(given: Given) -> tuple[LinOp, Join]:
    b, a = (Dense(given.train(f"lora_{end}")) for end in "BA")
    scale = given.config.alpha / (given.config.rank + EDGE)
    return Product([b, Diag(nn.Parameter(given.parts["lora_E"][:, 0].contiguous())), a]), Add(scale)


def _plain(config: Config, shapes: Sizes) -> dict[str, Any]:
    return {"rank": config.rank, "alpha": config.alpha}


def _classes(op: LinOp, *kinds: type[LinOp] | None) -> bool:
    if not isinstance(op, Product) or len(op.ops) != len(kinds):
        return False
    return all(kind is None or type(one) is kind for one, kind in zip(op.ops, kinds, strict=True))


_DROP = frozenset({"init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale", "use_effective_conv2d"})
_DRAWN = frozenset({"init_weights", "projection_prng_key", "vera_dropout", "randlora_dropout", "d_initial"})
_BUDGET = frozenset({
    "r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "init_lora_weights",
})  # fmt: skip

TYPES: dict[str, Layout] = {
    "LORA": Layout(
        label="LoRA", method="lora", alpha="lora_alpha", patterns=True, write=None, read=_lora,
        shapes=_lora_shapes,
        names=("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"),
        wanted=lambda _, config: {"lora_A.weight", "lora_B.weight", *(["lora_magnitude_vector"] * config.dora)},
        sizes=lambda parts: (parts["lora_B.weight"].shape[0], parts["lora_A.weight"].shape[-1]),
        holds=lambda op, _: isinstance(op, LowRank), harmless=LORA_HARMLESS,
        fields=frozenset({"use_rslora", "use_dora", "init_lora_weights", "trainable_token_indices"}), args=_plain,
    ),
    "LOHA": Layout(
        label="LoHa", method="loha", alpha="alpha", patterns=True, write=write_loha, read=_loha, names=HADA,
        shapes=_loha_shapes, sizes=lambda parts: (parts[HADA[0]].shape[0], parts[HADA[1]].shape[-1]),
        holds=lambda op, join: isinstance(op, Hadamard) and _sum(join), harmless=_DROP, args=_plain,
    ),
    "LOKR": Layout(
        label="LoKr", method="lokr", alpha="alpha", patterns=True, write=write_lokr, shapes=_lokr_shapes,
        names=tuple(f"{name}{end}" for name in LOKR for end in ("", "_a", "_b")), sizes=_lokr_sizes,
        read=lambda given: (kron_of(given), given.add), wanted=_lokr_wanted, options=_lokr_options,
        args=_lokr_args,
        holds=lambda op, join: isinstance(op, Kron) and _sum(join), harmless=_DROP,
        fields=frozenset({"decompose_both", "decompose_factor"}),
    ),
    "VERA": Layout(
        label="VeRA", method="vera", default=256, write=write_vera, read=_vera, shapes=_vera_shapes,
        names=("vera_lambda_b", "vera_lambda_d"), shared=("vera_A", "vera_B"), options=_projected,
        sizes=lambda parts: (parts["vera_lambda_b"].shape[0], None), fields=frozenset({"save_projection"}),
        holds=lambda op, join: _classes(op, Diag, None, Diag, None) and _sum(join), harmless=_DRAWN,
    ),
    "OFT": Layout(
        label="OFT", method="oft", rank=None, write=write_oft, read=_oft, shapes=_oft_shapes, sizes=_oft_sizes,
        names=("oft_R.weight",), options=_oft_options, args=_oft_args, turns=True,
        holds=lambda op, join: isinstance(op, Zero) and isinstance(join, Rotate), harmless=_DROP | {"eps"},
        fields=frozenset({"r", "oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms"}),
    ),
    "SHIRA": Layout(
        label="SHiRA", method="shira", default=32, write=write_shira, read=_shira, shapes=_shira_shapes,
        names=("shira_weight", "shira_indices"), sizes=lambda _: (None, None),
        holds=lambda op, join: isinstance(op, Entries) and _sum(join),
        harmless=frozenset({"init_weights", "mask_type", "random_seed"}),
        args=lambda config, _: {"rank": config.rank},
    ),
    "RANDLORA": Layout(
        label="RandLoRA", method="randlora", default=32, alpha="randlora_alpha", default_alpha=640,
        write=write_randlora, read=_randlora, shapes=_randlora_shapes, holds=_is_randlora, options=_projected,
        names=("randlora_lambda", "randlora_gamma"), shared=("randlora_A", "randlora_B"),
        sizes=lambda _: (None, None), fields=frozenset({"save_projection"}),
        harmless=_DRAWN | {"sparse", "very_sparse"},
    ),
    "ADALORA": Layout(
        label="AdaLoRA", method="adalora", rank="init_r", default=12, alpha="lora_alpha", write=write_adalora,
        read=_adalora, shapes=_adalora_shapes, names=("lora_A", "lora_B", "lora_E"), options=_adalora_options,
        sizes=lambda parts: (parts["lora_B"].shape[0], parts["lora_A"].shape[-1]),
        holds=lambda op, join: _classes(op, Dense, Diag, Dense) and _sum(join),
        fields=frozenset({"rank_pattern", "trainable_token_indices"}), harmless=LORA_HARMLESS | _BUDGET,
    ),
}  # fmt: skip
