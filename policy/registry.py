"""The folder of published adapters: `<root>/<policy>/v0000007/`, each whole and never changed.

Publishing is validate, write aside, fsync, rename, so that a reader in any process sees a whole
version or none, whatever is killed when. Which version answers is `policy.releases`'.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import math
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from policy.adapter_config import CONFIG, read_json
from policy.adapter_weights import WEIGHTS
from policy.durable import make_folder, sync
from policy.registry_errors import (
    AdapterCorrupt,
    AdapterGone,
    AdapterInvalid,
    AdapterMissing,
    AdapterUnreadable,
    RegistryError,
)
from policy.types import Adapter, AdapterRef, Probe
from policy.validation import MANIFEST, MAX_JSON_BYTES, check_adapter, check_files

__all__ = ["AdapterCorrupt", "AdapterGone", "AdapterInvalid", "AdapterMissing"]
__all__ += ["AdapterUnreadable", "Registry", "RegistryError"]

_LOG = logging.getLogger(__name__)
_FOLDER = re.compile(r"v(\d{7,9})")
_ASIDE = ".aside-"
_NEXT = ".next"
"""A line's file of the first number that was never used."""


class _Manifest(BaseModel):
    """`manifest.json`, written once beside the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    name: str
    digest: str
    base_model: str
    rank: int
    parent: str | None
    created_at: float
    metrics: dict[str, float]
    probe: Probe | None


class Registry:
    """Adapter versions of one base model. Safe to use from several processes at once.

    Numbers count up from 1 for each policy and are never reused, not even after a deletion: the
    next one is on disk, in `.next`, before a folder gets its name.
    """

    def __init__(
        self,
        root: Path,
        base_model_digest: str,
        max_rank: int,
        *,
        base_folder: Path | None = None,
    ) -> None:
        """With `base_folder`, drafts are also checked against the base model's modules, sizes."""
        self._root = root.resolve()
        self._base_model = base_model_digest
        self._max_rank = max_rank
        self._base_folder = base_folder

    def publish(
        self,
        draft: Path,
        *,
        policy: str,
        parent: AdapterRef | None = None,
        probe: Probe | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Adapter:
        """Copy a draft folder in under the next number; the draft stays as it is.

        Raises AdapterInvalid with the reason, and then no number is used.
        """
        _check_numbers(metrics or {}, probe)
        self._check_draft(draft)
        with _building_site(self._line(policy)) as (line, aside):
            _copy(draft, aside)
            checked = check_adapter(aside, max_rank=self._max_rank, base_folder=self._base_folder)
            ref = AdapterRef(policy, _take_number(line))
            manifest = _Manifest(
                name=str(ref),
                digest=_digest(aside),
                base_model=self._base_model,
                rank=checked.rank,
                parent=None if parent is None else str(parent),
                created_at=time.time(),
                metrics=dict(metrics or {}),
                probe=probe,
            )
            _write(aside / MANIFEST, manifest.model_dump_json(indent=1).encode())
            sync(aside)
            aside.rename(self._folder(ref))
            sync(line)
        return self._adapter(ref, manifest)

    def get(self, ref: AdapterRef) -> Adapter:
        """The record of a version; reads its manifest, not its weights (see `verify`).

        Raises AdapterMissing, AdapterUnreadable, AdapterCorrupt, or AdapterInvalid if its base
        model is another one.
        """
        adapter = self._read(ref)
        if adapter.base_model != self._base_model:
            raise AdapterInvalid(
                f"{ref} was trained on base model {adapter.base_model}; this one is "
                f"{self._base_model}; set model.path back, or publish under another policy"
            )
        return adapter

    def versions(self, policy: str) -> list[Adapter]:
        """All readable versions, oldest first, those of other base models included."""
        found = []
        for number in _numbers(self._line(policy)):
            try:
                found.append(self._read(AdapterRef(policy, number)))
            except RegistryError as error:
                _LOG.warning("skipped an adapter: %s", error)
        return found

    def verify(self, ref: AdapterRef) -> Adapter:
        """`get`, and the files are still what was published. Raises AdapterCorrupt if not.

        A folder that was put here by hand may agree with itself: it must pass what drafts pass.
        """
        adapter = self.get(ref)
        with self._reading(ref, "is damaged"):
            check_files(adapter.path, is_draft=False)
            digest = _digest(adapter.path)
        if digest != adapter.digest:
            raise AdapterCorrupt(
                f"{ref} has digest {digest}; expected {adapter.digest}, as published; roll back "
                "and delete it"
            )
        with self._reading(ref, "is damaged"):
            # Not by `max_rank`, which is a setting: lowered, it damages no version.
            check_adapter(
                adapter.path, max_rank=adapter.rank, base_folder=self._base_folder, is_draft=False
            )
        return adapter

    def delete(self, ref: AdapterRef) -> None:
        """Remove a version's folder, damaged or not; its number stays used.

        The caller makes sure that no engine uses it. Raises AdapterMissing.
        """
        line, folder = self._line(ref.policy), self._folder(ref)
        self._check_present(ref)
        with _locked(line):
            self._check_present(ref)
            _write_next(line, _next(line))
            doomed = folder.rename(line / f"{_ASIDE}{uuid.uuid4().hex}")
            sync(line)
        _remove(doomed)

    def _line(self, policy: str) -> Path:
        try:
            AdapterRef.parse(f"{policy}@v0")
        except ValueError as error:
            raise AdapterInvalid(f"policy name is {policy!r}; {error}") from error
        return self._root / policy

    def _folder(self, ref: AdapterRef) -> Path:
        return self._line(ref.policy) / f"v{ref.version:07d}"

    def _check_present(self, ref: AdapterRef) -> None:
        if ref.version < 1 or not self._folder(ref).is_dir():
            line = self._line(ref.policy)
            where = f"{ref} is not in {str(self._root)!r} (setting model.adapters)"
            published = f"published versions of {ref.policy!r}: {_numbers(line)}"
            if _was_here(line, ref.version):
                raise AdapterGone(f"{where}: its folder was removed by hand; {published}")
            raise AdapterMissing(f"{where}; {published}")

    def _check_draft(self, draft: Path) -> None:
        check_files(draft)
        if (draft / MANIFEST).exists():  # a version published elsewhere
            base_model = read_json(draft / MANIFEST).get("base_model")
            if base_model != self._base_model:
                raise AdapterInvalid(
                    f"the draft was trained on base model {base_model!r}; expected "
                    f"{self._base_model!r}"
                )

    def _read(self, ref: AdapterRef) -> Adapter:
        with self._reading(ref, f"has no readable {MANIFEST}"):
            self._check_present(ref)
            file = self._folder(ref) / MANIFEST
            _check_plain(file)
            manifest = _Manifest.model_validate_json(file.read_bytes())
            _check_numbers(manifest.metrics, manifest.probe)
            adapter = self._adapter(ref, manifest)
        if manifest.name != str(ref):
            raise AdapterCorrupt(f"the folder of {ref} holds {manifest.name!r}; was it moved?")
        return adapter

    @contextmanager
    def _reading(self, ref: AdapterRef, damage: str) -> Iterator[None]:
        """Tell damage of a version, which is for good, from what passes or can be mended."""
        try:
            yield
        except (AdapterMissing, AdapterCorrupt):
            raise
        except (AdapterInvalid, ValueError, FileNotFoundError) as error:
            self._check_present(ref)  # else its folder went away meanwhile, as a mount does
            raise AdapterCorrupt(f"{ref} {damage}: {error}") from error
        except OSError as error:
            raise AdapterUnreadable(
                f"{ref} cannot be read from {str(self._root)!r} (setting model.adapters): {error}"
            ) from error

    def _adapter(self, ref: AdapterRef, manifest: _Manifest) -> Adapter:
        return Adapter(
            ref=ref,
            path=self._folder(ref),
            digest=manifest.digest,
            base_model=manifest.base_model,
            rank=manifest.rank,
            parent=None if manifest.parent is None else AdapterRef.parse(manifest.parent),
            probe=manifest.probe,
            metrics=manifest.metrics,
            created_at=manifest.created_at,
        )


def _check_plain(file: Path) -> None:
    """Before it is opened: a FIFO would hold its reader for ever."""
    status = file.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON_BYTES:
        raise AdapterInvalid(
            f"{file.name!r} is no plain file of at most {MAX_JSON_BYTES} bytes, as it was written"
        )


def _check_numbers(metrics: Mapping[str, float], probe: Probe | None) -> None:
    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        raise AdapterInvalid(f"metrics {bad} are not finite")
    if probe is None:
        return
    sizes = len(probe.token_ids) - 1, len(probe.logprobs), len(probe.base_logprobs)
    if sizes[0] < 1 or len(set(sizes)) != 1:
        raise AdapterInvalid(
            f"probe has {sizes[0] + 1} tokens, {sizes[1]} and {sizes[2]} log-probabilities; "
            "expected one less than tokens, of each"
        )
    if min(probe.token_ids) < 0:
        raise AdapterInvalid(f"probe has token {min(probe.token_ids)}; expected ids from 0 up")
    if not all(map(math.isfinite, (*probe.logprobs, *probe.base_logprobs))):
        raise AdapterInvalid("probe has log-probabilities that are not finite")


def _digest(folder: Path) -> str:
    """sha256 over the config and the weights, each led by its length."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        content = (folder / name).read_bytes()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return f"sha256:{digest.hexdigest()}"


def _numbers(line: Path) -> list[int]:
    names: Iterable[str] = (entry.name for entry in line.iterdir()) if line.is_dir() else ()
    return sorted(int(match[1]) for name in names if (match := _FOLDER.fullmatch(name)))


def _next(line: Path) -> int:
    """The first number that was never used."""
    mark = line / _NEXT
    try:
        never_used = int(mark.read_text()) if mark.exists() else 1
    except ValueError as error:
        raise AdapterCorrupt(
            f"{str(mark)!r} holds no number; write one above all versions ever published"
        ) from error
    return max([never_used, *(number + 1 for number in _numbers(line))])


def _was_here(line: Path, number: int) -> bool:
    """Whether this number was given out in this folder, which then is no empty mount point."""
    try:
        return (line / _NEXT).exists() and 0 < number < _next(line)
    except AdapterCorrupt:
        return False


def _take_number(line: Path) -> int:
    number = _next(line)
    _write_next(line, number + 1)
    return number


def _write_next(line: Path, number: int) -> None:
    aside = line / f"{_ASIDE}next"
    _write(aside, str(number).encode())
    aside.rename(line / _NEXT)
    sync(line)


def _copy(draft: Path, aside: Path) -> None:
    aside.mkdir()
    for name in (CONFIG, WEIGHTS):
        # The draft was checked, but may be swapped for a link since then.
        source = os.open(draft / name, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(source, "rb") as stream, (aside / name).open("wb") as copy:
            shutil.copyfileobj(stream, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        (aside / name).chmod(0o444)


def _write(file: Path, content: bytes) -> None:
    with file.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def _locked(line: Path) -> Iterator[None]:
    """One writer for each policy, over all processes; the kernel frees a killed one's lock."""
    with (line / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _building_site(line: Path) -> Iterator[tuple[Path, Path]]:
    """The locked line, and the name of a folder aside that is gone afterwards."""
    make_folder(line)
    with _locked(line):
        for debris in line.glob(f"{_ASIDE}*"):  # of killed publishers: under the lock none works
            _remove(debris)
        aside = line / f"{_ASIDE}{uuid.uuid4().hex}"
        try:
            yield line, aside
        finally:
            _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
