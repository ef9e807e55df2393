"""The optimizers that train.py can be told to take train."""

from __future__ import annotations

import copy
from typing import Any, get_args

import pytest

from advisor.specs.job import Optimizer

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from advisor.launch.train_optimizers import NAMES, make_optimizer  # noqa: E402 - they import torch

pytestmark = pytest.mark.filterwarnings("ignore")


class Small(torch.nn.Module):  # type: ignore[name-defined,misc]
    """An embedding, a matrix, a norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 8)
        self.matrix = torch.nn.Linear(8, 16, bias=False)
        self.norm = torch.nn.LayerNorm(16)
        self.head = torch.nn.Linear(16, 7, bias=False)

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, ids: Any) -> Any:
        return self.head(self.norm(self.matrix(self.embedding(ids))))


def loss_of(model: Any) -> Any:
    ids = torch.arange(7)
    return torch.nn.functional.cross_entropy(model(ids), ids.flip(0))


def stepped(model: Any, optimizer: Any) -> float:
    optimizer.zero_grad()
    loss = loss_of(model)
    loss.backward()
    optimizer.step()
    return float(loss)


def test_train_py_can_be_told_every_optimizer() -> None:
    assert set(NAMES) == set(get_args(Optimizer))


@pytest.mark.parametrize(
    "name", ["adamw-fused", "sgd-momentum", "adamw-8bit-paged", "lion", "adafactor", "muon", "galore"]
)
def test_a_few_steps_lower_the_loss_and_move_every_weight(name: str) -> None:
    if name == "galore":
        pytest.importorskip("galore_torch")
    torch.manual_seed(0)
    model = Small()
    before = copy.deepcopy(model)
    optimizer = make_optimizer(name, model, learning_rate=0.01, galore_rank=4)

    losses = [stepped(model, optimizer) for _ in range(10)]

    assert losses[-1] < losses[0]
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_muon_goes_on_from_a_saved_state_and_takes_a_new_rate() -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = make_optimizer("muon", model, learning_rate=0.01)
    stepped(model, optimizer)
    other = copy.deepcopy(model)
    again = make_optimizer("muon", other, learning_rate=0.5)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in (*optimizer.param_groups, *again.param_groups):
        group["lr"] = 0.02

    stepped(model, optimizer), stepped(other, again)

    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_muon_has_the_layers_matrices_alone() -> None:
    model = Small()
    muon, adamw = make_optimizer("muon", model, learning_rate=0.01).param_groups

    assert [id(each) for each in muon["params"]] == [id(model.matrix.weight)]
    assert len(adamw["params"]) == 4


def test_an_unknown_name_ends_the_program_with_the_known_ones() -> None:
    with pytest.raises(SystemExit, match=r"must be one of adamw-fused, .* got 'adam'"):
        make_optimizer("adam", Small(), learning_rate=0.01)
