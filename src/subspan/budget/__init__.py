"""Sizes to ranks: one rank for every site, from what is known of them and one target for the whole model."""

from subspan.budget.base import Budget as Budget
from subspan.budget.base import Evidence as Evidence
from subspan.budget.base import Informed as Informed
from subspan.budget.base import Scores as Scores
from subspan.budget.base import Spectra as Spectra
from subspan.budget.blocks import BlockInfluence as BlockInfluence
from subspan.budget.blocks import Owl as Owl
from subspan.budget.leastloss import LeastLoss as LeastLoss
from subspan.budget.spectral import Energy as Energy
from subspan.budget.spectral import Uniform as Uniform
from subspan.budget.spectral import WeLore as WeLore
from subspan.budget.spectral import normalised as normalised
from subspan.budget.target import Bytes as Bytes
from subspan.budget.target import Err as Err
from subspan.budget.target import Ranks as Ranks
from subspan.budget.target import Ratio as Ratio
from subspan.budget.target import Target as Target
from subspan.budget.target import bisect as bisect
