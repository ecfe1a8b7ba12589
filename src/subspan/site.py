"""Which weights are matrices, and how: for each kind of layer its matrix, its inputs, and what takes its place.

Kinds are told by the type of the layer, never by that of the model. What is compressed is a matrix w (m, n),
such that a layer does y = w x + bias to each of its inputs x.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from subspan.ops import LinOp, OpConv, OpEmbedding, OpLayer, OpLinear
from subspan.ops.experts import Stacked, transposed
from subspan.ops.layer import Window, filled

# Not imported: a model of transformers that has these layers has imported it.
TRANSFORMERS = "transformers.pytorch_utils"


class Expert(nn.Module):
    """One matrix of a 3-D parameter (experts, m, n) of a module, seen as a layer; it holds nothing itself."""

    bias: None = None

    def __init__(self, owner: nn.Module, key: str, index: int) -> None:
        super().__init__()
        # In a tuple, so that the owner is no part of its part.
        self._place = (owner, key, index)

    @property
    def owner(self) -> nn.Module:
        """The module that keeps the parameter."""
        return self._place[0]

    @property
    def key(self) -> str:
        """The parameter's name there."""
        return self._place[1]

    @property
    def index(self) -> int:
        """Which of the experts."""
        return self._place[2]

    @property
    def weight(self) -> Tensor:
        """Its matrix (m, n), a view of the parameter."""
        return matrix(self)


class OpConv1D(OpLinear):
    """What stands where a `Conv1D` of transformers stood, whose weight is (in, out)."""

    def plain(self, weight: Tensor) -> nn.Module:
        """A `Conv1D`; raises RuntimeError when transformers is not loaded."""
        kind = conv1d()
        if kind is None:
            raise RuntimeError(f"{TRANSFORMERS} is not loaded, so there is no Conv1D; import transformers first")
        made = kind(self.out_features, self.in_features)
        return filled(made, weight.mT, self.bias)


