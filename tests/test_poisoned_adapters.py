"""Adapters that must never answer anybody, each made for real and each refused with its own reason.

The lists are the documentation: what a broken trainer or an attacker may hand to the registry
(`DRAFTS`), put into its folder by hand (`DROPPED`), or publish as a candidate that is whole and
wrong (`CANDIDATES`). What passed the registry is refused by the engine's probe or the gate.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feedback.spec import GateSpec
from feedback.store import Store
from feedback.wakeup import InProcess
from policy.leases import Leases
from policy.registry import AdapterInvalid, Registry, RegistryError, _digest
from policy.releases import Releases
from policy.scripted import ScriptedEngine, scripted_logprobs
from policy.types import Adapter, AdapterRef, Probe
from server.errors import NotFound
from server.release_controller import ReleaseController
from tests.policy.adapter_drafts import (
    BASE,
    CONFIG,
    DOWN,
    RANK,
    Q,
    configured,
    fifo,
    header,
    in_bfloat16,
    link_weights,
    oversize,
    repeat_tensor,
    set_value,
    truncate,
    weighted,
    write_base,
    write_draft,
)
from trainer.gate import Gate, Trial
from trainer.gate_weights import BoundedNorm, FiniteWeights, Moved

DRAFTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "nan": (weighted(set_value(np.nan)), r"q_proj.lora_A.weight' has 1 NaN values of 32"),
    "inf": (weighted(set_value(-np.inf)), r"q_proj.lora_A.weight' has 1 infinite values of 32"),
    "bf16 nan": (in_bfloat16(0x7FC0, 0xFFC1), r"lora_B.weight' has 2 NaN values of 32"),
    "bf16 inf": (in_bfloat16(0x3F80, 0xFF80), r"lora_B.weight' has 1 infinite values of 32"),
    "integers": (
        weighted(lambda v: v.update({f"{Q}.lora_A.weight": np.ones((RANK, 8), np.int32)})),
        r"has type 'I32'; expected one of",
    ),
    "no weights": (
        lambda d: (d / "adapter_model.safetensors").unlink(),
        r"'adapter_model.safetensors' is missing",
    ),
    "no config": (lambda d: (d / "adapter_config.json").unlink(), r"'adapter_config.json' is miss"),
    "pickle": (
        lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
        r"'adapter_model.bin' does not belong .*pickled weights are never read",
    ),
    "pickle beside": (lambda d: (d / "extra.pt").write_bytes(b"\x80"), r"'extra.pt' does not bel"),
    "subfolder": (lambda d: (d / "checkpoint").mkdir(), r"'checkpoint' does not belong"),
    "symlink": (link_weights, r"'adapter_model.safetensors' is a symbolic link"),
    "truncated": (truncate, r"no readable safetensors file"),
    "not safetensors": (
        lambda d: (d / "adapter_model.safetensors").write_bytes(b"\x80\x04" * 40),
        r"no readable safetensors file",
    ),
    "oversize": (oversize, r"has 2147483649 bytes; expected at most 2147483648"),
    "bad json": (lambda d: (d / "adapter_config.json").write_text("{r: 4"), r"is not valid JSON"),
    "no object": (lambda d: (d / "adapter_config.json").write_text("[]"), r"expected a JSON obj"),
    "json nan": (configured(lora_alpha=float("nan")), r"NaN is not JSON"),
    "rank too high": (configured(r=17), r"rank is 17; expected at most 16"),
    "rank no number": (configured(r=True), r"'r' = True; expected a positive whole number"),
    "rank disagrees": (configured(r=8), r"expected \(8, in\) and \(out, 8\)"),
    "not lora": (configured(peft_type="IA3"), r"'peft_type' = 'IA3'; expected 'LORA'"),
    "dora": (configured(use_dora=True), r"'use_dora' = True; it must be off"),
    "bias": (configured(bias="all"), r"'bias' = 'all'; expected 'none'"),
    "modules_to_save": (configured(modules_to_save=["lm_head"]), r"'modules_to_save' = \['lm_he"),
    "rank pattern": (configured(rank_pattern={"q_proj": 2}), r"'rank_pattern' = .* must be off"),
    "pissa": (configured(init_lora_weights="pissa"), r"'pissa'; .* change the base model's"),
    "unknown key": (configured(auto_exec="sh"), r"unknown key 'auto_exec'"),
    "targets a regex": (configured(target_modules=".*"), r"expected a list of module names"),
    "target missing": (
        configured(target_modules=["q_proj", "down_proj", "k_proj"]),
        r"names 'k_proj', for which there are no weights",
    ),
    "untargeted": (configured(target_modules=["q_proj"]), r"is not in target_modules \['q_proj'\]"),
    "no B": (
        weighted(lambda v: v.pop(f"{Q}.lora_B.weight")),
        r"A of shape \(4, 8\) and B of shape None",
    ),
    "one dimension": (
        weighted(lambda v: v.update({f"{Q}.lora_B.weight": np.ones(32, np.float32)})),
        r"B of shape \(32,\)",
    ),
    "foreign tensor": (
        weighted(lambda v: v.update({"../../etc": np.ones(1, np.float32)})),
        r"holds '../../etc'; expected only base_model",
    ),
    "other sizes than the base": (
        weighted(lambda v: v.update({f"{DOWN}.lora_A.weight": np.ones((RANK, 8), np.float32)})),
        r"down_proj' is 8 x 8; in the base model it is 8 x 16",
    ),
    "no such layer in the base": (
        weighted(
            lambda v: v.update(
                {n.replace("layers.0", "layers.7"): v.pop(n) for n in list(v) if DOWN in n}
            )
        ),
        r"has no linear module 'model.layers.7.mlp.down_proj'",
    ),
    "other base": (
        lambda d: (d / "manifest.json").write_text('{"base_model": "sha256:other"}'),
        r"trained on base model 'sha256:other'; expected 'sha256:base'",
    ),
    "huge": (
        weighted(set_value(1e6)),
        r"lora_A.weight' has 1 larger than 1024 values of 32",
    ),
    "bf16 huge": (in_bfloat16(0x7E00), r"lora_B.weight' has 1 larger than 1024 values of 32"),
    "doubles": (
        weighted(lambda v: v.update({f"{Q}.lora_A.weight": np.ones((RANK, 8), np.float64)})),
        r"has type 'F64'; expected one of",
    ),
    "hard link": (
        lambda d: (d.parent / "other name").hardlink_to(d / "adapter_model.safetensors"),
        r"'adapter_model.safetensors' is a hard link",
    ),
    "fifo": (fifo, r"'adapter_config.json' does not belong"),
    "device": (
        lambda d: (d / "README.md").symlink_to("/dev/zero"),
        r"'README.md' is a symbolic link",
    ),
    "oversize config": (
        lambda d: (d / "adapter_config.json").write_text(" " * (1 << 20) + json.dumps(CONFIG)),
        r"'adapter_config.json' has \d+ bytes; expected at most 1048576",
    ),
    "deep json": (
        lambda d: (d / "adapter_config.json").write_text('{"a":' * 100_000),
        r"'adapter_config.json' is not valid JSON",
    ),
    "key twice": (
        lambda d: (d / "adapter_config.json").write_text(
            json.dumps(CONFIG)[:-1] + ', "use_dora": true}'
        ),
        r"the key 'use_dora' stands twice",
    ),
    "absurd scaling": (configured(lora_alpha=8000), r"scales the update by 2000, with lora_alpha"),
    "absurd alpha": (configured(lora_alpha=10**400), r"'lora_alpha' = 1000.*up to a million"),
    "negative alpha": (configured(lora_alpha=-8), r"'lora_alpha' = -8; expected a positive"),
    "trained tokens": (
        configured(trainable_token_indices=[1]),
        r"'trainable_token_indices' = \[1\]; it must be off",
    ),
    "merged layers": (configured(layer_replication=[[0, 1]]), r"'layer_replication' = .* be off"),
    "extra tensor": (
        weighted(lambda v: v.update({f"{Q}.lora_A.bias": np.ones(4, np.float32)})),
        r"holds '.*lora_A.bias'; expected only",
    ),
    "magnitudes": (
        weighted(lambda v: v.update({f"{Q}.lora_magnitude_vector": np.ones(8, np.float32)})),
        r"holds '.*lora_magnitude_vector'",
    ),
    "embeddings": (
        weighted(
            lambda v: v.update(
                {"base_model.model.model.embed_tokens.weight": np.ones((32, 8), np.float32)}
            )
        ),
        r"holds 'base_model.model.model.embed_tokens.weight'",
    ),
    "header beyond the file": (header(length=2**63), r"said to have 9223372036854775808 bytes"),
    "header too short": (header(length=3), r"the header of .* is not valid JSON"),
    "header metadata": (
        header(lambda h: h.update({"__metadata__": {"format": "pt", "run": "curl evil.sh"}})),
        r"has the metadata .*curl evil.sh.*; expected none",
    ),
    "overlapping tensors": (
        header(lambda h: h[f"{Q}.lora_A.weight"].update(data_offsets=[0, 128])),
        r"no readable safetensors file: .*",
    ),
    "tensor twice": (repeat_tensor, r"the header of .*the key '.*lora_A.weight' stands twice"),
}


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return write_draft(tmp_path / "draft")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters", BASE, 16, base_folder=write_base(tmp_path / "base"))


@pytest.mark.parametrize("case", DRAFTS)
def test_a_poisoned_draft_gets_no_name(registry: Registry, draft: Path, case: str) -> None:
    damage, reason = DRAFTS[case]
    damage(draft)
    with pytest.raises(AdapterInvalid, match=reason):
        registry.publish(draft, policy="desk")
    assert registry.versions("desk") == []
    good = write_draft(draft.parent / "good")
    assert registry.publish(good, policy="desk").ref.version == 1, "a refusal uses no number"


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the manifest, as one who may write to the folder can."""
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def agreeing(damage: Callable[[Path], object]) -> Callable[[Path], object]:
    """Damage a version and make its manifest agree with it."""

    def drop(folder: Path) -> None:
        for file in folder.iterdir():
            file.chmod(0o644)
        damage(folder)
        rewrite(folder, digest=_digest(folder))

    return drop


