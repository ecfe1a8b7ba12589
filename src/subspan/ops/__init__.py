"""What a matrix is: structured matrices that know how to apply themselves."""

from subspan.ops.base import LinOp as LinOp
from subspan.ops.base import Product as Product
from subspan.ops.base import Scaled as Scaled
from subspan.ops.base import Sum as Sum
from subspan.ops.base import Transposed as Transposed
from subspan.ops.basic import Dense as Dense
from subspan.ops.basic import Diag as Diag
from subspan.ops.basic import LowRank as LowRank
from subspan.ops.layer import OpLinear as OpLinear
