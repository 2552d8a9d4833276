from __future__ import annotations

from collections.abc import Iterator

import pytest

from feedback.store import Store


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    opened = Store.open(url)
    yield opened
    opened.close()
