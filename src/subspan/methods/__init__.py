"""Published methods: each a few lines over the parts, with its citation."""

from subspan.methods import adapters as adapters
from subspan.methods import compression as compression
from subspan.methods import healing as healing
from subspan.methods import optimizers as optimizers
from subspan.methods.registry import Method as Method
from subspan.methods.registry import build as build
from subspan.methods.registry import find as find
from subspan.methods.registry import method as method
from subspan.methods.registry import methods as methods
