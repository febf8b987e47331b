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
    """read defaults from this YAML file or from the recipe of this name; flags override them"""
    dataset: Literal["folder", "cifar10", "cifar100", "caltech256", "fashionmnist", "stl10", "mnist5k"] | None
    """use a known data set instead of an image folder"""
    download: bool
    """let --dataset download its files"""
    cache: StrPath | None
    """folder in which decoded images are kept and mapped into memory, for sets of small images: each is decoded
    once instead of in every epoch (20 GB at most)"""
    val_data: StrPath | None
    """labelled validation images, where DIR does not hold them"""
    size: int | None
    """side of the square views in pixels (default: 224; sets of small images have their own size)"""
    channels: int | None
    """read the images as grey (1) or colour (3), or .npy and TIFF files by their N channels, bands or pages
    (default: the data set's)"""
    levels: Sequence[float] | None
    """values of the image files that become black and white, linear between and clipped beyond, for images that are
    not of 0 to 255: 0 4095 for 12 bits in 16 (default: those of the files' type, 0 65535 of 16 bits; of floats 0 1
    or 0 255, as a few images have them)"""
    mean: float | Sequence[float] | None
    """mean of each channel, in 0..1 (default: the data set's)"""
    std: float | Sequence[float] | None
    """standard deviation of each channel, in 0..1 (default: the data set's)"""
    workers: int
    """number of loader processes on this machine, for all processes together (default: 32, at most one per core)"""
    aug_plus: bool
    """use MoCo v2's augmentation (the same as --aug v2)"""
    aug: StrPath | None
    """augmentation: v1, v2, v3, v3-wide, cifar, supcon, digits, simclr, crop, or FILE.yml, a file of your own with
    a preset's values (default: v1; simclr, supcon, hcl, dcl: supcon; moco_v3: v3; sets of small images have their
    own)"""
    crop_min: float | None
    """smallest share of an image that a view keeps, the lower end of the augmentation's crop_scale (default: the
    augmentation's)"""
    aug_device: Literal["cpu", "gpu", "auto"]
    """where views are made after their crop: cpu, by the loader's processes, or gpu, in batches on the run's device
    (default: auto, which is cpu)"""
    decode: Literal["exact", "fast"]
    """fast: decode a JPEG only as finely as its crops need, which changes pixel values by at most two levels
    (default: exact)"""
    stats: Literal["auto"] | None
    """auto: --mean and --std are those of the training images, computed once and kept in --cache or --save-dir"""
    drop_last: bool
    """drop the incomplete batch at the end of an epoch (default: on)"""
    local_crops: int
    """small random crops per image beside its views, as queries only: against the same keys, queue and synthetic
    negatives (default: 0; SwAV: 6)"""
    local_crop_size: int | None
    """their side in pixels (default: 96 beside views of 224, others in proportion)"""
    local_crop_scale: Sequence[float]
    """share of an image that they keep (default: 0.05 0.14)"""
    auto: bool
    """of small sets: choose queue, batch, schedule, size and the like by the number and the size of the images,
    where they are not given; the log says what was taken (default: off, the published recipes' values)"""
    train_folder: StrPath | None
    """DIR, as SupContrast spells it"""
    num_classes: int | None
    """number of classes; only checked, the data decide"""
    arch: str
    """name of a torchvision or timm network (default: resnet50)"""
    stem: Literal["auto", "imagenet", "cifar"]
    """cifar: a 3x3 first convolution without pooling; auto: cifar up to 64 px"""
    pretrained: StrPath
    """begin from these weights: the folder of a run, a checkpoint of this project or of many others, or
    torchvision:NAME for published ones; a run that is resumed goes on from its own (default: random weights)"""
    sync_bn: bool
    """BatchNorm over the batch of all processes"""
    method: Literal["moco", "mochi", "synco", "simclr", "supcon", "hcl", "dcl", "moco_v3"] | None
    """default: moco, or what --n1..--n6 (synco) or --mochi imply; simclr, supcon, hcl, dcl: in-batch negatives;
    moco_v3: keys of the batch; supcon with --moco-k: a queue of keys and labels, with synthetic negatives if
    --mochi or --n1..--n6 ask for them"""
    moco_dim: int
    """feature dimension C (default: 128; moco_v3: 256)"""
    moco_mlp_dim: int
    """moco_v3: hidden width of its MLP heads (default: 4096)"""
    moco_k: int | None
    """queue size K in keys (default: 65536; supcon: no queue)"""
    moco_m: float
    """key encoder's momentum (default: 0.999; moco_v3: 0.99)"""
    moco_m_cos: bool
    """moco_v3: raise the momentum to 1 over the run by half a cosine (default: on)"""
    moco_t: float
    """temperature T of the loss (default: 0.07; moco_v3: 1)"""
    mlp: bool | None
    """use MoCo v2's MLP head (default: on for simclr, supcon, hcl, dcl)"""
    stop_grad_conv1: bool
    """moco_v3: freeze a ViT's patch embedding at its random weights (default: on)"""
    symmetric: bool
    """add the loss with the two views exchanged (default: off)"""
    bn_splits: int | None
    """number of parts of a process's batch that BatchNorm normalises separately (default: with one process 8, or
    what the batch allows; with several 1)"""
    shuffle_bn: bool
    """MoCo's shuffled BatchNorm of the keys (default: on)"""
    mask_same_image: bool | None
    """leave the queue's keys of the query's own image out of its negatives (default: on when the queue holds more
    than a tenth of the data set)"""
    head_impl: Literal["auto", "reference", "cpu", "triton"]
    """implementation of the loss; auto: triton (fused) on a GPU where it is right and not slower, else cpu (closed
    forms, for any device)"""
    head_precision: Literal["auto", "fp32", "tf32", "tf32x3", "bf16"]
    """precision of the loss's two matrix products with the queue, which are summed in fp32; auto: with triton
    tf32x3 (three products, as exact as fp32) or fp32, whichever is faster, bf16 on a CPU that is faster with it,
    else fp32"""
    base_temperature: float | None
    """multiply the loss by T / T0 (default: T0 = 0.07, as in SupContrast, for simclr and supcon without a queue;
    supcon with a queue takes it)"""
    contrast_mode: Literal["all", "one"]
    """anchors: all views, or the first of each image"""
    views: int
    """views per image, without a queue (default: 2)"""
    beta: float
    """hcl: weight of hardness, its beta (default: 1)"""
    tau_plus: float
    """hcl: share of false negatives (default: 0.1)"""
    estimator: Literal["hard", "easy"]
    """hcl: easy weighs all negatives alike"""
    n_hard: int
    """number of hardest negatives in the queue from which a query's synthetic ones are made (default: 1024)"""
    n1: int | None
    """SynCo: interpolation negatives per query (default: 256)"""
    n2: int | None
    """SynCo: extrapolation negatives per query (default: 256)"""
    n3: int | None
    """SynCo: mixup negatives per query (default: 256)"""
    n4: int | None
    """SynCo: noise negatives per query (default: 64)"""
    n5: int | None
    """SynCo: perturbation negatives per query (default: 64)"""
    n6: int | None
    """SynCo: adversarial negatives per query (default: 64)"""
    sigma: float
    """SynCo: standard deviation of the noise (default: 0.01)"""
    delta: float
    """SynCo: step size of the perturbation (default: 0.01)"""
    eta: float
    """SynCo: step size of the adversarial negatives (default: 0.01)"""
    mochi: Sequence[int] | None
    """MoCHi: for each query, mix the N hardest negatives into S of type 1 and S2 of type 2"""
    hard_start_epoch: int
    """first epoch, counted from 0, with synthetic negatives (default: 10)"""
    hard_stop_epoch: int | None
    """first epoch without them again (default: never)"""
    type_starts: str | Sequence[str]
    """a later first epoch for one kind, such as interpolation=20, or optimizer step, mixup=1000steps; kinds: mixup
    interpolation extrapolation noise perturbation adversarial"""
    extrapolation: Literal["code", "paper"]
    """extrapolate as SynCo's code or its paper does"""
    control: Literal["none", "random", "hardest", "reweight"] | None
    """a control of an ablation: in place of the method's synthetic negatives, as many copies of random queue rows
    (random) or of the rows that they would be made from (hardest), or the hardest rows once more each (reweight)
    (default: none)"""
    epochs: int
    """number of epochs (default: 200)"""
    start_epoch: int
    """number of the first epoch, for restarts by hand (default: 0)"""
    batch_size: int
    """images per step, over all processes of this node (default: 256)"""
    lr: float
    """learning rate (default: 0.03)"""
    schedule: int | Sequence[int]
    """epochs at which the learning rate drops 10x (default: 120 160)"""
    lr_decay_epochs: str
    """SupContrast's spelling of --schedule E E"""
    lr_decay_rate: float
    """factor of the learning rate at the epochs of --schedule (default: 0.1)"""
    cos: bool
    """decay the learning rate by a cosine instead, once per epoch (with pretraining's --steps: at every step)"""
    steps: int | None
    """train for N optimizer steps instead of --epochs"""
    plateau: int | None
    """instead of --schedule: the learning rate drops 10x when the mean loss of an epoch has not fallen for more
    than E epochs"""
    warm: bool | None
    """warm up: raise the learning rate from --warm-from over --warm-epochs (default: on for simclr, supcon, hcl,
    dcl at batches above 256)"""
    warm_epochs: int
    """length of the warm-up --warm in epochs (default: 10)"""
    warm_from: float
    """learning rate at which the warm-up --warm starts (default: 0.01)"""
    warm_steps: int | None
    """instead of --warm: raise the learning rate from --warm-from over N steps; also with --steps"""
    rise_epochs: float
    """instead of --warm: raise the learning rate linearly from 0 over E epochs, then decay it by --cos or
    --plateau, both at every step (default: 0; MoCo v3's recipes use it)"""
    accum: int
    """number of batches per step: their gradients are averaged, keys are enqueued after each, and the key encoder
    is updated once (default: 1)"""
    momentum: float
    """momentum of SGD (default: 0.9)"""
    weight_decay: float
    """weight decay (default: 0.0001)"""
    opt: str
    """sgd, or an optimizer of timm such as adamw, lars or lookahead_adamw (default: sgd)"""
    opt_betas: float | Sequence[float] | None
    """betas of an optimizer that has them (default: timm's, for adamw 0.9 0.999)"""
    clip_grad: float | None
    """clip the norm of the gradient at X (default: no clipping)"""
    min_lr: float
    """learning rate at which --cos ends and below which --plateau does not go (default: 0)"""
    exclude_bias_norm: bool
    """exclude biases and norm layers from weight decay and, with --opt lars, from its adaptation (default: off;
    --layer-decay does so anyway)"""
    ema: float | None
    """evaluate and save an exponential moving average of the weights, with decay D per step (default: off)"""
    ema_epoch: float | None
    """the moving average of --ema with its decay D given per epoch instead of per step (default: off)"""
    print_freq: int
    """number of steps between log lines (default: 10)"""
    resume: StrPath
    """checkpoint to resume from; auto: the newest in --save-dir"""
    seed: int | None
    """random seed (default: drawn, logged and kept in checkpoints)"""
    save_every: int
    """number of epochs between checkpoints (default: 1)"""
    keep: int
    """keep only the newest N checkpoints (default: 0, all)"""
    report: bool
    """write report.html, a page with the curves of the run, into --save-dir at its end (default: on)"""
    overwrite: bool
    """start a new run in a folder that holds another run"""
    max_minutes: float | None
    """save and stop after M minutes (default: no limit)"""
    save_minutes: float | None
    """save within an epoch too, M minutes after the last save (default: only at the end of an epoch)"""
    save_steps: int | None
    """save within an epoch too, S steps after the last save (default: only at the end of an epoch)"""
    hang_minutes: float
    """when a step has made no progress for M minutes, name the process that holds it up and exit with code 75
    (default: 10; 0: never)"""
    data_patience: float
    """when the images or the disk are unreachable, wait M minutes for them, then exit with code 75 (default: 10)"""
    max_restarts: int
    """with --nproc: restart from the newest good checkpoint when a process dies, at most N times (default: 0;
    torchrun has its own flag)"""
    max_bad_steps: int
    """stop after N steps in a row with a non-finite loss or gradient (default: 5)"""
    max_bad_images: int
    """stop when more than N images are unreadable (default: 100)"""
    check_every: int
    """number of steps between checks that the queues of all processes are equal (default: 1000)"""
    wandb: str | None
    """log to this project of Weights & Biases too (needs the extra wandb)"""
    compat: Literal["supcontrast", "supcon-framework", "schane", "mochi", "synco"] | None
    """read the line as this project's program reads it, with its spellings and its defaults, which
    docs/migrating.md lists"""
    amp: Literal["auto", "off", "bf16", "fp16"]
    """precision of the encoders (default: auto, bf16 where the device has it; the loss is always fp32)"""
    channels_last: bool
    """use the channels-last memory layout for convolutions (default: on)"""
    compile: bool
    """compile the two encoders by torch.compile (default: off)"""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"]
    """mode of torch.compile; the last two replay the encoders as CUDA graphs (default: default)"""
    recompute: bool
    """save memory for larger batches: recompute part of the forward pass in the backward pass (default: off)"""
    knn_every: int
    """number of epochs between k-NN evaluations (default: 10; 0: never)"""
    retrieval_every: int
    """number of epochs between retrieval and clustering metrics of held-out images, before and after the projection
    head: precision@1, R-precision, mAP@R, mAP, AMI, NMI (default: 0, never)"""
    rankme_every: int | None
    """number of epochs between measurements of RankMe, the effective rank of the features of at most 25,600
    training images, which needs no labels (default: as --knn-every)"""
    online_probe: bool | None
    """train a linear classifier beside the encoder, on its features and without a gradient into it, so that the log
    has its accuracy (default: where the images have labels)"""
    knn_k: int | Sequence[int]
    """number of neighbours; several numbers are evaluated in one pass, and the first is reported as knn (default:
    200)"""
    knn_t: float
    """temperature of the neighbours' votes (default: 0.1)"""
    world_size: int
    """number of nodes (--multiprocessing-distributed) or processes"""
    rank: int
    """number of this node or process, from 0"""
    dist_url: str | None
    """address at which the processes of several nodes meet, tcp://HOST:PORT"""
    dist_backend: str
    """communication backend: nccl, or gloo, which is chosen where there are no GPUs"""
    gpu: int | None
    """number of the GPU to use"""
    multiprocessing_distributed: bool
    """start one process per GPU (or --nproc processes) on each node"""
    nproc: int | Literal["all"] | None
    """number of processes on this node; gloo connects them without GPUs"""


