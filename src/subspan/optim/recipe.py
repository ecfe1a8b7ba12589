"""`Recipe`: a rule, where its gradients come from, and which parameters move."""

from __future__ import annotations

from dataclasses import dataclass

from subspan.optim.awake import All, Awake
from subspan.optim.rule import Rule
from subspan.optim.rules import Adam
from subspan.optim.source import Backprop, Source


@dataclass(frozen=True, slots=True)
class Recipe:
    """What `Optim` takes in place of a plain rule; `other` steps what `where` does not select.

    >>> Recipe(Adam()).source, Recipe(Adam()).awake
    (Backprop(), All())
    """

    rule: Rule
    source: Source = Backprop()
    awake: Awake = All()
    other: Rule = Adam()


def unpacked(rule: Rule | Recipe, other: Rule | None) -> Recipe:
    """The recipe that `Optim(rule, other=other)` names: a given `other` wins over the recipe's."""
    recipe = rule if isinstance(rule, Recipe) else Recipe(rule)
    return recipe if other is None else Recipe(recipe.rule, recipe.source, recipe.awake, other)
