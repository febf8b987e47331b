"""Fine-tuning's other recipes: optimizers and their groups, schedules, moving averages, BEiT-3 and SCHaNe, few-shot."""

import json
import math
import shutil
from functools import partial

import pytest
import timm
import torch
from conftest import TINY as PRETRAIN
from conftest import differences, load, records
from support.finetuning import ARCH, MEAN, STD, sentence, state_of, tune

import main_lincls
from moco import files
from moco.cli import parse_lincls, parse_semisup
from moco.config import OptimizerConfig
from moco.data import open_sources
from moco.errors import UserError
from moco.eval import finetune
from moco.eval.features import EvalData
from moco.models.ema import attach_ema, moving_average
from moco.models.encoder import build_encoder
from moco.train.optimizers import Plateau, build_optimizer, layer_groups
from moco.train.stop import StopRequest
from moco.weights.layouts import File, arch_of
from moco.weights.read import load_backbone

pytestmark = pytest.mark.usefixtures("restored")
BEIT3 = "beit3_base_patch16_224"
# SCHaNe's command, after BEiT-3's
SCHANE = (
    "--model beit3_base_patch16_224 --input-size 32 --task imagenet --batch-size 4 --layer-decay 0.65 --lr 7e-4 "
    "--update-freq 1 --epochs 1 --warmup-epochs 0.5 --drop-path 0.15 --opt adamw --wd 0.05 --mixup 0.8 --cutmix 1.0 "
    "--smoothing 0.1 --reprob 0.25 --aa rand-m9-mstd0.5-inc1 --dist-eval --save-ckpt-freq 1 --loss SCHaNe --alpha 0.9 "
    "--temp 0.5 --estimator hard"
)
EVERYTHING = (
    "--train-percent 50 --epochs 4 --loss schane --opt lookahead_adamw --lr 1e-3 --ema-epoch 0.5 --plateau 0 "
    "--mixup 0.8 --cutmix 1 --reprob 0.5 --aa rand-m9-mstd0.5-inc1 --drop-path 0.2 --update-freq 3 "
    "--warmup-epochs 0.5 --layer-decay 0.8"
)


# ------------------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("--alpha 0.5", "--alpha is for --loss supcon, simclr, schane; ce has none"),
        ("--loss supcon --beta 1", "--beta is for --loss schane; supcon has none"),
        ("--loss supcon --alpha 1.5", "--alpha is a share from 0 to 1"),
        ("--loss supcon --temp 0", "--temp must be a number above 0"),
        ("--loss supcon --weights freeze", "--loss supcon trains the encoder"),
        ("--smoothing 1", "--smoothing is a share from 0 to below 1"),
        ("--reprob -0.1", "--reprob is a share"),
        ("--ema 1", "--ema is above 0 and below 1"),
        ("--ema 0.9 --ema-epoch 0.9", "give one of them"),
        ("--layer-decay 0", "--layer-decay is above 0"),
        ("--update-freq 0", "--update-freq must be at least 1"),
        ("--epochs 5 --warmup-epochs 5", "--warmup-epochs must end before"),
        ("--plateau -1", "--plateau must be at least 0"),
        ("--clip-grad 0", "--clip-grad must be a number above 0"),
        ("--few-shot-data X", "are for --few-shot"),
        ("--task vqav2", "--task vqav2 is no image classification known here"),
        ("--data-path X", "DIR and --data-path are the same thing"),
    ],
)
def test_wrong_flags_are_one_sentence_and_exit_code_2(words, what, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_semisup(["DIR", *words.split()])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert what in error
    assert error.count("\n") == 1


def test_schanes_command_parses():
    args = parse_semisup([*SCHANE.split(), "--finetune", "FILE", "--data-path", "DIR", "--output-dir", "OUT"])
    assert (args.arch, args.loss, args.alpha, args.temp, args.estimator) == (BEIT3, "schane", 0.9, 0.5, "hard")
    assert (args.data, args.pretrained, args.save_dir, args.dataset) == ("DIR", "FILE", "OUT", "folder")
    assert (args.lr_backbone, args.lr_classifier, args.opt, args.weight_decay) == (7e-4, 7e-4, "adamw", 0.05)


# --------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("name", ["adamw", "lars", "lookahead_adamw", "lookahead_sgd"])
def test_timms_optimizers_train_every_group_at_its_rate(name):
    weights = [torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizer = build_optimizer(
        OptimizerConfig(name, 0.01, 0.9, 0.0), [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:]}]
    )
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]
    assert name.startswith("lookahead") == (type(optimizer).__name__ == "Lookahead")
    sum((w * w).sum() for w in weights).backward()
    optimizer.step()
    moved = [float((1 - w.detach()).abs().max()) for w in weights]
    assert moved[0] > 5 * moved[1] > 0


