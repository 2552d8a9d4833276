"""Publishing: refusals with reasons, atomicity under kill -9, numbers that are never reused."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from policy.registry import (
    AdapterCorrupt,
    AdapterInvalid,
    AdapterMissing,
    AdapterUnreadable,
    Registry,
)
from policy.types import AdapterRef, Probe
from policy.validation import check_adapter

BASE = "sha256:base"
RANK = 4
Q = "base_model.model.model.layers.0.self_attn.q_proj"
DOWN = "base_model.model.model.layers.0.mlp.down_proj"
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "use_dora": False,
    "modules_to_save": None,
}
Tensors = dict[str, np.ndarray[Any, Any]]


def tensors(seed: int = 0) -> Tensors:
    random = np.random.default_rng(seed)
    shapes = {
        f"{Q}.lora_A.weight": (RANK, 8),
        f"{Q}.lora_B.weight": (8, RANK),
        f"{DOWN}.lora_A.weight": (RANK, 16),
        f"{DOWN}.lora_B.weight": (8, RANK),
    }
    return {name: random.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def write_draft(folder: Path, seed: int = 0) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(seed), folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return write_draft(tmp_path / "draft")


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    weights = {
        "model.embed_tokens.weight": np.zeros((32, 8), np.float32),
        "model.layers.0.self_attn.q_proj.weight": np.zeros((8, 8), np.float32),
        "model.layers.0.mlp.down_proj.weight": np.zeros((8, 16), np.float32),
        "model.layers.0.input_layernorm.weight": np.zeros(8, np.float32),
    }
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def registry(tmp_path: Path, base_folder: Path) -> Registry:
    return Registry(tmp_path / "adapters", BASE, 16, base_folder=base_folder)


def configured(**changes: Any) -> Callable[[Path], None]:
    def damage(draft: Path) -> None:
        (draft / "adapter_config.json").write_text(json.dumps({**CONFIG, **changes}))

    return damage


def weighted(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def damage(draft: Path) -> None:
        values = tensors()
        change(values)
        save_file(values, draft / "adapter_model.safetensors")

    return damage


def in_bfloat16(*bits: int) -> Callable[[Path], None]:
    """The weights as bfloat16, of which the first ones have the given bit patterns."""

    def damage(draft: Path) -> None:
        cut = {n: (v.view(np.uint32) >> 16).astype(np.uint16) for n, v in tensors().items()}
        cut[f"{Q}.lora_B.weight"].flat[: len(bits)] = bits
        header, data = {}, b""
        for name, value in cut.items():
            offsets = [len(data), len(data) + value.nbytes]
            header[name] = {"dtype": "BF16", "shape": list(value.shape), "data_offsets": offsets}
            data += value.tobytes()
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + data
        (draft / "adapter_model.safetensors").write_bytes(content)

    return damage


def truncate(draft: Path) -> None:
    file = draft / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def link_weights(draft: Path) -> None:
    file = draft / "adapter_model.safetensors"
    file.rename(draft.parent / "elsewhere.safetensors")
    file.symlink_to(draft.parent / "elsewhere.safetensors")


def oversize(draft: Path) -> None:
    with (draft / "adapter_model.safetensors").open("r+b") as stream:
        stream.truncate((2 << 30) + 1)  # sparse: takes no space


def set_value(value: float) -> Callable[[Tensors], None]:
    return lambda values: values[f"{Q}.lora_A.weight"].__setitem__((0, 0), value)


REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
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
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses_a_corrupt_draft_with_its_reason(
    registry: Registry, draft: Path, case: str
) -> None:
    damage, reason = REFUSALS[case]
    damage(draft)
    with pytest.raises(AdapterInvalid, match=reason):
        registry.publish(draft, policy="desk")
    assert registry.versions("desk") == []
    good = write_draft(draft.parent / "good")
    assert registry.publish(good, policy="desk").ref.version == 1  # a refusal uses no number


@pytest.mark.parametrize("policy", ["../desk", "Desk", "a/b", "", ".", "desk@v1", "desk\n"])
def test_refuses_policy_names_that_could_leave_the_folder(
    registry: Registry, draft: Path, policy: str
) -> None:
    with pytest.raises(AdapterInvalid, match="policy name is"):
        registry.publish(draft, policy=policy)
    with pytest.raises(AdapterInvalid, match="policy name is"):
        registry.get(AdapterRef(policy, 1))


def test_refuses_a_linked_draft(registry: Registry, draft: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(draft)
    with pytest.raises(AdapterInvalid, match="is no folder"):
        registry.publish(tmp_path / "link", policy="desk")


def test_refuses_numbers_that_are_not_finite(registry: Registry, draft: Path) -> None:
    with pytest.raises(AdapterInvalid, match=r"'loss'.*not finite"):
        registry.publish(draft, policy="desk", metrics={"loss": float("nan")})
    with pytest.raises(AdapterInvalid, match="3 tokens, 2 and 1 log-prob"):
        registry.publish(draft, policy="desk", probe=Probe((1, 2, 3), (-1.0, -2.0), (-1.0,)))
    with pytest.raises(AdapterInvalid, match="not finite"):
        registry.publish(draft, policy="desk", probe=Probe((1, 2), (float("-inf"),), (-1.0,)))


def test_accepts_bfloat16_and_what_peft_writes(draft: Path, base_folder: Path) -> None:
    from peft import LoraConfig

    written = LoraConfig(
        r=RANK, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    written.save_pretrained(str(draft))
    in_bfloat16(0x3F80, 0x0001)(draft)
    checked = check_adapter(draft, max_rank=4, base_folder=base_folder)
    assert checked.rank == 4
    assert checked.modules == ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj")


def test_round_trip_through_another_process_view(
    registry: Registry, draft: Path, tmp_path: Path
) -> None:
    probe = Probe((5, 6, 7), (-0.1, -2.5), (-0.30000000000000004, -1.0))
    first = registry.publish(draft, policy="desk", metrics={"reward": 0.5})
    second = registry.publish(
        write_draft(tmp_path / "b", 1), policy="desk", parent=first.ref, probe=probe
    )
    fresh = Registry(tmp_path / "adapters", BASE, 16)
    assert fresh.versions("desk") == [first, second]
    assert fresh.verify(second.ref) == second
    assert second.parent == AdapterRef("desk", 1)
    assert second.probe == probe
    assert second.path == tmp_path / "adapters/desk/v0000002"
    assert first.digest != second.digest
    assert registry.publish(draft, policy="other").digest == first.digest  # content, not name
    assert sorted(file.name for file in second.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    ]


def test_get_tells_missing_from_corrupt_from_another_base(
    registry: Registry, draft: Path, tmp_path: Path
) -> None:
    ref = registry.publish(draft, policy="desk").ref
    with pytest.raises(AdapterMissing, match=r"desk@v2 is not in .* \[1\]"):
        registry.get(AdapterRef("desk", 2))
    with pytest.raises(AdapterMissing):
        registry.get(AdapterRef("desk", 0))
    with pytest.raises(KeyError):
        registry.delete(AdapterRef("never", 1))
    with pytest.raises(AdapterInvalid, match="was trained on base model sha256:base"):
        Registry(tmp_path / "adapters", "sha256:other", 16).get(ref)
    manifest = registry.get(ref).path / "manifest.json"
    manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(AdapterCorrupt, match="no readable manifest"):
        registry.get(ref)
    assert registry.versions("desk") == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_verify_finds_one_changed_bit(registry: Registry, draft: Path, name: str) -> None:
    adapter = registry.publish(draft, policy="desk")
    file = adapter.path / name
    content = bytearray(file.read_bytes())
    content[-2] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    assert registry.get(adapter.ref) == adapter  # reads no weights
    with pytest.raises(AdapterCorrupt, match="digest"):
        registry.verify(adapter.ref)


@pytest.mark.parametrize("name", ["manifest.json", "adapter_model.safetensors"])
def test_a_disk_that_fails_damages_no_version(
    registry: Registry, draft: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ref = registry.publish(draft, policy="desk").ref
    read_bytes = Path.read_bytes

    def fail(file: Path) -> bytes:
        if file.name == name:
            raise OSError(errno.EMFILE, "Too many open files")
        return read_bytes(file)

    with monkeypatch.context() as failing:
        failing.setattr(Path, "read_bytes", fail)
        with pytest.raises(AdapterUnreadable, match=r"model\.adapters.*Too many open files"):
            registry.verify(ref)
    assert registry.verify(ref).ref == ref


def test_a_mount_that_goes_away_while_it_is_read_damages_no_version(
    registry: Registry, draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = registry.publish(draft, policy="desk").ref
    read_bytes = Path.read_bytes

    def unmounted(file: Path) -> bytes:
        if file.name == "adapter_model.safetensors":
            (tmp_path / "adapters").rename(tmp_path / "elsewhere")
        return read_bytes(file)

    monkeypatch.setattr(Path, "read_bytes", unmounted)
    with pytest.raises(AdapterMissing, match=r"model\.adapters"):
        registry.verify(ref)


def test_numbers_are_never_reused(registry: Registry, draft: Path, tmp_path: Path) -> None:
    for expected in (1, 2, 3):
        assert registry.publish(draft, policy="desk").ref.version == expected
    for version in (3, 2, 1):
        registry.delete(AdapterRef("desk", version))
    assert registry.versions("desk") == []
    assert Registry(tmp_path / "adapters", BASE, 16).publish(draft, policy="desk").ref.version == 4
    (tmp_path / "adapters/desk/.next").unlink()  # an older or hand-made folder
    registry.delete(AdapterRef("desk", 4))
    assert registry.publish(draft, policy="desk").ref.version == 5


PUBLISH = """
import sys
from pathlib import Path
from policy.registry import Registry
root, draft, times = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
registry = Registry(root, "sha256:base", 16)
for _ in range(times):
    print(registry.publish(draft, policy="desk").ref.version, flush=True)