def moved(folder: Path) -> None:
    """Another name for version 1, such as a rollback might lead to."""
    elsewhere = folder.parent / "v0000002"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def swap_for_link(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").symlink_to("/etc/hostname")


def manifest_fifo(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


DROPPED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit flipped": (
        lambda f: rewrite(f, digest="sha256:" + "0" * 64),
        r"has digest sha256:\w+; expected sha256:0000",
    ),
    "not a number, and the manifest agrees": (
        agreeing(weighted(set_value(np.nan))),
        r"desk@v\d is damaged: .* has 1 NaN values",
    ),
    "sizes of another base, and the manifest agrees": (
        agreeing(
            weighted(lambda v: v.update({f"{DOWN}.lora_A.weight": np.ones((RANK, 8), np.float32)}))
        ),
        r"belongs to another base",
    ),
    "another rank than the manifest's": (
        lambda f: rewrite(f, rank=2),
        r"rank is 4; expected at most 2",
    ),
    "another version's folder": (lambda f: rewrite(f, name="desk@v7"), r"holds 'desk@v7'; was it"),
    "another base's": (lambda f: rewrite(f, base_model="sha256:o"), r"base model sha256:o; this"),
    "a parent outside": (lambda f: rewrite(f, parent="../../etc@v1"), r"'../../etc@v1'; expected"),
    "an unknown manifest key": (lambda f: rewrite(f, run="evil.sh"), r"no readable manifest.json"),
    "a probe of unequal lengths": (
        lambda f: rewrite(f, probe={"token_ids": [1, 2], "logprobs": [], "base_logprobs": [-1]}),
        r"probe has 2 tokens, 0 and 1 log-prob",
    ),
    "a probe of no token": (
        lambda f: rewrite(f, probe={"token_ids": [1, -2], "logprobs": [-1], "base_logprobs": [-1]}),
        r"probe has token -2",
    ),
    "a manifest that is a FIFO": (manifest_fifo, r"'manifest.json' is no plain file"),
    "a manifest without end": (
        lambda f: (f / "manifest.json").write_text(" " * (2 << 20)),
        r"'manifest.json' is no plain file of at most 1048576 bytes",
    ),
    "weights swapped for a link": (swap_for_link, r"is a symbolic link"),
    "a folder that is a link": (moved, r"is no folder"),
    "a pickle beside": (
        lambda f: (f / "adapter_model.bin").write_bytes(b"\x80\x04"),
        r"'adapter_model.bin' does not belong",
    ),
}


