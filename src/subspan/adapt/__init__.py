"""Adapters: an op, a join and a start, put on a frozen layer."""

from subspan.adapt.init import FromWeight as FromWeight
from subspan.adapt.init import ZeroLowRank as ZeroLowRank
from subspan.adapt.join import Add as Add
from subspan.adapt.join import Join as Join
from subspan.adapt.join import Layer as Layer
from subspan.adapt.join import Rescale as Rescale
from subspan.adapt.join import per_rank as per_rank
from subspan.adapt.join import row_norms as row_norms
from subspan.adapt.layer import Adapted as Adapted
from subspan.adapt.layer import Adapter as Adapter
from subspan.adapt.layer import Base as Base
from subspan.adapt.layer import Folded as Folded
from subspan.adapt.layer import KeepBase as KeepBase
from subspan.adapt.layer import Slot as Slot
from subspan.adapt.layer import SubtractInit as SubtractInit
from subspan.adapt.layer import adapt as adapt
from subspan.adapt.layer import merge as merge
from subspan.adapt.layer import trainable as trainable
