"""What a launch holds, and how it reaches the disk: whole or not at all."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings

from advisor.errors import SpecError, WriteError
from advisor.launch import files
from advisor.launch.files import Launch, LaunchFile, render, write
from advisor.launch.trainers.advisor import FILES
from advisor.specs.job import Job
from advisor.specs.plan import Offload, Strategy
from advisor.specs.question import Input
from launch.examples import PLANS_OF_EVERY_KIND, cluster, hostile_text, model, plan

ALL_FILES = ["accelerate.yaml", "ds_config.json", *FILES, "run.sh"]


@pytest.fixture
def launch() -> Launch:
    return render(model(), Job(), plan(Strategy.ZERO2), cluster())


def text_of(launch: Launch, name: str) -> str:
    return next(file.text for file in launch.files if file.name == name)


@pytest.mark.parametrize("kind", PLANS_OF_EVERY_KIND)
def test_the_same_inputs_give_the_same_bytes(kind: str) -> None:
    chosen = PLANS_OF_EVERY_KIND[kind]

    first, second = (render(model(), Job(), chosen, cluster(int(chosen.gpus))) for _ in range(2))

    assert first == second
    assert hash(first) == hash(second)
    has_deepspeed = chosen.strategy.zero_stage is not None
    assert [file.name for file in first.files] == [name for name in ALL_FILES if has_deepspeed or name[:2] != "ds"]


def test_one_machine_is_started_by_accelerate_in_the_folder(launch: Launch) -> None:
    assert launch.command[:5] == ("accelerate", "launch", "--config_file", "accelerate.yaml", "train.py")
    assert launch.shell().startswith("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True accelerate launch")


@pytest.mark.parametrize(
    "needs_the_machine",
    [
        render(model(), Job(), plan(gpus=4), cluster(4, nodes=2)),
        render(model(), Job(), plan(Strategy.ZERO2, offload=Offload.OPTIMIZER), cluster()),
    ],
    ids=["rank", "cores"],
)
def test_what_only_the_machine_knows_is_left_to_the_script(needs_the_machine: Launch) -> None:
    assert needs_the_machine.shell() == "bash run.sh"


def test_headers_name_plan_and_assumptions() -> None:
    inputs = (Input("gpu", "Test-80GB", "assumed"), Input("gpus", 2, "given"), Input("link", "test-link", "assumed"))

    launch = render(model(), Job(), plan(), cluster(), weights_from="a/config.json", inputs=inputs)

    for name in ("accelerate.yaml", "run.sh"):
        header = text_of(launch, name)
        assert "# tiny, DDP on 2 x Test-80GB. Written by advisor " in header
        assert "# Batch: 2 GPUs x micro-batch 2 x 2 accumulation steps = 8 sequences of 2048 tokens" in header
        assert "# Assumed: gpu Test-80GB, link test-link." in header
        assert "sdpa attention, full loss, checkpointing none, offload none." in header
        assert "# The model is a configuration without weights: training starts from random ones." in header


@given(name=hostile_text, value=hostile_text)
@settings(deadline=None)
def test_no_name_ends_a_comment(name: str, value: str) -> None:
    inputs = (Input("gpu", value, "assumed"),)
    plain = render(model(), Job(), plan(Strategy.ZERO2), cluster())

    hostile = render(model(name), Job(), plan(Strategy.ZERO2), cluster(), weights_from="tiny", inputs=inputs)

    assert yaml.safe_load(text_of(hostile, "accelerate.yaml")) == yaml.safe_load(text_of(plain, "accelerate.yaml"))
    assert json.loads(text_of(hostile, "ds_config.json")) == json.loads(text_of(plain, "ds_config.json"))
    for file in ("accelerate.yaml", "run.sh"):
        without_header = [line for line in text_of(hostile, file).splitlines() if not line.startswith("#")]
        assert without_header == [line for line in text_of(plain, file).splitlines() if not line.startswith("#")]


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            lambda: render(model(), Job(), plan(gpus=4), cluster(2)),
            "the plan uses 4 GPUs, but the cluster has 2: plan for all of them",
        ),
        (
            lambda: render(model(), Job(), plan(), cluster(bf16=False)),
            "Test-80GB has no bf16, so this job would not start on it; give --precision fp16",
        ),
        (
            lambda: render(model(family="t5"), Job(), plan(Strategy.FSDP), cluster()),
            "accelerate's FSDP cannot shard t5 models with their tied parameters; use ddp or zero2",
        ),
        (
            lambda: render(model(), Job(), plan(Strategy.MEGATRON), cluster()),
            "Megatron is not run by the script that advisor writes; give --trainer megatron",
        ),
        (
            lambda: render(model(), Job(), plan(), cluster(), weights_from="nul\0"),
            r"the model 'nul\x00' cannot be written on a command line; rename its folder",
        ),
        (
            lambda: render(model(), Job(), plan(), cluster(), weights_from="\udc80"),
            r"the model '\udc80' cannot be written on a command line; rename its folder",
        ),
    ],
)
def test_what_could_not_start_is_refused(attempt: Callable[[], Launch], message: str) -> None:
    with pytest.raises(SpecError) as refused:
        attempt()

    assert str(refused.value) == message


def test_writing_makes_missing_folders_and_an_executable_script(launch: Launch, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deeper"

    written = write(launch, folder)

    assert [path.name for path in written] == ALL_FILES
    assert {path.name for path in folder.iterdir()} == set(ALL_FILES)
    for path, file in zip(written, launch.files, strict=True):
        assert path.read_bytes() == file.text.encode()
        assert os.access(path, os.X_OK) == (path.name == "run.sh")


def test_nothing_is_overwritten_without_force(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("mine")

    with pytest.raises(WriteError) as refused:
        write(launch, tmp_path)

    assert str(refused.value) == f"{tmp_path / 'run.sh'} exists; give --force to overwrite it, or another folder"
    assert [path.name for path in tmp_path.iterdir()] == ["run.sh"]
    assert (tmp_path / "run.sh").read_text() == "mine"

    write(launch, tmp_path, force=True)
    assert (tmp_path / "run.sh").read_text() == text_of(launch, "run.sh")


def test_the_same_files_may_lie_there_already(launch: Launch, tmp_path: Path) -> None:
    write(launch, tmp_path)
    (tmp_path / "train.py").unlink()
    before = (tmp_path / "run.sh").stat()

    written = write(launch, tmp_path)

    assert [path.name for path in written] == ALL_FILES
    assert all(path.is_file() for path in written)
    assert (tmp_path / "run.sh").stat() == before


def test_a_dangling_link_counts_as_existing(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "run.sh").symlink_to(tmp_path / "nowhere")

    with pytest.raises(WriteError, match="exists; give --force"):
        write(launch, tmp_path)


def test_a_file_in_place_of_the_folder_is_refused(launch: Launch, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")

    for folder in (file, file / "below"):
        with pytest.raises(WriteError, match="give another folder"):
            write(launch, folder, force=True)

    assert file.read_text() == "mine"


def test_a_folder_in_place_of_a_file_is_refused_even_with_force(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "train.py").mkdir()

    with pytest.raises(WriteError, match="is a folder, where a file of that name would stand"):
        write(launch, tmp_path, force=True)

    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_a_folder_that_no_system_accepts_is_an_explained_failure(launch: Launch, tmp_path: Path) -> None:
    for folder in (tmp_path / "nul\0", tmp_path / ("long" * 100)):
        with pytest.raises(WriteError, match=r"cannot write .*; give another folder"):
            write(launch, folder)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nth", range(len(ALL_FILES)))
def test_a_full_disk_leaves_nothing_behind(
    nth: int, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files._write_new
    calls = iter(range(len(ALL_FILES)))

    def full(path: Path, text: str) -> None:
        real(path, text[:10])
        if next(calls) == nth:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_write_new", full)

    with pytest.raises(WriteError) as failed:
        write(launch, tmp_path / "new" / "deeper")

    assert (
        str(failed.value) == f"cannot write {tmp_path / 'new' / 'deeper'}: No space left on device; give another folder"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_failure_half_way_into_place_takes_the_new_files_back(
    launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def fails_at_the_script(self: Path, target: Path) -> Path:
        if target.name == "run.sh":
            raise PermissionError(13, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", fails_at_the_script)

    with pytest.raises(WriteError, match="Permission denied"):
        write(launch, tmp_path)

    assert list(tmp_path.iterdir()) == []


def test_a_launch_shows_its_command_with_quotes_where_they_are_needed() -> None:
    launch = Launch(("run", "two words"), {"SETTING": "a b"}, (LaunchFile("x", str),))

    assert launch.shell() == "SETTING='a b' run 'two words'"


def test_headers_say_where_each_input_came_from_and_when_they_were_written() -> None:
    inputs = (Input("gpu", "Test-80GB", "found"), Input("gpus", 2, "given"), Input("seq-len", 2048, "assumed"))

    launch = render(model(), Job(), plan(), cluster(), inputs=inputs, date=datetime.date(2026, 1, 2))

    for name in ("accelerate.yaml", "run.sh"):
        header = text_of(launch, name).splitlines()
        assert "# Given: gpus 2." in header
        assert "# Found on the machine that wrote this: gpu Test-80GB." in header
        assert "# Assumed: seq-len 2048." in header
        assert "# Date: 2026-01-02." in header
        assert f"# Names and keys as in {files.WRITTEN_FOR}." in header


def test_a_later_day_alone_changes_no_file_that_is_there(tmp_path: Path) -> None:
    first, second = (render(model(), Job(), plan(), cluster(), date=datetime.date(2026, 1, day)) for day in (2, 3))
    write(first, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    write(second, tmp_path)

    assert first != second
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_auto_is_kept_only_for_a_trainer_that_fills_it_in() -> None:
    kept = render(model(), Job(trainer="hf"), plan(Strategy.ZERO2), cluster(), keep_auto=True)

    assert json.loads(text_of(kept, "ds_config.json"))["train_batch_size"] == "auto"
    for job, chosen in ((Job(), plan(Strategy.ZERO2)), (Job(trainer="hf"), plan())):
        with pytest.raises(SpecError, match="completes no DeepSpeed JSON; auto can stay for zero1, zero2 or zero3"):
            render(model(), job, chosen, cluster(), keep_auto=True)