def test_an_unknown_optimizer_is_one_sentence():
    with pytest.raises(UserError, match="--opt adamv: timm has no optimizer of this name; close ones: "):
        build_optimizer(OptimizerConfig("adamv", 0.1, 0.9, 0.0), [torch.nn.Parameter(torch.ones(2))])


def small_beit3(**more):
    return timm.create_model(BEIT3, depth=3, embed_dim=24, num_heads=3, img_size=32, num_classes=5, **more)


def test_layer_groups_are_timms():
    encoder = small_beit3()
    head = list(encoder.head.parameters())
    made = layer_groups(encoder, head, 1.0, 1.0, 0.05, 0.65)
    wanted = timm.optim.param_groups_layer_decay(
        encoder, weight_decay=0.05, no_weight_decay_list=encoder.no_weight_decay(), layer_decay=0.65
    )

    def by_parameter(groups, rate):
        return {id(p): (g[rate], g["weight_decay"]) for g in groups for p in g["params"]}

    assert by_parameter(made, "lr") == by_parameter(wanted, "lr_scale")
    assert len(by_parameter(made, "lr")) == len(list(encoder.parameters()))
    rates = by_parameter(layer_groups(encoder, head, 0.5, 0.01, 0.05, 0.65), "lr")
    assert rates[id(head[0])] == (0.5, 0.05)
    assert rates[id(head[1])] == (0.5, 0.0)  # a bias is not decayed
    deepest = rates[id(encoder.patch_embed.proj.weight)][0]
    assert deepest == pytest.approx(0.01 * 0.65 ** (3 + 1))  # the embedding lies below three blocks and the head


def test_a_tuning_that_spares_vectors_says_which_flag_differs(folder, tmp_path):
    tune(folder, tmp_path, "--epochs", 1, "--exclude-bias-norm", "--wd", 0.1)
    groups = state_of(tmp_path)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    said = sentence(folder, tmp_path, "--epochs", 1, "--wd", 0.1, "--resume", "auto")
    assert "--exclude-bias-norm" in said
    state = state_of(tmp_path)
    del state["run"]["flags"]["--exclude-bias-norm"]  # as in files from before the flag
    torch.save(state, tmp_path / "old.pth.tar")
    said = sentence(folder, tmp_path, "--epochs", 1, "--wd", 0.1, "--resume", tmp_path / "old.pth.tar")
    assert "its weights are in other groups: --exclude-bias-norm or --layer-decay was given there" in said


def test_a_plateau_is_torchs():
    scores = [1.0, 2.0, 2.0, 1.9, 2.0, 3.0, 3.0, 3.0, 3.0]
    mine, weight = Plateau(1), torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=1)
    for score in scores:
        mine.note(score)
        theirs.step(score)
        assert 0.5 * mine.factor == pytest.approx(optimizer.param_groups[0]["lr"])
        again = Plateau(1)
        again.load_state_dict(mine.state_dict())
        mine = again
    assert mine.factor == pytest.approx(0.01)
    assert Plateau(None).factor == 1.0


# ----------------------------------------------------------------------------------------------------- schedules


