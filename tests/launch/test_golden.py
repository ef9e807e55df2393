"""All that is written, whole, for each target, trainer and strategy, as it was last reviewed.

``pytest tests/launch/test_golden.py --update-golden`` writes ``golden/`` anew; ``git diff`` shows what changed.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from advisor.catalog import trainers
from advisor.launch import files
from advisor.launch.files import Launch, render
from advisor.launch.targets import TARGETS, Target
from advisor.launch.trainers.advisor import FILES
from advisor.specs.job import Trainer
from advisor.specs.plan import Checkpointing, FsdpSettings, Offload, Plan, Strategy
from advisor.specs.question import Input
from launch.examples import PLANS_OF_EVERY_KIND, cluster, gpu, model, plan
from launch.trainers.told import TRAINERS, job_for

GOLDEN = Path(__file__).with_name("golden")
CONFIGURATIONS = ("accelerate.yaml", "ds_config.json")
INPUTS = (Input("gpu", "A100-SXM4-80GB", "found"), Input("seq-len", 2048, "assumed"))
USUAL = plan(Strategy.ZERO2, gpus=4, checkpointing=Checkpointing.FULL)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan by a target and a trainer."""

    plan: Plan = USUAL
    target: Target | None = None
    trainer: Trainer = "advisor"
    nodes: int = 1

    def launch(self) -> Launch:
        machines = replace(cluster(int(self.plan.gpus), self.nodes), gpu=gpu("A100-SXM4-80GB"))
        name = "Llama-3.1-8B" if self.trainer == "torchtitan" else "Qwen2.5-1.5B"
        job, weights_from = job_for(self.trainer), f"org/{name}"
        return render(
            model(name), job, self.plan, machines, weights_from=weights_from, inputs=INPUTS, target=self.target
        )


BY_TARGET: dict[str, Case] = {target: Case(target=target, nodes=2) for target in TARGETS} | {
    "accelerate-one-machine": Case(target="accelerate"),
    "torchrun-fsdp": Case(target="torchrun", plan=plan(Strategy.FSDP, gpus=4)),
    "slurm-offload": Case(target="slurm", nodes=2, plan=plan(Strategy.ZERO3, gpus=4, offload=Offload.OPTIMIZER)),
    "ray-ddp": Case(target="ray", nodes=2, plan=plan(gpus=4)),
}
OF_THEIR_OWN: dict[str, Plan] = {
    "open-r1": plan(Strategy.ZERO2, gpus=4, micro_batch=8, checkpointing=Checkpointing.FULL),
    "torchtitan": plan(Strategy.HSDP, gpus=4, fsdp=FsdpSettings(shard_ranks=2)),
    "megatron": plan(Strategy.MEGATRON, gpus=4, tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
}
BY_TRAINER = {
    trainer: Case(trainer=trainer, **({"plan": OF_THEIR_OWN[trainer]} if trainer in OF_THEIR_OWN else {}))
    for trainer in TRAINERS
}
BY_STRATEGY = {kind: Case(plan=chosen) for kind, chosen in PLANS_OF_EVERY_KIND.items()}


@pytest.fixture(autouse=True)
def assumed_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden files hold whatever is installed, and for the next version of this package too."""
    monkeypatch.setattr(trainers, "installed", lambda package: None)
    monkeypatch.setattr(files, "__version__", "(version)")


@pytest.mark.parametrize("name", BY_TARGET)
def test_the_files_of_each_target(name: str, pytestconfig: pytest.Config) -> None:
    assert_golden(GOLDEN / "targets" / name, whole(BY_TARGET[name].launch()), pytestconfig)


@pytest.mark.parametrize("name", BY_TRAINER)
def test_the_files_of_each_trainer(name: str, pytestconfig: pytest.Config) -> None:
    assert_golden(GOLDEN / "trainers" / name, whole(BY_TRAINER[name].launch()), pytestconfig)


@pytest.mark.parametrize("name", BY_STRATEGY)
def test_the_configurations_of_each_strategy(name: str, pytestconfig: pytest.Config) -> None:
    written = whole(BY_STRATEGY[name].launch())

    held = {file: written[file] for file in CONFIGURATIONS if file in written}
    assert_golden(GOLDEN / "strategies" / name, held, pytestconfig)


@pytest.mark.parametrize(
    ("group", "cases"), [("targets", BY_TARGET), ("trainers", BY_TRAINER), ("strategies", BY_STRATEGY)]
)
def test_no_golden_file_is_of_a_case_that_is_gone(
    group: str, cases: dict[str, Case], pytestconfig: pytest.Config
) -> None:
    gone = {folder.name for folder in (GOLDEN / group).iterdir()} - cases.keys()

    if pytestconfig.getoption("--update-golden"):
        for name in gone:
            shutil.rmtree(GOLDEN / group / name)
    else:
        assert not gone


def whole(launch: Launch) -> dict[str, str]:
    """Every file by its name, less the programs, which lie in the package as they are, and what to type."""
    written = {file.name: file.text for file in launch.files if file.name not in FILES}
    return written | {"command.txt": "".join(f"{line}\n" for line in (launch.shell(), *launch.notes))}


def assert_golden(folder: Path, written: dict[str, str], config: pytest.Config) -> None:
    if config.getoption("--update-golden"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, text in written.items():
            (folder / name).write_text(text, encoding="utf-8")

    assert {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()} == written
