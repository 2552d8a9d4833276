"""Publishing: atomicity under kill -9, numbers that are never reused, damage told from absence.

What is refused, and why, is listed in `tests/test_poisoned_adapters.py`.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from policy.registry import (
    AdapterCorrupt,
    AdapterGone,
    AdapterInvalid,
    AdapterMissing,
    AdapterUnreadable,
    Registry,
)
from policy.types import AdapterRef, Probe
from policy.validation import check_adapter
from tests.policy.adapter_drafts import BASE, RANK, in_bfloat16, write_base, write_draft


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return write_draft(tmp_path / "draft")


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base")


@pytest.fixture
def registry(tmp_path: Path, base_folder: Path) -> Registry:
    return Registry(tmp_path / "adapters", BASE, 16, base_folder=base_folder)


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


def test_a_version_that_was_removed_is_told_from_one_that_was_never_here(
    registry: Registry, draft: Path, tmp_path: Path
) -> None:
    ref = registry.publish(draft, policy="desk").ref
    with pytest.raises(AdapterMissing) as never:
        registry.get(AdapterRef("desk", 2))
    shutil.rmtree(tmp_path / "adapters/desk/v0000001")
    with pytest.raises(AdapterGone, match=r"desk@v1 .* its folder was removed by hand"):
        registry.get(ref)
    (tmp_path / "adapters/desk/.next").write_text("")
    with pytest.raises(AdapterMissing) as illegible:
        registry.get(ref)
    (tmp_path / "adapters/desk").rename(tmp_path / "away")
    with pytest.raises(AdapterMissing) as unmounted:
        registry.get(ref)
    assert {error.type for error in (never, illegible, unmounted)} == {AdapterMissing}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_disk_that_fails_refuses_no_draft(
    registry: Registry, draft: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whoever trained it would else be told that training again is in vain."""
    read_bytes = Path.read_bytes

    def fail(file: Path) -> bytes:
        if file.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(file)

    with monkeypatch.context() as failing:
        failing.setattr(Path, "read_bytes", fail)
        with pytest.raises(OSError, match="Input/output error"):
            registry.publish(draft, policy="desk")
    assert registry.publish(draft, policy="desk").ref.version == 1


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
