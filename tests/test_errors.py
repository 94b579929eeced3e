from __future__ import annotations

import pytest

from saekit.errors import (
    FileMissing,
    Interrupted,
    InvalidInput,
    SaekitError,
    UnknownFeature,
    UnknownName,
    near,
)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InvalidInput, ValueError),
        (FileMissing, FileNotFoundError),
        (UnknownName, KeyError),
        (UnknownFeature, IndexError),
        (UnknownFeature, KeyError),
        (Interrupted, RuntimeError),
    ],
)
def test_every_error_is_also_the_builtin_a_caller_expects(kind: type, builtin: type) -> None:
    assert issubclass(kind, builtin)
    assert issubclass(kind, SaekitError)
    assert str(kind("what was given")) == "what was given"  # KeyError alone would add quotes


def test_near_lists_close_names() -> None:
    assert (
        near("blocks.2.hook_resid_prr", ["blocks.2.hook_resid_pre", "x"])
        == "Did you mean blocks.2.hook_resid_pre?"
    )
    assert near("zzz", ["abc"]) == ""
    assert near("aaa", ["aab", "aac"]).endswith("?")
