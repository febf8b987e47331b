"""The options of the functions by their names in Python, written by ``python tests/support/typed_options.py``."""

# fmt: off

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, TypedDict, Union

StrPath = Union[str, "os.PathLike[str]"]
ExportKind = Literal["torchvision", "timm", "hub", "detectron2", "safetensors", "onnx", "features"]


class PretrainOptions(TypedDict, total=False):
    """Of :func:`moco.pretrain`: the flags of ``moco pretrain``."""

    config: StrPath | None
    """defaults from a file or a recipe's name; flags override them"""
    dataset: Literal["folder", "cifar10", "cifar100", "caltech256", "fashionmnist", "stl10", "mnist5k"] | None
    """a known data set instead of an image folder"""
    download: bool
    """let --dataset fetch its files"""
    cache: StrPath | None
    """keep decoded images in this folder, for sets of small images: decoded once instead of in every epoch, then
    mapped into memory (20 GB at most)"""
    val_data: StrPath | None
    """labelled validation images when DIR does not hold them"""
    size: int | None
    """side of the square views (default: 224, small sets their own size)"""
    channels: Literal[1, 3] | None
    """read images as grey (1) or colour (3; default: the data set's)"""
    mean: float | Sequence[float] | None
    """channel means in 0..1 (default: the data set's)"""
    std: float | Sequence[float] | None
    """channel deviations in 0..1 (default: the data set's)"""
    workers: int
    """loader processes on this machine in all (default: 32, never more than its cores)"""
    aug_plus: bool
    """MoCo v2's augmentation (same as --aug v2)"""
    aug: Literal["v1", "v2", "v3", "v3-wide", "cifar", "supcon", "digits"] | None
    """augmentation preset (default v1; small sets their own; simclr, supcon, hcl, dcl: supcon; moco_v3: v3)"""
    aug_device: Literal["cpu", "gpu", "auto"]
    """where views are made after their crop: by the loader's processes, or in batches on the run's device (default:
    auto, the loader's)"""
    decode: Literal["exact", "fast"]
    """fast: JPEG decoded only as finely as the crops need, crops within two levels of PIL's (default: exact)"""
    drop_last: bool
    """drop an epoch's last short batch (default: on)"""
    train_folder: StrPath | None
    """SupContrast's DIR"""
    num_classes: int | None
    """checked against the data, which decides by itself"""
    arch: str
    """torchvision or timm network (default: resnet50)"""
    stem: Literal["auto", "imagenet", "cifar"]
    """cifar: 3x3 and no pooling; auto: cifar up to 64 px"""
    sync_bn: bool
    """BatchNorm over the batch of all processes"""
    method: Literal["moco", "mochi", "synco", "simclr", "supcon", "hcl", "dcl", "moco_v3"] | None
    """default moco; --n1..--n6 mean synco, --mochi mochi; simclr, supcon, hcl, dcl compare the images of a batch;
    supcon and --moco-k: with a queue of keys and labels, and synthetic negatives if --mochi or --n1..--n6 ask for
    them; moco_v3 compares with the keys of the batch"""
    moco_dim: int
    """feature dimension C (default: 128; moco_v3: 256)"""
    moco_mlp_dim: int
    """moco_v3: width inside of its MLPs (default: 4096)"""
    moco_k: int | None
    """queue size K (default: 65536; supcon: no queue)"""
    moco_m: float
    """momentum of the key encoder (default: 0.999; moco_v3: 0.99)"""
    moco_m_cos: bool
    """moco_v3: raise the momentum to 1 over the run by half a cosine (default: on)"""
    moco_t: float
    """temperature T (default: 0.07; moco_v3: 1)"""
    mlp: bool | None
    """MoCo v2's head (default: on for simclr, supcon, hcl, dcl)"""
    stop_grad_conv1: bool
    """moco_v3: keep a ViT's patch embedding as it was drawn (default: on)"""
    symmetric: bool
    """each view is query once; the two losses are added"""
    bn_splits: int | None
    """parts of the batch that BatchNorm sees alone (default: 8 or what the batch allows with one process, 1 with
    several)"""
    shuffle_bn: bool
    """shuffle keys between processes (or splits) for BatchNorm"""
    mask_same_image: bool | None
    """leave out queue rows of the query's own image (default: on when the queue holds more than a tenth of the data
    set)"""
    head_impl: Literal["auto", "reference", "cpu", "triton"]
    """loss implementation; auto: triton (fused) on a GPU where it is right and not slower, else cpu (closed forms,
    any device)"""
    head_precision: Literal["auto", "fp32", "tf32", "tf32x3", "bf16"]
    """operands of the loss's two matrix products with the queue, summed in fp32; auto: tf32x3 (three products, as
    exact as fp32) with triton, bf16 on a CPU that is faster with it, else fp32"""
    base_temperature: float | None
    """multiply the loss by T / T0 (default: 0.07 for simclr and supcon without a queue, as SupContrast does; supcon
    with a queue takes it)"""
    contrast_mode: Literal["all", "one"]
    """anchors: all views, or the first of each image"""
    views: int
    """random views an image, for the methods without a queue (default: 2)"""
    beta: float
    """hcl: how much harder negatives weigh more (default: 1)"""
    tau_plus: float
    """hcl: share of negatives that are positives (0.1)"""
    estimator: Literal["hard", "easy"]
    """hcl: easy weighs all negatives alike"""
    n_hard: int
    """hardest queue rows that a query mixes (default: 1024)"""
    n1: int | None
    """SynCo: negatives by interpolation (default: 256)"""
    n2: int | None
    """SynCo: negatives by extrapolation (default: 256)"""
    n3: int | None
    """SynCo: negatives by mixup (default: 256)"""
    n4: int | None
    """SynCo: negatives by noise (default: 64)"""
    n5: int | None
    """SynCo: negatives by perturbation (default: 64)"""
    n6: int | None
    """SynCo: negatives by adversarial (default: 64)"""
    sigma: float
    """SynCo: deviation of the noise (default: 0.01)"""
    delta: float
    """SynCo: step of the perturbation (default: 0.01)"""
    eta: float
    """SynCo: step of the adversarial sign (default: 0.01)"""
    mochi: Sequence[int] | None
    """MoCHi: N hardest rows, S negatives of type 1, S2 of type 2"""
    hard_start_epoch: int
    """first epoch, counted from 0, with synthetic negatives (default: 10)"""
    hard_stop_epoch: int | None
    """first epoch without them again (default: none)"""
    type_starts: str | Sequence[str]
    """a later first epoch for one kind, such as interpolation=20, or optimizer step, mixup=1000steps; kinds: mixup
    interpolation extrapolation noise perturbation adversarial"""
    extrapolation: Literal["code", "paper"]
    """SynCo's released code or its paper's text"""
    epochs: int
    """epochs to run (default: 200)"""
    start_epoch: int
    """number of the first epoch, for restarts by hand"""
    batch_size: int
    """images a step over all processes of this node (default: 256)"""
    lr: float
    """learning rate (0.03)"""
    schedule: int | Sequence[int]
    """epochs at which lr drops 10x ([120, 160])"""
    lr_decay_epochs: str
    """SupContrast's spelling of --schedule E E"""
    lr_decay_rate: float
    """what lr is multiplied by at those epochs (0.1)"""
    cos: bool
    """cosine learning rate instead, one value an epoch (with pretraining's --steps, a step)"""
    steps: int | None
    """train N optimizer steps instead of --epochs"""
    plateau: int | None
    """in place of --schedule: lr drops 10x when the mean loss of an epoch has not fallen for more than E epochs"""
    warm: bool | None
    """raise the rate from --warm-from over --warm-epochs (default: on for simclr, supcon, hcl, dcl at batches above
    256)"""
    warm_epochs: int
    """of --warm (default: 10)"""
    warm_from: float
    """of --warm (default: 0.01)"""
    warm_steps: int | None
    """in place of --warm: raise the rate from --warm-from over N steps, also of a run that counts --steps"""
    rise_epochs: float
    """in place of --warm: raise the rate from 0 over E epochs, then the cosine takes the rest; both move every step
    (default: 0; MoCo v3's recipes have it)"""
    accum: int
    """batches a step: gradients are averaged over A batches, keys are enqueued after each, the key encoder moves
    once"""
    momentum: float
    """momentum of SGD (default: 0.9)"""
    weight_decay: float
    """(0.0001)"""
    opt: str
    """sgd, or an optimizer of timm: adamw, lars, lookahead_adamw .. (default: sgd)"""
    opt_betas: float | Sequence[float] | None
    """of optimizers that have betas (default: timm's, for adamw 0.9 0.999)"""
    clip_grad: float | None
    """largest norm of the gradient (default: no limit)"""
    min_lr: float
    """where the cosine ends, and what no plateau goes below (0)"""
    exclude_bias_norm: bool
    """no weight decay of biases and norms, and with --opt lars no adaptation of their rates (default: off; --layer-
    decay has it already)"""
    ema: float | None
    """evaluate and save an average of the weights that keeps a share D of itself at every step"""
    ema_epoch: float | None
    """the same, D an epoch"""
    print_freq: int
    """steps between log lines (default: 10)"""
    resume: StrPath
    """continue this checkpoint; auto: the newest in --save-dir"""
    seed: int | None
    """of all randomness (default: drawn, logged and kept in checkpoints)"""
    save_every: int
    """epochs between checkpoints (default: 1)"""
    keep: int
    """keep only the newest N checkpoints (default: 0 = all)"""
    overwrite: bool
    """start afresh in a folder that holds another run"""
    max_minutes: float | None
    """save and stop (exit code 0) after M minutes"""
    save_minutes: float | None
    """also save inside an epoch, M minutes after the last save (default: only at epochs' ends)"""
    save_steps: int | None
    """the same, S steps after the last save"""
    hang_minutes: float
    """when a step stands still for M minutes, name the process that holds it up and end with exit code 75 (default:
    10; 0: never)"""
    data_patience: float
    """wait M minutes for images or a disk that are gone, then stop (exit code 75; default: 10)"""
    max_restarts: int
    """with --nproc: start again from the newest good checkpoint when a process dies, at most N times (default: 0;
    torchrun has its own)"""
    max_bad_steps: int
    """stop after N non-finite steps in a row (default: 5)"""
    max_bad_images: int
    """stop when more images are unreadable (100)"""
    check_every: int
    """steps between checks that all queues are equal"""
    wandb: str | None
    """also log to Weights & Biases (extra: wandb)"""
    amp: Literal["auto", "off", "bf16", "fp16"]
    """encoder arithmetic (default: bf16 where the device has it; the loss is always fp32)"""
    channels_last: bool
    """memory layout of convolutions (default: on)"""
    compile: bool
    """torch.compile the two encoders"""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"]
    """torch's modes; the last two replay the encoders as CUDA graphs (default: default)"""
    recompute: bool
    """keep less of the forward pass for backward, for larger batches"""
    knn_every: int
    """epochs between k-NN evaluations (default: 10; 0: off)"""
    retrieval_every: int
    """epochs between measures of held-out images before the projection head and behind it: precision@1,
    R-precision, mAP@R, mAP, AMI, NMI (default: 0, never)"""
    knn_k: int | Sequence[int]
    """neighbours; several numbers are answered in one pass, the first is reported as knn (default: 200)"""
    knn_t: float
    """temperature of the votes (default: 0.1)"""
    world_size: int
    """nodes (with --multiprocessing-distributed) or processes"""
    rank: int
    """this node's or process's number"""
    dist_url: str | None
    """where the processes of several nodes meet, tcp://HOST:PORT"""
    dist_backend: str
    """nccl, or gloo without GPUs (chosen by itself)"""
    gpu: int | None
    """use this GPU"""
    multiprocessing_distributed: bool
    """one process a GPU (or --nproc) on each node"""
    nproc: int | Literal["all"] | None
    """processes on this node; without GPUs they use gloo"""


