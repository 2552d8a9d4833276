"""Supervised training of the pocket policy on demonstrated dialogues.

One process, no checkpoints: a run takes minutes. What the corpus holds is `corpus`'s business, how
good the result is, `measure`'s. Two choices made copying appear in a fifth of the tokens that plain
AdamW on the assistant's words alone took: Muon for the matrices, and a little loss on all text.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from examples.desk.recipe.corpus import Dialogue

PADDING = 0
"""The id of `<|endoftext|>`, which stands nowhere in the corpus."""


def batches(dialogues: Sequence[Dialogue], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of like length: (ids_BT, said_BT), padded at the right."""
    ordered = sorted(dialogues, key=lambda d: len(d.ids))
    chunks = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    for index in torch.randperm(len(chunks)).tolist():
        chunk = chunks[index]
        width = max(len(d.ids) for d in chunk)
        ids = torch.zeros(len(chunk), width, dtype=torch.long)
        said = torch.zeros(len(chunk), width, dtype=torch.bool)
        for row, dialogue in enumerate(chunk):
            ids[row, : len(dialogue.ids)] = torch.tensor(dialogue.ids)
            said[row, : len(dialogue.said)] = torch.tensor(dialogue.said)
        yield ids, said


def weighted_loss(model: Any, ids_BT: Tensor, said_BT: Tensor, heard: float) -> Tensor:
    """Mean cross-entropy, nats: weight 1 for the assistant's words, `heard` for all other text."""
    hidden_BTD = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    target_BT = ids_BT[:, 1:]
    weight_BT = torch.where(said_BT[:, 1:], 1.0, heard).masked_fill(target_BT == PADDING, 0.0)
    kept = weight_BT > 0
    logits = model.lm_head(hidden_BTD[kept]).float()
    nats = nn.functional.cross_entropy(logits, target_BT[kept], reduction="none")
    return (nats * weight_BT[kept]).sum() / weight_BT.sum()


def learning_rate(step: int, steps: int, peak: float, *, warm_up: int = 50) -> float:
    """Linear warm-up, then a cosine down to 2% of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: Any, dialogues: Sequence[Dialogue], *, size: int, peak: float, heard: float = 0.3
) -> None:
    """Train in place for one epoch under bf16 autocast; `peak` is the learning rate's."""
    optimizers = _optimizers(model, peak)
    steps = math.ceil(len(dialogues) / size)
    recent, tokens, started = 0.0, 0, time.monotonic()
    model.train()
    for step, (ids, said) in enumerate(batches(dialogues, size)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = weighted_loss(model, ids, said, heard)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent, tokens = recent + loss.item(), tokens + ids.numel()
        if (step + 1) % 100 == 0:
            rate = tokens / (time.monotonic() - started)
            print(
                f"step {step + 1}/{steps}  loss {recent / 100:.4f}  {rate:,.0f} tokens/s",
                flush=True,
            )
            recent = 0.0
    model.eval()


def _optimizers(model: Any, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for the embedding, the biases and the norms."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (hidden if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return [
        torch.optim.Muon(hidden, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]