@pytest.mark.parametrize("case", DROPPED)
def test_what_was_put_into_the_folder_is_not_served(
    registry: Registry, draft: Path, case: str
) -> None:
    adapter = registry.publish(draft, policy="desk")
    damage, reason = DROPPED[case]
    adapter.path.joinpath("manifest.json").chmod(0o644)
    damage(adapter.path)
    with pytest.raises(RegistryError, match=reason):
        registry.verify(adapter.ref)
    registry.versions("desk")  # others are listed all the same


def scale(factor: float) -> Callable[[dict[str, Any]], None]:
    def change(values: dict[str, Any]) -> None:
        values.update({name: weight * np.float32(factor) for name, weight in values.items()})

    return change


def untrained(values: dict[str, Any]) -> None:
    for name, weight in values.items():
        if "lora_B" in name:
            weight[:] = 0


CANDIDATES: dict[str, tuple[Callable[[Path], object], bool, str]] = {
    "no-op": (lambda draft: None, True, r"the update changed no weight"),
    "untrained": (weighted(untrained), False, r"the update changed no weight"),
    "a blow": (
        weighted(scale(30)),
        True,
        r"changed by .* of the base matrix's norm",
    ),
}
"""The draft, whether its parent is as written by `write_draft`, and what the gate says."""


