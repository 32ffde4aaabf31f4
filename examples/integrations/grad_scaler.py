"""float16 autocast with a GradScaler. Run: python examples/integrations/grad_scaler.py

The loss reads float16 predictions as they are and reduces in float32; only the gradient it hands back is float16, which
is what the scale is for. Without a GPU, torch's CPU autocast and scaler run in earnest, only slowly.
"""

import torch
from tiny import batch, loss_of, policy_and_reference, report

STEPS = 30
device = "cuda" if torch.cuda.is_available() else "cpu"

policy, reference = (x.to(device) for x in policy_and_reference())
optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3)
scaler = torch.amp.GradScaler(device, init_scale=2.0**24, growth_interval=10)

first, skipped = None, 0
for step in range(STEPS):
    noised, time, velocity = (x.to(device) for x in batch(step))
    with torch.autocast(device, torch.float16):
        out = loss_of(policy, reference, noised, time, velocity)
    scaler.scale(out.loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    before = scaler.get_scale()
    scaler.step(optimizer)  # leaves the weights alone where a gradient overflowed
    scaler.update()
    skipped += scaler.get_scale() < before
    optimizer.zero_grad()
    first = first or out
assert 0 < skipped < STEPS // 2, f"the scale started too high on purpose, yet {skipped} steps were skipped"
print(f"scale {scaler.get_scale():.0f} after {skipped} skipped steps")
report(first, out)
