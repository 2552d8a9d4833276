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

from policy.types import Probe
from trainer.base_weights import load_base
from trainer.batch import Microbatch
from trainer.frozen import combination
from trainer.lora_product import fuse
from trainer.shared_attention import IMPLEMENTATION, can_share

HEAD_ELEMENTS = 2**23
"""Most logits that are held at once."""


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model says of the trained tokens of a microbatch, at their own temperature."""

    logprobs: Tensor
    """Float32 [N], nats."""
    entropy: Tensor
    """Float32 [N], nats, without gradient."""
    hidden: Tensor
    """[N, H]: the last layer's output that each is predicted from, without gradient."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """An adapter and its base model at the trained tokens of a microbatch, at their temperature.

    Divergence and entropies are over the whole vocabulary, so that they are exact at each context.
    """

    logprobs: Tensor
    """Float32 [N], nats: the adapter's, of the sampled tokens."""
    kl_base: Tensor
    """Float32 [N], nats: KL(adapter || base)."""
    entropy: Tensor
    """Float32 [N], nats: the adapter's."""
    base_entropy: Tensor
    """Float32 [N], nats."""


class LoraModel:
    """One base model and, between `attach` and `detach`, one trainable adapter."""

    def __init__(
        self, path: str | Path, *, device: str = "cpu", dtype: str = "auto", borrow: bool = True
    ) -> None:
        self._base: Any = load_base(path, device=device, dtype=dtype, borrow=borrow)
        self.shares_prefixes = can_share(self._base)
        if self.shares_prefixes:
            self._base.set_attn_implementation(IMPLEMENTATION)
        self._device = device
        self._peft: Any = None

    @property
    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and weights that are trained, in a fixed order."""
        return [(n, p) for n, p in self._attached.named_parameters() if p.requires_grad]

    @property
    def hidden_size(self) -> int:
        """H: how wide the last layer's output is."""
        return int(self._base.get_output_embeddings().weight.shape[1])

    @property
    def device(self) -> str:
        return self._device

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
        if any(p.requires_grad for p in self._peft.get_output_embeddings().parameters()):
            self.detach()
            raise ValueError(
                f"adapter {str(start)!r} changes the output head, expected one that leaves it as "
                "it is: its gradient is not computed; train one on the linear layers below"
            )
        self._peft.eval()
        fuse(self._peft)

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
        picked, head = self._hidden(batch), self._head
        targets, temperature = batch.targets.to(self._device), batch.temperature.to(self._device)
        size = max(1, HEAD_ELEMENTS // head.weight.shape[0])
        score: Any = _Score.apply
        pieces = [
            score(head, *parts)
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
            picked.detach(),
        )

    def _hidden(self, batch: Microbatch) -> Tensor:
        """The last layer's output that each trained token is predicted from, [N, H]."""
        decoder = self._attached.base_model.model.base_model
        if batch.prefixes is None:
            ids = batch.input_ids.to(self._device)
            hidden: Tensor = decoder(input_ids=ids, use_cache=False).last_hidden_state
            return hidden[batch.row.to(self._device), batch.context.to(self._device)]
        prefixes = batch.prefixes.to(self._device)
        hidden = decoder(
            input_ids=prefixes.token_ids[None],
            position_ids=prefixes.positions[None],
            use_cache=False,
            prefixes=prefixes,
        ).last_hidden_state
        return hidden[0, prefixes.trained]

    @torch.no_grad()
    def base_logprobs(self, batch: Microbatch) -> Tensor:
        """log p of every trained token under the base model: the adapter is switched off. [N]."""
        with self._attached.disable_adapter():
            return self.logprobs(batch).logprobs

    @torch.no_grad()
    def compare(self, batch: Microbatch) -> Comparison:
        """The adapter beside the base model, at every trained token of a microbatch."""
        peft, size = self._attached, max(1, HEAD_ELEMENTS // self._head.weight.shape[0])
        hidden = self._hidden(batch)
        with peft.disable_adapter():
            base_hidden = self._hidden(batch)
        targets, temperature = batch.targets.to(self._device), batch.temperature.to(self._device)
        pieces = []
        for part in torch.split(torch.arange(len(targets), device=self._device), size):
            every = _distribution(self._head, hidden[part], temperature[part])
            with peft.disable_adapter():
                base = _distribution(self._head, base_hidden[part], temperature[part])
            pieces.append((every.gather(-1, targets[part, None])[:, 0], *_divergences(every, base)))
        return Comparison(*(torch.cat(column).cpu() for column in zip(*pieces, strict=True)))

    def weight_norm(self, module: str) -> float:
        """Frobenius norm of a base matrix, such as 'model.layers.0.self_attn.q_proj'; 0 if there
        is none. Between `detach` and `attach` only."""
        try:
            return float(self._base.get_submodule(module).weight.float().norm())
        except AttributeError:
            return 0.0

    def probe(self, token_ids: list[int]) -> Probe:
        """What the adapter, and the base without it, say of a token sequence at temperature 1."""
        return Probe(
            tuple(token_ids),
            tuple(self._sequence_logprobs(token_ids, with_adapter=True)),
            tuple(self._sequence_logprobs(token_ids, with_adapter=False)),
        )

    @property
    def _head(self) -> Any:
        return self._attached.base_model.model.get_output_embeddings()

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


class _Score(torch.autograd.Function):
    """log softmax(head(hidden) / T)[target] and the entropy: [N, H] -> [N], [N].

    The head is frozen and a token's log-probability depends on its own hidden state only, so that
    its gradient (W[target] - sum_v p_v W[v]) / T is known at once: no logits are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, head: torch.nn.Linear, hidden: Tensor, targets: Tensor, temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits = head(hidden).float() / temperature[:, None]
        normalizer = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None])[:, 0] - normalizer
        chances = (logits - normalizer[:, None]).exp_()
        entropy = normalizer - torch.linalg.vecdot(chances, logits)
        if ctx.needs_input_grad[1]:
            expected = combination(chances.to(hidden.dtype), head.weight)
            ctx.save_for_backward((head.weight[targets] - expected) / temperature[:, None])
            ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return None, (gradients[0][:, None] * slope).to(ctx.dtype), None, None


def _distribution(head: torch.nn.Module, hidden: Tensor, temperature: Tensor) -> Tensor:
    """log softmax(head(hidden) / T): [N, H] -> [N, V]."""
    logits: Tensor = head(hidden).float() / temperature[:, None]
    return logits.log_softmax(-1)


def _divergences(every: Tensor, base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p || q) = sum p (log p - log q), then the entropies of p and q: [N, V] twice -> [N]."""
    p, q = every.exp(), base.exp()
    return (p * (every - base)).sum(-1), -(p * every).sum(-1), -(q * base).sum(-1)
