"""AdamW on fp32 master weights, whatever dtype the network computes in.

A parameter that is not fp32 gets an fp32 copy; its gradient is moved there as soon as it is complete, so accumulation,
clipping, moments and the update are all fp32 and the network only ever receives rounded copies.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pgdpo_fast.errors import DataError

__all__ = ["MasterAdamW"]


class MasterAdamW:
    """AdamW over the trainable parameters of `model`, with linear warm-up.

    `norm` and `clip` work on the device; nothing here waits for it. State is saved by parameter name.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        warmup_steps: int,
    ):
        self.lr, self.warmup_steps = lr, warmup_steps
        self.parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
                continue
            master = self.masters[name] = parameter.detach().float().requires_grad_(True)
            parameter.register_post_accumulate_grad_hook(
                lambda parameter, master=master: _move_gradient(parameter, master)
            )
        fused = all(master.is_cuda for master in self.masters.values())  # no temporaries the size of the network
        self.adamw = torch.optim.AdamW(
            self.masters.values(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused
        )
        self._step_on_host = not fused

    def learning_rate(self, step: int) -> float:
        """The rate of the update that makes step `step` (from 0) into `step + 1`."""
        return self.lr * min(1.0, (step + 1) / (self.warmup_steps + 1))

    def zero_grad(self) -> None:
        self.adamw.zero_grad(set_to_none=True)

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients to `max_norm` at most (0: leave them) and return their norm before, a 0-d tensor."""
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if max_norm:
            nn.utils.clip_grads_with_norm_(self.masters.values(), max_norm, norm)
        return norm

    @torch.no_grad()
    def step(self, step: int) -> None:
        """Update the masters at the rate of `step`, then the network."""
        for group in self.adamw.param_groups:
            group["lr"] = self.learning_rate(step)
        self.adamw.step()
        for name, master in self.masters.items():
            if master is not self.parameters[name]:
                self.parameters[name].copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Everything to save, by `kind/parameter name`; masters that are the network's own parameters are left out."""
        state = {
            f"master/{name}": master.detach()
            for name, master in self.masters.items()
            if master is not self.parameters[name]
        }
        for name, master in self.masters.items():
            for kind, value in self.adamw.state.get(master, {}).items():
                state[f"{kind}/{name}"] = value
        return state

    @torch.no_grad()
    def load_state(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """Take over the items of what `state` gave, one at a time.

        Raises:
            DataError: an entry belongs to no parameter or has another shape.
        """
        for key, value in state:
            kind, _, name = key.partition("/")
            master = self.masters.get(name)
            if master is None or (kind != "step" and value.shape != master.shape):
                raise DataError(
                    f"optimizer state {key} {tuple(value.shape)} does not fit the network; "
                    f"resume with the model section the checkpoint was made with"
                )
            if kind == "master":
                master.copy_(value)
            else:
                device = "cpu" if kind == "step" and self._step_on_host else master.device
                self.adamw.state[master][kind] = value.to(device, copy=True)


def _move_gradient(parameter: Tensor, master: Tensor) -> None:
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None
