"""Files in the layouts of MoCo, SynCo and torchvision, built here key by key, load; what does not fit is named."""

import urllib.error
from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn

from moco.encoder import backbone_keys, build_encoder
from moco.errors import UserError
from moco.pretrained import load_backbone

K, C = 12, 128


def resnet(head: nn.Module | None = None, arch: str = "resnet18") -> nn.Module:
    """torchvision's own network, as upstream builds it, with random running statistics."""
    network = torchvision.models.get_model(arch, weights=None, num_classes=C)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.normal_()
    if head is not None:
        network.fc = head
    return network


def contrastive_file(queue_shape: tuple[int, int], head: str, arch: str = "resnet18") -> tuple[dict, nn.Module]:
    """A checkpoint exactly as main_moco.py (or SynCo's) writes it, and its query encoder."""

    def make() -> nn.Module:
        return resnet(nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, C)) if head == "mlp" else None, arch)

    q, k = make(), make()
    entries = OrderedDict()
    for name, network in (("encoder_q", q), ("encoder_k", k)):
        entries.update({f"module.{name}.{key}": value for key, value in network.state_dict().items()})
    entries["module.queue"] = torch.randn(queue_shape)
    entries["module.queue_ptr"] = torch.zeros(1, dtype=torch.long)
    optimizer = torch.optim.SGD(q.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    return {"epoch": 200, "arch": arch, "state_dict": entries, "optimizer": optimizer.state_dict()}, q


def assert_same_backbone(encoder: nn.Module, source: nn.Module) -> None:
    theirs = source.state_dict()
    for name in backbone_keys(encoder):
        assert torch.equal(encoder.state_dict()[name], theirs[name]), name


@pytest.fixture
def encoder() -> nn.Module:
    return build_encoder("resnet18", 10, stem="imagenet")


@pytest.mark.parametrize(
    ("queue", "head"),
    [((C, K), "linear"), ((C, K), "mlp"), ((K, C), "mlp")],
    ids=["MoCo v1", "MoCo v2", "SynCo"],
)
def test_contrastive_checkpoints_give_their_query_encoder(tmp_path, encoder, queue, head):
    state, q = contrastive_file(queue, head)
    path = str(tmp_path / "theirs.pth.tar")
    torch.save(state, path)
    before = {name: value.clone() for name, value in encoder.fc.state_dict().items()}
    words = load_backbone(encoder, path, "resnet18")
    assert_same_backbone(encoder, q)
    assert all(torch.equal(value, before[name]) for name, value in encoder.fc.state_dict().items())
    assert "read 120 tensors from encoder_q" in words
    assert "epoch 200" in words
    assert f"its head ({2 if head == 'linear' else 4} tensors)" in words


def variants(network: nn.Module) -> dict[str, dict]:
    plain = dict(network.state_dict())
    wrapped = {"module." + name: value for name, value in plain.items()}
    return {
        "torchvision's": plain,
        "a classifier's": {"epoch": 3, "arch": "resnet18", "state_dict": wrapped, "best_acc1": 1.0, "optimizer": {}},
        "model": {"model": plain},
        "compiled": {"state_dict": {"_orig_mod." + name: value for name, value in plain.items()}},
        "half precision": {"state_dict": {n: v.half() if v.is_floating_point() else v for n, v in plain.items()}},
        "without counters": {n: v for n, v in plain.items() if not n.endswith("num_batches_tracked")},
        "without a head": {n: v for n, v in plain.items() if not n.startswith("fc.")},
    }


@pytest.mark.parametrize("layout", list(variants(nn.Linear(1, 1))))
def test_other_layouts(tmp_path, encoder, layout):
    network = resnet(nn.Linear(512, 1000))
    if layout == "half precision":
        network = network.half().float()
    path = str(tmp_path / "weights.pth")
    torch.save(variants(network)[layout], path)
    load_backbone(encoder, path)
    assert_same_backbone(encoder, network)


def test_timm_and_small_stems_read_their_own_files(tmp_path):
    for arch, options in (("vit_tiny_patch16_224", {"size": 32}), ("resnet18", {"size": 32, "in_chans": 1})):
        trained = build_encoder(arch, C, mlp=True, **options)
        entries = {"module.encoder_q." + name: value for name, value in trained.state_dict().items()}
        path = str(tmp_path / "ours.pth.tar")
        torch.save({"epoch": 1, "arch": arch, "state_dict": entries, "optimizer": {}}, path)
        fresh = build_encoder(arch, 10, **options)
        load_backbone(fresh, path, arch)
        assert_same_backbone(fresh, trained)


def refusal(encoder: nn.Module, path: object, arch: str = "resnet18") -> str:
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_backbone(encoder, str(path), arch)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items()), "loaded in part"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_architecture_is_named(tmp_path, encoder):
    path = tmp_path / "theirs.pth.tar"
    state, _ = contrastive_file((C, K), "linear", "resnet34")
    torch.save(state, path)
    # resnet34 holds every entry of resnet18, with equal shapes: only its further blocks tell them apart
    sentence = refusal(encoder, path)
    assert "has unknown layer1.2.conv1.weight" in sentence
    assert "trained with -a resnet34" in sentence
    torch.save(dict(resnet().state_dict()), path)
    assert "lacks layer1.0.conv3.weight" in refusal(build_encoder("resnet50", 10), path, "resnet50")