@pytest.mark.parametrize("case", CANDIDATES)
def test_a_candidate_that_is_whole_and_wrong_is_refused_by_the_gate(
    registry: Registry, draft: Path, case: str
) -> None:
    live = registry.publish(draft, policy="desk")
    change, has_parent, reason = CANDIDATES[case]
    change(draft)
    candidate = registry.publish(draft, policy="desk", parent=live.ref)
    incumbent = live if has_parent else None
    gate = Gate([FiniteWeights(), Moved(), BoundedNorm(lambda module: 100.0)])
    verdict = gate.judge(
        Trial(candidate, live.ref, incumbent.path if incumbent else None, GateSpec())
    )
    assert not verdict.passed
    assert re.search(reason, verdict.reason)


class Site:
    """A controller over the real registry and record, with an engine that says what it loaded."""

    def __init__(self, folder: Path, registry: Registry) -> None:
        self.store = Store.open(f"sqlite:///{folder}/hone.db")
        self.releases = Releases(self.store.database)
        self.registry = registry
        self.engine = ScriptedEngine(lambda *_: [1], lambda ids: "", eos_id=0)
        self.controller = ReleaseController(
            self.engine, registry, self.releases, Leases(), slots=8, wakeup=InProcess()
        )  # fmt: skip

    def candidate(self, draft: Path, *, lies_by: float = 0.0) -> Adapter:
        ref = AdapterRef("desk", len(self.registry.versions("desk")) + 1)
        ids = tuple(range(20, 40))
        told = tuple(logprob + lies_by for logprob in scripted_logprobs(ids, ref))
        probe = Probe(ids, told, tuple(scripted_logprobs(ids, AdapterRef("desk", 0))))
        adapter = self.registry.publish(draft, policy="desk", probe=probe)
        self.releases.record(
            "desk", adapter.ref.version, "candidate", actor="trainer", reason="published"
        )
        return adapter


async def test_before_the_engine_each_is_rejected_and_none_is_loaded(
    registry: Registry, draft: Path, tmp_path: Path
) -> None:
    site = Site(tmp_path, registry)
    good = site.candidate(draft)
    dropped = [*list(DROPPED)[:2], "a manifest that is a FIFO"]
    poisoned = [site.candidate(draft) for _ in dropped]
    liar = site.candidate(draft, lies_by=0.4)
    for adapter, case in zip(poisoned, dropped, strict=True):
        (adapter.path / "manifest.json").chmod(0o644)
        DROPPED[case][0](adapter.path)
    await site.controller.reconcile()

    assert site.engine.loaded == {good.ref}
    states = site.releases.state("desk").states
    assert states[good.ref.version] == "loaded"
    for adapter in (*poisoned, liar):
        assert states[adapter.ref.version] == "rejected"
        with pytest.raises(NotFound, match="was rejected"):
            await site.controller.hold(adapter.ref)
    said = [event.reason for event in site.releases.events("desk") if event.state == "rejected"]
    reasons = [*(DROPPED[case][1] for case in dropped), "0.4 nats away"]
    for reason, text in zip(reasons, said, strict=True):
        assert re.search(reason, text)
    site.store.close()