def test_a_warm_up_rises_step_by_step_and_the_cosine_takes_the_rest(folder, tmp_path):
    words = ["--train-percent", 50, "--warmup-epochs", 1.5, "--lr", 0.2, "-p", 1, "--val-share", 0.1, "--val-only"]
    tune(folder, tmp_path, "--epochs", 3, *words)
    found = [r["lr_backbone"] for r in records(tmp_path) if "lr_backbone" in r]
    steps, total = 4, 12
    assert len(found) == total
    for step, rate in enumerate(found):
        t = step / steps
        up, rest = min(1.0, t / 1.5), max(0.0, t - 1.5) / 1.5
        assert rate == pytest.approx(0.2 * up * 0.5 * (1 + math.cos(math.pi * rest)), rel=1e-12, abs=1e-15)


def test_batches_of_a_step_add_up_to_a_larger_batch(folder, tmp_path):
    """With a frozen encoder, whose BatchNorm does not look at the batch."""
    words = ["--weights", "freeze", "--epochs", 2, "--val-share", 0.2, "--val-only"]  # 48 images
    tune(folder, tmp_path / "whole", *words, "-b", 16)
    tune(folder, tmp_path / "parts", *words, "-b", 4, "--update-freq", 4)
    one, two = (state_of(tmp_path / name)["state_dict"]["module.fc.weight"] for name in ("whole", "parts"))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_clipped_gradient_moves_the_weights_so_far(folder, tmp_path):
    tune(folder, tmp_path, "--epochs", 1, "-b", 64, "--momentum", 0, "--wd", 0, "--lr", 1, "--clip-grad", 1e-3,
         "--val-share", 0.2, "--val-only")  # fmt: skip
    torch.manual_seed(0)
    moved = state_of(tmp_path)["state_dict"]["module.fc.bias"]  # starts at 0
    assert 0 < float(moved.norm()) <= 1.001e-3


# ------------------------------------------------------------------------------------------------ a moving average


def test_what_is_evaluated_and_saved_is_the_moving_average(folder, tmp_path):
    words = ["--val-share", 0.2, "--val-only", "-b", 64, "--ema", 0.75]  # one step an epoch
    found = tune(folder, tmp_path, *words, "--epochs", 3, "--save-ckpt-freq", 1)
    states = [state_of(tmp_path, finetune.KEPT.format(epoch)) for epoch in range(3)]
    for before, after in zip(states, states[1:], strict=False):
        for name, value in after["state_dict"].items():
            if value.is_floating_point():
                wanted = 0.75 * before["state_dict"][name] + 0.25 * after["trained"][name]
                torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6, msg=name)
    assert differences(states[2], state_of(tmp_path)) == []
    assert states[2]["acc1"] == found["val_acc1"]
    encoder = build_encoder(ARCH, 3, size=16)
    model = finetune.Classifier(encoder, MEAN, STD, 3, False)
    encoder.load_state_dict({n.removeprefix("module."): v for n, v in states[2]["state_dict"].items()})
    images = EvalData(16, 8, 3)
    val = open_sources(path=str(folder)).train
    assert val is not None
    assert finetune.evaluate(model, images.of(val)).loss > 0


def test_decay_of_an_epoch_is_that_of_its_steps():
    model = finetune.Classifier(build_encoder(ARCH, 3, size=16), MEAN, STD, 0, False)
    assert moving_average(model, None, 0.5, steps=4).decay ** 4 == pytest.approx(0.5)
    assert moving_average(model, 0.9, None, steps=4).decay == 0.9
    assert moving_average(model, None, None, steps=4) is None


def test_a_resumed_run_is_the_same_run(folder, tmp_path, monkeypatch):
    """All that has a state at once: Lookahead, AdamW, a moving average, a plateau, mixing, a policy, drop path."""
    words = EVERYTHING.split()
    tune(folder, tmp_path / "whole", *words)
    left: list[int] = []
    monkeypatch.setattr(StopRequest, "asked", lambda self: 76 * (left.pop() == 0) if left else 0)
    for steps, code in ((1, 75), (3, 75), (2, 75), (0, 0)):  # of each part; the last part goes on to the end
        left[:] = range(steps)
        tune(folder, tmp_path / "parts", *words, "--resume", "auto", code=code)
    whole, parts = state_of(tmp_path / "whole"), state_of(tmp_path / "parts")
    assert whole["epoch"] == parts["epoch"] == 4
    assert differences(whole, parts) == []
    assert "trained" in whole


