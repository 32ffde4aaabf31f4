"""DeepSpeed: ZeRO 1 with accumulation, the engine's own backward. Run: python examples/integrations/deepspeed_engine.py

One process here; `deepspeed examples/integrations/deepspeed_engine.py` starts one for each device.
"""

import os
import socket

import deepspeed
import torch
from tiny import batch, loss_of, policy_and_reference, report

STEPS, ACCUMULATION, PAIRS = 20, 2, 4

if "RANK" not in os.environ:  # started without a launcher: a world of one
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))
deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")

policy, reference = policy_and_reference()
engine, *_ = deepspeed.initialize(
    model=policy,
    optimizer=torch.optim.AdamW(policy.parameters(), lr=3e-3),
    config={
        "train_micro_batch_size_per_gpu": PAIRS,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    },
)
reference.to(engine.device)

first = None
for micro_step in range(STEPS * ACCUMULATION):
    data = batch(micro_step * engine.world_size + engine.global_rank, PAIRS)
    out = loss_of(engine, reference, *(x.to(engine.device) for x in data))
    engine.backward(out.loss)  # divides by the accumulation steps
    engine.step()  # steps and clears at the end of an accumulation
    first = first or out
report(first, out)
torch.distributed.destroy_process_group()
