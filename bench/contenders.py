"""What is compared: the readable formula, `torch.compile` of it, the usual Diffusion-DPO recipe, the fused backends.

Every contender makes the loss and the gradient by the stacked prediction from the same inputs. The formula and the
recipe make no telemetry beyond what their authors print, so a ratio to them never counts work nobody asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, mse_loss

import pgdpo_fast as pf
from pgdpo_fast import backends
from pgdpo_fast.backends import launches
from pgdpo_fast.backends.eager import unpack

from .shapes import Case

OBJECTIVE = pf.PGDPO(beta=100.0)
RECIPE_OBJECTIVE = pf.DPO(beta=100.0)


@dataclass(frozen=True)
class Inputs:
    """Operands of a case: prediction `[2B, C, F, H, W]`, target and reference as `preference_loss` takes them."""

    prediction: Tensor
    target: Tensor | pf.NoisedTarget
    reference: Tensor | pf.ReferenceErrors | pf.PackedReference


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Fresh normal targets; a reference with errors of 0.25; a policy near it, nearer on the chosen half."""
    dtype, pairs, video = getattr(torch, case.dtype), case.pairs, case.shape.latents
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, scale=1.0):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return torch.randn(*shape, generator=generator, device=device, dtype=wide).mul_(scale)

    if case.target_form == "built":
        uniform = torch.rand(2, pairs, generator=generator, device=device)
        target = pf.NoisedTarget(
            normal(2 * pairs, *video).to(dtype),
            normal(pairs, *video).to(dtype),
            0.5 + 0.5 * uniform[0],
            -0.5 - 0.5 * uniform[1],
        )
    else:
        target = normal((2 if case.target_form == "stacked" else 1) * pairs, *video).to(dtype)
    reference = normal(2, pairs, *video, scale=0.5).add_(whole_target(target, pairs))
    distance = torch.tensor([0.05, 0.1], device=device).view(2, 1, 1, 1, 1, 1)
    prediction = normal(2, pairs, *video).mul_(distance).add_(reference).to(dtype).flatten(0, 1)
    reference = reference.to(dtype).flatten(0, 1)
    if case.reference_form == "errors":
        granularity = "frame" if case.granularity == "frame" else "sample"
        held = pf.reference_errors(reference, target, granularity=granularity, backend="eager")
    elif case.reference_form == "predictions":
        held = reference
    else:
        held = pf.PackedReference.pack(reference, target, case.reference_form)
    return Inputs(prediction.requires_grad_(), target, held)


