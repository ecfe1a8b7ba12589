"""The vocabulary of a language model: where its tokens are read in and scored, and how it grows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken
from torch import Tensor, nn

from subspan.adapt import Adapted
from subspan.adapt.layers import matrix
from subspan.hosts.peft_write import unwrapped
from subspan.hosts.text import encode
from subspan.hosts.transformers import LoadedModel


class Ends(NamedTuple):
    """The names of the embeddings and of the head, None where there is none, and whether both are one table."""

    embedding: str
    head: str | None
    tied: bool

    @property
    def sources(self) -> dict[str, str]:
        """Both names, each with that of the module whose rows it has: the embeddings, for a head tied to them."""
        found = {self.embedding: self.embedding}
        return found if self.head is None else found | {self.head: self.embedding if self.tied else self.head}


def ends(model: nn.Module) -> Ends:
    """Where a model's tokens are read in and scored; raises ValueError for one that does not say it.

    >>> from transformers import LlamaConfig, LlamaModel
    >>> ends(LlamaModel(LlamaConfig(vocab_size=8, hidden_size=4, num_hidden_layers=0, num_attention_heads=1)))
    Ends(embedding='embed_tokens', head=None, tied=False)
    """
    modules = unwrapped(model)
    inner: Any = modules[""]
    found = [get() for side in ("in", "out") if (get := getattr(inner, f"get_{side}put_embeddings", None))]
    names = [next((name for name, m in modules.items() if m is one), None) for one in found if one is not None]
    if not names or None in names:
        raise ValueError(
            f"{type(inner).__name__} does not say where its tokens are read in (get_input_embeddings), so their "
            "rows cannot be found; give a language model of transformers"
        )
    head = names[1] if len(names) > 1 else None
    tables = [_table(modules[name]) for name in names if name is not None]
    return Ends(str(names[0]), head, head is not None and _same(tables[0], tables[1]))


def _table(module: nn.Module) -> Tensor | None:
    base = module.base if isinstance(module, Adapted) else module
    return base.weight if isinstance(base, nn.Linear | nn.Embedding) else None


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None or one.shape != two.shape:
        return False
    # An adapted layer may be a double over the same memory.
    return one is two or (not one.is_meta and one.data_ptr() == two.data_ptr())


def rows_in(model: nn.Module) -> int:
    """How many rows the embeddings have."""
    module = unwrapped(model)[ends(model).embedding]
    return len(matrix(module.base if isinstance(module, Adapted) else module))


@torch.no_grad()
def grow(model: nn.Module, size: int) -> int:
    """Give embeddings and head `size` rows, in place, if they have fewer; returns how many are new, and zero.

    Ties stay, and the config says the new size. Raises ValueError for tables that carry an adapter, that are
    compressed, and of two sizes.
    """
    there, old = ends(model), rows_in(model)
    if size <= old:
        return 0
    inner: Any = unwrapped(model)[""]
    modules = {name: inner.get_submodule(name) for name in there.sources}
    for name, module in modules.items():
        if not isinstance(module, nn.Linear | nn.Embedding) or len(module.weight) != old:
            what = "carries an adapter" if isinstance(module, Adapted) else f"is an {type(module).__name__}"
            has = f"has {len(module.weight)} rows" if isinstance(module, nn.Linear) else what
            raise ValueError(
                f"the vocabulary has {old} rows and needs {size}, but {name} {has}; only plain embeddings and "
                "heads of one size grow: use the dense model, without adapters there"
            )
    modes = {name: module.training for name, module in modules.items()}
    with torch.random.fork_rng(devices=[]):
        inner.resize_token_embeddings(size, mean_resizing=False)
    for name, mode in modes.items():
        for parameter in inner.get_submodule(name).train(mode).parameters():
            parameter[old:] = 0
    return size - old


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a tokenizer got: themselves, their ids, and the ids that each was written as before.

    `grown` is how many rows the vocabulary had to grow by.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    grown: int

    @property
    def start(self) -> Mapping[int, tuple[int, ...]]:
        """Id -> the ids whose mean row it starts as: `train_tokens` takes it."""
        return dict(zip(self.ids, self.pieces, strict=True))


def add_tokens(loaded: LoadedModel, tokens: Sequence[str]) -> tuple[LoadedModel, NewTokens]:
    """Add special tokens to a model's vocabulary; returns the model with a tokenizer that knows them.

    The tokenizer given stays as it is. The model grows in place, where its tables have no rows to spare. A row is
    to start as the mean of the rows of the pieces that the token was written as before: this says what is meant,
    tells two new tokens apart, and makes none likelier than its pieces are on average, as exp of a mean is at most
    the mean of exp. Raises ValueError for a token that is empty, listed twice or known already, for a tokenizer
    that does not find it in text, and what `grow` raises.
    """
    if not tokens:
        raise ValueError("no new token was named; give at least one, such as '<think>'")
    words, known = copy.deepcopy(loaded.tokenizer), loaded.tokenizer.get_vocab()
    for place, token in enumerate(tokens):
        if not token.strip():
            raise ValueError(f"new token {place + 1} of {list(tokens)} is empty; name each, such as '<think>'")
        if token in tokens[:place]:
            raise ValueError(f"new token {token!r} is listed twice; name each once")
        if token in known:
            raise ValueError(
                f"{token!r} is already a token (its id is {known[token]}), and its row is trained; leave it out"
            )
    pieces = tuple(tuple(encode(loaded.tokenizer, token).tolist()) for token in tokens)
    words.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
    ids = tuple(int(words.convert_tokens_to_ids(token)) for token in tokens)
    for token, one in zip(tokens, ids, strict=True):
        if encode(words, f"a{token}b").tolist().count(one) != 1 or one in known.values():
            raise ValueError(f"{type(words).__name__} does not find {token!r} in text; choose another token")
    # Without pieces, the mean of all rows is the next best.
    usual = tuple(range(min(len(known), rows_in(loaded.model))))
    grown = grow(loaded.model, max(ids) + 1)
    new = NewTokens(tuple(tokens), ids, tuple(one or usual for one in pieces), grown)
    return replace(loaded, tokenizer=words), new
