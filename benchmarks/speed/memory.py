"""What pretraining keeps in memory: parameters, optimizer, queue, and activations of the query encoder for each image.

    python -m benchmarks.speed.memory [--arch NAME@SIZE ...] [--batch N]

Activations are what autograd keeps of a forward pass, counted storage by storage, in fp32 and under bf16 autocast on
the CPU; a GPU's libraries may keep other copies. The key encoder keeps none. Beside the sum of the table a run needs
the activations of the layer that is being computed, the batches that the loader has ready, and its libraries.
"""

from __future__ import annotations

import argparse

import torch
from torch.autograd.graph import saved_tensors_hooks

from moco.models.encoder import build_encoder

MIB = 2**20
DEFAULT = ("test_resnet@28", "resnet18@32", "resnet18@224", "resnet50@224", "vit_small_patch16_224@224")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=DEFAULT, metavar="NAME@SIZE", help="networks and sides in pixels")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="images of the smaller pass (default: 4)")
    args = parser.parse_args(argv)
    print("| network, px | parameters, M | weights and SGD, MiB | activations an image, MiB: fp32 | bf16 |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for word in args.arch:
        name, _, side = word.partition("@")
        encoder = build_encoder(name, 128, mlp=True, size=int(side))
        parameters = list(encoder.parameters())
        count, held = sum(p.numel() for p in parameters), sum(p.nbytes for p in parameters)
        kept = [an_image(encoder, args.batch, int(side), amp) / MIB for amp in (False, True)]
        # two encoders, the gradient and the momentum of one
        print(f"| {name}, {side} | {count / 1e6:.1f} | {4 * held / MIB:.0f} | {kept[0]:.2f} | {kept[1]:.2f} |")


def an_image(encoder: torch.nn.Module, images: int, side: int, amp: bool) -> float:
    """Bytes that an image more makes autograd keep: the difference of two batches is without what every batch has
    once, such as the weights in bf16."""
    one, two = (kept_bytes(encoder, n, side, amp) for n in (images, 2 * images))
    return (two - one) / images


def kept_bytes(encoder: torch.nn.Module, images: int, side: int, amp: bool) -> int:
    """Bytes that autograd keeps of a forward pass, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its place
        return x

    with saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=amp):
        out = encoder.train()(torch.rand(images, 3, side, side).contiguous(memory_format=torch.channels_last))
    total = sum(storage.nbytes() for storage in kept.values())
    del out
    return total


if __name__ == "__main__":
    main()
