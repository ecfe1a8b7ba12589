"""What a matrix is: structured matrices that know how to apply themselves."""

from subspan.ops.base import LinOp as LinOp
from subspan.ops.base import Product as Product
from subspan.ops.base import Scaled as Scaled
from subspan.ops.base import Sum as Sum
from subspan.ops.base import Transposed as Transposed
from subspan.ops.basic import Dense as Dense
from subspan.ops.basic import Diag as Diag
from subspan.ops.basic import LowRank as LowRank
from subspan.ops.basic import factors as factors
from subspan.ops.layer import OpConv as OpConv
from subspan.ops.layer import OpEmbedding as OpEmbedding
from subspan.ops.layer import OpLayer as OpLayer
from subspan.ops.layer import OpLinear as OpLinear
from subspan.ops.quantized import Quantized as Quantized
from subspan.ops.quantized import quantize as quantize
from subspan.ops.shards import Shards as Shards
from subspan.ops.structured import BlockCayley as BlockCayley
from subspan.ops.structured import Columns as Columns
from subspan.ops.structured import Entries as Entries
from subspan.ops.structured import Hadamard as Hadamard
from subspan.ops.structured import Kron as Kron
from subspan.ops.structured import Seeded as Seeded
from subspan.ops.structured import Stacked as Stacked
from subspan.ops.structured import Zero as Zero
