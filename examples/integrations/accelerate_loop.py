"""accelerate: gradient accumulation and clipping. Run: python examples/integrations/accelerate_loop.py"""

import torch
from accelerate import Accelerator
from tiny import batch, loss_of, policy_and_reference, report

STEPS, ACCUMULATION = 20, 2

accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
policy, reference = policy_and_reference()
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
policy, optimizer = accelerator.prepare(policy, optimizer)

first = None
for micro_step in range(STEPS * ACCUMULATION):
    with accelerator.accumulate(policy):
        out = loss_of(policy, reference, *(x.to(accelerator.device) for x in batch(micro_step)))
        accelerator.backward(out.loss)  # divides by the accumulation steps
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    first = first or out
# Means over all processes, read once: metrics() itself never waits for the device.
means = accelerator.reduce(out.metrics(), reduction="mean")
assert set(means) == set(out.metrics())
report(first, out)
