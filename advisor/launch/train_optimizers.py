"""The optimizers that train.py can be told to take, each over all parameters of a model that are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ADAMW: dict[str, dict[str, Any]] = {
    "adamw-fused": {"fused": True},
    "adamw-foreach": {"foreach": True},
    "adamw-loop": {"foreach": False, "fused": False},
}
SGD: dict[str, dict[str, Any]] = {"sgd": {}, "sgd-momentum": {"momentum": 0.9}}
# bitsandbytes: the class and what it is given.
BLOCKWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw-8bit": ("AdamW", {"optim_bits": 8}),
    "adamw-paged": ("AdamW", {"optim_bits": 32, "is_paged": True}),
    "adamw-8bit-paged": ("AdamW", {"optim_bits": 8, "is_paged": True}),
    "lion": ("Lion", {"optim_bits": 32}),
    "lion-8bit": ("Lion", {"optim_bits": 8}),
}
NAMES = (*ADAMW, *SGD, *BLOCKWISE, "adafactor", "muon", "galore")
GALORE: dict[str, Any] = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


def refuse_unknown(name: str) -> None:
    """End the program where *name* is no optimizer's."""
    if name not in NAMES:
        raise SystemExit(f"--optimizer must be one of {', '.join(NAMES)}, got {name!r}")


def make_optimizer(
    name: str, model: torch.nn.Module, *, learning_rate: float, weight_decay: float = 0.0, galore_rank: int = 128
) -> torch.optim.Optimizer:
    """The optimizer *name* over the parameters of *model* that are trained."""
    refuse_unknown(name)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rates: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
    if name in ADAMW:
        return torch.optim.AdamW(trained, **rates, **ADAMW[name])
    if name in SGD:
        return torch.optim.SGD(trained, **rates, **SGD[name], foreach=True)
    if name in BLOCKWISE:
        kind, settings = BLOCKWISE[name]
        found: torch.optim.Optimizer = getattr(_bitsandbytes(), kind)(trained, **rates, **settings)
        return found
    if name == "adafactor":
        from transformers.optimization import Adafactor

        make: Any = Adafactor
        built: torch.optim.Optimizer = make(trained, **rates, scale_parameter=False, relative_step=False)
        return built
    matrices = matrices_of_layers(model)
    apart = set(map(id, matrices))
    others = [parameter for parameter in trained if id(parameter) not in apart]
    if name == "muon":
        return MuonBesideAdamW(matrices, others, learning_rate, weight_decay)
    projected = {"params": matrices, "rank": galore_rank, **GALORE}
    groups = [{"params": others}, projected] if others else [projected]
    adamw: torch.optim.Optimizer = _galore()(groups, **rates, no_deprecation_warning=True)
    return adamw


def matrices_of_layers(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained matrices that neither embed tokens nor make logits."""
    tables = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outside = set(map(id, [*tables, *([head.weight] if head is not None else [])]))
    return [each for each in model.parameters() if each.requires_grad and each.ndim == 2 and id(each) not in outside]


class MuonBesideAdamW(torch.optim.Optimizer):
    """Muon for matrices and fused AdamW for all else, as one optimizer."""

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        others: list[torch.nn.Parameter],
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        rates: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay}
        # Scaled so that a rate that suits AdamW suits it too (Liu et al., arXiv:2502.16982).
        self.parts: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, **rates, adjust_lr_fn="match_rms_adamw")]
        if others:
            self.parts.append(torch.optim.AdamW(others, **rates, fused=True))
        super().__init__([group for part in self.parts for group in part.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.state, part.param_groups = self.state, [group]  # which a loaded checkpoint replaces
            part.step()


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import optim
    except ImportError:
        raise SystemExit("optimizers in eight bits, paged ones and Lion need: pip install bitsandbytes") from None
    return optim


def _galore() -> Any:
    try:
        from galore_torch import GaLoreAdamW  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise SystemExit("--optimizer galore needs: pip install galore-torch") from None
    return GaLoreAdamW
