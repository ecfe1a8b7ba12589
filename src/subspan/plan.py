"""What will be done to each site, before anything is done: a table people print, edit as a file, then apply."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, get_args

from rich import box
from rich.table import Column, Table

from subspan import linalg

Shapes = Mapping[str, tuple[int, int]]
Form = Literal["lowrank", "dense", "keep"]
FORMAT = 1


# At this share a model decoded 0 to 9 % faster than with whole matrices (bench/compression_speed.py); above it two
# factors are not sure to gain anything.
WORTH = Fraction(9, 10)


def break_even(m: int, n: int) -> int:
    """The largest rank whose two factors are worth it: they hold at most 9/10 of the m x n matrix's numbers.

        rank (m + n) <= 0.9 m n

    Above that they save next to nothing, and need not be faster than the matrix.

    >>> break_even(4096, 4096), break_even(4, 4)
    (1843, 1)
    """
    return int(WORTH * m * n / (m + n))


def numbers(rank: int, m: int, n: int) -> int:
    """How many numbers a site stores at this rank: two factors up to break-even, above it the dense matrix."""
    return rank * (m + n) if rank <= break_even(m, n) else m * n


@dataclass(frozen=True, slots=True)
class SitePlan:
    """One row: `form` is `lowrank` (two factors), `dense` (truncated, multiplied back) or `keep` (untouched).

    `bias` counts the numbers of a bias that a changed layer gains, where it had none. `ridge` is what had to be
    added to a singular statistic of the inputs, as a share of the mean of its diagonal; 0 for none.
    """

    shape: tuple[int, int]
    rank: int
    form: Form
    bits: int
    bytes_before: int
    bytes_after: int
    error: float
    reason: str
    bias: int = 0
    ridge: float = 0.0

    @property
    def full(self) -> int:
        """The largest rank the shape allows."""
        return min(self.shape)


@dataclass(frozen=True, slots=True)
class Plan:
    """Site -> what becomes of it; errors are relative, under the method's metric."""

    method: str
    args: Mapping[str, Any]
    sites: Mapping[str, SitePlan]
    other_bytes: int = 0
    format: int = field(default=FORMAT)

    @property
    def err(self) -> float:
        """Effective rank reduction reached: 1 - sum of ranks after / sum of ranks before."""
        return 1 - sum(s.rank for s in self.sites.values()) / sum(s.full for s in self.sites.values())

    @property
    def ratio(self) -> float:
        """Share of the sites' numbers that is kept."""
        before = sum(m * n for m, n in (s.shape for s in self.sites.values()))
        after = sum(numbers(s.rank, *s.shape) for s in self.sites.values())
        return after / before

    @property
    def bytes(self) -> tuple[int, int]:
        """Bytes of the whole model before and after, what is not a site included."""
        before = sum(s.bytes_before for s in self.sites.values())
        return before + self.other_bytes, sum(s.bytes_after for s in self.sites.values()) + self.other_bytes

    @property
    def target(self) -> Mapping[str, float]:
        """What was asked for, such as {"err": 0.5}; empty where nobody said."""
        found = self.args.get("target")
        return found if isinstance(found, Mapping) else {}

    def ranks(self) -> dict[str, int]:
        """Site -> rank."""
        return {name: site.rank for name, site in self.sites.items()}

    def check(self, shapes: Shapes) -> None:
        """Raise ValueError unless the plan's sites exist in a model with these shapes, with possible ranks."""
        missing = [name for name in self.sites if name not in shapes]
        if missing:
            near = get_close_matches(
                missing[0], [name for name in shapes if name not in self.sites], n=1, cutoff=0.8
            )
            hint = f"did you mean {near[0]} by {missing[0]}? If not, " if near else ""
            raise ValueError(
                f"the plan names {len(missing)} sites this model lacks, e.g. {', '.join(missing[:3])}; {hint}"
                f"the model has {', '.join(list(shapes)[:3])}, ...: was the plan made for another model?"
            )
        for name, site in self.sites.items():
            if site.shape != tuple(shapes[name]):
                raise ValueError(
                    f"{name}: the plan says shape {site.shape}, the model has {tuple(shapes[name])}; "
                    "the plan was made for another model: plan again"
                )
            _whole(site.rank, name)
            linalg.check_rank(site.rank, *site.shape, name)

    def title(self) -> str:
        """Method, ranks removed, numbers kept and bytes, which are three things; beside one what was asked."""
        before, after = self.bytes
        asked = {kind: _asked(kind, value) for kind, value in self.target.items()}
        return (
            f"{self.method}: rank reduction {self.err:.1%}{asked.get('err', '')}, "
            f"numbers kept {self.ratio:.1%}{asked.get('ratio', '')}, "
            f"bytes {before / 2**20:.1f} -> {after / 2**20:.1f} MiB{asked.get('bytes', '')}"
        )

    def remarks(self) -> list[str]:
        """What a person should know beside the table: too little calibration, or ranks cut for nothing."""
        return [*self._ridged(), *self._dense()]

    def _dense(self) -> list[str]:
        dense = [name for name, site in self.sites.items() if site.form == "dense"]
        if not dense:
            return []
        return [
            f"{len(dense)} of {len(self.sites)} sites lose ranks and stay dense, e.g. {dense[0]}: their factors "
            f"would hold over {float(WORTH):.0%} of their numbers and be no faster than the matrix, so nothing is "
            "saved there; aim lower, or take the method least_loss, which never does this"
        ]

    def _ridged(self) -> list[str]:
        ridged = [name for name, site in self.sites.items() if site.ridge]
        if not ridged:
            return []
        worst = max(ridged, key=lambda name: self.sites[name].ridge)
        return [
            f"{len(ridged)} of {len(self.sites)} sites had inputs that do not span all directions and needed a "
            f"ridge, e.g. at {worst} ({self.sites[worst].reason}); predicted errors may be too low: use more "
            "calibration tokens than any layer has inputs"
        ]

    def table(self, limit: int | None = None) -> Table:
        """The plan as a printable table; `limit` rows at most."""
        table = Table(
            Column("site", overflow="fold"), "shape", "rank", "form", "error", "reason", box=box.SIMPLE_HEAD,
            title=self.title(),
        )  # fmt: skip
        for name, s in list(self.sites.items())[:limit]:
            shape, rank = f"{s.shape[0]}x{s.shape[1]}", f"{s.rank}/{s.full}"
            table.add_row(name, shape, rank, s.form, f"{s.error:.2%}", s.reason)
        if limit is not None and len(self.sites) > limit:
            table.caption = f"{len(self.sites) - limit} more sites; --json prints all"
        return table

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the shape of the json file."""
        before, after = self.bytes
        totals: dict[str, Any] = {
            "err": self.err,
            "ratio": self.ratio,
            "bytes_before": before,
            "bytes_after": after,
        }
        totals["target"] = dict(self.target)
        sites = {name: asdict(site) for name, site in self.sites.items()}
        return {
            "method": self.method, "args": dict(self.args), "sites": sites,
            "other_bytes": self.other_bytes, "format": self.format, "totals": totals,
        }  # fmt: skip

    def to_json(self, path: str | Path) -> None:
        """Write the plan beside its final name, then rename."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        partial.replace(path)

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str = "plan") -> Plan:
        """Rebuild a plan; a site whose row was taken out stays as it is in the model, and its bytes count on.

        Raises ValueError naming a missing field, an impossible rank or a newer format.
        """
        try:
            if data.get("format", 0) > FORMAT:
                raise ValueError(f"{where}: format {data['format']} is newer than {FORMAT}; upgrade subspan")
            sites = {name: _row(row, f"{where}: {name}") for name, row in data["sites"].items()}
            plan = Plan(data["method"], data["args"], sites, _others(data, sites))
        except (KeyError, TypeError, AttributeError) as problem:
            raise ValueError(
                f"{where} is not a subspan plan (format, sites, method, args, other_bytes): {problem}; "
                "make one with `subspan plan`"
            ) from None
        if not sites:
            raise ValueError(f"{where} plans no sites; make one with `subspan plan`")
        return plan

    @staticmethod
    def from_json(path: str | Path) -> Plan:
        """Read a plan file; raises ValueError when it is not json or not a plan."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as problem:
            raise ValueError(f"{path} is not json: {problem}") from None
        return Plan.from_dict(data, str(path))


def site_plan(
    shape: tuple[int, int],
    rank: int,
    error: Callable[[int], float],
    *,
    bits: int,
    reason: str = "",
    where: str = "matrix",
    bias: int = 0,
    ridge: float = 0.0,
    tokens: int = 0,
) -> SitePlan:
    """The row for a rank: two factors below break-even, dense above it, untouched at full rank.

    A `ridge` that the statistic of `tokens` inputs needed is said in the reason.
    """
    m, n = shape
    linalg.check_rank(rank, m, n, where)
    form: Form = "keep" if rank == min(m, n) else "lowrank" if rank <= break_even(m, n) else "dense"
    why = {
        "keep": "full rank",
        "lowrank": f"{rank * (m + n) / (m * n):.0%} of the numbers",
        "dense": f"past break-even {break_even(m, n)}",
    }
    row = SitePlan(
        shape, rank, form, bits, m * n * bits // 8, _cost(shape, rank, form, bias) * bits // 8,
        0.0 if form == "keep" else error(rank), reason or why[form], bias,
    )  # fmt: skip
    return row if form == "keep" else ridged(row, ridge, tokens)


def ridged(site: SitePlan, ridge: float, tokens: int) -> SitePlan:
    """The row with the ridge that the statistic of `tokens` inputs needed, or with none for 0, and its reason."""
    note = f"; ridge {ridge:g} for {tokens:,} tokens in {site.shape[1]:,} inputs" if ridge else ""
    return replace(site, ridge=ridge, reason=site.reason.partition("; ridge ")[0] + note)


def priced(site: SitePlan) -> SitePlan:
    """The row with its bytes reckoned anew from shape, rank, form, bits and bias."""
    m, n = site.shape
    before, after = m * n, _cost(site.shape, site.rank, site.form, site.bias)
    return replace(site, bytes_before=before * site.bits // 8, bytes_after=after * site.bits // 8)


def _cost(shape: tuple[int, int], rank: int, form: Form, bias: int) -> int:
    """How many numbers a site then stores, a bias that it gains included."""
    m, n = shape
    return m * n if form == "keep" else bias + (rank * (m + n) if form == "lowrank" else m * n)


def _asked(kind: str, value: object) -> str:
    """A target as it stands behind what was reached."""
    if not isinstance(value, int | float):
        return ""
    return f" (at most {value / 2**20:.1f})" if kind == "bytes" else f" (target {value:.1%})"


def _others(data: Mapping[str, Any], sites: Mapping[str, SitePlan]) -> int:
    """The bytes of all that has no row: what the file says, or for a file with other rows than once, the rest."""
    whole = data.get("totals", {}).get("bytes_before")
    said: int = data["other_bytes"]
    return said if whole is None else max(int(whole) - sum(site.bytes_before for site in sites.values()), 0)


def _whole(rank: object, where: str) -> None:
    if type(rank) is not int:
        raise ValueError(f"{where}: rank {rank!r} is not a whole number; write one without quotes or point")


def _row(row: Mapping[str, Any], where: str) -> SitePlan:
    """A row as read from a file, its bytes reckoned anew: people edit rank and form, not the sums."""
    try:
        site = SitePlan(**{**row, "shape": tuple(row["shape"])})
    except (KeyError, TypeError) as problem:
        raise ValueError(
            f"{where} is not a row of a subspan plan: {problem}; make one with `subspan plan`"
        ) from None
    _whole(site.rank, where)
    _whole(site.bias, where)
    if site.form not in get_args(Form):
        raise ValueError(f"{where}: form {site.form!r} is unknown; choose one of {', '.join(get_args(Form))}")
    if site.form == "keep":
        return priced(replace(site, rank=site.full))
    linalg.check_rank(site.rank, *site.shape, where)
    return priced(site)
