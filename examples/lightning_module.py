"""The same with Lightning, on any number of devices: python lightning_module.py DIR, DIR a folder of class folders.

It needs pip install lightning. Afterwards: moco export runs/lightning/last.ckpt --to torchvision --size 64.
"""

import argparse

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torchvision import datasets, models
from torchvision.transforms import v2

import moco


class Contrastive(L.LightningModule):
    def __init__(self, epochs: int, lr: float = 0.03) -> None:
        super().__init__()
        self.epochs, self.lr = epochs, lr
        self.model = moco.MoCo(models.resnet18(), m=0.99, criterion=moco.MoCHiLoss(dim=128, K=4096, T=0.2))

    def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
        (view1, view2), _ = batch
        loss = self.model(view1, view2)
        self.log_dict({"loss": loss.detach(), **self.model.criterion.stats}, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.model.encoder_q.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", metavar="DIR")
    parser.add_argument("--out", default="runs/lightning")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--steps", type=int, default=-1)
    parser.add_argument("--batch-size", type=int, default=128, help="of each device")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--devices", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--precision", default="32-true", help="bf16-mixed on a GPU that has it")
    args = parser.parse_args()
    crop, colours = v2.RandomResizedCrop(args.size, (0.2, 1.0)), v2.ColorJitter(0.4, 0.4, 0.4, 0.1)
    augment = v2.Compose([crop, v2.RandomApply([colours], 0.8), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    images = datasets.ImageFolder(args.images, lambda image: (augment(image), augment(image)))
    loader = torch.utils.data.DataLoader(images, args.batch_size, True, num_workers=args.workers, drop_last=True)
    # The queues of all processes are equal: none has to be sent.
    strategy = DDPStrategy(broadcast_buffers=False) if args.devices > 1 else "auto"
    trainer = L.Trainer(
        devices=args.devices, strategy=strategy, precision=args.precision, max_epochs=args.epochs,
        max_steps=args.steps, default_root_dir=args.out, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Contrastive(args.epochs), loader)
    trainer.save_checkpoint(f"{args.out}/last.ckpt")
