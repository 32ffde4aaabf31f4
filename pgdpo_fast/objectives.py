"""What each preference objective means: a frozen dataclass of hyper-parameters and one pure function on errors.

Everything here is plain torch on `[B, G]` tensors (B pairs, G groups of latent elements), works in float64 and is
differentiable, so it is the oracle for every kernel. With p the policy's prediction, q the reference's and y the
target, a group of M elements has

    error    e = mean (p - y)^2          gap     d = mean (p - y)^2 - (q - y)^2
    reward   r = -d                      margin  r_w - r_l           (w chosen, l rejected)

beta multiplies the mean over the group with the 1/2 of Diffusion-DPO: logits z = b (r_w - r_l), b = beta / 2.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pgdpo_fast.errors import ConfigError
from pgdpo_fast.named import Registry
from pgdpo_fast.options import number, wrong

# The ratio of PG-DPO has a pole; beyond this size every sigmoid of it is saturated, so it is cut here, never NaN.
RATIO_LIMIT = 1e6
# What float32, the kernels' arithmetic, holds.
MAX_NUMBER, MIN_EPS = 3e38, 1e-30


class GroupErrors(NamedTuple):
    """Per-group statistics of one batch of pairs, each `[B, G]`, float32 or float64.

    Policy errors are always there; gaps need a reference, `anchor` = mean (p_w - q_w)^2 (and
    `anchor_rejected` of the other video, which no objective here uses) needs its predictions, and
    `cross` = mean (p_w - y_w)(p_l - y_l) is computed only for objectives that ask for it.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    gap_chosen: Tensor | None = None
    gap_rejected: Tensor | None = None
    anchor: Tensor | None = None
    cross: Tensor | None = None
    anchor_rejected: Tensor | None = None

    @property
    def gaps(self) -> tuple[Tensor, Tensor]:
        """Of the chosen and the rejected video. Raises ValueError where there is no reference."""
        return _given(self.gap_chosen, "errors.gap_chosen"), _given(self.gap_rejected, "errors.gap_rejected")

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """As `gaps`, with the other sign."""
        chosen, rejected = self.gaps
        return -chosen, -rejected

    @property
    def margin(self) -> Tensor:
        """Chosen minus rejected reward. Raises as `gaps`."""
        chosen, rejected = self.gaps
        return rejected - chosen


def _given(x: Tensor | None, name: str) -> Tensor:
    if x is None:
        raise ValueError(f"{name}: expected a tensor, which this objective needs, got None")
    return x


class Terms(NamedTuple):
    """What an objective makes of the errors, each `[B, G]`: the loss (differentiable) and its weights."""

    loss: Tensor
    logits: Tensor
    alpha: Tensor
    gamma: Tensor
    importance: Tensor


class Parameters(NamedTuple):
    """The numbers of an objective as the kernels take them; those a formula does not use are zero."""

    half_beta: float = 0.0
    k1: float = 0.0
    k2: float = 0.0
    ipr_scale: float = 0.0  # ipr_weight times kappa
    eps: float = 0.0
    label_smoothing: float = 0.0
    target: float = 0.0  # IPO's 1 / (2 beta)
    delta: float = 0.0
    weight: float = 0.0
    penalty: float = 0.0
    shift: float = 0.0
    threshold: float = 0.0
    clip: float = 0.0
    mu: float = 0.0
    term_weight: float = 1.0


class Epilogue(NamedTuple):
    """An objective in the form the kernels take: which formula, its switches, its numbers.

    Those of a sum of objectives follow one another: TERM_KIND_BITS of `kind` and TERM_FLAG_BITS of `flags` for each
    term, the first lowest, and the `Parameters` of all terms in one tuple. Telemetry is the first term's.
    """

    kind: int
    flags: int
    parameters: tuple[float, ...]


# Epilogue kinds and flag bits, shared like the places of `Parameters` with kernels/epilogue.py and csrc/epilogue.h.
KIND_DPO, KIND_PGDPO, KIND_IPO, KIND_SLIC, KIND_SFT, KIND_DPOP, KIND_DPO_SHIFT, KIND_HINGE = range(8)
FLAG_ARS, FLAG_IPR_REWARD, FLAG_IPR_ANCHOR, FLAG_ATTACHED = 1, 2, 4, 8
FLAG_RATIO_SHIFT = 4  # two bits: index into RATIOS
FLAG_SAFEGUARD, FLAG_IMPORTANCE = 64, 128
FLAG_IPR_BETA = 256  # kappa is beta/2, so it follows beta_scale
FLAG_INSIDE = 512  # the importance weight multiplies the logits
FLAG_SAFEGUARD_BATCH = 1024  # lambda is one number of the batch
FLAG_TERM_WEIGHT = 2048  # term_weight is not one
FLAG_TERM_WEIGHT_BETA = 4096  # term_weight is in units of beta/2, so it follows beta_scale
TERM_KIND_BITS, TERM_FLAG_BITS, TERM_LIMIT = 8, 16, 4
RATIOS = ("logit", "symmetric", "abs", "signed")


