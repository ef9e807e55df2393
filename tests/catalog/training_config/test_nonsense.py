"""Whatever stands in a file, it is read or refused in words: nothing else is ever raised."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advisor.catalog.training_config.accelerate import from_accelerate
from advisor.catalog.training_config.command import from_command
from advisor.catalog.training_config.deepspeed import from_deepspeed
from advisor.errors import AdvisorError, ConfigError
from catalog.training_config.examples import (
    ACCELERATE_FSDP1,
    ACCELERATE_FSDP2,
    ACCELERATE_ZERO,
    PLAIN_ZERO2,
    TRAINER_ZERO3,
    changed,
)

values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["auto", "cpu", "true", "5e8", "zero3"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=8), inner, max_size=2)),
    max_leaves=4,
)


def paths(config: dict[str, Any], before: str = "") -> list[str]:
    found = []
    for key, value in config.items():
        found.append(f"{before}{key}")
        if isinstance(value, dict):
            found += paths(value, f"{before}{key}.")
    return found


def somewhere_else(config: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """*config* with any value at any of its keys."""
    return st.builds(lambda path, value: changed(config, path, value), st.sampled_from(paths(config)), values)


def no_file(named: str) -> tuple[str, Any]:
    raise ConfigError(f"there is no {named}")


def read_or_refused(read: Any, *arguments: Any) -> None:
    with contextlib.suppress(AdvisorError):
        read(*arguments)


@pytest.mark.parametrize("config", [PLAIN_ZERO2, TRAINER_ZERO3], ids=["plain", "trainer"])
def test_any_json(config: dict[str, Any]) -> None:
    @settings(deadline=None)
    @given(somewhere_else(config))
    def holds(other: dict[str, Any]) -> None:
        read_or_refused(from_deepspeed, "ds.json", other)

    holds()


@pytest.mark.parametrize("config", [ACCELERATE_ZERO, ACCELERATE_FSDP1, ACCELERATE_FSDP2], ids=["zero", "v1", "v2"])
def test_any_yaml(config: dict[str, Any]) -> None:
    @settings(deadline=None)
    @given(somewhere_else(config))
    def holds(other: dict[str, Any]) -> None:
        read_or_refused(from_accelerate, "accelerate.yaml", other, no_file)

    holds()


words = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["torchrun", "deepspeed", "accelerate", "launch", "t.py", "4", "$X", '"', "-m", "\\\n"]),
    st.sampled_from(["--num_gpus", "--bf16", "--deepspeed", "--fsdp", "--use_fsdp", "--fsdp_version", "--config_file"]),
)


@settings(deadline=None, max_examples=200)
@given(st.lists(words, max_size=10))
def test_any_script(script: list[str]) -> None:
    read_or_refused(from_command, "go.sh", " ".join(script), no_file, no_file)