# ------------------------------------------------------------------------------------------------------- BEiT-3


def official(depth: int = 2, width: int = 48, side: int = 14) -> dict:
    """A file as BEiT-3's authors publish them: two branches of everything but the attention's input."""
    made: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)

    def add(name, *shape):
        made[name] = 0.02 * torch.randn(*shape)

    add("beit3.text_embed.weight", 10, width)
    add("beit3.vision_embed.mask_token", 1, 1, width)
    add("beit3.vision_embed.cls_token", 1, 1, width)
    add("beit3.vision_embed.proj.weight", width, 3, 16, 16)
    add("beit3.vision_embed.proj.bias", width)
    add("beit3.encoder.embed_positions.A.weight", side * side + 3, width)
    add("beit3.encoder.embed_positions.B.weight", 20, width)
    for layer in range(depth):
        for branch in "AB":
            start = f"beit3.encoder.layers.{layer}."
            for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
                add(f"{start}self_attn.{name}.{branch}.weight", width, width)
                add(f"{start}self_attn.{name}.{branch}.bias", width)
            for name in ("self_attn.inner_attn_ln", "self_attn_layer_norm", "final_layer_norm"):
                add(f"{start}{name}.{branch}.weight", width)
                add(f"{start}{name}.{branch}.bias", width)
            add(f"{start}ffn.{branch}.fc1.weight", 4 * width, width)
            add(f"{start}ffn.{branch}.fc1.bias", 4 * width)
            add(f"{start}ffn.{branch}.fc2.weight", width, 4 * width)
            add(f"{start}ffn.{branch}.fc2.bias", width)
            add(f"{start}ffn.{branch}.ffn_layernorm.weight", 4 * width)
            add(f"{start}ffn.{branch}.ffn_layernorm.bias", 4 * width)
    return {"model": made}


