"""Which rule is an optimizer's."""

from __future__ import annotations

from advisor.specs.job import Job
from advisor.step.optimizers.adafactor import Adafactor
from advisor.step.optimizers.bitsandbytes import SETTINGS, Blockwise
from advisor.step.optimizers.matrices import GaLore, Muon
from advisor.step.optimizers.rule import Rule
from advisor.step.optimizers.torch_native import AdamW, Sgd

RULES: dict[str, type[Rule]] = {
    "adafactor": Adafactor,
    "sgd": Sgd,
    "sgd-momentum": Sgd,
    "muon": Muon,
    "galore": GaLore,
    **dict.fromkeys(SETTINGS, Blockwise),
}


def rule_of(job: Job) -> Rule:
    """The rule of the job's optimizer."""
    return RULES.get(job.optimizer, AdamW)(job)
