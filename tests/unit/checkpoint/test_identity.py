"""Which keys a run is bound to, and that keys that came later leave the digest of earlier runs as it was."""

import pytest

from instance_ssl.checkpoint.identity import LATER_KEYS, bound_keys, keys_digest, require_same_keys
from instance_ssl.config.experiment import ExperimentConfig, flatten
from instance_ssl.errors import UserError


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_keys_at_their_former_value_leave_the_digest_as_it_was(kind: str) -> None:
    keys = flatten(ExperimentConfig.model_validate({"data": {"kind": kind}}))
    assert {key: keys[key] for key in LATER_KEYS} == LATER_KEYS, "a run that lacks a key counts as having its default"
    before = {key: value for key, value in keys.items() if key not in LATER_KEYS}
    assert keys_digest(keys) == keys_digest(before)


@pytest.mark.parametrize("kind", ["digits", "folder"])
@pytest.mark.parametrize("key", LATER_KEYS)
def test_another_value_is_another_run(kind: str, key: str) -> None:
    keys = flatten(ExperimentConfig.model_validate({"data": {"kind": kind}}))
    assert key in bound_keys(keys)
    changed = {**keys, key: "another"}
    assert keys_digest(changed) != keys_digest(keys)
    with pytest.raises(UserError, match=f"{key} = ") as refused:
        require_same_keys(keys, changed, "runs/old")
    assert "give another --run-dir" in str(refused.value)