@pytest.fixture
def small(monkeypatch):
    """BEiT-3 with two blocks of 48 channels."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2, embed_dim=48, num_heads=4))


def test_an_official_file_loads_with_every_key_of_the_vision_branch(small, tmp_path):
    state = official()
    torch.save(state, tmp_path / "beit3.pth")
    encoder = build_encoder(BEIT3, 5)
    _, words = load_backbone(encoder, str(tmp_path / "beit3.pth"), BEIT3)
    assert "BEiT-3's vision branch, its fc_norm is new" in words
    loaded = torch.cat([value.flatten() for name, value in encoder.state_dict().items()
                        if not name.startswith(("head", "fc_norm"))])  # fmt: skip
    unused = ("text_embed", "mask_token", ".B.")
    vision = {n: v for n, v in state["model"].items() if not any(word in n for word in unused)}
    kept = {n: v[2:] if "embed_positions" in n else v for n, v in vision.items()}  # two positions belong to the text
    wanted = torch.cat([value.flatten() for value in kept.values()])
    assert torch.equal(loaded.sort().values, wanted.sort().values)  # every number of the branch, and no other
    block, own = encoder.blocks[1].attn, "beit3.encoder.layers.1.self_attn."
    theirs = torch.cat([vision[f"{own}{name}_proj.A.weight"] for name in "qkv"])
    assert torch.equal(block.qkv.weight, theirs)
    assert torch.equal(encoder.blocks[0].mlp.fc2.weight, vision["beit3.encoder.layers.0.ffn.A.fc2.weight"])


def test_an_official_pretrainings_norm_of_the_last_tokens_is_left_out_as_its_own_classification_does(small, tmp_path):
    torch.save(official(), tmp_path / "without.pth")
    state = official()
    state["model"] |= {
        f"beit3.encoder.layer_norm.{branch}.{name}": torch.ones(48) for branch in "AB" for name in ("weight", "bias")
    }
    state["model"]["mlm_head.weight"] = torch.ones(10, 48)
    torch.save(state, tmp_path / "with.pth")
    encoder = build_encoder(BEIT3, 5)
    without, _ = load_backbone(encoder, str(tmp_path / "without.pth"), BEIT3)
    found, words = load_backbone(encoder, str(tmp_path / "with.pth"), BEIT3)
    assert "the norm of its last tokens is not used" in words
    assert found.keys() == without.keys() and all(torch.equal(found[name], without[name]) for name in found)


def test_an_official_file_tells_its_architecture():
    for width, word, patch in ((768, "base", 16), (1024, "large", 16), (1408, "giant", 14)):
        tensors = {"beit3.vision_embed.proj.weight": torch.zeros(width, 3, patch, patch)}
        assert arch_of(File("beit3.pth", {}, tensors, {})) == f"beit3_{word}_patch{patch}_224"
        assert timm.is_model(f"beit3_{word}_patch{patch}_224")


def test_an_official_fine_tuned_file_gives_its_norm_and_not_its_head(small, tmp_path):
    state = official()
    state["model"] |= {"fc_norm.weight": torch.full((48,), 2.0), "fc_norm.bias": torch.full((48,), 3.0),
                       "head.weight": torch.zeros(1000, 48), "head.bias": torch.zeros(1000)}  # fmt: skip
    torch.save(state, tmp_path / "beit3.pth")
    encoder = build_encoder(BEIT3, 5, size=224)
    _, words = load_backbone(encoder, str(tmp_path / "beit3.pth"), BEIT3)
    assert "its head (2 tensors) is not used; BEiT-3's vision branch" in words
    assert "is new" not in words
    assert float(encoder.fc_norm.bias.detach().mean()) == 3
    with pytest.raises(UserError, match="does not fit the encoder"):
        load_backbone(build_encoder("resnet18", 5), str(tmp_path / "beit3.pth"), "resnet18")


def test_schanes_recipe_trains_beit3_base(folder, tmp_path, monkeypatch):
    """With one of its twelve blocks; two steps of two views and a mixed image each."""
    monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=1))
    written = []
    monkeypatch.setattr(files, "write", lambda state, path: written.append((path, state)))  # of 100 MB each
    found = tune(folder, tmp_path, *SCHANE.split(), "--train-percent", 14, "--val-share", 0.1, "--val-only")
    assert found["train_images"] == 8
    last = [r for r in records(tmp_path) if "contrast" in r][-1]
    assert last["loss"] == pytest.approx(0.1 * last["cross_entropy"] + 0.9 * last["contrast"], rel=1e-3)
    names = [str(tmp_path / name) for name in (finetune.BEST, finetune.KEPT.format(0), finetune.CHECKPOINT)]
    assert [path for path, _ in written] == names
    state = written[-1][1]
    assert state["state_dict"]["module.pos_embed"].shape == (1, 5, 768)
    assert len(state["optimizer"]["state"]) == len(state["state_dict"])  # every parameter was trained


def test_drop_path_is_timms_alone():
    assert build_encoder("test_vit", 3, size=160, drop_path=0.3).blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    with pytest.raises(UserError, match="--drop-path is for timm's networks"):
        build_encoder("resnet18", 3, drop_path=0.1)


# ------------------------------------------------------------------------------------------------------ few-shot


def test_few_shot_on_new_classes_after_fine_tuning(folder, tmp_path):
    """An episodic split: base classes to fine-tune on, others for the episodes."""
    base, novel = tmp_path / "base", tmp_path / "novel"
    shutil.copytree(folder / "train", base / "train")
    for label in range(3):
        shutil.copytree(folder / "val" / f"class{label}", novel / f"other{label}")
    words = ["--epochs", 1, "--loss", "supcon", "--val-share", 0.2, "--val-only", "--eval-fewshot", "--few-shot-way", 2,
             "--few-shot-shots", 1, 2, "--few-shot-queries", 2, "--few-shot-episodes", 4]  # fmt: skip
    found = tune(base, tmp_path, *words, "--few-shot-data", novel)
    assert found["few_shot"]["episodes"] == 4
    # the fine-tuned encoder, frozen: what the probe's few-shot finds in the file that was written
    probed = {}
    for name, pretrained in (("tuned", tmp_path / finetune.CHECKPOINT), ("untrained", "")):
        flags = ["-a", ARCH, "--size", 16, "-j", 0, "--seed", 3, "--few-shot", *words[words.index("--few-shot-way") :]]
        flags += ["--pretrained", pretrained, "--save-dir", tmp_path / name, novel]
        assert main_lincls.worker(parse_lincls([*map(str, flags)])) == 0
        probed[name] = json.loads((tmp_path / name / "few_shot.json").read_text())
    measures = [f"{what}_{shot}shot" for what in ("acc", "ci95") for shot in (1, 2)]
    assert [found[name] for name in measures] == pytest.approx([probed["tuned"][name] for name in measures])
    assert [found[name] for name in measures] != [probed["untrained"][name] for name in measures]
    assert "does not exist" in sentence(base, tmp_path / "no", *words, "--few-shot-data", tmp_path / "none")
    assert not (tmp_path / "no" / finetune.CHECKPOINT).exists()  # said before anything was trained
    assert json.loads((tmp_path / "result.json").read_text()) == found


# --------------------------------------------------------------------------------------------------- pretraining


def test_a_pretraining_has_the_same_comforts(image_folder, in_process, tmp_path):
    """A moving average that is evaluated, saved, read back and resumed; an optimizer of timm; clipping."""
    words = [image_folder, *PRETRAIN, "--opt", "lookahead_adamw", "--lr", 1e-3, "--clip-grad", 0.5, "--ema-epoch", 0.5]
    assert in_process(*words, "--epochs", 2, "--save-dir", tmp_path / "whole") == 0
    assert in_process(*words, "--epochs", 2, "--save-dir", tmp_path / "parts", "--max-minutes", 1e-9) == 75
    assert in_process(*words, "--epochs", 2, "--save-dir", tmp_path / "parts", "--resume", "auto") == 0
    whole, parts = (load(tmp_path / name) for name in ("whole", "parts"))
    assert differences(whole["state_dict"], parts["state_dict"]) == []
    path = tmp_path / "whole" / "checkpoint_0001.pth.tar"
    encoder = build_encoder(ARCH, 3, size=16)
    assert "from encoder_ema of" in load_backbone(encoder, str(path), ARCH)[1].replace("tensors from", "from")
    average = whole["state_dict"]["module.encoder_ema.conv1.0.weight"]
    assert torch.equal(encoder.conv1[0].weight, average)
    assert not torch.equal(average, whole["state_dict"]["module.encoder_q.conv1.0.weight"])
    trained = sum(len(group["params"]) for group in whole["optimizer"]["param_groups"])
    assert trained == 2 * len(list(build_encoder(ARCH, 16, size=16).parameters()))  # queries and keys, no average


def test_a_step_that_is_called_off_does_not_move_the_average():
    model = torch.nn.Module()
    model.encoder_q = torch.nn.Linear(2, 2)
    optimizer = build_optimizer(OptimizerConfig("sgd", 0.1, 0.0, 0.0), model.parameters())
    average = attach_ema(model, optimizer, 0.5, None, 1)
    assert average is model.encoder_ema
    model.encoder_q.weight.data += 1.0
    before = average.weight.clone()
    optimizer.param_groups[0].update(fused=True, foreach=False)  # as the training loop does
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
    optimizer.step()
    assert torch.equal(average.weight, before)
    optimizer.found_inf = torch.tensor(0.0)
    optimizer.step()
    torch.testing.assert_close(average.weight, before + 0.5)
    assert (
        "fused" not in build_optimizer(OptimizerConfig("lookahead_adamw", 0.1, 0.0, 0.0), model.parameters()).defaults
    )
    assert attach_ema(torch.nn.ModuleDict({"encoder_q": average}), optimizer, None, None, 1) is average


def test_a_gradient_that_is_not_finite_is_not_clipped():
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = build_optimizer(OptimizerConfig("sgd", 1.0, 0.0, 0.0, clip=0.5), [weight])
    weight.grad = torch.tensor([3.0, 4.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.3, -0.4, 0.0]))
    weight.grad = torch.tensor([1.0, torch.inf, 2.0])
    optimizer.step()
    assert weight.grad.tolist() == [1.0, torch.inf, 2.0]
