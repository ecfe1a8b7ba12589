"""Low-rank training, adaptation, inspection and compression of PyTorch models."""

from subspan.budget import Energy as Energy
from subspan.budget import Err as Err
from subspan.budget import Ratio as Ratio
from subspan.budget import Uniform as Uniform
from subspan.budget import WeLore as WeLore
from subspan.compress import Compression as Compression
from subspan.compress import Study as Study
from subspan.compress import study as study
from subspan.edit import Edit as Edit
from subspan.edit import sites as sites
from subspan.methods import build as build
from subspan.metric import AbsMean as AbsMean
from subspan.metric import Gram as Gram
from subspan.metric import Metric as Metric
from subspan.metric import Plain as Plain
from subspan.optim import Optim as Optim
from subspan.plan import Plan as Plan
