"""The import contracts of ARCHITECTURE.md, checked on the code as it stands."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("server", "policy", "feedback", "trainer")


def imports(source: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.partition(".")[0])
    return found


def test_rooms_know_only_whom_they_may() -> None:
    """Run as a program: the contracts stand in pyproject.toml, without exceptions."""
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_exactly_one_package_imports_vllm() -> None:
    sources = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert len(sources) > 10
    users = {str(path.parent.relative_to(ROOT)) for path in sources if "vllm" in imports(path)}
    assert users == {"policy/vllm_engine"}
