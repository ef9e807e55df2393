"""Which checkpoint train.py goes on from, and when it refuses to."""

from __future__ import annotations

import importlib
import itertools
from argparse import Namespace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from launch.test_train import arguments, rank

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def checkpoint() -> ModuleType:
    return importlib.import_module("advisor.launch.train_checkpoint")


class Accelerator(SimpleNamespace):
    """The first of two processes, which notes what it loads, and may be killed while it saves."""

    def __init__(self, processes: int = 2, dies: bool = False) -> None:
        kind = SimpleNamespace(value="MULTI_GPU")
        super().__init__(num_processes=processes, distributed_type=kind, is_main_process=True, dies=dies, loaded=[])

    def wait_for_everyone(self) -> None: ...

    def save_state(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text("half")
        if self.dies:
            raise KeyboardInterrupt
        (folder / "weights").write_text("whole")

    def load_state(self, folder: str) -> None:
        self.loaded.append(Path(folder).name)


def asked(output: Path, **changed: Any) -> Namespace:
    return arguments(output=output, dataset=None, **{"resume": "auto"} | changed)


def test_the_newest_whole_checkpoint_is_the_one_to_go_on_from(checkpoint: ModuleType, tmp_path: Path) -> None:
    checkpoint.save_checkpoint(Accelerator(), asked(tmp_path), 9)
    checkpoint.save_checkpoint(Accelerator(), asked(tmp_path), 10)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(Accelerator(dies=True), asked(tmp_path), 11)
    resumed = Accelerator()

    assert checkpoint.resume(resumed, asked(tmp_path), None) == 10
    assert resumed.loaded == ["checkpoint-10"]
    assert not (tmp_path / "checkpoint-9").exists()


def test_what_a_killed_run_left_half_written_does_not_stop_the_next(checkpoint: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(Accelerator(dies=True), asked(tmp_path), 3)
    checkpoint.save_checkpoint(Accelerator(), asked(tmp_path), 3)
    checkpoint.save_checkpoint(Accelerator(), asked(tmp_path), 3)

    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert (tmp_path / "checkpoint-3" / "weights").read_text() == "whole"


def test_a_later_checkpoint_survives_a_run_that_went_on_from_an_earlier_one(
    checkpoint: ModuleType, tmp_path: Path
) -> None:
    for step in (50, 20):
        checkpoint.save_checkpoint(Accelerator(), asked(tmp_path), step)

    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-20", "checkpoint-50"}


def test_without_a_checkpoint_training_starts_at_the_beginning(checkpoint: ModuleType, tmp_path: Path) -> None:
    assert checkpoint.resume(Accelerator(), asked(tmp_path / "none"), None) == 0
    assert checkpoint.resume(Accelerator(), asked(tmp_path, resume=None), None) == 0


@pytest.mark.parametrize(
    ("processes", "changed", "complaint"),
    [
        (4, {}, "checkpoint-3 was saved with processes 2, this run has 4: make them equal"),
        (2, {"micro_batch": 1}, "checkpoint-3 was saved with micro_batch 2, this run has 1: make them equal"),
        (2, {"seed": 7}, "checkpoint-3 was saved with seed 0, this run has 7: make them equal"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    processes: int, changed: dict[str, int], complaint: str, checkpoint: ModuleType, tmp_path: Path
) -> None:
    checkpoint.save_checkpoint(Accelerator(), asked(tmp_path), 3)
    other = Accelerator(processes)

    with pytest.raises(SystemExit, match=complaint):
        checkpoint.resume(other, asked(tmp_path, **changed), None)

    assert not other.loaded


def test_a_folder_that_is_no_checkpoint_is_refused(checkpoint: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"is no whole checkpoint of train.py: it has no progress.json"):
        checkpoint.resume(Accelerator(), asked(tmp_path, resume=str(tmp_path)), None)


def test_an_optimizers_state_is_made_without_moving_a_weight(checkpoint: ModuleType) -> None:
    weight = torch.nn.Parameter(torch.randn(3, 5))
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)

    checkpoint.make_state(optimizer)

    assert torch.equal(weight, before)
    assert weight.grad is None
    assert optimizer.state[weight].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("source", ["random", "text"])
def test_the_data_go_on_where_they_stopped(source: str, tmp_path: Path) -> None:
    data = importlib.import_module("advisor.launch.train_data")
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(64))))

    class Numbers:
        eos_token_id = sep_token_id = mask_token_id = unk_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    tokenizer = Numbers() if source == "text" else None
    words = (rank(1), arguments(dataset=str(tmp_path / "numbers.txt")), tokenizer, 256)

    whole = [batch["input_ids"] for batch in itertools.islice(data.make_batches(*words), 8)]
    rest = [batch["input_ids"] for batch in itertools.islice(data.make_batches(*words, skipped=5), 3)]

    assert torch.equal(torch.stack(rest), torch.stack(whole[5:]))
    assert not torch.equal(whole[0], whole[5])