"""
HOUSE = Path(__file__).parents[2]


def test_publishers_in_several_processes_get_different_numbers(draft: Path, tmp_path: Path) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(tmp_path / "adapters"), str(draft), "15"],
            env={**os.environ, "PYTHONPATH": str(HOUSE)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    printed = [process.communicate(timeout=60)[0].split() for process in running]
    assert all(process.returncode == 0 for process in running)
    assert sorted(int(number) for numbers in printed for number in numbers) == list(range(1, 46))
    registry = Registry(tmp_path / "adapters", BASE, 16)
    assert [a.ref.version for a in registry.versions("desk")] == list(range(1, 46))


def kill_at(step: int) -> None:
    """Die by SIGKILL before (odd steps) or after (even) the n-th call that changes or syncs."""
    calls = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if 2 * calls - 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return call(*args, **kwargs)
            finally:
                if 2 * calls == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    for name in ("fsync", "rename", "mkdir", "chmod", "open"):
        setattr(os, name, deadly(getattr(os, name)))


def test_kill_at_any_step_leaves_a_whole_version_or_none(draft: Path, tmp_path: Path) -> None:
    """One process forks a publisher for each step, so that none pays the imports again."""
    registry = Registry(tmp_path / "adapters", BASE, 16)
    published: list[int] = []
    outcomes = set()
    for step in range(1, 200):
        seen = {adapter.ref.version for adapter in registry.versions("desk")}
        child = os.fork()
        if child == 0:
            try:
                kill_at(step)
                registry.publish(draft, policy="desk")
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        new = [a.ref for a in registry.versions("desk") if a.ref.version not in seen]
        for ref in new:
            registry.verify(ref)
            published.append(ref.version)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == 9
        outcomes.add(len(new))
    else:
        pytest.fail("the publisher was killed in every one of 199 runs; is the count too small?")
    assert outcomes == {0, 1}  # killed before the rename, and after it
    assert published == sorted(set(published))
    entries = {entry.name for entry in (tmp_path / "adapters/desk").iterdir()}
    assert entries == {".lock", ".next", *(f"v{number:07d}" for number in published)}