class EvaluateOptions(TypedDict, total=False):
    """Of :func:`moco.evaluate`: the flags of ``moco lincls``, ``moco semisup`` and ``moco retrieval``."""

    config: StrPath | None
    """read defaults from this YAML file or from the recipe of this name; flags override them"""
    dataset: Literal["folder", "cifar10", "cifar100", "caltech256", "fashionmnist", "stl10", "mnist5k"] | None
    """use a known data set instead of an image folder"""
    download: bool
    """let --dataset download its files"""
    cache: StrPath | None
    """folder in which decoded images are kept and mapped into memory, for sets of small images: each is decoded
    once instead of in every epoch (20 GB at most)"""
    val_data: StrPath | None
    """labelled validation images, where DIR does not hold them"""
    size: int | None
    """side of the square views in pixels (default: the file's, else 224; sets of small images have their own
    size)"""
    channels: int | None
    """read the images as grey (1) or colour (3), or .npy and TIFF files by their N channels, bands or pages
    (default: the file's, else the data set's)"""
    levels: Sequence[float] | None
    """values of the image files that become black and white, linear between and clipped beyond, for images that are
    not of 0 to 255: 0 4095 for 12 bits in 16 (default: the file's, else those of the files' type, 0 65535 of 16
    bits; of floats 0 1 or 0 255, as a few images have them)"""
    mean: float | Sequence[float] | None
    """mean of each channel, in 0..1 (default: the file's, else the data set's)"""
    std: float | Sequence[float] | None
    """standard deviation of each channel, in 0..1 (default: the file's, else the data set's)"""
    workers: int
    """number of loader processes on this machine, for all processes together (default: 32, at most one per core)"""
    train_folder: StrPath | None
    """DIR, as SupContrast spells it"""
    num_classes: int | None
    """number of classes; only checked, the data decide"""
    arch: str | None
    """name of a torchvision or timm network (default: the file's, else resnet50)"""
    stem: Literal["auto", "imagenet", "cifar"]
    """cifar: a 3x3 first convolution without pooling; auto: the file's, else cifar up to 64 px"""
    amp: Literal["off", "bf16", "fp16"] | Literal["auto", "off", "bf16", "fp16"]
    """precision of the frozen encoder (default: off, fp32); or precision of the encoder (default: off, fp32)"""
    features: Literal["views", "cached"]
    """views: augment the images anew in every epoch, as in the published protocol; cached: compute the features
    once, without augmentation, so that an epoch takes seconds (default: views)"""
    epochs: int | None
    """number of epochs (default: 100); or number of epochs (default: 60 below 10 percent of the images, 30 below
    100, 90 for all)"""
    start_epoch: int
    """number of the first epoch, for restarts by hand (default: 0)"""
    batch_size: int
    """images per step, over all processes of this node (default: 256); or images per step, over all processes of
    this node (default: 1024)"""
    lr: float | Sequence[float] | None
    """learning rate (default: 30); several, such as 30 10 3, train one classifier each on the same features; or
    learning rate of encoder and classifier"""
    schedule: int | Sequence[int] | None
    """epochs at which the learning rate drops 10x (default: 60 80); or epochs at which the learning rates drop 10x
    (default: the cosine)"""
    lr_decay_epochs: str
    """SupContrast's spelling of --schedule E E"""
    lr_decay_rate: float
    """factor of the learning rate at the epochs of --schedule (default: 0.1)"""
    cos: bool
    """decay the learning rate by a cosine instead, once per epoch (with pretraining's --steps: at every step); or
    cosine decay even if --schedule is given"""
    warm: bool | None
    """warm up: raise the learning rate from --warm-from over --warm-epochs (default: off); or warm up: raise the
    learning rate from --warm-from over --warm-epochs (default: on, as in SupContrast's main_ce.py, for --lr with
    --cos or --schedule and without --pretrained at batches above 256)"""
    warm_epochs: int
    """length of the warm-up --warm in epochs (default: 10)"""
    warm_from: float
    """learning rate at which the warm-up --warm starts (default: 0.01)"""
    momentum: float
    """momentum of SGD (default: 0.9)"""
    weight_decay: float
    """weight decay (default: 0); or weight decay (default: 1e-06)"""
    opt: str
    """sgd, or an optimizer of timm such as adamw, lars or lookahead_adamw (default: sgd)"""
    opt_betas: float | Sequence[float] | None
    """betas of an optimizer that has them (default: timm's, for adamw 0.9 0.999)"""
    clip_grad: float | None
    """clip the norm of the gradient at X (default: no clipping)"""
    min_lr: float
    """learning rate at which --cos ends and below which --plateau does not go (default: 0)"""
    label_smoothing: float
    """label smoothing of the training loss, in 0..1 (default: 0)"""
    print_freq: int
    """number of steps between log lines (default: 10)"""
    resume: StrPath
    """checkpoint to resume from; auto: the newest in --save-dir; or checkpoint to resume from; auto: the one in
    --save-dir"""
    seed: int | None
    """random seed (default: drawn, logged and kept in checkpoints); or random seed, but for the draw of images
    (default: drawn, logged and kept); or seed of k-means (default: 0)"""
    report: bool
    """write report.html, a page with the curves of the run, into --save-dir at its end (default: on)"""
    overwrite: bool
    """start a new run in a folder that holds another run"""
    max_minutes: float | None
    """save and stop after M minutes (default: no limit)"""
    save_minutes: float | None
    """save within an epoch too, M minutes after the last save (default: only at the end of an epoch)"""
    save_steps: int | None
    """save within an epoch too, S steps after the last save (default: only at the end of an epoch)"""
    hang_minutes: float
    """when a step has made no progress for M minutes, name the process that holds it up and exit with code 75
    (default: 10; 0: never)"""
    data_patience: float
    """when the images or the disk are unreachable, wait M minutes for them, then exit with code 75 (default: 10)"""
    save_freq: int | None
    """SupContrast's flag, without effect: every epoch is saved"""
    save_ckpt_freq: int
    """keep the checkpoint of every E-th epoch too, as checkpoint_lincls_NNNN.pth.tar, for moco average (default: 0,
    none); or keep the checkpoint of every E-th epoch too, as checkpoint_semisup_NNNN.pth.tar (default: 0, none)"""
    lr_find: bool
    """learning-rate range test: raise the rate step by step, write lr_find.csv and lr_find.png, suggest a --lr and
    stop"""
    lr_find_steps: int | None
    """number of steps of --lr-find (default: one epoch, at least 100)"""
    compat: Literal["supcontrast", "supcon-framework", "schane", "mochi", "synco"] | None
    """read the line as this project's program reads it, with its spellings and its defaults, which
    docs/migrating.md lists"""
    evaluate: bool
    """evaluate on the validation set and stop; or evaluate the checkpoint of --resume on the test images and
    stop"""
    val_share: float
    """hold out this share of every class's training images and evaluate on it, to select settings without the
    validation images (default: 0); or hold out this share of every class's training images, evaluate on it after
    each epoch and on the test images once, at the end (default: 0, on the test images after each epoch)"""
    per_class: StrPath | None
    """write top-1, top-5 and the most frequent mistake of each class to this file"""
    confusion: bool
    """write the confusion matrix to confusion.csv and confusion.png in --save-dir (of --knn: knn_confusion)"""
    max_bad_images: int | None
    """largest number of unreadable images of a set that are left out; more end the program (default: half of the
    set, at most 100, or 1 % of more than 10,000)"""
    knn_k: int | Sequence[int]
    """number of neighbours; several numbers are evaluated in one pass, and the first is reported as knn (default:
    200)"""
    knn_t: float
    """temperature of the neighbours' votes (default: 0.1)"""
    few_shot_classes: StrPath
    """file with the classes to draw from, one per line, or miniImageNet's CSV with the columns filename,label
    (default: all classes, held-out images only)"""
    few_shot_way: int
    """number of classes per episode (default: 5)"""
    few_shot_shots: int | Sequence[int]
    """number of labelled images per class, one result for each number (default: 1 5)"""
    few_shot_queries: int
    """number of images to classify per class (default: 15)"""
    few_shot_episodes: int
    """number of episodes (default: 600)"""
    world_size: int
    """number of nodes (--multiprocessing-distributed) or processes"""
    rank: int
    """number of this node or process, from 0"""
    dist_url: str | None
    """address at which the processes of several nodes meet, tcp://HOST:PORT"""
    dist_backend: str
    """communication backend: nccl, or gloo, which is chosen where there are no GPUs"""
    gpu: int | None
    """number of the GPU to use"""
    multiprocessing_distributed: bool
    """start one process per GPU (or --nproc processes) on each node"""
    nproc: int | Literal["all"] | None
    """number of processes on this node; gloo connects them without GPUs"""
    train_percent: float | None
    """train on P percent of the labelled images (default: 100): SimCLR's published lists for 1 and 10 percent of
    ImageNet, downloaded once, otherwise a class-balanced draw"""
    train_files: StrPath
    """file of the names of the images to train on, one per line (n01440764_18.JPEG, or FOLDER/NAME); balanced: a
    class-balanced draw, also at 1 and 10 percent of ImageNet"""
    subset_seed: int
    """seed of the draw of training and held-out images (default: 0); apart from --seed, so that runs with several
    seeds train on the same images"""
    val_only: bool
    """with --val-share: do not evaluate on the test images"""
    task: str | None
    """BEiT-3's: imagenet for an image folder, or a --dataset's name"""
    data_path: StrPath | None
    """DIR as BEiT-3 and SupContrast spell it"""
    aa: str
    """timm's AutoAugment or RandAugment policy, such as rand-m9-mstd0.5-inc1, applied after the random crop
    (default: none)"""
    aug: StrPath | None
    """augmentation: v1, v2, v3, v3-wide, cifar, supcon, digits, simclr, crop, or FILE.yml, a file of your own with
    a preset's values (default: crop and flip)"""
    weights: Literal["finetune", "freeze"]
    """fine-tune the encoder, or freeze it"""
    drop_path: float
    """stochastic depth of timm's networks (default: 0)"""
    sync_bn: bool
    """BatchNorm over the batch of all processes"""
    channels_last: bool
    """use the channels-last memory layout for convolutions (default: on)"""
    lr_backbone: float
    """learning rate of the encoder (default: 0.01; SynCo's grid: 0.01 0.02 0.05 0.1 0.005)"""
    lr_classifier: float
    """learning rate of the classifier (default: 0.5)"""
    update_freq: int
    """number of batches per step: their gradients are averaged, and each has its own contrastive loss (default:
    1)"""
    warmup_epochs: float
    """raise the learning rates from 0 over E epochs; the cosine then acts at every step (default: 0, with the
    cosine once per epoch)"""
    plateau: int | None
    """instead of the cosine: rates drop 10x when accuracy has not risen for more than E epochs"""
    exclude_bias_norm: bool
    """exclude biases and norm layers from weight decay and, with --opt lars, from its adaptation (default: off;
    --layer-decay does so anyway)"""
    ema: float | None
    """evaluate and save an exponential moving average of the weights, with decay D per step (default: off)"""
    ema_epoch: float | None
    """the moving average of --ema with its decay D given per epoch instead of per step (default: off)"""
    layer_decay: float | None
    """the learning rate of each layer is D times that of the layer above; biases and norm layers have no weight
    decay (default: off)"""
    loss: Literal["ce", "supcon", "simclr", "schane"]
    """ce: cross-entropy; the others: (1 - alpha) * cross-entropy + alpha * contrastive loss of two views per image
    (default: ce)"""
    alpha: float | None
    """weight of the contrastive loss (default: 0.9)"""
    temp: float | None
    """temperature of the contrastive loss (default: 0.5)"""
    estimator: Literal["hard", "easy"] | None
    """schane: weigh hard negatives more, or weigh all alike (easy), which is supcon (default: hard)"""
    beta: float | None
    """schane: how much more hard negatives weigh (default: 1)"""
    smoothing: float
    """label smoothing of cross-entropy, in 0..1 (default: 0)"""
    mixup: float
    """alpha of timm's mixup, for cross-entropy (default: 0, off)"""
    cutmix: float
    """alpha of timm's CutMix, for cross-entropy (default: 0, off)"""
    reprob: float
    """probability of erasing a random rectangle of an image (default: 0)"""
    dist_eval: bool
    """BEiT-3's, without effect: processes always share the evaluation"""
    few_shot: bool
    """evaluate frozen features on few-shot episodes: logistic regression on a few images per class, mean accuracy
    with its 95 % interval"""
    few_shot_data: StrPath
    """folder or list of images of new classes for --few-shot (default: the test images, whose classes were trained
    on)"""
    split: Literal["val", "train"] | None
    """images to use (default: the validation images, where there are any)"""


