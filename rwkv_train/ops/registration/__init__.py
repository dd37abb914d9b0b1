"""Our operators in torch.library, one file per family. Importing this package declares them all; it builds nothing."""

from __future__ import annotations

from importlib import import_module

from rwkv_train.ops.families import FAMILIES
from rwkv_train.ops.registration.declaration import SelfTestCase

# A family's file has its name, and declares its operators when it is imported.
SELF_TEST_CASES: dict[str, tuple[SelfTestCase, ...]] = {
    family: import_module(f"{__name__}.{family}").SELF_TEST_CASES for family in FAMILIES
}
