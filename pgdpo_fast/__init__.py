"""Fast, exact preference optimization for video diffusion models.

`import pgdpo_fast as pf` needs torch alone; everything else is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as below, for type checkers and editors
    from pgdpo_fast import diffusion, errors, objectives
    from pgdpo_fast.loss import (
        NoisedTarget,
        PackedReference,
        PreferenceLoss,
        PreferenceLossOutput,
        ReferenceErrors,
        SampleErrors,
        paired_errors,
        preference_loss,
        reference_errors,
        sample_errors,
    )
    from pgdpo_fast.objectives import (
        DPO,
        DPOP,
        IPO,
        PGDPO,
        RPO,
        SDPO,
        SFT,
        DPOClipMask,
        DPOShift,
        GroupErrors,
        Objective,
        RobustDPO,
        Safeguarded,
        SLiC,
        Sum,
        beta_from_sum,
        beta_without_half,
        videodpo_pair_weight,
    )

__version__ = "0.1.0"

# Public name -> the module that defines it. Resolved on first use, so importing the package stays cheap.
_PUBLIC = {
    "PreferenceLoss": "loss",
    "PreferenceLossOutput": "loss",
    "paired_errors": "loss",
    "preference_loss": "loss",
    "reference_errors": "loss",
    "sample_errors": "loss",
    "NoisedTarget": "loss",
    "PackedReference": "loss",
    "ReferenceErrors": "loss",
    "SampleErrors": "loss",
    "DPO": "objectives",
    "DPOClipMask": "objectives",
    "DPOP": "objectives",
    "DPOShift": "objectives",
    "IPO": "objectives",
    "Objective": "objectives",
    "PGDPO": "objectives",
    "RPO": "objectives",
    "RobustDPO": "objectives",
    "Safeguarded": "objectives",
    "SDPO": "objectives",
    "SFT": "objectives",
    "SLiC": "objectives",
    "Sum": "objectives",
    "GroupErrors": "objectives",
    "videodpo_pair_weight": "objectives",
    "beta_from_sum": "objectives",
    "beta_without_half": "objectives",
}
_MODULES = ("diffusion", "errors", "objectives")
__all__ = [
    "DPO",
    "DPOClipMask",
    "DPOP",
    "DPOShift",
    "GroupErrors",
    "IPO",
    "NoisedTarget",
    "Objective",
    "PGDPO",
    "PackedReference",
    "PreferenceLoss",
    "PreferenceLossOutput",
    "RPO",
    "ReferenceErrors",
    "RobustDPO",
    "SDPO",
    "SFT",
    "SLiC",
    "Safeguarded",
    "SampleErrors",
    "Sum",
    "beta_from_sum",
    "beta_without_half",
    "diffusion",
    "errors",
    "objectives",
    "paired_errors",
    "preference_loss",
    "reference_errors",
    "sample_errors",
    "videodpo_pair_weight",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})