class EvaluateOptions(TypedDict, total=False):
    """Of :func:`moco.evaluate`: the flags of ``moco lincls``, ``moco semisup`` and ``moco retrieval``."""

    config: StrPath | None
    """defaults from a file or a recipe's name; flags override them"""
    dataset: Literal["folder", "cifar10", "cifar100", "caltech256", "fashionmnist", "stl10", "mnist5k"] | None
    """a known data set instead of an image folder"""
    download: bool
    """let --dataset fetch its files"""
    cache: StrPath | None
    """keep decoded images in this folder, for sets of small images: decoded once instead of in every epoch, then
    mapped into memory (20 GB at most)"""
    val_data: StrPath | None
    """labelled validation images when DIR does not hold them"""
    size: int | None
    """side of the square views (default: the file's, else 224, small sets their own size)"""
    channels: Literal[1, 3] | None
    """read images as grey (1) or colour (3; default: the file's, else the data set's)"""
    mean: float | Sequence[float] | None
    """channel means in 0..1 (default: the file's, else the data set's)"""
    std: float | Sequence[float] | None
    """channel deviations in 0..1 (default: the file's, else the data set's)"""
    workers: int
    """loader processes on this machine in all (default: 32, never more than its cores)"""
    train_folder: StrPath | None
    """the labelled images to train on, as DIR"""
    num_classes: int | None
    """checked against the data, which decides by itself"""
    arch: str | None
    """torchvision or timm network (default: the file's, else resnet50)"""
    stem: Literal["auto", "imagenet", "cifar"]
    """cifar: 3x3 and no pooling; auto: the file's, else cifar up to 64 px"""
    amp: Literal["off", "bf16", "fp16"] | Literal["auto", "off", "bf16", "fp16"]
    """arithmetic of the frozen encoder (default: off); or encoder arithmetic (default: off); or arithmetic of the
    encoder (default: off)"""
    features: Literal["views", "cached"]
    """views: augmented anew every epoch, the published protocol; cached: computed once, without augmentation, then
    epochs cost seconds"""
    epochs: int | None
    """epochs to run (default: 100); or epochs to run (default: 60 below 10 percent, 30 below 100, 90 for all
    images)"""
    start_epoch: int
    """number of the first epoch, for restarts by hand"""
    batch_size: int
    """images a step over all processes of this node (default: 256); or images a step over all processes of this
    node (default: 1024)"""
    lr: float | Sequence[float] | None
    """learning rate ([30.0]); several, such as 30 10 3: a classifier each, on the same features; or of both, in
    place of the two"""
    schedule: int | Sequence[int] | None
    """epochs at which lr drops 10x ([60, 80]); or epochs at which rates drop 10x, in place of the cosine"""
    lr_decay_epochs: str
    """SupContrast's spelling of --schedule E E"""
    lr_decay_rate: float
    """what lr is multiplied by at those epochs (0.1)"""
    cos: bool
    """cosine learning rate instead, one value an epoch (with pretraining's --steps, a step); or the cosine also
    where --schedule is given"""
    warm: bool | None
    """raise the rate from --warm-from over --warm-epochs (default: off); or raise the rate from --warm-from over
    --warm-epochs (default: on, as in SupContrast's main_ce.py, for --lr with --cos or --schedule and without
    --pretrained at batches above 256)"""
    warm_epochs: int
    """of --warm (default: 10)"""
    warm_from: float
    """of --warm (default: 0.01)"""
    momentum: float
    """momentum of SGD (default: 0.9)"""
    weight_decay: float
    """(0.0); or (default: 1e-6)"""
    opt: str
    """sgd, or an optimizer of timm: adamw, lars, lookahead_adamw .. (default: sgd)"""
    opt_betas: float | Sequence[float] | None
    """of optimizers that have betas (default: timm's, for adamw 0.9 0.999)"""
    clip_grad: float | None
    """largest norm of the gradient (default: no limit)"""
    min_lr: float
    """where the cosine ends, and what no plateau goes below (0)"""
    label_smoothing: float
    """of the training loss, in 0..1 (default: 0)"""
    print_freq: int
    """steps between log lines (default: 10)"""
    resume: StrPath
    """continue this checkpoint; auto: the newest in --save-dir; or continue this checkpoint; auto: the one in
    --save-dir"""
    seed: int | None
    """of all randomness (default: drawn, logged and kept in checkpoints); or of all randomness but the draw
    (default: drawn, logged and kept); or of k-means (default: 0)"""
    overwrite: bool
    """start afresh in a folder that holds another run"""
    max_minutes: float | None
    """save and stop (exit code 0) after M minutes"""
    save_minutes: float | None
    """also save inside an epoch, M minutes after the last save (default: only at epochs' ends)"""
    save_steps: int | None
    """the same, S steps after the last save"""
    hang_minutes: float
    """when a step stands still for M minutes, name the process that holds it up and end with exit code 75 (default:
    10; 0: never)"""
    data_patience: float
    """wait M minutes for images or a disk that are gone, then stop (exit code 75; default: 10)"""
    save_freq: int | None
    """SupContrast's: changes nothing, every epoch is saved"""
    save_ckpt_freq: int
    """also keep the checkpoint of every E-th epoch, as checkpoint_lincls_NNNN.pth.tar, for moco.average (default:
    0, none); or also keep the checkpoint of every E-th epoch, as checkpoint_semisup_NNNN.pth.tar (default: 0,
    none)"""
    lr_find: bool
    """learning-rate range test: raise the rate step by step, write lr_find.csv and lr_find.png, suggest a --lr,
    stop"""
    lr_find_steps: int | None
    """steps of --lr-find (default: one epoch, at least 100)"""
    evaluate: bool
    """evaluate on the validation set and stop; or evaluate --resume on the test images and stop"""
    val_share: float
    """evaluate on this share of every class's training images, held out, and leave the validation images alone: to
    choose settings by (default: 0); or hold this share of every class's training images out, evaluate each epoch on
    it, and the test images once, at the end (default: 0, each epoch on the test images)"""
    per_class: StrPath | None
    """also write top-1, top-5 and the likeliest mistake of each class"""
    confusion: bool
    """also write confusion.csv and confusion.png into --save-dir"""
    knn_k: int | Sequence[int]
    """neighbours; several numbers are answered in one pass, the first is reported as knn (default: 200)"""
    knn_t: float
    """temperature of the votes (default: 0.1)"""
    few_shot_classes: StrPath
    """the classes to draw from, one a line, or miniImageNet's CSV of filename,label (default: all, held-out images
    only)"""
    few_shot_way: int
    """classes an episode (default: 5)"""
    few_shot_shots: int | Sequence[int]
    """labelled images a class (1 5)"""
    few_shot_queries: int
    """images to classify a class (default: 15)"""
    few_shot_episodes: int
    """episodes (default: 600)"""
    world_size: int
    """nodes (with --multiprocessing-distributed) or processes"""
    rank: int
    """this node's or process's number"""
    dist_url: str | None
    """where the processes of several nodes meet, tcp://HOST:PORT"""
    dist_backend: str
    """nccl, or gloo without GPUs (chosen by itself)"""
    gpu: int | None
    """use this GPU"""
    multiprocessing_distributed: bool
    """one process a GPU (or --nproc) on each node"""
    nproc: int | Literal["all"] | None
    """processes on this node; without GPUs they use gloo"""
    train_percent: float | None
    """train on P percent of the labelled images (default: 100): of ImageNet at 1 and 10 SimCLR's lists, fetched
    once, else a class-balanced draw"""
    train_files: StrPath
    """train on the images named in this file, one a line (n01440764_18.JPEG, or FOLDER/NAME); balanced: a draw,
    also of ImageNet at 1 and 10 percent"""
    subset_seed: int
    """of the draw and of the validation part (default: 0); not --seed, so that runs with several seeds train on the
    same images"""
    val_only: bool
    """with --val-share: leave the test images alone"""
    task: str | None
    """BEiT-3's: imagenet for an image folder, or a --dataset's name"""
    data_path: StrPath | None
    """BEiT-3's and SupContrast's DIR"""
    aa: str
    """timm's AutoAugment or RandAugment, such as rand-m9-mstd0.5-inc1, after the random crop (default: none)"""
    aug: Literal["v1", "v2", "cifar", "supcon", "digits"] | None
    """a pretraining's views in place of crop and flip"""
    weights: Literal["finetune", "freeze"]
    """train the encoder, or keep it"""
    drop_path: float
    """stochastic depth of timm's networks (default: 0)"""
    sync_bn: bool
    """BatchNorm over the batch of all processes"""
    channels_last: bool
    """memory layout of convolutions (default: on)"""
    lr_backbone: float
    """of the encoder (default: 0.01; SynCo's grid: 0.01 0.02 0.05 0.1 0.005)"""
    lr_classifier: float
    """of the linear layer (default: 0.5)"""
    update_freq: int
    """batches a step: gradients are averaged over A, each with its own contrastive loss (default: 1)"""
    warmup_epochs: float
    """raise the rates from 0 over E epochs; then the cosine moves every step (default: 0, every epoch)"""
    plateau: int | None
    """in place of the cosine: rates drop 10x when the accuracy has not risen for more than E epochs"""
    exclude_bias_norm: bool
    """no weight decay of biases and norms, and with --opt lars no adaptation of their rates (default: off; --layer-
    decay has it already)"""
    ema: float | None
    """evaluate and save an average of the weights that keeps a share D of itself at every step"""
    ema_epoch: float | None
    """the same, D an epoch"""
    layer_decay: float | None
    """each layer's rate is D times that of the layer above; biases and norms are not decayed (default: off)"""
    loss: Literal["ce", "supcon", "simclr", "schane"]
    """ce: cross-entropy; the others: (1 - alpha) cross-entropy + alpha times the contrastive loss of two views an
    image (default: ce)"""
    alpha: float | None
    """weight of the contrastive loss (default: 0.9)"""
    temp: float | None
    """temperature of the contrastive loss (default: 0.5)"""
    estimator: Literal["hard", "easy"] | None
    """schane: weigh hard negatives, or all alike, which is supcon (default: hard)"""
    beta: float | None
    """schane: how much more hard negatives weigh (1)"""
    smoothing: float
    """of cross-entropy (default: 0)"""
    mixup: float
    """of cross-entropy's images, timm's (default: 0, off)"""
    cutmix: float
    """the same by rectangles (default: 0, off)"""
    reprob: float
    """probability of erasing a rectangle (default: 0)"""
    dist_eval: bool
    """BEiT-3's: changes nothing, processes always share the evaluation"""
    few_shot: bool
    """few-shot accuracy of the frozen features: logistic regression on few images a class, mean and 95 % interval
    over episodes"""
    few_shot_data: StrPath
    """images of new classes for --few-shot, a folder or list (default: the test images, whose classes were trained
    on)"""
    split: Literal["val", "train"] | None
    """which images (default: the held-out ones where there are any)"""


