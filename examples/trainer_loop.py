"""LoRA+ in the Trainer of transformers: a run that is saved half way and resumed elsewhere ends equal."""

import tempfile
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

from subspan import build
from subspan.adapt import adapt, trainable
from subspan.edit import edit
from subspan.hosts.transformers import optimizer_factory

TEXT = torch.tensor(list("\n\n".join(topics.values()).encode()))
WINDOW, STEPS, HALF = 32, 150, 80
WINDOWS = TEXT[: len(TEXT) // WINDOW * WINDOW].reshape(-1, WINDOW)
DATA = [{"input_ids": ids, "labels": ids} for ids in WINDOWS]


def adapted() -> nn.Module:
    """A small model that stays as it is, and an adapter on each of its layers and on the head."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=WINDOW, bos_token_id=None, eos_token_id=None,
        tie_word_embeddings=False,
    ))  # fmt: skip
    model.requires_grad_(False)
    edit(model, "*_proj|lm_head", adapt(build("lora_plus", rank=16, alpha=16.0)))
    return model


def trainer(folder: str) -> Trainer:
    """A run from the start, which saves itself half way."""
    args = TrainingArguments(
        folder, learning_rate=3e-3, max_steps=STEPS, save_steps=HALF, logging_steps=1, use_cpu=True, seed=0,
        per_device_train_batch_size=16, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    made: Any = optimizer_factory("lora_plus", args, rank=16, alpha=16.0)
    run = Trainer(adapted(), args, train_dataset=DATA, optimizer_cls_and_kwargs=made)
    run.remove_callback(PrinterCallback)
    return run


def main() -> tuple[nn.Module, nn.Module, list[float]]:
    """Train once without and once with an interruption; returns both models and the losses of the first."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        whole = trainer(one)
        whole.train()
        resumed = trainer(two)
        resumed.train(resume_from_checkpoint=f"{one}/checkpoint-{HALF}")
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    numbers = sum(p.numel() for _, p in trainable(whole.model))
    print(f"{numbers} numbers, {STEPS} steps of LoRA+: loss {losses[0]:.3f} -> {sum(losses[-20:]) / 20:.3f}")
    return whole.model, resumed.model, losses


if __name__ == "__main__":
    first, second = main()[:2]
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    print(f"resumed run equals: {all(torch.equal(p, q) for p, q in pairs)}")
