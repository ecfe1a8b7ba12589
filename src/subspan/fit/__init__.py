"""How a matrix becomes a structured one."""

from subspan.fit.base import Fit as Fit
from subspan.fit.combine import Stack as Stack
from subspan.fit.combine import stack as stack
from subspan.fit.svd import Decomposition as Decomposition
from subspan.fit.svd import Svd as Svd
from subspan.fit.svd import decompose as decompose
