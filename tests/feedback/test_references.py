"""References to secrets: one way to read them, whoever owns the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.references import UnreadableReference, anchor, is_reference, resolve


def test_values_stand_in_for_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NAME", " Ada\n")
    (tmp_path / "key").write_text("k3y \r\n")
    text = "${env:NAME} has ${file:key}, not ${other:x}"
    assert resolve(text, tmp_path) == " Ada has k3y , not ${other:x}"
    assert resolve(anchor(text, tmp_path)) == resolve(text, tmp_path)
    absolute = f"${{file:{tmp_path}/key}}"
    assert resolve(absolute, Path("/elsewhere")) == "k3y "
    assert anchor(absolute, Path("/elsewhere")) == absolute


def test_only_the_whole_text_is_a_reference() -> None:
    assert is_reference("${env:NAME}")
    assert is_reference("${file:a/b}")
    assert not any(map(is_reference, ("x${env:A}", "${env:A}${env:B}", "${env:}", "env:A")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("${env:HONE_UNSET}", "environment variable 'HONE_UNSET' is not set"),
        ("${file:none}", "file 'none' cannot be read: FileNotFoundError"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UnreadableReference, match=said):
        resolve(text, tmp_path)
