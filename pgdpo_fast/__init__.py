"""Fast, exact preference optimization for video diffusion models.

`import pgdpo_fast as pf` needs torch alone; everything else is imported when first used.
"""

from importlib import import_module

__version__ = "0.1.0"

# Public name -> the module that defines it. Resolved on first use, so importing the package stays cheap.
_PUBLIC = {
    **dict.fromkeys(
        (
            "PreferenceLoss",
            "PreferenceLossOutput",
            "paired_errors",
            "preference_loss",
            "reference_errors",
            "NoisedTarget",
            "PackedReference",
            "ReferenceErrors",
        ),
        "loss",
    ),
    **dict.fromkeys(
        (
            "DPO",
            "DPOClipMask",
            "DPOP",
            "DPOShift",
            "IPO",
            "Objective",
            "PGDPO",
            "Safeguarded",
            "SDPO",
            "SFT",
            "SLiC",
            "GroupErrors",
            "videodpo_pair_weight",
            "beta_from_sum",
            "beta_without_half",
        ),
        "objectives",
    ),
}
_MODULES = ("diffusion", "errors", "objectives")
__all__ = sorted(_PUBLIC)


def __getattr__(name):
    if name in _PUBLIC:
        value = getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_PUBLIC, *_MODULES})