class EmbedOptions(TypedDict, total=False):
    """Of :func:`moco.embed`: the flags of ``moco embed``."""

    amp: Literal["off", "bf16", "fp16"]
    """precision of the encoder (default: off, fp32)"""
    split: Literal["val", "train"] | None
    """images to use (default: the validation images, where there are any)"""
    format: Literal["npz", "safetensors"]
    """format of the features (default: npz)"""
    picture: Literal["tsne", "umap", "pacmap", "none"]
    """projection of the features to two dimensions (default: tsne; the extras umap and pacmap install the
    others)"""
    points: int
    """largest number of images in the picture (default: 2000)"""
    beside: StrPath | None
    """second checkpoint, whose map of the same images is drawn beside the first"""
    seed: int
    """seed of the choice of images and of the picture (default: 0)"""
    config: StrPath | None
    """read defaults from this YAML file or from the recipe of this name; flags override them"""
    dataset: Literal["folder", "cifar10", "cifar100", "caltech256", "fashionmnist", "stl10", "mnist5k"] | None
    """use a known data set instead of an image folder"""
    download: bool
    """let --dataset download its files"""
    cache: StrPath | None
    """folder in which decoded images are kept and mapped into memory, for sets of small images: each is decoded
    once instead of in every epoch (20 GB at most)"""
    val_data: StrPath | None
    """labelled validation images, where DIR does not hold them"""
    size: int | None
    """side of the square views in pixels (default: the file's, else 224; sets of small images have their own
    size)"""
    channels: int | None
    """read the images as grey (1) or colour (3), or .npy and TIFF files by their N channels, bands or pages
    (default: the file's, else the data set's)"""
    levels: Sequence[float] | None
    """values of the image files that become black and white, linear between and clipped beyond, for images that are
    not of 0 to 255: 0 4095 for 12 bits in 16 (default: the file's, else those of the files' type, 0 65535 of 16
    bits; of floats 0 1 or 0 255, as a few images have them)"""
    mean: float | Sequence[float] | None
    """mean of each channel, in 0..1 (default: the file's, else the data set's)"""
    std: float | Sequence[float] | None
    """standard deviation of each channel, in 0..1 (default: the file's, else the data set's)"""
    workers: int
    """number of loader processes on this machine, for all processes together (default: 32, at most one per core)"""
    batch_size: int
    """images per step, over all processes of this node (default: 256)"""
    max_bad_images: int | None
    """largest number of unreadable images of a set that are left out; more end the program (default: half of the
    set, at most 100, or 1 % of more than 10,000)"""
    arch: str | None
    """name of a torchvision or timm network (default: the file's, else resnet50)"""
    stem: Literal["auto", "imagenet", "cifar"]
    """cifar: a 3x3 first convolution without pooling; auto: the file's, else cifar up to 64 px"""
    world_size: int
    """number of nodes (--multiprocessing-distributed) or processes"""
    rank: int
    """number of this node or process, from 0"""
    dist_url: str | None
    """address at which the processes of several nodes meet, tcp://HOST:PORT"""
    dist_backend: str
    """communication backend: nccl, or gloo, which is chosen where there are no GPUs"""
    gpu: int | None
    """number of the GPU to use"""
    multiprocessing_distributed: bool
    """start one process per GPU (or --nproc processes) on each node"""
    nproc: int | Literal["all"] | None
    """number of processes on this node; gloo connects them without GPUs"""


