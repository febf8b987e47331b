"""Networks by name: stems, channels, heads that are used, features, and BatchNorm in parts."""

import pytest
import torch
from torch import nn

from moco.errors import UserError
from moco.models.batchnorm import (
    SplitBatchNorm2d,
    choose_splits,
    describe_batchnorm,
    has_batchnorm,
    largest_divisor,
    split_batchnorm,
)
from moco.models.encoder import backbone_keys, build_encoder, features, head_of, recompute_blocks, strided_point

RESNETS = ["resnet18", "resnet34", "resnext50_32x4d", "wide_resnet50_2"]
OTHERS = ["timm/resnet10t", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "densenet121",
          "deit_tiny_distilled_patch16_224", "resnetv2_50"]  # fmt: skip


@pytest.mark.parametrize("arch", RESNETS + OTHERS)
def test_the_mlp_head_is_used_by_every_kind_of_network(arch):
    encoder = build_encoder(arch, 12, mlp=True, size=32, in_chans=3)
    head = encoder.get_submodule(head_of(encoder))
    assert isinstance(head, nn.Sequential)
    assert len(head) == 3
    x = torch.randn(2, 3, 32, 32)
    y = encoder(x)
    assert y.shape == (2, 12)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters() if p.ndim > 1)


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet10t", "vit_tiny_patch16_224"])
def test_features_are_what_enters_the_head(arch):
    encoder = build_encoder(arch, 7, size=32, in_chans=1).eval()
    x = torch.randn(3, 1, 32, 32)
    with torch.no_grad():
        inside = features(encoder, x)
        torch.testing.assert_close(encoder.get_submodule(head_of(encoder))(inside), encoder(x))
    assert inside.ndim == 2


