"""No name is taken for more than a name, in any trainer's file or command."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings

from advisor.errors import SpecError
from advisor.launch.files import Launch
from advisor.launch.targets import Target
from advisor.specs.job import Trainer
from advisor.specs.plan import Plan, Strategy
from launch.examples import hostile_text, plan
from launch.started import Started
from launch.trainers.told import FILES, TRAINERS, launch_for, told

HOLDS_THE_MODEL = {
    "trl": "model_name_or_path",
    "llama-factory": "model_name_or_path",
    "axolotl": "base_model",
}
WORD_OF_THE_MODEL = {
    "hf": "--model_name_or_path={}",
    "open-r1": "--model_name_or_path={}",
    "megatron": "--tokenizer-model={}",
}


def plan_for(trainer: Trainer) -> Plan:
    return plan({"torchtitan": Strategy.FSDP, "megatron": Strategy.MEGATRON}.get(trainer, Strategy.ZERO2))


def launched(trainer: Trainer, word: str, weights_from: str) -> Launch:
    return launch_for(trainer, plan_for(trainer), f"--note={word}", weights_from=weights_from)


@pytest.mark.parametrize("trainer", TRAINERS)
@given(weights_from=hostile_text, word=hostile_text, added=hostile_text)
@example(weights_from="- --a 'b' \"c\"\n$(touch pwned)", word="\n", added="-")
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_words_arrive_as_they_are(
    trainer: Trainer, tmp_path: Path, weights_from: str, word: str, added: str
) -> None:
    launch = launched(trainer, word, weights_from)

    started = Started(tmp_path, launch, added)

    assert started.result.returncode == 0, started.result.stderr
    arguments = started.arguments
    assert arguments[-2:] == [f"--note={word}", added]
    if trainer in FILES:
        assert told(trainer, launch)[HOLDS_THE_MODEL[trainer]] == weights_from
    elif trainer in WORD_OF_THE_MODEL:
        assert WORD_OF_THE_MODEL[trainer].format(weights_from) in arguments
    assert list(started.elsewhere.iterdir()) == []
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("target", ["accelerate", "deepspeed", "torchrun"])
def test_every_path_leads_to_a_file(trainer: Trainer, target: Target, nodes: int, tmp_path: Path) -> None:
    if trainer in ("torchtitan", "megatron") and target != "torchrun":
        return
    launch = launch_for(trainer, plan_for(trainer), target=target, nodes=nodes)

    started = Started(tmp_path, launch, NODE_RANK="1", MAIN_ADDRESS="10.0.0.1")

    assert started.result.returncode == 0, started.result.stderr
    named = {word.rpartition("=")[2] for word in started.arguments if str(tmp_path) in word}
    assert all(Path(each).is_file() for each in named)
    written = {str(started.files / name) for name in [FILES.get(trainer), "torchtitan.toml"] if name}
    assert named & written or trainer in ("hf", "open-r1", "megatron")


@pytest.mark.parametrize("trainer", ["torchtitan", "megatron"])
@pytest.mark.parametrize("target", ["accelerate", "deepspeed"])
def test_what_spreads_a_model_itself_wants_torchrun(trainer: Trainer, target: Target) -> None:
    with pytest.raises(SpecError, match=f"{trainer} spreads the model itself; take the target torchrun or slurm"):
        launch_for(trainer, plan_for(trainer), target=target)