def numbers(objective: pf.Objective, x: Inputs) -> dict[str, Tensor]:
    """What the objective asks for beside the operands, by its name in `preference_loss`."""
    if not objective.needs_posterior_scale:
        return {}
    # the errors of `make_inputs` add up to a half: an importance of exp(-0.025), which no threshold masks
    return {"posterior_scale": x.prediction.new_full((x.prediction.shape[0] // 2,), 0.1, dtype=torch.float32)}


def select(x: Inputs, pairs: Sequence[int], cast: Callable[[Tensor], Tensor] = lambda t: t) -> Inputs:
    """The inputs of some of the pairs, each tensor a copy; `cast` is applied to all but packed rows."""
    count = x.prediction.shape[0] // 2
    stacked = [*pairs, *(pair + count for pair in pairs)]

    def rows(t):
        return cast(t.detach()[stacked if t.shape[0] == 2 * count else list(pairs)])

    if isinstance(x.target, pf.NoisedTarget):
        target = pf.NoisedTarget(*(rows(t) for t in vars(x.target).values()))
    else:
        target = rows(x.target)
    if isinstance(x.reference, pf.ReferenceErrors):
        reference = pf.ReferenceErrors(rows(x.reference.chosen), rows(x.reference.rejected))
    elif isinstance(x.reference, pf.PackedReference):
        reference = pf.PackedReference(*(None if t is None else t[list(pairs)] for t in vars(x.reference).values()))
    else:
        reference = rows(x.reference)
    return Inputs(rows(x.prediction).requires_grad_(), target, reference)


def whole_target(target, pairs: int) -> Tensor:
    """The target in float32 (float64 stays), `[2, B, ...]`, or `[1, B, ...]` when the pair shares it."""
    if isinstance(target, pf.NoisedTarget):
        shape = (1, pairs, 1, 1, 1, 1)
        noise = target.noise_scale.view(shape) * _wide(target.noise)[None]
        return noise + target.clean_scale.view(shape) * _wide(target.clean).unflatten(0, (2, pairs))
    return _wide(target).unflatten(0, (-1, pairs))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def formula(prediction: Tensor, target, reference, objective: pf.Objective, granularity: str) -> Tensor:
    """The loss as one would write it down: squared errors, means over the groups, the objective. Any granularity."""
    pairs = prediction.shape[0] // 2

    def grouped(error):
        if granularity == "sample":
            return error.mean((2, 3, 4, 5))[..., None]
        return error.mean((2, 4, 5)) if granularity == "frame" else error.flatten(2)

    y = whole_target(target, pairs)
    policy_error = grouped((_wide(prediction).unflatten(0, (2, pairs)) - y) ** 2)
    if isinstance(reference, pf.ReferenceErrors):
        reference_error = torch.stack([reference.chosen, reference.rejected]).view(2, pairs, -1)
    elif isinstance(reference, pf.PackedReference):
        residual = torch.stack(
            [unpack(reference.chosen, reference.chosen_scale), unpack(reference.rejected, reference.rejected_scale)]
        )
        reference_error = grouped(_wide(residual) ** 2)
    else:
        reference_error = grouped((_wide(reference).unflatten(0, (2, pairs)) - y) ** 2)
    gap = policy_error - reference_error
    return objective.terms(pf.GroupErrors(*policy_error, *gap)).loss.mean()


def recipe(prediction: Tensor, target: Tensor, reference: Tensor, beta: float, granularity: str) -> tuple[Tensor, dict]:
    """Diffusion-DPO as its users train it: two squared errors, chunk into winner and loser, -beta/2 times the
    difference of differences, logsigmoid, and the figures the trainer logs. Element granularity has no means."""

    def reduced(loss):
        return loss if granularity == "element" else loss.mean(dim=tuple(range(1, loss.ndim)))

    policy_loss = reduced(mse_loss(prediction.float(), target.float(), reduction="none"))
    policy_w, policy_l = policy_loss.chunk(2)
    with torch.no_grad():
        reference_loss = reduced(mse_loss(reference.float(), target.float(), reduction="none"))
        reference_w, reference_l = reference_loss.chunk(2)
    inside = -0.5 * beta * ((policy_w - policy_l) - (reference_w - reference_l))
    logged = {
        "policy": 0.5 * (policy_w.detach().mean() + policy_l.detach().mean()),
        "reference": reference_loss.mean(),
        "accuracy": (inside > 0).float().mean(),
    }
    return -logsigmoid(inside).mean(), logged


Call = Callable[[Inputs], tuple[Tensor, Tensor]]


@contextmanager
def forced(form: str) -> Iterator[None]:
    """Calls of Triton's sample and frame granularity in this form, as PGDPO_FAST_FORM has it."""
    before, launches.FORM = launches.FORM, form
    try:
        yield
    finally:
        launches.FORM = before


@dataclass(frozen=True)
class Contender:
    """A way to compute loss and gradient. `prepare(case)` returns the call that is timed; `refuses` says why not.

    A fused one is a backend, by default that of its name, in the form that `auto` takes or in `form`.
    """

    name: str
    summary: str
    fused: bool = False
    objective: pf.Objective = OBJECTIVE
    backend: str = ""
    form: str = ""

    def refuses(self, case: Case, device: torch.device) -> str | None:
        """Why this contender cannot be timed on `case`, or None."""
        if self.fused:
            backend = self.backend or self.name
            if backend == "triton" and device.type == "cpu":
                return "needs a CUDA device (Triton's interpreter is a checking tool, never timed)"
            if self.form and case.granularity == "element":
                return "element granularity has one form"
            return backends.unavailable(backend, device)
        if self.name == "diffusion-dpo":
            if case.granularity == "frame":
                return "the recipe has no rewards per frame"
            if case.reference_form != "predictions" or case.target_form != "stacked":
                return "the recipe takes whole predictions and targets"
            if case.dtype == "float64":
                return "the recipe computes in float32"
        return None

    def prepare(self, case: Case) -> Call:
        loss = self._loss(case.granularity)

        def call(x: Inputs) -> tuple[Tensor, Tensor]:
            value = loss(x)
            return value.detach(), *torch.autograd.grad(value, x.prediction)

        return call

    def _loss(self, granularity: str) -> Callable[[Inputs], Tensor]:
        if self.fused:
            settings = dict(objective=self.objective, granularity=granularity, backend=self.backend or self.name)

            def fused(x: Inputs) -> Tensor:
                return pf.preference_loss(x.prediction, x.target, x.reference, **settings).loss

            return forced(self.form)(fused) if self.form else fused
        if self.name == "diffusion-dpo":
            return lambda x: recipe(x.prediction, x.target, x.reference, self.objective.beta, granularity)[0]
        function = formula
        if self.name == "compile":
            torch._dynamo.reset()  # static shapes, and no silent fallback after many of them
            function = torch.compile(formula, fullgraph=True, dynamic=False)
        return lambda x: function(x.prediction, x.target, x.reference, self.objective, granularity)


CONTENDERS = (
    Contender("eager", "the formula, line by line in torch"),
    Contender("compile", "torch.compile(fullgraph=True) of the same formula"),
    Contender("diffusion-dpo", "the usual training script's recipe (DPO, not PG-DPO)", objective=RECIPE_OBJECTIVE),
    *(Contender(name, f"preference_loss(backend={name!r})", fused=True) for name in backends.NAMES if name != "eager"),
)
TRITON = next(contender for contender in CONTENDERS if contender.name == "triton")
# Timed on a GPU beside the others, whatever the table of launches says.
STREAM = Contender(
    "stream", "preference_loss(backend='triton'), PGDPO_FAST_FORM=stream", fused=True, backend="triton", form="stream"
)