def test_upstreams_parameter_names():
    names = set(build_encoder("resnet50", 128, mlp=True).state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer4.2.conv3.weight", "fc.0.weight", "fc.2.bias"} <= names
    plain = build_encoder("resnet50", 128)
    assert {"fc.weight", "fc.bias"} == set(plain.state_dict()) - backbone_keys(plain)


def test_stems():
    small, large = build_encoder("resnet18", 8, size=32), build_encoder("resnet18", 8, size=224)
    assert small.conv1.kernel_size == (3, 3)
    assert isinstance(small.maxpool, nn.Identity)
    assert large.conv1.kernel_size == (7, 7)
    assert build_encoder("resnet18", 8, size=32, stem="imagenet").conv1.kernel_size == (7, 7)
    assert build_encoder("resnet18", 8, size=224, stem="cifar").conv1.stride == (1, 1)
    assert build_encoder("resnet18", 8, size=28, in_chans=1).conv1.in_channels == 1


@pytest.mark.parametrize(
    ("arch", "options", "words"),
    [
        ("resnet81", {}, "resnet18|resnet101"),
        ("vit_tiny_patch16_224", {"stem": "cifar", "size": 32}, "--stem cifar"),
        ("inception_v3", {}, "inception_v3"),
        ("vit_b_16", {"size": 30}, "30 px"),
    ],
)
def test_impossible_networks_are_sentences(arch, options, words):
    if arch == "inception_v3":  # torchvision's returns two outputs; timm's network of that name is used instead
        assert build_encoder(arch, 4, size=299).get_submodule("fc").out_features == 4
        return
    with pytest.raises(UserError, match=words):
        build_encoder(arch, 4, **options)


def test_split_batchnorm_equals_one_batchnorm_a_part():
    torch.manual_seed(0)
    x = torch.randn(12, 5, 3, 3)
    whole = nn.Sequential(nn.BatchNorm2d(5))
    split = split_batchnorm(nn.Sequential(nn.BatchNorm2d(5)), 3)
    nn.init.normal_(whole[0].weight)
    split.load_state_dict(whole.state_dict())
    assert isinstance(split[0], SplitBatchNorm2d)
    out = split(x)
    means, variances = [], []
    for part, got in zip(x.chunk(3), out.chunk(3), strict=True):
        torch.testing.assert_close(got, whole(part))
        means.append(part.mean((0, 2, 3)))
        variances.append(part.var((0, 2, 3)))
    torch.testing.assert_close(split[0].running_mean, 0.1 * torch.stack(means).mean(0))
    torch.testing.assert_close(split[0].running_var, 0.9 + 0.1 * torch.stack(variances).mean(0))
    assert int(split[0].num_batches_tracked) == 1
    split.eval()
    expected = torch.nn.functional.batch_norm(
        x, split[0].running_mean, split[0].running_var, whole[0].weight, whole[0].bias
    )
    torch.testing.assert_close(split(x), expected)


@pytest.mark.parametrize("shape", [(12, 5, 3, 3), (12, 5)])
def test_a_compiler_meets_one_formula_for_all_parts(shape, monkeypatch):
    """Its values, gradients and running statistics are those of one call a part; a trace has no calls by part."""
    torch.manual_seed(0)
    x, towards = torch.randn(2, *shape, dtype=torch.float64)
    found, graphs = [], []
    for compiled in (False, True):
        norm = split_batchnorm(nn.Sequential(nn.BatchNorm2d(5)), 3)[0].double()
        nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
        call = norm
        if compiled:
            monkeypatch.setattr(norm, "_part_by_part", None)
            call = torch.compile(norm, backend=lambda graph, _: graphs.append(graph) or graph, fullgraph=True)
        views = x.clone().requires_grad_()
        out = call(views)
        out.backward(towards)
        found.append([out, views.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)
    assert len(graphs) == 1


@pytest.mark.parametrize("arch", ["resnet18", "timm/resnet10t"])
def test_splitting_changes_neither_the_state_dict_nor_evaluation(arch):
    one = build_encoder(arch, 6, size=32).eval()
    two = build_encoder(arch, 6, size=32)
    two.load_state_dict(one.state_dict())
    split_batchnorm(two, 4).eval()
    assert list(one.state_dict()) == list(two.state_dict())
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(one(x), two(x))


def test_parts_of_a_batch():
    assert [largest_divisor(n, 8) for n in (256, 128, 12, 10, 7, 4, 2, 1, 15)] == [8, 8, 6, 5, 1, 2, 1, 1, 5]
    assert choose_splits(None, 128, 1) == 8
    assert choose_splits(None, 128, 4) == 1
    assert choose_splits(4, 128, 4) == 4
    for wanted in (3, 128):
        with pytest.raises(UserError, match="--bn-splits"):
            choose_splits(wanted, 128, 1)


def test_the_log_says_how_batchnorm_is_kept_from_leaking():
    norm, without = build_encoder("resnet18", 4, size=32), build_encoder("vit_tiny_patch16_224", 4, size=32)
    assert has_batchnorm(norm)
    assert not has_batchnorm(without)
    assert "SplitBatchNorm in 8 parts, keys shuffled between the parts" in describe_batchnorm(norm, 1, 8, True)
    assert "shuffled across processes (ShuffleBN)" in describe_batchnorm(norm, 2, 1, True)
    assert "NOT shuffled" in describe_batchnorm(norm, 1, 1, False)
    assert "no BatchNorm" in describe_batchnorm(without, 1, 1, False)


def test_strided_convolutions_on_one_pixel_are_found():
    # 16 px: the stem leaves 4, two strides 1, and the next stride looks at one pixel
    assert strided_point(build_encoder("timm/test_resnet", 4, size=16), 3, 16).startswith("layer")
    assert strided_point(build_encoder("timm/test_resnet", 4, size=28, in_chans=1), 1, 28) == ""
    assert strided_point(build_encoder("resnet18", 4, size=32), 3, 32) == ""


# ---------------------------------------------------------------------------------------------- recomputation


def passed(arch: str, recompute: bool, splits: int) -> tuple[list[torch.Tensor], int]:
    """Output, gradients and statistics of one pass, and the bytes that were kept for the backward pass."""
    torch.manual_seed(0)
    net = split_batchnorm(build_encoder(arch, 8, size=32, mlp=True), splits)
    if recompute:
        recompute_blocks(net)
    kept = 0

    def keep(x: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += x.nbytes
        return x

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = net(torch.randn(4, 3, 32, 32))
    out.square().sum().backward()
    return [out.detach(), *[p.grad for p in net.parameters()], *net.buffers()], kept


@pytest.mark.parametrize(("arch", "splits"), [("test_resnet", 1), ("test_resnet", 2), ("test_vit", 1)])
def test_recomputed_blocks_change_memory_and_nothing_else(arch, splits):
    (plain, kept), (again, less) = (passed(arch, recompute, splits) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert less < kept / 2


def test_recomputation_needs_blocks():
    with pytest.raises(UserError, match="--recompute needs a network of repeated blocks"):
        recompute_blocks(torch.nn.Linear(3, 2))
