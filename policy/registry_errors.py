"""What a folder of adapters may refuse, as one tree.

The difference that matters to whoever decides on a version: damage is for good, a disk or a mount
that fails says nothing of the version.
"""

from __future__ import annotations


class RegistryError(Exception):
    """A folder of adapters does not hold what was asked for.

    RegistryError
    ├── AdapterInvalid      a draft, or a version of another base model, that must not be served
    ├── AdapterMissing      no such version (also a KeyError); maybe nothing is mounted there
    │   └── AdapterGone     its line is there and it is not: somebody removed its folder
    ├── AdapterUnreadable   the disk or its permissions failed, which says nothing of the version
    └── AdapterCorrupt      a published version is no longer what was published
    """


class AdapterInvalid(RegistryError):
    pass


class AdapterMissing(RegistryError, KeyError):
    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it


class AdapterGone(AdapterMissing):
    pass


class AdapterUnreadable(RegistryError):
    pass


class AdapterCorrupt(RegistryError):
    pass
