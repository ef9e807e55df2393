"""The data that ships with the package is found, complete and in its form."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from advisor.catalog import profiles
from advisor.catalog.profiles import model_profiles, profiles_folder
from advisor.errors import ConfigError

FIELDS = {"model_id", "source", "verified", "note", "config"}


def test_profiles_inside_the_package_come_before_those_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "advisor"
    for folder in (tmp_path / "profiles", package / "_profiles"):
        folder.mkdir(parents=True)
        (folder / "gpus.csv").touch()
    monkeypatch.setattr(profiles, "_PACKAGE", package)

    assert profiles_folder() == package / "_profiles"
    (package / "_profiles" / "gpus.csv").unlink()
    assert profiles_folder() == tmp_path / "profiles"


def test_missing_profiles_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "_PACKAGE", tmp_path / "advisor")

    with pytest.raises(ConfigError, match=r"no profiles in .*_profiles or .*profiles; install advisor again"):
        profiles_folder()


@pytest.mark.parametrize("path", sorted(model_profiles().iterdir()), ids=lambda path: path.stem)
def test_a_model_profile_has_its_form(path: Path) -> None:
    profile = json.loads(path.read_text())

    assert set(profile) - {"note"} == FIELDS - {"note"}
    assert profile["model_id"].replace("/", "__") + ".json" == path.name
    assert profile["source"]
    assert isinstance(profile["verified"], bool)
    assert isinstance(profile["config"]["model_type"], str)


@pytest.mark.parametrize("name", ["gpus.csv", "links.csv", "skypilot.csv"])
def test_every_row_of_a_table_is_complete_and_has_a_source(name: str) -> None:
    with (profiles_folder() / name).open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert rows
    assert all(None not in row and None not in row.values() and row["source"] for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)


def test_every_measured_collective_has_a_source() -> None:
    with (profiles_folder() / "rates" / "collectives.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert len(rows) == 124
    assert all(row["source"] and float(row["bus_gb_per_s"]) > 0 for row in rows)
