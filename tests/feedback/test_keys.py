"""API keys in the record, on both databases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from feedback.errors import EpisodeForeign
from feedback.keys import ApiKey, ApiKeys
from feedback.store import Store
from policy.ownership import own
from tests.feedback.record_samples import episode

KEY = ApiKey("k1", "ci", "acme", frozenset({"runs", "feedback"}), b"\1" * 32, 10.0)


@pytest.fixture
def keys(store: Store) -> ApiKeys:
    return ApiKeys(store.database)


def test_a_key_is_read_as_it_was_made_and_lists_are_a_tenants(keys: ApiKeys) -> None:
    other = replace(KEY, id="k2", tenant="bolt", created_at=11.0, expires_at=20.0)
    for key in (KEY, other):
        keys.add(key)
    assert keys.listed("acme") == [KEY]
    assert keys.listed("bolt") == [other]
    assert keys.listed(None) == [other, KEY]
    assert keys.listed("nobody") == []
    assert keys.usable(19.0) == [other, KEY]
    assert keys.usable(20.0) == [KEY], "it expires at that moment"


def test_only_its_tenant_revokes_a_key_and_the_first_time_counts(keys: ApiKeys) -> None:
    keys.add(KEY)
    assert keys.revoke("k1", "bolt", 12.0) is None
    assert keys.usable(12.0) == [KEY]
    revoked = replace(KEY, revoked_at=13.0)
    assert keys.revoke("k1", "acme", 13.0) == revoked
    assert keys.revoke("k1", None, 14.0) == revoked
    assert keys.usable(13.0) == []
    assert keys.listed("acme") == [revoked], "what there was stays in the list"
    assert keys.revoke("k9", None, 14.0) is None


def test_the_latest_use_stays_whoever_notes_it_last(keys: ApiKeys) -> None:
    for key in (KEY, replace(KEY, id="k2")):
        keys.add(key)
    keys.note_use({})
    keys.note_use({"k1": 30.0, "k2": 31.0, "unknown": 32.0})
    keys.note_use({"k1": 29.0, "k2": 33.0})
    assert {key.id: key.last_used_at for key in keys.listed("acme")} == {"k1": 30.0, "k2": 33.0}


def test_no_tenants_episode_enters_anothers_policy(store: Store) -> None:
    """Whatever a server does: training reads what a policy has, and this is where it gets it."""
    own(store.database, {"desk": "acme"})
    with pytest.raises(EpisodeForeign, match="policy 'desk'"):
        store.begin(episode("e", tenant="bolt"))
    assert store.tenant_of("e") is None
    store.begin(episode("e", tenant="acme"))
    assert store.tenant_of("e") == "acme"
