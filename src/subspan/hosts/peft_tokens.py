"""Rows of single tokens that train beside an adapter, as PEFT keeps them: `trainable_token_indices`.

PEFT keeps what the rows are, and its layer reads them instead of the base's; ours adds how far they are from
those. Both ends of a model whose embeddings are tied to its head have one set of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from subspan import shards
from subspan import site as kinds
from subspan.adapt import Adapted
from subspan.adapt.layers import matrix, refusal
from subspan.adapt.tokens import rows_of, shared_rows
from subspan.edit import Make
from subspan.hosts.peft_config import FIELD, PeftConfig
from subspan.hosts.peft_keys import some
from subspan.hosts.peft_types import TYPES
from subspan.hosts.peft_write import Tokens, unwrapped
from subspan.hosts.vocabulary import Ends, ends, grow
from subspan.linalg import wide

INSIDE = ".token_adapter."
ROWS = f"{INSIDE}trainable_tokens_delta"
# Copies of the tables, which PEFT adds when the vocabulary has grown.
TABLE, OLD = f"{INSIDE}base_layer.weight", f"{INSIDE}trainable_tokens_original"


@dataclass(frozen=True)
class TokenRows:
    """The rows of tokens in a folder: `values` (k, n) by site, and `tables` (vocabulary, n) that lie beside them.

    `asked` is what the config says: ids (k,) by the end of a module's name, "" for the embeddings.
    """

    path: Path = Path()
    asked: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    values: Mapping[str, Tensor] = field(default_factory=dict)
    tables: Mapping[str, Tensor] = field(default_factory=dict)

    def at(self, path: Path, *, prefix: str, root: str) -> TokenRows:
        """The same rows in that folder, with the sites named as in the model."""
        values, tables = (
            {root + site.removeprefix(prefix): t for site, t in found.items()}
            for found in (self.values, self.tables)
        )
        return TokenRows(path, self.asked, values, tables)

    def ids(self, site: str) -> tuple[int, ...]:
        """The ids (k,) at a site."""
        return next(ids for name, ids in self.asked.items() if site.endswith(name))

    @property
    def size(self) -> int:
        """How many rows the vocabulary must have."""
        most = [1 + max(self.ids(site)) for site in self.values]
        return max([*most, *(len(t) for t in self.tables.values())], default=0)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The rows under PEFT's names, without the prefix."""
        return {f"{site}{ROWS}": t for site, t in self.values.items()}

    def fits(self, model: nn.Module) -> dict[str, str]:
        """Site -> the site whose rows stand there; a head that is tied to the embeddings has theirs, as in PEFT.

        Raises ValueError for rows that PEFT would not put there, or of another width, for a layer that is no
        embedding and no head or cannot be adapted, and for a head with a bias, which PEFT leaves out while rows
        train.
        """
        if not self.values:
            return {}
        there, modules = ends(model), unwrapped(model)
        lost = [name for name in self.asked if not any(site.endswith(name) for site in there.sources)]
        if other := sorted({*self.values, *self.tables, *lost} - there.sources.keys()):
            raise ValueError(
                f"{self.path} has rows of tokens for {some(other)}, and those of {type(model).__name__} are in "
                f"{some(there.sources)}; it belongs to another model"
            )
        wanted, own = self._wanted(there), self.values.get(there.embedding)
        # When the vocabulary has grown, PEFT writes the rows of a tie twice.
        once = there.tied and wanted == {there.embedding} and own is not None
        alike = once and all(torch.equal(t, own) for t in self.values.values() if own is not None)
        if wrong := set() if alike else wanted ^ self.values.keys():
            raise ValueError(
                f"{self.path}: {FIELD} and the tensors disagree about {some(sorted(wrong))}; copy or save the "
                "folder again"
            )
        for site, rows in self.values.items():
            if (width := _matrix(modules[site]).shape[1]) != rows.shape[1]:
                raise ValueError(f"{self.path} has rows of {rows.shape[1]} numbers for {site}, which has {width}")
        placed = {site: site for site in there.sources if site in wanted}
        if there.tied and there.head is not None and there.embedding in placed:
            placed.setdefault(there.head, there.embedding)
        refuse_ends({site: modules[site] for site in placed})
        return placed

    def _wanted(self, there: Ends) -> set[str]:
        """The sites that PEFT would write for such a model."""
        if "" in self.asked:
            return {there.embedding}
        found = {site for site in there.sources if site.endswith(tuple(self.asked))}
        once = there.tied and len(found) == 2 and len({self.ids(site) for site in found}) == 1
        return {there.embedding} if once else found

    @torch.no_grad()
    def makers(self, model: nn.Module, name: str) -> dict[str, Make]:
        """Let the vocabulary grow to these rows, and return for each site what puts them there.

        Raises ValueError as `fits` and `grow` do, and for tables that are not the model's.
        """
        placed = self.fits(model)
        if not placed:
            return {}
        own = {site: _matrix(unwrapped(model)[site]) for site in self.tables}
        for site in self.tables:
            self.check_table(site, own[site])
        grow(model, self.size)
        for site, table in self.tables.items():
            _matrix(unwrapped(model)[site])[len(own[site]) :] = table[len(own[site]) :].to(own[site])
        return dict.fromkeys(placed, shared_rows(placed, self._change, name))

    def check_table(self, site: str, own: Tensor) -> None:
        """Raise ValueError when the table that lies beside the rows is not the model's, as far as that goes."""
        table = self.tables[site][: len(own)]
        if table.shape != own.shape or not torch.equal(table.to(own), own):
            raise ValueError(
                f"{self.path} holds a base weight of {site} that is not the model's; give it the base it was "
                "trained on"
            )

    def _change(self, site: str, w: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.tensor(self.ids(site), device=w.device)
        own = wide(w[index])
        return index, self.values[site].to(own) - own

    @torch.no_grad()
    def merged(self, site: str, source: str | None, old: Tensor) -> Tensor:
        """A table (m, n) or a bias (m,) as the merged model has it: grown, and with the rows of a source in it."""
        w = torch.cat([old, old.new_zeros(max(0, self.size - len(old)), *old.shape[1:])])
        if old.dim() == 2 and site in self.tables:
            self.check_table(site, old)
            w[len(old) :] = self.tables[site][len(old) :].to(w)
        if source is not None:
            w[torch.tensor(self.ids(source))] = self.values[source].to(w)
        return w


def _matrix(module: nn.Module) -> Tensor:
    return matrix(module.origin if isinstance(module, Adapted) else module).detach()


def refuse_ends(found: Mapping[str, nn.Module]) -> None:
    """Raise ValueError for embeddings or a head where no rows of tokens can train, as PEFT would have them."""
    for site, module in found.items():
        base = module.base if isinstance(module, Adapted) else module
        if why := refusal(base):
            raise ValueError(f"rows of tokens cannot train in {site}, an {type(base).__name__}: {why}")
        if kinds.bias(base) is not None:
            raise ValueError(
                f"{site} has a bias, and PEFT leaves that out while rows of tokens train there: it computes other "
                "logits than it merges; train the head whole instead (--train-also)"
            )


def split_tokens(tensors: Mapping[str, Tensor], config: PeftConfig) -> tuple[TokenRows, dict[str, Tensor]]:
    """The rows of tokens among the tensors of a file, and all others.

    Raises ValueError where the rows are not those of the config.
    """
    asked = config.tokens
    found: dict[str, dict[str, Tensor]] = {end: {} for end in (ROWS, TABLE, OLD)}
    rest = {}
    for key, tensor in tensors.items():
        end = next((end for end in found if key.endswith(end)), None)
        if end is None:
            rest[key] = tensor
        else:
            found[end][key.removesuffix(end)] = tensor
    values, tables = found[ROWS], found[TABLE]
    # The table of the other end lies there under its plain name, if it has no rows of its own.
    other = (*config.layout.names, *(f"{name}.weight" for name in config.whole))
    alike = {t.shape for t in tables.values()}
    plain = [k for k, t in rest.items() if k.endswith(".weight") and t.shape in alike and not k.endswith(other)]
    tables |= {key.removesuffix(".weight"): rest.pop(key) for key in plain}
    made = TokenRows(asked=asked, values=values, tables=tables)
    unasked = [site for site in values if not site.endswith(tuple(asked) or ("\0",))]
    if unasked or (asked and not values):
        told = {name: list(ids) for name, ids in asked.items()}
        raise ValueError(
            f"{FIELD} is {told.get('', told or None)}, and there are trained token rows for "
            f"{some(values) or 'nothing'}; config and tensors do not belong together: copy or save the folder "
            "again, or merge it with peft's merge_and_unload"
        )
    for site, rows in values.items():
        if rows.dim() != 2 or len(rows) != len(made.ids(site)):
            raise ValueError(
                f"{site}: the rows of {len(made.ids(site))} tokens are {tuple(rows.shape)}; save it again"
            )
    return made, rest


@torch.no_grad()
def written_tokens(model: nn.Module, found: Mapping[str, Adapted], kind: str, name: str) -> Tokens:
    """What a folder of PEFT's type `kind` keeps of the rows of tokens at these sites.

    Raises ValueError for a type that has none, for rows on one side of a tie, and for a head with a bias.
    """
    if not found:
        return Tokens()
    if FIELD not in TYPES[kind].fields:
        raise ValueError(
            f"PEFT's {TYPES[kind].label} has no rows of tokens beside it; use an adapter such as lora"
        )
    there, head = ends(model), str(ends(model).head)
    refuse_ends(found)
    rows = {site: found_rows for site, m in found.items() if (found_rows := rows_of(m.slot(name))) is not None}
    ids = {site: index.tolist() for site, (index, _) in rows.items()}
    once = there.tied and len({id(m.slot(name).op) for m in found.values()}) == 1 < len(found)
    if there.tied and not once and (own := ids.get(there.embedding)) == ids.get(head, own) and own:
        raise ValueError(
            f"{some(found)}: PEFT ties rows of tokens as the model ties {there.embedding} and {head}, and these "
            "are not; merge the adapter first"
        )
    kept = [there.embedding] if once else list(found)
    tensors = {}
    for site in kept:
        index, change = rows[site]
        own_rows = wide(shards.whole(_matrix(found[site]))[index])
        tensors[f"{site}{ROWS}"] = own_rows + shards.whole(change.detach()).to(own_rows)
    return Tokens(ids[kept[0]] if kept == [there.embedding] else {site: ids[site] for site in kept}, tensors)