def _number(
    objective: Any,
    name: str,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> None:
    where = f"{type(objective).__name__}.{name}"
    number(where, getattr(objective, name), low, high, open_low=open_low, open_high=open_high, limit=MAX_NUMBER)


def _half_beta(objective: Any, beta_scale: Tensor | None) -> Any:
    return 0.5 * objective.beta if beta_scale is None else 0.5 * objective.beta * beta_scale


def _choice(objective: Any, name: str, allowed: tuple) -> None:
    value = getattr(objective, name)
    if not isinstance(value, type(allowed[0])) or value not in allowed:
        raise wrong(f"{type(objective).__name__}.{name}", value, f"one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class Objective:
    """Base of all objectives: subclass it, write `terms`, and the objective runs fused through `pf.preference_loss`."""

    needs_cross: ClassVar[bool] = False
    # False where `terms` has no logits to tell of: in a sum, the telemetry is then another term's.
    has_logits: ClassVar[bool] = True
    _names_beta_scale: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._names_beta_scale = "beta_scale" in inspect.signature(cls.terms).parameters

    @property
    def needs_reference(self) -> bool:
        """Whether the objective uses gaps. Like the three below, a subclass may also give it as a class variable."""
        return True

    @property
    def needs_posterior_scale(self) -> bool:
        """Whether `terms` uses c_t of the pairs' timesteps."""
        return False

    @property
    def needs_anchor(self) -> bool:
        """Whether the objective uses mean (p_w - q_w)^2, hence the reference's predictions."""
        return False

    @property
    def outer(self) -> bool:
        """Whether the loss multiplies means over the groups of a sample, so that groups do not stand alone."""
        return False

    @property
    def unused_settings(self) -> frozenset[str]:
        """Settings that do not enter the formula as the others stand, such as `k1` where alpha is fixed."""
        return frozenset()

    @property
    def whole_batch(self) -> bool:
        """Whether a pair's gradient depends on the other pairs of the batch."""
        return False

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        """Loss and weights of every group.

        Args:
            errors: statistics, each `[B, G]`.
            posterior_scale: `[B, 1]`, c_t of the pair's timestep, for importance-weighted objectives.
            beta_scale: `[B, 1]` or `[B, G]`, what multiplies beta wherever it stands. Passed by name and only when
                the caller gave one; an objective may leave it out of its signature, and is then refused one.
        """
        raise NotImplementedError

    @property
    def takes_beta_scale(self) -> bool:
        """Whether `terms` takes `beta_scale`."""
        return self._names_beta_scale

    def epilogue(self) -> Epilogue | None:
        """The same formula for the kernels, or None: then `terms` runs in torch between two fused kernels."""
        return None

    def kernel_terms(self) -> tuple[Epilogue, ...] | None:
        """The terms of `epilogue`, one for each formula added up, or None."""
        epilogue = self.epilogue()
        return None if epilogue is None else (epilogue,)

    def __add__(self, other: Objective) -> Sum:
        return Sum((self, other)) if isinstance(other, Objective) else NotImplemented

    def __mul__(self, weight: float) -> Sum:
        return Sum((self,), (weight,)) if isinstance(weight, (int, float)) else NotImplemented

    __rmul__ = __mul__

    @staticmethod
    def result(
        loss: Tensor,
        logits: Tensor,
        alpha: Tensor | None = None,
        gamma: Tensor | None = None,
        importance: Tensor | None = None,
    ) -> Terms:
        """`Terms` with weights of one where none are given; what `terms` returns."""
        one = torch.ones_like(logits)
        return Terms(
            loss,
            logits,
            one if alpha is None else alpha,
            one if gamma is None else gamma,
            one if importance is None else importance,
        )


def terms_of(
    objective: Objective, errors: GroupErrors, posterior_scale: Tensor | None, beta_scale: Tensor | None
) -> Terms:
    """`objective.terms`, which gets `beta_scale` only where there is one."""
    if beta_scale is None:
        return objective.terms(errors, posterior_scale)
    return objective.terms(errors, posterior_scale, beta_scale=beta_scale)


def _packed(terms: tuple[Epilogue, ...] | None) -> Epilogue | None:
    """One epilogue of all terms, its numbers a plain tuple: torch 2.11 compiles no call that has another made by
    `_replace`."""
    if terms is None or len(terms) > TERM_LIMIT:
        return None
    kinds = (term.kind << TERM_KIND_BITS * k for k, term in enumerate(terms))
    flags = (term.flags << TERM_FLAG_BITS * k for k, term in enumerate(terms))
    return Epilogue(sum(kinds), sum(flags), tuple(number for term in terms for number in term.parameters))


def _weighted(term: Epilogue, weight: float) -> Epilogue:
    weight *= Parameters._make(term.parameters).term_weight
    flags = term.flags if weight == 1.0 else term.flags | FLAG_TERM_WEIGHT
    return term._replace(flags=flags, parameters=Parameters._make(term.parameters)._replace(term_weight=weight))


@dataclass(frozen=True)
class DPO(Objective):
    """Diffusion-DPO (Wallace et al. 2024, Eq. 14): softplus(-z), z = beta/2 (r_w - r_l).

    Label smoothing eps mixes in the flipped label: (1 - eps) softplus(-z) + eps softplus(z).
    VideoDPO is this objective with `pair_weight=videodpo_pair_weight(...)`.
    """

    beta: float = 5000.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _number(self, "beta", 0.0, open_low=True)
        _number(self, "label_smoothing", 0.0, 0.5)

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        logits = _half_beta(self, beta_scale) * errors.margin
        loss = -(1 - self.label_smoothing) * logsigmoid(logits) - self.label_smoothing * logsigmoid(-logits)
        return self.result(loss, logits)

    def epilogue(self) -> Epilogue:
        return Epilogue(KIND_DPO, 0, Parameters(half_beta=0.5 * self.beta, label_smoothing=self.label_smoothing))


@dataclass(frozen=True)
class RobustDPO(Objective):
    """Robust DPO (Chowdhury et al. 2024): ((1 - flip) softplus(-z) - flip softplus(z)) / (1 - 2 flip), z of DPO.

    Its expectation over labels flipped at the rate `flip` is the loss of DPO on the true ones. It is unbounded below.
    """

    beta: float = 5000.0
    flip: float = 0.1

    def __post_init__(self) -> None:
        _number(self, "beta", 0.0, open_low=True)
        _number(self, "flip", 0.0, 0.5, open_high=True)

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        logits = _half_beta(self, beta_scale) * errors.margin
        loss = self.flip * logsigmoid(-logits) - (1 - self.flip) * logsigmoid(logits)
        return self.result(loss / (1 - 2 * self.flip), logits)


@dataclass(frozen=True)
class PGDPO(Objective):
    """PG-DPO (arXiv 2511.19049, Eq. 7-9): adaptive rejection scaling alpha, implicit preference regularization gamma.

        alpha = sigmoid(k1 rho)      gamma = sigmoid(-k2 rho)      z = beta/2 (r_w - alpha r_l)
        loss  = gamma softplus(-z) + (1 - gamma) ipr_weight kappa I

    Args:
        ratio: rho. "logit" beta/2 (r_w - r_l); "symmetric" (r_w - r_l)/(|r_w| + |r_l| + 2/beta);
            "abs" (r_w - r_l)/(|r_l| + |eps|); "signed" (r_w - r_l)/(r_l + eps), the printed Eq. 7, with a pole at
            r_l = -eps, which is where training starts.
        ars: False fixes alpha = 1.
        ipr: I = "reward" -r_w (Eq. 9); "anchor" mean (p_w - q_w)^2 (the printed listing); "none" fixes gamma = 1.
        ipr_scale: kappa. "beta" beta/2, both terms on one scale; "one" 1, as printed.
        detach_weights: no gradient through alpha and gamma. False is the printed listing: where the policy equals the
            reference its gradient is k2 ln2 / (4 |eps|), about 1e5 times that of DPO at its usual beta, and with the
            listing's negative eps it pushes the chosen reward down.
        combine: how groups of one sample meet. "pointwise" mean(gamma P + (1 - gamma) I); "outer"
            mean(gamma) mean(P) + (1 - mean(gamma)) mean(I), the broadcasting of the printed listing at batch 1.
    """

    beta: float = 100.0
    k1: float = 1.0
    k2: float = 1.0
    ratio: str = "logit"
    ars: bool = True
    ipr: str = "reward"
    ipr_scale: str = "beta"
    ipr_weight: float = 1.0
    detach_weights: bool = True
    combine: str = "pointwise"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("beta", "k1", "k2"):
            _number(self, name, 0.0, open_low=True)
        _number(self, "ipr_weight", 0.0)
        _number(self, "eps")
        if abs(self.eps) < MIN_EPS and self.ratio in ("signed", "abs"):
            raise ConfigError(
                f"PGDPO(eps={self.eps!r}, ratio={self.ratio!r}): expected |eps| >= {MIN_EPS:g}, "
                "the ratio divides by it where training starts"
            )
        _choice(self, "ratio", RATIOS)
        _choice(self, "ipr", ("reward", "anchor", "none"))
        _choice(self, "ipr_scale", ("beta", "one"))
        _choice(self, "combine", ("pointwise", "outer"))
        for name in ("ars", "detach_weights"):
            _choice(self, name, (True, False))

    @classmethod
    def equation(cls, beta: float = 100.0, k1: float = 10.0, k2: float = 10.0) -> PGDPO:
        """Eq. 7-9 of the paper: signed ratio, reward regularizer, kappa = 1."""
        return cls(beta=beta, k1=k1, k2=k2, ratio="signed", ipr_scale="one")

    @classmethod
    def listing(cls, beta: float = 100.0, k1: float = 10.0, k2: float = 10.0) -> PGDPO:
        """Listing A.5.4 of the paper made well-defined; use with `granularity="element"`.

        The listing adds eps to the rejected *gap*, so eps is subtracted from the reward here.
        """
        return cls(
            beta=beta,
            k1=k1,
            k2=k2,
            ratio="signed",
            ipr="anchor",
            ipr_scale="one",
            detach_weights=False,
            combine="outer",
            eps=-1e-8,
        )

    @classmethod
    def ars_only(cls, **options: Any) -> PGDPO:
        """The paper's +ARS ablation: gamma = 1."""
        return cls(ipr="none", **options)

    @classmethod
    def ipr_only(cls, **options: Any) -> PGDPO:
        """The paper's +IPR ablation: alpha = 1."""
        return cls(ars=False, **options)

    @property
    def unused_settings(self) -> frozenset[str]:
        unused = set() if self.ars else {"k1"}
        if self.ipr == "none":
            unused |= {"k2", "ipr_scale", "ipr_weight", "combine"}
        if not self.ars and self.ipr == "none":
            unused |= {"ratio", "detach_weights"}
        if "ratio" in unused or self.ratio not in ("signed", "abs"):
            unused |= {"eps"}
        return frozenset(unused)

    @property
    def needs_anchor(self) -> bool:
        return self.ipr == "anchor"

    @property
    def outer(self) -> bool:
        return self.combine == "outer" and self.ipr != "none"

    def _ratio(self, chosen: Tensor, rejected: Tensor, half_beta: Any) -> Tensor:
        margin = chosen - rejected
        if self.ratio == "logit":
            ratio = half_beta * margin
        elif self.ratio == "symmetric":
            ratio = margin / (chosen.abs() + rejected.abs() + 1 / half_beta)
        elif self.ratio == "abs":
            ratio = margin / (rejected.abs() + abs(self.eps))
        else:
            denominator = rejected + self.eps
            at_pole = denominator == 0
            ratio = margin / denominator.masked_fill(at_pole, 1.0)
            ratio = torch.where(at_pole, margin.sign() * RATIO_LIMIT, ratio)
        return ratio.clamp(-RATIO_LIMIT, RATIO_LIMIT)

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        chosen, rejected = errors.rewards
        half_beta = _half_beta(self, beta_scale)
        ratio = self._ratio(chosen, rejected, half_beta)
        if self.detach_weights:
            ratio = ratio.detach()
        one = torch.ones_like(ratio)
        alpha = torch.sigmoid(self.k1 * ratio) if self.ars else one
        logits = half_beta * (chosen - alpha * rejected)
        preference = -logsigmoid(logits)
        if self.ipr == "none":
            return self.result(preference, logits, alpha.detach())
        gamma, complement = torch.sigmoid(-self.k2 * ratio), torch.sigmoid(self.k2 * ratio)
        implicit = _given(errors.anchor, "errors.anchor") if self.ipr == "anchor" else -chosen
        scale = self.ipr_weight * (half_beta if self.ipr_scale == "beta" else 1.0)
        if isinstance(scale, Tensor):
            implicit, scale = scale * implicit, 1.0
        if self.outer:
            mean = [x.mean(-1, keepdim=True) for x in (gamma, preference, complement, implicit)]
            loss = (mean[0] * mean[1] + scale * mean[2] * mean[3]).expand_as(preference)
        else:
            loss = gamma * preference + scale * complement * implicit
        return self.result(loss, logits, alpha.detach(), gamma.detach())

    def epilogue(self) -> Epilogue:
        half_beta = 0.5 * self.beta
        flags = (
            FLAG_ARS * self.ars
            | FLAG_IPR_REWARD * (self.ipr == "reward")
            | FLAG_IPR_ANCHOR * self.needs_anchor
            | FLAG_ATTACHED * (not self.detach_weights)
            | FLAG_IPR_BETA * (self.ipr != "none" and self.ipr_scale == "beta")
            | RATIOS.index(self.ratio) << FLAG_RATIO_SHIFT
        )
        scale = self.ipr_weight * (half_beta if self.ipr_scale == "beta" else 1.0)
        return Epilogue(
            KIND_PGDPO,
            flags,
            Parameters(half_beta=half_beta, k1=self.k1, k2=self.k2, ipr_scale=scale, eps=self.eps),
        )


@dataclass(frozen=True)
class IPO(Objective):
    """IPO (Azar et al. 2023; arXiv 2511.19049 Eq. 31): (1/2 (r_w - r_l) - 1/(2 beta))^2, target margin 1/beta."""

    beta: float = 5000.0

    def __post_init__(self) -> None:
        _number(self, "beta", 0.0, open_low=True)

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        half_beta, margin = _half_beta(self, beta_scale), errors.margin
        return self.result((0.5 * margin - 0.25 / half_beta) ** 2, half_beta * margin)

    def epilogue(self) -> Epilogue:
        return Epilogue(KIND_IPO, 0, Parameters(half_beta=0.5 * self.beta, target=0.5 / self.beta))


@dataclass(frozen=True)
class SLiC(Objective):
    """SLiC (Zhao et al. 2023; arXiv 2511.19049 Eq. 32), reference-free: max(0, delta - (e_l - e_w)/2) + weight e_w/2.

    `hinge=True` uses the reference instead: max(0, delta - z) + weight 1/2 e_w with z of DPO.
    """

    beta: float = 5000.0
    delta: float = 1.0
    weight: float = 0.1
    hinge: bool = False

    def __post_init__(self) -> None:
        _number(self, "beta", 0.0, open_low=True)
        _number(self, "delta", 0.0)
        _number(self, "weight", 0.0)
        _choice(self, "hinge", (True, False))

    @property
    def unused_settings(self) -> frozenset[str]:
        return frozenset() if self.hinge else frozenset({"beta"})

    @property
    def needs_reference(self) -> bool:
        return self.hinge

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        if self.hinge:
            logits = _half_beta(self, beta_scale) * errors.margin
        else:
            logits = 0.5 * (errors.policy_rejected - errors.policy_chosen)
        loss = (self.delta - logits).clamp(min=0.0) + 0.5 * self.weight * errors.policy_chosen
        return self.result(loss, logits)

    def epilogue(self) -> Epilogue:
        kind = KIND_HINGE if self.hinge else KIND_SLIC
        return Epilogue(kind, 0, Parameters(half_beta=0.5 * self.beta, delta=self.delta, weight=self.weight))


@dataclass(frozen=True)
class SFT(Objective):
    """Supervised fine-tuning on the chosen video (arXiv 2511.19049 Eq. 18): e_w. A reference only adds telemetry."""

    needs_reference: ClassVar[bool] = False
    has_logits: ClassVar[bool] = False

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        return self.result(errors.policy_chosen.clone(), torch.zeros_like(errors.policy_chosen))

    def epilogue(self) -> Epilogue:
        return Epilogue(KIND_SFT, 0, Parameters())


@dataclass(frozen=True)
class RPO(Objective):
    """DPO with the likelihood of the chosen video held up (as in Pang et al. 2024): softplus(-z) + weight beta/2 e_w.

    The factor beta/2 puts both terms on one scale, as kappa does in `PGDPO`. `pf.DPO(beta) + w * pf.SFT()` is the same
    with w = weight beta/2; by the prediction, e_w and -r_w have one gradient.
    """

    beta: float = 5000.0
    weight: float = 1.0

    def __post_init__(self) -> None:
        _number(self, "beta", 0.0, open_low=True)
        _number(self, "weight", 0.0)

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        half_beta = _half_beta(self, beta_scale)
        logits = half_beta * errors.margin
        return self.result(-logsigmoid(logits) + self.weight * half_beta * errors.policy_chosen, logits)

    def kernel_terms(self) -> tuple[Epilogue, ...]:
        weight = Parameters(term_weight=self.weight * 0.5 * self.beta)
        likelihood = Epilogue(KIND_SFT, FLAG_TERM_WEIGHT | FLAG_TERM_WEIGHT_BETA, weight)
        return Epilogue(KIND_DPO, 0, Parameters(half_beta=0.5 * self.beta)), likelihood

    def epilogue(self) -> Epilogue | None:
        return _packed(self.kernel_terms())


@dataclass(frozen=True)
class DPOP(Objective):
    """DPO-Positive (Pal et al. 2024): softplus(-beta/2 (r_w - r_l - penalty max(0, -r_w)))."""

    beta: float = 5000.0
    penalty: float = 5.0

    def __post_init__(self) -> None:
        _number(self, "beta", 0.0, open_low=True)
        _number(self, "penalty", 0.0)

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        chosen, rejected = errors.rewards
        logits = _half_beta(self, beta_scale) * (chosen - rejected - self.penalty * (-chosen).clamp(min=0.0))
        return self.result(-logsigmoid(logits), logits)

    def epilogue(self) -> Epilogue:
        return Epilogue(KIND_DPOP, 0, Parameters(half_beta=0.5 * self.beta, penalty=self.penalty))


@dataclass(frozen=True)
class DPOShift(Objective):
    """DPO-Shift (Yang et al. 2025): softplus(-beta/2 (r_w - shift r_l)), rejection scaling with a constant alpha."""

    beta: float = 5000.0
    shift: float = 0.75

    def __post_init__(self) -> None:
        _number(self, "beta", 0.0, open_low=True)
        _number(self, "shift", 0.0, 1.0)

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        gap_chosen, gap_rejected = errors.gaps
        logits = _half_beta(self, beta_scale) * (self.shift * gap_rejected - gap_chosen)
        return self.result(-logsigmoid(logits), logits, torch.full_like(logits, self.shift))

    def epilogue(self) -> Epilogue:
        return Epilogue(KIND_DPO_SHIFT, 0, Parameters(half_beta=0.5 * self.beta, shift=self.shift))


@dataclass(frozen=True)
class SDPO(Objective):
    """Importance-sampled DPO (arXiv 2505.21893), a reconstruction: the paper has no public code or full equations.

    Assumed: equal Gaussian variances of policy and posterior, so E log w = -c_t e with e the mean squared prediction
    error; the weight of a pair is the geometric mean of its two videos', w = exp(-c_t (e_w + e_l)/2), detached and
    clipped to [1 - clip, 1 + clip] (w never exceeds 1). A weight below `threshold` counts as zero; the default masks
    none. c_t comes from `process.posterior_scale(timestep)`.

    Args:
        placement: where w stands. "outside" multiplies the DPO loss, w softplus(-z). "inside" multiplies the logits,
            softplus(-w z), as the paper's reviews have it ("clipped importance reweighting to the log-likelihood ratio
            term"); a masked pair then counts a constant ln 2. Its paper leaves both readings open. `logits` in the
            telemetry are what the sigmoid is taken of, w z when "inside".
    """

    needs_posterior_scale: ClassVar[bool] = True

    beta: float = 5000.0
    clip: float = 0.1
    threshold: float = 0.0
    placement: str = "outside"

    def __post_init__(self) -> None:
        _number(self, "beta", 0.0, open_low=True)
        _number(self, "clip", 0.0, 1.0)
        _number(self, "threshold", 0.0, 1.0)
        _choice(self, "placement", ("outside", "inside"))

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        scale = _given(posterior_scale, "posterior_scale")
        raw = torch.exp(-0.5 * scale * (errors.policy_chosen + errors.policy_rejected)).detach()
        importance = torch.where(raw < self.threshold, torch.zeros_like(raw), raw.clamp(1 - self.clip, 1 + self.clip))
        logits = _half_beta(self, beta_scale) * errors.margin
        if self.placement == "inside":
            logits = importance * logits
            return self.result(-logsigmoid(logits), logits, importance=importance)
        return self.result(-importance * logsigmoid(logits), logits, importance=importance)

    def epilogue(self) -> Epilogue:
        parameters = Parameters(half_beta=0.5 * self.beta, threshold=self.threshold, clip=self.clip)
        flags = FLAG_IMPORTANCE | FLAG_INSIDE * (self.placement == "inside")
        return Epilogue(KIND_DPO, flags, parameters)


@dataclass(frozen=True)
class DPOClipMask(SDPO):
    """DPO-C&M (arXiv 2505.21893), a reconstruction: SDPO's weight, zero where it is below `threshold`.

    Timesteps of low importance weight are masked, the rest clipped to [1 - clip, 1 + clip]. Assumptions as in `SDPO`.
    """

    threshold: float = 0.9


def _holds_safeguarded(objective: Objective) -> bool:
    parts = objective.objectives if isinstance(objective, Sum) else (objective,)
    return any(isinstance(part, Safeguarded) for part in parts)


@dataclass(frozen=True)
class Safeguarded(Objective):
    """Diffusion-SDPO (arXiv 2511.03317), "safeguarded" DPO: any objective with the rejected gradient scaled by

        lambda = clamp((1 - mu) |g_w|^2 / <g_w, g_l>, 0, 1)  where <g_w, g_l> > 0, else 1,

    g = p - y the output-space error gradients. The loss value is the base objective's; only its gradient changes.

    Args:
        mu: how much of the chosen gradient is kept from the rejected one; 0 keeps the chosen error from rising, to
            first order. The default, as that of `scope`, is the published script's; the classmethods are the settings
            published for a model.
        scope: "batch" takes one lambda from the sums over all pairs (of this process), as the published code does;
            "pair" one for every group, so that one conflicting pair does not scale the others. With "batch" and
            `granularity="element"`, torch works between two passes instead of in them.
    """

    needs_cross: ClassVar[bool] = True
    base: Objective = DPO()
    mu: float = 0.0
    scope: str = "batch"

    def __post_init__(self) -> None:
        _number(self, "mu", 0.0, 1.0)
        _choice(self, "scope", ("batch", "pair"))
        if not isinstance(self.base, Objective) or _holds_safeguarded(self.base):
            raise ConfigError(f"Safeguarded(base={self.base!r}): expected an objective that is not safeguarded itself")

    @classmethod
    def sd15(cls, base: Objective = DPO()) -> Safeguarded:
        """Published for Stable Diffusion 1.5 with DPO and DMPO: mu 0.9."""
        return cls(base, mu=0.9)

    @classmethod
    def sd15_dspo(cls, base: Objective = DPO()) -> Safeguarded:
        """Published for Stable Diffusion 1.5 with DSPO: mu 0.2."""
        return cls(base, mu=0.2)

    @classmethod
    def sdxl(cls, base: Objective = DPO()) -> Safeguarded:
        """Published for SDXL: mu 0.6."""
        return cls(base, mu=0.6)

    @property
    def beta(self) -> float:
        """The base objective's; AttributeError where that has none."""
        return self.base.beta  # type: ignore[attr-defined]

    @property
    def unused_settings(self) -> frozenset[str]:
        return frozenset(f"base.{name}" for name in self.base.unused_settings)

    @property
    def needs_reference(self) -> bool:
        return self.base.needs_reference

    @property
    def needs_anchor(self) -> bool:
        return self.base.needs_anchor

    @property
    def needs_posterior_scale(self) -> bool:
        return self.base.needs_posterior_scale

    @property
    def has_logits(self) -> bool:  # type: ignore[override]
        return self.base.has_logits

    @property
    def outer(self) -> bool:
        return self.base.outer

    @property
    def whole_batch(self) -> bool:
        return self.scope == "batch" or self.base.whole_batch

    @property
    def takes_beta_scale(self) -> bool:
        return self.base.takes_beta_scale

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        chosen, cross = errors.policy_chosen, _given(errors.cross, "errors.cross")
        if self.scope == "batch":
            chosen, cross = chosen.sum(), cross.sum()
        conflict = cross > 0
        bound = (1 - self.mu) * chosen / cross.masked_fill(~conflict, 1.0)
        scale = torch.where(conflict, bound.clamp(0.0, 1.0), torch.ones_like(bound)).detach()

        def scaled(x: Tensor) -> Tensor:
            return x.detach() + scale * (x - x.detach())

        gap = errors.gap_rejected
        errors = errors._replace(
            policy_rejected=scaled(errors.policy_rejected), gap_rejected=None if gap is None else scaled(gap)
        )
        return terms_of(self.base, errors, posterior_scale, beta_scale)

    def kernel_terms(self) -> tuple[Epilogue, ...] | None:
        base = self.base.kernel_terms()
        if base is None:
            return None
        flag = FLAG_SAFEGUARD if self.scope == "pair" else FLAG_SAFEGUARD_BATCH
        return tuple(
            Epilogue(term.kind, term.flags | flag, Parameters._make(term.parameters)._replace(mu=self.mu))
            for term in base
        )

    def epilogue(self) -> Epilogue | None:
        return _packed(self.kernel_terms())


@dataclass(frozen=True)
class Sum(Objective):
    """Objectives added up with positive weights, `pf.DPO(beta) + 0.3 * pf.SFT()`, in one pass over the latents.

    Sums inside are laid open and equal objectives counted once, so `objectives` holds no `Sum`. Logits, alpha, gamma
    and importance in the telemetry are those of the first objective that has logits (any but `SFT`). Up to TERM_LIMIT
    formulas (`RPO` is two) run in the kernels' epilogue; a longer sum, one with combine="outer" in it, or one with an
    objective that is torch alone, runs in torch between two passes.

    Args:
        objectives: at least one.
        weights: one number for each; all one where left out.
    """

    objectives: tuple[Objective, ...] = (DPO(), SFT())
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        objectives = self.objectives
        if not isinstance(objectives, (list, tuple)) or not objectives:
            raise wrong("Sum.objectives", objectives, "at least one objective")
        for objective in objectives:
            if not isinstance(objective, Objective):
                raise wrong("Sum.objectives", objective, "an instance such as pf.DPO()")
        if not isinstance(self.weights, (list, tuple)):
            raise wrong("Sum.weights", self.weights, "a number for every objective")
        for weight in self.weights:
            number("Sum.weights", weight, 0.0, open_low=True, limit=MAX_NUMBER)
        if self.weights and len(self.weights) != len(objectives):
            raise wrong("Sum.weights", self.weights, "one number for every objective")
        parts: list[tuple[Objective, float]] = []
        for objective, weight in zip(objectives, self.weights or [1.0] * len(objectives), strict=True):
            inner = [(objective, 1.0)]
            if isinstance(objective, Sum):
                inner = list(zip(objective.objectives, objective.weights, strict=True))
            for part, inner_weight in inner:
                same = [place for place, (known, _) in enumerate(parts) if known == part]
                if same:
                    parts[same[0]] = (part, parts[same[0]][1] + weight * inner_weight)
                else:
                    parts.append((part, float(weight * inner_weight)))
        object.__setattr__(self, "objectives", tuple(part for part, _ in parts))
        object.__setattr__(self, "weights", tuple(weight for _, weight in parts))

    @property
    def beta(self) -> float:
        """That of the first objective which has one; AttributeError where none has."""
        return next((part for part in self.objectives if hasattr(part, "beta")), self.objectives[0]).beta  # type: ignore[attr-defined]

    @property
    def needs_reference(self) -> bool:
        return any(part.needs_reference for part in self.objectives)

    @property
    def needs_anchor(self) -> bool:
        return any(part.needs_anchor for part in self.objectives)

    @property
    def needs_cross(self) -> bool:  # type: ignore[override]
        return any(part.needs_cross for part in self.objectives)

    @property
    def needs_posterior_scale(self) -> bool:
        return any(part.needs_posterior_scale for part in self.objectives)

    @property
    def has_logits(self) -> bool:  # type: ignore[override]
        return any(part.has_logits for part in self.objectives)

    @property
    def outer(self) -> bool:
        return any(part.outer for part in self.objectives)

    @property
    def whole_batch(self) -> bool:
        return any(part.whole_batch for part in self.objectives)

    @property
    def takes_beta_scale(self) -> bool:
        return all(part.takes_beta_scale for part in self.objectives)

    def _leading_first(self) -> list[tuple[Objective, float]]:
        parts = zip(self.objectives, self.weights, strict=True)
        lead = next((k for k, part in enumerate(self.objectives) if part.has_logits), 0)
        return [part for _, part in sorted(enumerate(parts), key=lambda numbered: numbered[0] != lead)]

    def terms(
        self, errors: GroupErrors, posterior_scale: Tensor | None = None, beta_scale: Tensor | None = None
    ) -> Terms:
        parts = [
            (terms_of(part, errors, posterior_scale, beta_scale), weight) for part, weight in self._leading_first()
        ]
        first, weight = parts[0]
        loss = weight * first.loss
        for part, weight in parts[1:]:
            loss = loss + weight * part.loss
        return first._replace(loss=loss)

    def kernel_terms(self) -> tuple[Epilogue, ...] | None:
        terms: list[Epilogue] = []
        for part, weight in self._leading_first():
            own = part.kernel_terms()
            if own is None or part.outer:
                return None
            terms += [_weighted(term, weight) for term in own]
        return tuple(terms)

    def epilogue(self) -> Epilogue | None:
        return _packed(self.kernel_terms())


class Listed(NamedTuple):
    """An objective that has a name: its class, and what figures and tables call it."""

    make: type[Objective]
    label: str


# Every objective by its name in configuration files. Labels, docs, tests and benchmarks follow this list.
LISTED = {
    "pgdpo": Listed(PGDPO, "PG-DPO"),
    "dpo": Listed(DPO, "DPO"),
    "robust-dpo": Listed(RobustDPO, "Robust DPO"),
    "ipo": Listed(IPO, "IPO"),
    "slic": Listed(SLiC, "SLiC"),
    "sft": Listed(SFT, "SFT"),
    "rpo": Listed(RPO, "RPO"),
    "dpop": Listed(DPOP, "DPOP"),
    "dpo-shift": Listed(DPOShift, "DPO-Shift"),
    "sdpo": Listed(SDPO, "SDPO"),
    "dpo-clip-mask": Listed(DPOClipMask, "DPO-C&M"),
    "safeguarded": Listed(Safeguarded, "Safeguarded"),
    "sum": Listed(Sum, "Sum"),
}
NAMES = tuple(LISTED)
REGISTRY = Registry("objective", Objective, {name: listed.make for name, listed in LISTED.items()})


def from_name(name: str, **hyperparameters: Any) -> Objective:
    """An objective by its name in configuration files, or by the import path of its class, "my_package.losses:Mine".

    A hyper-parameter that is an objective itself, `base` of "safeguarded", is a mapping with a `name` of its own, and
    `objectives` of "sum" a list of such.

    Raises:
        ConfigError: the name or a hyper-parameter is unknown, or a value is of the wrong type or out of range; all of
            that in one message.
    """
    return REGISTRY.build({"name": name, **hyperparameters}, "objective")


def label(settings: Mapping[str, Any]) -> str:
    """What figures and tables call the objective of a configuration's `objective` section."""
    name = settings["name"]
    if name == "sum" and settings.get("objectives"):
        parts = [label({"name": part} if isinstance(part, str) else part) for part in settings["objectives"]]
        weights = settings.get("weights") or [1.0] * len(parts)
        return " + ".join(
            part if weight == 1 else f"{weight:g} {part}" for part, weight in zip(parts, weights, strict=True)
        )
    own = LISTED[name].label if name in LISTED else name.rpartition(":")[2]
    return f"{own} {label(settings['base'])}" if isinstance(settings.get("base"), Mapping) else own


def beta_from_sum(beta_sum: float, numel: int) -> float:
    """Our beta (mean over the group, with the 1/2) from one that multiplies the *sum* over its `numel` elements."""
    return beta_sum * numel


def beta_without_half(beta: float) -> float:
    """The equivalent beta of code that takes the mean but leaves out the 1/2 of Diffusion-DPO."""
    return beta / 2


def videodpo_pair_weight(
    chosen_score: Tensor, rejected_score: Tensor, exponent: float = 0.72, bin_width: float = 0.01, form: str = "paper"
) -> Tensor:
    """VideoDPO's re-weighting of pairs by how rare their scores are (arXiv 2412.14167).

    Args:
        chosen_score, rejected_score: `[P]`, the scores of every pair in the data set.
        exponent: alpha_h; 0.72 or 1 in the paper.
        bin_width: width of the score histogram's bins.
        form: "paper" (p_mode / sqrt(p(s_w) p(s_l)))^exponent with p the bin probability over all scores and p_mode
            that of the fullest bin; "code" (0.72 / s_w)^exponent, what the official code computes, for positive scores.

    Returns:
        `[P]` float32 weights for `pair_weight`.
    """
    chosen, rejected = torch.as_tensor(chosen_score).double(), torch.as_tensor(rejected_score).double()
    if chosen.ndim != 1 or chosen.shape != rejected.shape or not len(chosen):
        raise ValueError(
            f"chosen_score and rejected_score: expected two [P] tensors of one length, "
            f"got {tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    for scores, name in ((chosen, "chosen_score"), (rejected, "rejected_score")):
        if not bool(torch.isfinite(scores).all()):
            raise ValueError(f"{name}: expected finite scores, got NaN or infinity")
    if form == "code":
        if bool((chosen <= 0).any()):
            raise ValueError("chosen_score: form='code' divides by the score, expected all scores > 0")
        return (0.72 / chosen).pow(exponent).float()
    if form != "paper":
        raise ValueError(f"form={form!r}: expected 'paper' or 'code'")
    if not bin_width > 0:
        raise ValueError(f"bin_width={bin_width!r}: expected a positive number")
    # A thousandth of a bin up, so that a score printed to the bin's precision falls into its own (0.29 / 0.01 < 29).
    bins = torch.floor(torch.cat([chosen, rejected]) / bin_width + 1e-3).long()
    _, index, count = bins.unique(return_inverse=True, return_counts=True)
    probability = (count.double() / count.sum())[index]
    p_chosen, p_rejected = probability.split(len(chosen))
    return (probability.max() / (p_chosen * p_rejected).sqrt()).pow(exponent).float()
