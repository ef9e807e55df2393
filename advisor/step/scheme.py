"""What a strategy adds to the step: who holds what, what is gathered and reduced, and when.

``build.py`` walks the model's recordings and asks the scheme at each turn. Every answer is a sequence of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from advisor.errors import SpecError
from advisor.specs.job import Job
from advisor.specs.model import AnyLayer, ModelSpec, Parameter
from advisor.specs.plan import Count, Plan
from advisor.step.optimizers.rule import Rule
from advisor.step.optimizers.rules import rule_of
from advisor.step.program import Amount, Node
from advisor.step.recording import FORMULAS, Mode, Source, mode_of

Nodes = Sequence[Node]

SCALES = "scales of weights in four bits"


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of the model whose parameters are used together."""

    kind: Literal["embedding", "layer", "head"]
    parameters: tuple[Parameter, ...]
    layer: AnyLayer | None = None
    number: int | None = None
    """Which layer it is, counted from the embedding; where it stands for several that are alike, one of them."""

    @property
    def of_layer(self) -> AnyLayer:
        """The layer that this part is."""
        if self.layer is None:
            raise SpecError(f"the {self.kind} is no layer")
        return self.layer

    @property
    def numel(self) -> int:
        return sum(parameter.stored_numel for parameter in self.parameters)

    @property
    def trained(self) -> tuple[Parameter, ...]:
        """The parameters that are trained."""
        return tuple(parameter for parameter in self.parameters if parameter.trained)


@dataclass(frozen=True, slots=True, eq=False)
class MicroStep:
    """One forward and backward pass within an optimizer step."""

    first: Amount
    """1 where no gradient has been accumulated before, else 0."""
    last: bool
    """Whether the optimizer steps after it."""


@dataclass(frozen=True, eq=False)
class Scheme:
    """A strategy's part in the step; this one adds nothing anywhere."""

    model: ModelSpec
    job: Job
    plan: Plan
    rank: Count = 0
    """Which of the plan's ranks is laid out, for strategies under which ranks differ."""
    source: Source = FORMULAS
    """What the parts of the model do."""

    def contenders(self, ranks: int) -> NDArray[Any]:
        """The ranks of *ranks* that can be the fullest; one where all are alike."""
        return np.zeros(1, dtype=np.int64)

    @property
    def micro_steps_differ(self) -> bool:
        """Whether layers fare otherwise in one micro-step's backward than in another's."""
        return True

    @property
    def layers_apart_differ(self) -> bool:
        """Whether at least those do that fare otherwise than their neighbours."""
        return self.micro_steps_differ

    @property
    def parameter_bytes(self) -> int:
        """Bytes per element of the model that the modelling code computes with, but for what is trained beside it."""
        return self.job.model_bytes

    @property
    def trained_bytes(self) -> int:
        """Bytes per element of the trained weights as the modelling code finds them."""
        return self.parameter_bytes if self.job.method == "full" else self.job.parameter_bytes

    @property
    def built_bytes(self) -> int:
        """Bytes per element of the model as it is built."""
        return self.job.model_bytes

    @cached_property
    def optimizer(self) -> Rule:
        """What updates the weights."""
        return rule_of(self.job)

    @cached_property
    def mode(self) -> Mode:
        """In which formats the modelling code runs."""
        mode = mode_of(self.job, self.parameter_bytes, self.autocasts_half, self.plan.sequence_cut)
        if self.job.method == "full":
            return mode
        normed = self.model.embedding_norm == "layer"
        return replace(mode, adapter_bytes=self.trained_bytes, embedding_norm=normed)

    @property
    def uncut_bytes(self) -> int:
        """Frozen weights that every rank has whole before a framework cuts them: those beside four bits, and these.

        transformers 5.23 spares no rank of quantized weights (modeling_utils.py ``get_init_context``,
        ``_move_missing_keys_from_meta_to_device``).
        """
        if self.job.method != "qlora":
            return 0
        return sum(each.stored_numel for each in self.model.frozen) * self.job.compute_bytes

    @property
    def tables_bytes(self) -> int:
        """Bytes of the model's buffers, which keep the formats that they are built in."""
        return self.model.tables_bytes(self.built_bytes)

    @property
    def autocasts_half(self) -> bool:
        """Whether forward runs under autocast though its weights have the compute format already."""
        return False

    @cached_property
    def layers_apart(self) -> frozenset[int]:
        """Numbers of the layers that fare otherwise than their neighbours of one kind. The others stand together."""
        return frozenset()

    @property
    def tensor_sizes(self) -> Mapping[str, Callable[[], Iterable[int]]]:
        """Sizes of the tensors that are taken together under a label, for a single plan; one where nothing is said."""
        return {}

    @property
    def streams(self) -> Mapping[str, str]:
        """CUDA streams, other than the one that computes, from whose memory a label is taken."""
        return {}

    def states(self) -> Nodes:
        """What is held between steps, in the order in which it is made, with what making it takes."""
        return ()

    def in_forward(self, micro: MicroStep) -> Scheme:
        """The scheme as it is in the forward pass of *micro*; where the same object, so is the pass."""
        return self

    def begin_forward(self) -> Nodes:
        return ()

    def before_forward(self, part: Part) -> Nodes:
        return ()

    def after_forward(self, part: Part) -> Nodes:
        return ()

    def end_forward(self) -> Nodes:
        return ()

    def before_backward(self, part: Part, micro: MicroStep) -> Nodes:
        return ()

    def logits_gradient(self, micro: MicroStep) -> Nodes:
        """The gradient of the logits is there, and the output matrix comes next."""
        return ()

    def first_gradient(self, micro: MicroStep) -> Nodes:
        """Before the first weight gradient of a backward pass is handed over."""
        return ()

    def gradient(self, part: Part, parameter: Parameter, size_bytes: int, micro: MicroStep) -> Nodes:
        """*part*'s gradient of *size_bytes* is handed over; its memory is the scheme's from here on."""
        return ()

    def after_backward(self, part: Part, micro: MicroStep) -> Nodes:
        return ()

    def end_backward(self, micro: MicroStep) -> Nodes:
        return ()

    def update(self) -> Nodes:
        """The optimizer step."""
        return ()

    def host(self) -> Nodes:
        """What one rank holds in host memory. Weights are loaded straight onto the device, so none of them stay."""
        return ()

    def nvme(self) -> Nodes:
        """What one rank keeps on its machine's NVMe."""
        return ()

    def host_once(self) -> Nodes:
        """What only one rank of a machine holds in host memory."""
        return ()