def test_another_stem_or_number_of_channels_is_named(tmp_path):
    path = tmp_path / "theirs.pth.tar"
    torch.save(contrastive_file((C, K), "linear")[0], path)
    sentence = refusal(build_encoder("resnet18", 10, stem="cifar"), path)
    assert "conv1.weight is (64, 3, 7, 7) there and (64, 3, 3, 3) here" in sentence
    assert "--stem" in sentence
    assert "(64, 1, 7, 7) here" in refusal(build_encoder("resnet18", 10, stem="imagenet", in_chans=1), path)


def test_a_file_without_the_query_encoder_or_without_tensors_is_refused(tmp_path, encoder):
    path = tmp_path / "odd.pth.tar"
    state, _ = contrastive_file((C, K), "linear")
    only_k = {name: value for name, value in state["state_dict"].items() if "encoder_q" not in name}
    torch.save({"state_dict": only_k}, path)
    assert "lacks conv1.weight" in refusal(encoder, path)
    torch.save({"epoch": 3, "state_dict": {}}, path)
    assert "holds no weights" in refusal(encoder, path)
    torch.save([1, 2], path)
    assert "not a checkpoint" in refusal(encoder, path)


def test_missing_truncated_and_malicious_files_are_refused(tmp_path, encoder):
    assert "no checkpoint at" in refusal(encoder, tmp_path / "nowhere.pth.tar")
    path = tmp_path / "cut.pth.tar"
    torch.save(dict(resnet().state_dict()), path)
    path.write_bytes(path.read_bytes()[:100_000])
    assert "truncated, damaged" in refusal(encoder, path)
    torch.save({"state_dict": {"x": print}}, path)
    assert "more than weights" in refusal(encoder, path)


def test_published_weights_by_name(monkeypatch, encoder):
    network, asked = resnet(nn.Linear(512, 1000)), []

    def fetched(url, **options):
        asked.append((url, options["weights_only"], options["check_hash"]))
        return OrderedDict(network.state_dict())

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetched)
    words = load_backbone(encoder, "torchvision:IMAGENET1K_V1", "resnet18")
    assert_same_backbone(encoder, network)
    assert "torchvision:IMAGENET1K_V1" in words
    assert asked == [(torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url, True, True)]
    assert "it has IMAGENET1K_V1" in refusal(encoder, "torchvision:V9")
    assert "no weights for -a vit_tiny" in refusal(encoder, "torchvision:IMAGENET1K_V1", "vit_tiny_patch16_224")


def test_a_failed_download_is_one_sentence(monkeypatch, encoder):
    def fails(url, **options):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fails)
    sentence = refusal(encoder, "torchvision:IMAGENET1K_V1")
    assert "no route to host" in sentence
    assert "download it and give its path" in sentence