class EmbedOptions(TypedDict, total=False):
    """Of :func:`moco.embed`: the flags of ``moco embed``."""

    amp: Literal["off", "bf16", "fp16"]
    """arithmetic of the encoder (default: off)"""
    split: Literal["val", "train"] | None
    """which images (default: the held-out ones where there are any)"""
    format: Literal["npz", "safetensors"]
    """of the features (default: npz)"""
    picture: Literal["tsne", "umap", "pacmap", "none"]
    """how features become points (default: tsne; the extras umap and pacmap install the others)"""
    points: int
    """images in the picture at most (default: 2000)"""
    seed: int
    """of the choice of images and of the picture (default: 0)"""
    config: StrPath | None
    """defaults from a file or a recipe's name; flags override them"""
    dataset: Literal["folder", "cifar10", "cifar100", "caltech256", "fashionmnist", "stl10", "mnist5k"] | None
    """a known data set instead of an image folder"""
    download: bool
    """let --dataset fetch its files"""
    cache: StrPath | None
    """keep decoded images in this folder, for sets of small images: decoded once instead of in every epoch, then
    mapped into memory (20 GB at most)"""
    val_data: StrPath | None
    """labelled validation images when DIR does not hold them"""
    size: int | None
    """side of the square views (default: the file's, else 224, small sets their own size)"""
    channels: Literal[1, 3] | None
    """read images as grey (1) or colour (3; default: the file's, else the data set's)"""
    mean: float | Sequence[float] | None
    """channel means in 0..1 (default: the file's, else the data set's)"""
    std: float | Sequence[float] | None
    """channel deviations in 0..1 (default: the file's, else the data set's)"""
    workers: int
    """loader processes on this machine in all (default: 32, never more than its cores)"""
    batch_size: int
    """images a step over all processes of this node (default: 256)"""
    arch: str | None
    """torchvision or timm network (default: the file's, else resnet50)"""
    stem: Literal["auto", "imagenet", "cifar"]
    """cifar: 3x3 and no pooling; auto: the file's, else cifar up to 64 px"""
    world_size: int
    """nodes (with --multiprocessing-distributed) or processes"""
    rank: int
    """this node's or process's number"""
    dist_url: str | None
    """where the processes of several nodes meet, tcp://HOST:PORT"""
    dist_backend: str
    """nccl, or gloo without GPUs (chosen by itself)"""
    gpu: int | None
    """use this GPU"""
    multiprocessing_distributed: bool
    """one process a GPU (or --nproc) on each node"""
    nproc: int | Literal["all"] | None
    """processes on this node; without GPUs they use gloo"""


class ExportOptions(TypedDict, total=False):
    """Of :func:`moco.export`: the flags of ``moco export``."""

    head: Literal["drop", "keep"]
    """keep: logits of the file's linear classifier instead of features (torchvision, timm, hub, onnx; default:
    drop)"""
    arch: str
    """torchvision or timm network (default: the file's)"""
    stem: Literal["auto", "imagenet", "cifar"]
    """(default: the file's)"""
    size: int | None
    """side of the images (default: the file's)"""
    dataset: Literal["folder", "cifar10", "cifar100", "caltech256", "fashionmnist", "stl10", "mnist5k"] | None
    """whose channel statistics the card names (default: the run's)"""
    mean: float | Sequence[float] | None
    """channel means in 0..1 for the card"""
    std: float | Sequence[float] | None
    """channel deviations in 0..1 for the card"""
