"""The model that is trained: frozen base weights, loaded once, with one LoRA adapter on top.

Owns everything that touches transformers and peft: attaching, saving, log-probabilities of sampled
tokens. The output head runs on trained positions only. Losses and optimizers are the learner's.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from policy.types import Probe
from trainer.batch import Microbatch

HEAD_ELEMENTS = 2**26
"""Most logits that are held at once; beyond it the head is recomputed in the backward pass."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model says of the trained tokens of a microbatch, at their own temperature."""

    logprobs: Tensor
    """Float32 [N], nats."""
    entropy: Tensor
    """Float32 [N], nats, without gradient."""


class LoraModel:
    """One base model and, between `attach` and `detach`, one trainable adapter."""

    def __init__(self, path: str | Path, *, device: str = "cpu", dtype: str = "auto") -> None:
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        self._base: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa"
        ).to(device)
        self._base.requires_grad_(False).eval()
        self._device = device
        self._peft: Any = None

    @property
    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and weights that are trained, in a fixed order."""
        return [(n, p) for n, p in self._attached.named_parameters() if p.requires_grad]

    def attach(self, *, rank: int, alpha: int, seed: int, start: Path | None) -> None:
        """Put an adapter on all linear layers: that of folder `start`, or one without effect.

        A folder keeps the rank that it has: weights cannot be carried over to another one.
        """
        self.detach()
        if start is None:
            config = LoraConfig(
                r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none",
                target_modules="all-linear", task_type="CAUSAL_LM",
            )  # fmt: skip
        else:
            config = LoraConfig.from_pretrained(start)
            config.inference_mode = False
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._peft = get_peft_model(self._base, config)
        if start is not None:
            weights = load_peft_weights(str(start), device=self._device)
            outcome = set_peft_model_state_dict(self._peft, weights)
            if outcome.unexpected_keys:
                raise ValueError(
                    f"adapter {str(start)!r} has weights that the base model has no place for, "
                    f"such as {outcome.unexpected_keys[0]!r}; was it trained on another base?"
                )
        self._peft.eval()

    def detach(self) -> None:
        """Take the adapter off again; the base weights were never touched."""
        if self._peft is not None:
            self._base = self._peft.unload()
            self._base.requires_grad_(False)
            self._peft = None

    def save(self, folder: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` as peft does."""
        self._attached.save_pretrained(str(folder))

    def logprobs(self, batch: Microbatch) -> TokenLogprobs:
        """log p of every trained token, given all before it in its row."""
        causal = self._attached.base_model.model
        hidden = causal.base_model(
            input_ids=batch.input_ids.to(self._device), use_cache=False
        ).last_hidden_state
        picked = hidden[batch.row.to(self._device), batch.context.to(self._device)]
        head = causal.get_output_embeddings()
        targets, temperature = batch.targets.to(self._device), batch.temperature.to(self._device)
        size = max(1, HEAD_ELEMENTS // head.weight.shape[0])
        if len(picked) <= size:
            return TokenLogprobs(*_score(head, picked, targets, temperature))
        pieces = [
            checkpoint(_score, head, *parts, use_reentrant=False)
            for parts in zip(
                torch.split(picked, size),
                torch.split(targets, size),
                torch.split(temperature, size),
                strict=True,
            )
        ]
        return TokenLogprobs(
            torch.cat([logprobs for logprobs, _ in pieces]),
            torch.cat([entropy for _, entropy in pieces]),
        )

    @torch.no_grad()
    def base_logprobs(self, batch: Microbatch) -> Tensor:
        """log p of every trained token under the base model: the adapter is switched off. [N]."""
        with self._attached.disable_adapter():
            return self.logprobs(batch).logprobs

    def probe(self, token_ids: list[int]) -> Probe:
        """What the adapter, and the base without it, say of a token sequence at temperature 1."""
        return Probe(
            tuple(token_ids),
            tuple(self._sequence_logprobs(token_ids, with_adapter=True)),
            tuple(self._sequence_logprobs(token_ids, with_adapter=False)),
        )

    @property
    def _attached(self) -> Any:
        if self._peft is None:
            raise RuntimeError("no adapter is attached; call attach() first")
        return self._peft

    @torch.no_grad()
    def _sequence_logprobs(self, token_ids: list[int], *, with_adapter: bool) -> list[float]:
        peft: PeftModel = self._attached
        ids = torch.tensor([token_ids], device=self._device)
        with nullcontext() if with_adapter else peft.disable_adapter():
            logits = peft(input_ids=ids[:, :-1], use_cache=False).logits[0].float()
        logprobs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])
        return [float(value) for value in logprobs[:, 0]]


def _score(
    head: torch.nn.Module, hidden: Tensor, targets: Tensor, temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """log softmax(head(hidden) / T)[target] and the entropy: [N, H] -> [N], [N]."""
    logits = head(hidden).float() / temperature[:, None]
    every = logits.log_softmax(-1)
    detached = every.detach()
    entropy = -(detached.exp() * detached).sum(-1)
    return every.gather(-1, targets[:, None])[:, 0], entropy
