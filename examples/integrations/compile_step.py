"""`torch.compile` of the whole step, one graph without breaks. Run: python examples/integrations/compile_step.py

Forward of policy and reference, loss and backward are one graph each way, the optimizer another; the fused kernels are
operators that the compiler leaves whole. The first steps compile, for up to a minute; nothing is compiled again later.
"""

import torch
from tiny import batch, loss_of, policy_and_reference, report

STEPS = 30

policy, reference = policy_and_reference()
# A tensor for the learning rate: a Python number would compile anew for every value of a schedule.
optimizer = torch.optim.AdamW(policy.parameters(), lr=torch.tensor(3e-3))


@torch.compile(fullgraph=True)
def forward(noised, time, velocity):
    return loss_of(policy, reference, noised, time, velocity)


@torch.compile
def update():
    optimizer.step()


first = None
for step in range(STEPS):
    out = forward(*batch(step))
    out.loss.backward()
    update()
    optimizer.zero_grad()
    if first is None:
        first = out
    if step == 1:
        torch._dynamo.config.error_on_recompile = True
report(first, out)
