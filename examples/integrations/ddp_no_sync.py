"""DDP over two processes with `no_sync` accumulation. Run: python examples/integrations/ddp_no_sync.py

Checks on its way that the weights are those of one process that sees all the pairs: the loss is a mean over pairs, so
equal shares of them, divided by the accumulation steps, add up to it.
"""

import contextlib
import os
import socket

import torch
import torch.distributed as dist
from tiny import batch, loss_of, policy_and_reference, report
from torch.nn.parallel import DistributedDataParallel

STEPS, ACCUMULATION, WORLD = 15, 2, 2


def train(model, reference, data_of, shares: int):
    """One optimizer step for each of STEPS; `data_of(step)` yields this process's micro-batches."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    outputs = []
    for step in range(STEPS):
        micro_batches = list(data_of(step))
        for i, data in enumerate(micro_batches):
            last = i == len(micro_batches) - 1
            wait = contextlib.nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync()
            with wait:  # forward too: DDP decides there whether backward will reduce
                out = loss_of(model, reference, *data)
                (out.loss / shares).backward()
        optimizer.step()
        optimizer.zero_grad()
        outputs.append(out)
    return outputs[0], outputs[-1]


def process(rank: int, port: int):
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    policy, reference = policy_and_reference()

    def mine(step):
        return (batch((step * ACCUMULATION + i) * WORLD + rank) for i in range(ACCUMULATION))

    first, last = train(DistributedDataParallel(policy), reference, mine, ACCUMULATION)

    if rank == 0:
        alone, reference = policy_and_reference()

        def all_of_them(step):
            return (batch(step * ACCUMULATION * WORLD + i) for i in range(ACCUMULATION * WORLD))

        train(alone, reference, all_of_them, ACCUMULATION * WORLD)
        for distributed, single in zip(policy.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(distributed, single, rtol=1e-4, atol=1e-6)
        report(first, last)
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port,), nprocs=WORLD)
