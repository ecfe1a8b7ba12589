"""PEFT's adapters other than LoRA on layers that are no `nn.Linear`: where they are what ours are."""

from __future__ import annotations

from torch import nn

from subspan import site
from subspan.adapt.layers import Table, use_of
from subspan.ops import OpLayer

LABELS = {
    "LOHA": "LoHa", "LOKR": "LoKr", "OFT": "OFT", "SHIRA": "SHiRA", "VERA": "VeRA", "RANDLORA": "RandLoRA",
    "ADALORA": "AdaLoRA",
}  # fmt: skip
# Those that PEFT puts on the Conv1D of transformers.
TURNED = frozenset({"VERA", "RANDLORA", "ADALORA"})


def unlike_on(kind: str, layer: nn.Module) -> str:
    """Why PEFT has no adapter of a type on a layer, or another than ours; empty where it is the same.

    >>> unlike_on("LOHA", nn.Conv2d(2, 4, 3)), unlike_on("VERA", nn.Conv2d(2, 4, 3)).partition(",")[0]
    ('', 'is a convolution of 2 axes')
    """
    use, label = use_of(layer), LABELS[kind]
    if use is None:
        turned = site.kind_of(layer) is not None and not isinstance(layer, nn.Linear | OpLayer)
        lacks = turned and kind not in TURNED
        return f"is a {type(layer).__name__}, on which PEFT has no {label}" if lacks else ""
    if isinstance(use, Table):
        return f"is an embedding, and PEFT's {label} is not read or written for one"
    window = use.window
    axes, whole = len(window.kernel), window.groups == 1
    if kind == "OFT" and axes == 2 and any(k > 1 for k in window.kernel):
        return (
            "is a convolution, whose overlapping patches PEFT's OFT turns and adds up again: that is no change of "
            "the weight, and not what it merges"
        )
    if (kind == "LOHA" and axes < 3) or (kind in ("OFT", "ADALORA") and axes == 2 and whole):
        return ""
    return f"is a convolution of {axes} axes, and PEFT's {label} is not read or written for one"
