"""Lightning: the loss in `training_step`, its metrics logged. Run: python examples/integrations/lightning_module.py"""

import warnings

import lightning
import torch
from tiny import batch, loss_of, policy_and_reference, report
from torch.utils.data import DataLoader, Dataset

STEPS = 30


class Pairs(Dataset):
    """Whole batches, so that a pair is never split: Lightning's sampler then moves pairs, not clips."""

    def __len__(self):
        return STEPS

    def __getitem__(self, step):
        return batch(step)


class Preference(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.policy, self.reference = policy_and_reference()
        self.outputs = []

    def training_step(self, batch, _):
        out = loss_of(self.policy, self.reference, *batch)
        self.log_dict(out.metrics(), batch_size=len(out.margin))
        self.outputs = [*self.outputs[:1], out]
        return out.loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.policy.parameters(), lr=3e-3)


warnings.filterwarnings("ignore", module="lightning")
module = Preference()
trainer = lightning.Trainer(
    max_steps=STEPS,
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    gradient_clip_val=1.0,
)
trainer.fit(module, DataLoader(Pairs(), batch_size=None))
assert "rewards/margins" in trainer.logged_metrics
report(*module.outputs)