class Kind(ABC):
    """How a layer's parameter is a matrix."""

    label: ClassVar[str]
    usual: ClassVar[bool] = True
    """Whether layers of this kind are taken without being named."""
    biased: ClassVar[bool] = True
    """Whether a layer can have a bias, or gain one."""
    called: ClassVar[bool] = True
    """Whether what reaches a layer and what leaves it pass through a module of its own."""

    @abstractmethod
    def holds(self, module: nn.Module) -> bool:
        """Whether a layer is of this kind."""

    def parameter(self, module: nn.Module) -> nn.Parameter:
        """The parameter that holds the matrix."""
        return module.get_parameter("weight")

    def view(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """The matrix (m, n) in a tensor of the parameter's shape: its value, or its gradient."""
        return tensor

    def kept(self, module: nn.Module, w: Tensor) -> Tensor:
        """A matrix (m, n) in the parameter's shape: what `view` undoes."""
        return w.reshape(self.parameter(module).shape)

    def rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """The inputs (tokens, n) that a layer is given by x."""
        return x.reshape(-1, x.shape[-1])

    def alike(self, module: nn.Module) -> object:
        """Layers with an equal value make the same rows of the same x."""
        return ()

    def outputs(self, module: nn.Module, y: Tensor) -> Tensor:
        """The outputs (tokens, m), in a layer's output or its gradient."""
        return y.reshape(-1, y.shape[-1])

    def refusal(self, module: nn.Module) -> str:
        """Why a layer cannot be compressed; empty when it can."""
        return ""

    def blind(self, module: nn.Module) -> str:
        """Why a layer has no inputs to weigh; empty when it has."""
        return ""

    def rebuild(self, module: nn.Module, op: LinOp, bias: Tensor | None) -> OpLayer:
        """The layer that takes a layer's place, with an op for its matrix."""
        return OpLinear(op, bias)


class LinearKind(Kind):
    """`nn.Linear`: its weight is the matrix."""

    label = "nn.Linear"

    def holds(self, module: nn.Module) -> bool:
        """Any `nn.Linear`."""
        return isinstance(module, nn.Linear)


class Conv1DKind(Kind):
    """transformers' `Conv1D`, a linear layer whose weight is the matrix transposed."""

    label = "Conv1D"

    def holds(self, module: nn.Module) -> bool:
        """Any `Conv1D`."""
        kind = conv1d()
        return kind is not None and isinstance(module, kind)

    def view(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """The transpose."""
        return tensor.mT

    def kept(self, module: nn.Module, w: Tensor) -> Tensor:
        """The transpose again."""
        return w.mT

    def rebuild(self, module: nn.Module, op: LinOp, bias: Tensor | None) -> OpLayer:
        """A linear layer that knows which one it stands for."""
        return OpConv1D(op, bias)


class ConvKind(Kind):
    """Convolutions: the matrix (out, channels * kernel) multiplies each patch of the input."""

    label = "convolution"
    usual = False

    def holds(self, module: nn.Module) -> bool:
        """`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`, with their own forward."""
        return any(isinstance(module, k) and type(module).forward is k.forward for k in CONVOLUTIONS)

    def view(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """Channels and kernel in one axis."""
        return tensor.flatten(1)

    def rows(self, module: nn.Module, x: Tensor) -> Tensor:
        """The patches."""
        return _window(module).rows(x)

    def alike(self, module: nn.Module) -> object:
        """The window."""
        return _window(module)

    def outputs(self, module: nn.Module, y: Tensor) -> Tensor:
        """Every place of the image is a token."""
        channels = y.movedim(-1 - len(_window(module).kernel), -1)
        return channels.reshape(-1, channels.shape[-1])

    def refusal(self, module: nn.Module) -> str:
        """One with groups is several matrices."""
        groups = module.groups
        return "" if groups == 1 else f"is a convolution in {groups} groups, which is no one matrix"

    def rebuild(self, module: nn.Module, op: LinOp, bias: Tensor | None) -> OpLayer:
        """A convolution with an op."""
        return OpConv(op, bias, window=_window(module))


class EmbeddingKind(Kind):
    """`nn.Embedding`: the matrix is the table (vocabulary, width), whose rows are looked up."""

    label = "nn.Embedding"
    usual = False
    biased = False

    def holds(self, module: nn.Module) -> bool:
        """`nn.Embedding` with its own forward."""
        return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward

    def refusal(self, module: nn.Module) -> str:
        """One that rescales its rows cannot be a product."""
        return "" if module.max_norm is None else "rescales its rows to max_norm as it looks them up"

    def blind(self, module: nn.Module) -> str:
        """It is given numbers of rows."""
        return "is an embedding, which has no inputs to weigh"

    def rebuild(self, module: nn.Module, op: LinOp, bias: Tensor | None) -> OpLayer:
        """A table with an op."""
        index = module.padding_idx
        return OpEmbedding(op, padding_idx=index if isinstance(index, int) else None)


class ExpertKind(Kind):
    """One expert of a 3-D parameter: a slice of it, transposed where the module says so."""

    label = "expert"
    biased = False
    called = False

    def holds(self, module: nn.Module) -> bool:
        """Only `Expert`."""
        return isinstance(module, Expert)

    def parameter(self, module: nn.Module) -> nn.Parameter:
        """That of all experts together."""
        return _expert(module).owner.get_parameter(_expert(module).key)

    def view(self, module: nn.Module, tensor: Tensor) -> Tensor:
        """The slice."""
        part = tensor[_expert(module).index]
        return part.mT if transposed(_expert(module).owner) else part

    def kept(self, module: nn.Module, w: Tensor) -> Tensor:
        """As the slice lies."""
        return w.mT if transposed(_expert(module).owner) else w


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS: list[Kind] = [LinearKind(), Conv1DKind(), ConvKind(), EmbeddingKind(), ExpertKind()]
_OTHER = LinearKind()


def conv1d() -> type[nn.Module] | None:
    """The `Conv1D` of transformers, if that is loaded."""
    loaded: Any = sys.modules.get(TRANSFORMERS)
    return None if loaded is None else loaded.Conv1D


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of a layer, None for one that is no matrix.

    >>> kind_of(nn.Linear(2, 2)).label, kind_of(nn.ReLU())
    ('nn.Linear', None)
    """
    return next((kind for kind in KINDS if kind.holds(module)), None)


def of(module: nn.Module) -> Kind:
    """The kind of a layer; one of no known kind is taken for a linear layer."""
    return kind_of(module) or _OTHER


def parameter(module: nn.Module) -> nn.Parameter:
    """The parameter that holds a layer's matrix."""
    return of(module).parameter(module)


def matrix(module: nn.Module) -> Tensor:
    """A layer's matrix w (m, n), in the parameter's own memory.

    >>> matrix(nn.Conv2d(3, 4, 2)).shape
    torch.Size([4, 12])
    """
    kind = of(module)
    return kind.view(module, kind.parameter(module))


def bias(module: nn.Module) -> nn.Parameter | None:
    """A layer's own bias, if it has one."""
    return dict(module.named_parameters(recurse=False)).get("bias")


def sites_of(name: str, module: nn.Module) -> dict[str, nn.Module]:
    """What a module is or keeps that is a matrix, by name: itself, or experts such as `experts.3.up_proj`.

    Experts are the slices of a 3-D parameter of a module that says `num_experts`, and of no layer of torch.
    """
    if kind_of(module) is not None:
        return {name: module}
    count = vars(module).get("num_experts")
    keys = [
        key for key, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and p.shape[0] == count and min(p.shape[1:]) > 1 and p.is_floating_point()
    ]  # fmt: skip
    prefix = f"{name}." if name else ""
    free = isinstance(module, Stacked) or not any(child.isdigit() for child, _ in module.named_children())
    return {f"{prefix}{i}.{key}": Expert(module, key, i) for key in keys for i in range(count or 0) if free}


def require_inputs(sites: Mapping[str, nn.Module], what: object) -> None:
    """Raise ValueError for a site whose inputs cannot be seen, naming the measure that wants them."""
    for name, module in sites.items():
        if why := of(module).blind(module):
            raise ValueError(
                f"{name} {why}, and {what!r} is read off inputs; leave it out with '!{name}', or compress it "
                "apart with the metric plain"
            )


def require_calls(sites: Mapping[str, nn.Module], what: object) -> None:
    """Raise ValueError for a site whose outputs cannot be seen, naming the importance that wants them."""
    for name, module in sites.items():
        if not of(module).called:
            raise ValueError(
                f"{name} is one expert of a 3-D parameter, whose outputs pass through no module, and {what!r} is "
                f"read off outputs; leave it out with '!{name}', or choose another budget"
            )


def require_matrices(sites: Mapping[str, nn.Module], *, grouped: Literal["refuse", "take"] = "refuse") -> None:
    """Raise ValueError for a site that cannot be compressed; grouped="take" lets convolutions in groups pass."""
    for name, module in sites.items():
        if grouped == "take" and isinstance(module, CONVOLUTIONS):
            continue
        if why := of(module).refusal(module):
            raise ValueError(f"{name} {why}; leave it out with '!{name}'")


def experts_of(sites: Mapping[str, nn.Module]) -> Iterator[tuple[str, Expert]]:
    """Those sites that are experts."""
    for name, module in sites.items():
        if isinstance(module, Expert):
            yield name, module


def _window(module: nn.Module) -> Window:
    if not isinstance(module, CONVOLUTIONS):
        raise TypeError(f"{type(module).__name__} is no convolution, so it has no window")
    return Window.of(module)


def _expert(module: nn.Module) -> Expert:
    if not isinstance(module, Expert):
        raise TypeError(f"{type(module).__name__} is no expert of a 3-D parameter")
    return module