class NeighboursOptions(TypedDict, total=False):
    """Of :func:`moco.neighbours`: the flags of ``moco neighbours``."""

    amp: Literal["off", "bf16", "fp16"]
    """precision of the encoder (default: off, fp32)"""
    split: Literal["val", "train"] | None
    """images to use (default: the validation images, where there are any)"""
    k: int
    """number of neighbours (default: 10)"""
    queries: int | None
    """number of queries, drawn from the held-out images where there are any, else from all (default: 10)"""
    class_name: str | None
    """choose queries of this class alone"""
    worst: bool
    """choose the queries with the most neighbours of another class"""
    seed: int
    """seed of the draw (default: 0)"""
    config: StrPath | None
    """read defaults from this YAML file or from the recipe of this name; flags override them"""
    dataset: Literal["folder", "cifar10", "cifar100", "caltech256", "fashionmnist", "stl10", "mnist5k"] | None
    """use a known data set instead of an image folder"""
    download: bool
    """let --dataset download its files"""
    cache: StrPath | None
    """folder in which decoded images are kept and mapped into memory, for sets of small images: each is decoded
    once instead of in every epoch (20 GB at most)"""
    val_data: StrPath | None
    """labelled validation images, where DIR does not hold them"""
    size: int | None
    """side of the square views in pixels (default: the file's, else 224; sets of small images have their own
    size)"""
    channels: int | None
    """read the images as grey (1) or colour (3), or .npy and TIFF files by their N channels, bands or pages
    (default: the file's, else the data set's)"""
    levels: Sequence[float] | None
    """values of the image files that become black and white, linear between and clipped beyond, for images that are
    not of 0 to 255: 0 4095 for 12 bits in 16 (default: the file's, else those of the files' type, 0 65535 of 16
    bits; of floats 0 1 or 0 255, as a few images have them)"""
    mean: float | Sequence[float] | None
    """mean of each channel, in 0..1 (default: the file's, else the data set's)"""
    std: float | Sequence[float] | None
    """standard deviation of each channel, in 0..1 (default: the file's, else the data set's)"""
    workers: int
    """number of loader processes on this machine, for all processes together (default: 32, at most one per core)"""
    batch_size: int
    """images per step, over all processes of this node (default: 256)"""
    max_bad_images: int | None
    """largest number of unreadable images of a set that are left out; more end the program (default: half of the
    set, at most 100, or 1 % of more than 10,000)"""
    arch: str | None
    """name of a torchvision or timm network (default: the file's, else resnet50)"""
    stem: Literal["auto", "imagenet", "cifar"]
    """cifar: a 3x3 first convolution without pooling; auto: the file's, else cifar up to 64 px"""
    world_size: int
    """number of nodes (--multiprocessing-distributed) or processes"""
    rank: int
    """number of this node or process, from 0"""
    dist_url: str | None
    """address at which the processes of several nodes meet, tcp://HOST:PORT"""
    dist_backend: str
    """communication backend: nccl, or gloo, which is chosen where there are no GPUs"""
    gpu: int | None
    """number of the GPU to use"""
    multiprocessing_distributed: bool
    """start one process per GPU (or --nproc processes) on each node"""
    nproc: int | Literal["all"] | None
    """number of processes on this node; gloo connects them without GPUs"""


class ExportOptions(TypedDict, total=False):
    """Of :func:`moco.export`: the flags of ``moco export``."""

    head: Literal["drop", "keep"]
    """keep: export the linear classifier of the file too, for logits instead of features (torchvision, timm, hub,
    onnx; default: drop)"""
    arch: str
    """name of a torchvision or timm network (default: the file's)"""
    stem: Literal["auto", "imagenet", "cifar"]
    """first layers of a ResNet (default: the file's)"""
    size: int | None
    """side of the images in pixels (default: the file's)"""
    dataset: Literal["folder", "cifar10", "cifar100", "caltech256", "fashionmnist", "stl10", "mnist5k"] | None
    """data set whose channel statistics go into the card (default: the run's)"""
    mean: float | Sequence[float] | None
    """mean of each channel, in 0..1 (default: the run's), for the card"""
    std: float | Sequence[float] | None
    """standard deviation of each channel, in 0..1 (default: the run's), for the card"""
