# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "torchvision>=0.21", "transformers>=4.48", "safetensors>=0.4.5",
#     "scikit-learn>=1.4", "tqdm>=4.66",
# ]
# ///
"""NAYER: data-free knowledge distillation by noisy-layer generation, in one file.

A trained teacher T is given, its training images are not. A generator G learns to make images on
which T is sure of a chosen class and whose batch statistics match those stored in T's BatchNorm
layers; a student S learns from T on those images. Earlier methods feed G random noise. NAYER feeds
it the label-text embedding (LTE) of the class name, which is constant, and puts the randomness into
a noisy layer Z between the two, drawn anew for every batch:  x = G(Z(e_y)).

    python nayer.py                            digits on a laptop's CPU, no download
    python nayer.py --dataset cifar10          the published settings, for a GPU
    python nayer.py --teacher file.py:load     your own network, and no data (see README.md)

    paper   meaning                                  in this file
    T, S    teacher (frozen), student                teacher, student
    G       generator                                Generator
    Z       noisy layer                              NoisyLayer, .reinitialize()
    e_y     label-text embedding of class y          label_embeddings (C, D)
    x^      synthetic images in [0, 1]               images (B, ch, h, w)
    M       memory of synthetic images               MemoryBank
    L_CE    cross-entropy of T's logits with y       --alpha-ce
    L_BN    distance to T's BatchNorm statistics     BatchNormLoss, --alpha-bn
    L_adv   where S agrees with T, drive them apart  adversarial_loss, --alpha-adv
    L_KD    distance of S's logits from T's          distillation_loss, --temperature (tau)
    B       images in a batch                        --synthesis-batch
    C       classes
    D, H    size of e_y, of Z's output (B, H)        HIDDEN_SIZE = H
    N, K    noisy matrices, images of each matrix    N = ceil(B / K), K = C (or B, if B < C)
    view    image, cropped, mirrored, normalised     Augment

Tags: [paper] stated in the paper, [code] only in the authors' code, [ours] our own decision.

Order: presets and flags; the parts of the method, in the order of the paper; `main`, which builds
everything and loops; a banner, and below it what surrounds the method. The parts run alone.

Paper: Tran et al., NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free
Knowledge Distillation, CVPR 2024, arXiv 2310.00258.
"""

import argparse
import contextlib
import copy
import csv
import inspect
import json
import math
import os
import random
import re
import runpy
import sys
import time
import unicodedata
import warnings
from functools import partial
from pathlib import Path
from unittest import mock

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm  # a bar for the console or for a notebook

# What only some runs need is imported where it is used, since importing it takes seconds:
# torchvision, scikit-learn, transformers.

SHIPPED = Path(__file__).resolve().parent / "teachers"  # trained teachers, label embeddings
HIDDEN_SIZE = 1000  # H, what Z gives to G [code]
SMALL_IMAGE = 64  # pixels; for larger images G is deeper [code]
EVAL_BATCH = 200  # test images in a batch
print_line = tqdm.write  # on the console, above the bars
DATASETS = ["digits", "cifar10", "cifar100", "tiny_imagenet", "folder"]


# ---- Presets and flags ---------------------------------------------------------------------------
# A preset is a list of flags. Yours override it. All other flags have their defaults, below: those
# of the published CIFAR-10 run [code], but for the text encoder [ours].
PRESETS = dict(
    cifar10="--dataset cifar10",
    cifar100="--dataset cifar100 --generator-steps 40",
    tiny_imagenet=(
        "--dataset tiny_imagenet --warmup-batches 20 --batches 4 "
        "--synthesis-batch 200 --generator-steps 60 "
        "--student-steps 1000 --student-batch 256 --lr 0.1"
    ),
    folder="--dataset folder",
    # [ours] Small, for a laptop: few images of 12 pixels; S learns four times from each output of
    # T; a weak L_adv keeps the images legible. Digits are not mirrored.
    digits=(
        "--dataset digits --teacher wrn10_2 --student wrn10_1 "
        "--warmup-epochs 2 --warmup-batches 4 --epochs 12 --batches 1 "
        "--synthesis-batch 100 --generator-steps 10 --generator-width 32 "
        "--alpha-ce 1 --alpha-bn 3 --alpha-adv 0.2 "
        "--student-steps 96 --student-batch 64 --reuse 4 --weight-decay 5e-4 --nesterov "
        "--crop-padding 1 --no-flip --agree-batches 4"
    ),
    # [ours] For CIFAR-10 in an hour on two cores: one generator for all epochs, few steps for each
    # batch; small student batches, each used four times; half of the views are blended.
    cpu=(
        "--dataset cifar10 --student wrn16_1 "
        "--warmup-epochs 9 --warmup-batches 6 --epochs 28 --batches 4 "
        "--synthesis-batch 200 --generator-steps 8 --generator-life 1000 "
        "--student-steps 1200 --student-batch 64 --reuse 4 --mix 0.5 "
        "--lr 0.1 --weight-decay 5e-4 --nesterov"
    ),
    # [ours] For images above 64 pixels: smaller batches, and more of them. M holds the newest
    # 20,000 images, 3 GB at 224 pixels.
    large=(
        "--dataset folder --student resnet18 --warmup-batches 20 --batches 10 "
        "--synthesis-batch 50 --student-batch 128 --bank-size 20000"
    ),
)


def number(kind, low, high=math.inf):
    """An argparse type: an int or a float (kind) in [low, high]."""

    def numeric(text):
        value = kind(text)
        if not low <= value <= high:  # nan is in no interval
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value

    return numeric


def parse_args(argv=None):
    """The command line -> a Namespace. A wrong one ends with one line on stderr and exit code 2.

    argv: a list of flags; None: those of the command line."""
    presets = [f"    {name:13} {flags}" for name, flags in PRESETS.items()]
    parser = argparse.ArgumentParser(
        "nayer.py",
        usage=argparse.SUPPRESS,  # so that an error is one line
        description="Data-free knowledge distillation (NAYER). T teacher, S student, G generator, "
        "Z noisy layer, M memory of synthetic images, L_... losses. The column agree: how often S "
        "predicts T's class on held-out synthetic images.",
        epilog="\n".join(["a --preset is a list of flags; yours override them:", *presets]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def flag(name, default, text, low=0, high=math.inf, **more):
        """Adds a flag to the current `group`. Its default gives the type; a bool gives --name and
        --no-name. low, high: the limits of a number."""
        if isinstance(default, bool):
            more["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, int | float):
            more["type"] = number(type(default), low, high)
        if default is not None:
            text += " (default: %(default)s)"
        group.add_argument(name, default=default, help=text, **more)

    group = parser.add_argument_group("run")
    flag("--dataset", None, "test images (default: digits, or folder)", choices=DATASETS)
    flag("--preset", None, "list of flags, see below (default: by --dataset)", choices=PRESETS)
    flag("--data-root", None, "folder of the test images (default: data)", type=Path)
    flag("--out", None, "output folder (default: runs/<dataset>-<teacher>-<student>)", type=Path)
    flag("--seed", 0, "seed of all random numbers")
    flag("--device", "auto", "auto: cuda if it is there", choices=["auto", "cuda", "cpu"])
    flag("--resume", False, "continue the run in --out after its last finished epoch")
    flag("--eval", True, "score T, and S after every epoch, on real test images")
    flag("--agree-batches", 10, "batches of held-out synthetic images for the column agree")
    flag("--amp", True, "bf16 autocast, where it is fast")
    group = parser.add_argument_group("networks and text encoder")
    flag("--teacher", "wrn40_2", "T: name in teachers/, model file, or file.py:function")
    flag("--student", "wrn16_2", "S: name, or file.py:function")
    flag("--text-encoder", "sentence-transformers/all-MiniLM-L6-v2", "Hugging Face name, or folder")
    flag("--prompt", None, "text that is embedded (default: a photo of [the digit] {class})")
    group = parser.add_argument_group("loop")
    flag("--warmup-epochs", 20, "epochs that only fill M")
    flag("--warmup-batches", 10, "batches made in each warm-up epoch", low=1)
    flag("--epochs", 100, "epochs that follow, with distillation; 0: only score T")
    flag("--batches", 2, "batches made in each epoch after the warm-up", low=1)
    group = parser.add_argument_group("phase 1: images, by Z and G")
    flag("--synthesis-batch", 400, "images in a batch (B)", low=2)
    flag("--generator-steps", 30, "steps of Z and G for a batch", low=1)
    flag("--generator-lr", 4e-3, "learning rate of Adam, a new one for each batch", low=1e-9)
    flag("--generator-life", 10, "epochs until a new Z and G replace the old", low=1)
    flag("--generator-width", 64, "channels of the last hidden layer of G", low=1)
    flag("--alpha-ce", 0.5, "weight of L_CE")
    flag("--alpha-bn", 10.0, "weight of L_BN; 0 if T has no BatchNorm")
    flag("--alpha-adv", 1.33, "weight of L_adv, off in the warm-up")
    flag("--bn-momentum", 0.9, "weight of the old average in L_BN; 0: no average", high=1)
    flag("--label-input", "lte", "input of Z", choices=["lte", "onehot", "noise"])
    flag("--noisy-layer", "reinit", "Z re-drawn, kept, or off", choices=["reinit", "fixed", "off"])
    group = parser.add_argument_group("phase 2: the student")
    flag("--student-steps", 400, "distillation steps per epoch", low=1)
    flag("--student-batch", 512, "images in a student step", low=2)
    flag("--reuse", 1, "times that S learns from each output of T (R)", low=1)
    flag("--mix", 0.0, "share of views blended with another (mixup)", high=1)
    flag("--lr", 0.2, "learning rate of SGD, falls to 2e-4 as a cosine", low=2e-4)
    flag("--weight-decay", 1e-4, "weight decay of SGD (momentum 0.9)")
    flag("--nesterov", False, "Nesterov momentum")
    flag("--temperature", 20.0, "softens the outputs of T and S in L_KD (tau)", low=1e-9)
    flag("--bank-size", 0, "images that M holds, the newest; 0: all")
    flag("--crop-padding", 4, "pixels of zeros around an image before the random crop")
    flag("--flip", True, "mirror half of the images")

    # Parsed twice: the first time to find the preset, whose flags then stand before the user's.
    argv = sys.argv[1:] if argv is None else argv
    first, _ = parser.parse_known_args(argv)  # the second time refuses unknown flags
    own = ".py:" in first.teacher or first.teacher.endswith(".safetensors")  # a user's network
    usual = "folder" if own else "digits"
    before = PRESETS[first.preset or first.dataset or usual].split()
    if own and first.dataset is None:
        before += ["--dataset", "folder"]
        if first.data_root is None:
            before += ["--no-eval"]  # the user may have no images
    args = parser.parse_args(before + argv)
    if args.prompt is None:
        subject = "the digit {class}" if args.dataset == "digits" else "{class}"
        args.prompt = f"a photo of {subject}"
    if args.out is None:
        names = [args.dataset, Path(args.teacher).stem, Path(args.student).stem]
        args.out = Path("runs", "-".join(names))
    return args


# ---- Label-text embeddings (LTE): e_y ------------------------------------------------------------
@torch.no_grad()
def label_text_embeddings(class_names, tokenize, encoder, prompt):
    """The class names, embedded by a text encoder: (C, D) float32, in the order of the names.

    tokenize: texts -> a dict of tensors, padded to one length. encoder: a Hugging Face model. If it
    has `get_text_features`, these are used (the paper: text tower of CLIP ViT-B/32, D = 512, not
    normalised [code]); if not, the mean of its last hidden states over the tokens [ours]. Both come
    from `load_text_encoder`. prompt: a text with "{class}" in it."""
    names = [re.sub("[_-]", " ", name) for name in class_names]  # [code]
    tokens = tokenize([prompt.replace("{class}", name) for name in names])
    if hasattr(encoder, "get_text_features"):
        features = encoder.get_text_features(**tokens)
        return getattr(features, "pooler_output", features).float()  # transformers 5 wraps it
    hidden = encoder(**tokens).last_hidden_state  # (C, tokens, D)
    mask = tokens["attention_mask"][:, :, None]  # 0 where a short text was padded
    return ((hidden * mask).sum(1) / mask.sum(1)).float()  # (C, D)


# ---- Noisy layer and generator: x = G(Z(e_y)) ----------------------------------------------------
class NoisyLayer(nn.Module):
    """Z: inputs (B, D) -> hidden (B, H). BatchNorm1d, then N random matrices, re-drawn each batch.

    Row i goes through matrix i // images_per_matrix. One matrix serves one image of each class
    ("K-to-1", K = C) [paper]: the images of one matrix differ by their LTE, the images of one
    class by their matrix. Matrices are trained with G; `reinitialize` draws them.
    num_matrices: N, at least B / images_per_matrix, rounded up. embedding_size: D."""

    def __init__(self, embedding_size, num_matrices, images_per_matrix, hidden_size=HIDDEN_SIZE):
        super().__init__()
        self.images_per_matrix = images_per_matrix
        self.norm = nn.BatchNorm1d(embedding_size)  # spreads LTEs that lie close together [paper]
        # Not a list of nn.Linear: N matrices in one tensor need one product and one Adam update.
        self.weight = nn.Parameter(torch.empty(num_matrices, embedding_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_matrices, 1, hidden_size))
        self.reinitialize()

    def reinitialize(self):
        """Draw all matrices from N(0, 1), not N(0, 1/D); bias 0; the norm is kept [code]."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, inputs):
        # Rows nK to nK + K - 1 are multiplied by matrix n. One product does all of them, so the
        # last set is filled up with rows of zeros, which are cut off at the end.
        B, D = inputs.shape
        N, K = len(self.weight), self.images_per_matrix
        sets = F.pad(self.norm(inputs), (0, 0, 0, N * K - B)).view(N, K, D)
        hidden = torch.baddbmm(self.bias, sets, self.weight)  # (N, K, D) @ (N, D, H) -> (N, K, H)
        return hidden.flatten(0, 1)[:B]  # (B, H)


class UpsampleConv(nn.Conv2d):
    """Doubles the maps, then convolves: (B, ch, h, w) -> (B, out, 2h, 2w). In `forward` these two
    lines would do the same:

        maps = F.interpolate(maps, scale_factor=2)
        return F.conv2d(maps, self.weight, padding=1)

    [ours] A 3x3 window of doubled pixels holds only 2x2 different ones. So the weights that are
    multiplied with the same pixel are added up first, and a transposed convolution needs 4 products
    in place of 9. Without it a generator step takes 28 % longer (two Zen 3 cores, float32)."""

    def forward(self, maps):
        # Sums of 2x2 neighbours, 3x3 -> 4x4; then flipped, for the transposed convolution.
        kernel = F.avg_pool2d(F.pad(self.weight, (1, 1, 1, 1)), 2, stride=1, divisor_override=1)
        kernel = kernel.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(maps, kernel, stride=2, padding=1)


class Generator(nn.Module):
    """G: hidden (B, H) -> images (B, channels, image_size, image_size), float32 in [0, 1].

    A linear layer makes a small map; up-sampling and 3x3 convolutions double its size, two times
    for images of up to 64 pixels [code], four times for larger ones [ours]. Always in train mode.
    width: f, the channels of the last hidden layer; the first two have 2f."""

    def __init__(self, hidden_size, channels, image_size, width=64):
        super().__init__()
        widths = [2 * width, 2 * width, width]
        if image_size > SMALL_IMAGE:
            widths += [width, width]
        side = math.ceil(image_size / 2 ** (len(widths) - 1))  # 8 for 32 pixels
        self.image_size = image_size
        self.map_shape = (widths[0], side, side)
        self.start = nn.Linear(hidden_size, math.prod(self.map_shape))
        layers = [nn.BatchNorm2d(widths[0])]
        for before, after in zip(widths, widths[1:]):
            layers += [UpsampleConv(before, after, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2, inplace=True)]
        layers.append(nn.Conv2d(width, channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden):
        maps = self.start(hidden).view(-1, *self.map_shape)  # (B, H) -> (B, 2f, side, side)
        maps = maps.contiguous(memory_format=torch.channels_last)
        images = self.layers(maps).float().sigmoid()
        size = self.image_size
        return images[:, :, :size, :size]  # (B, ch, s, s); for 68 pixels 80 are made, and cut


def class_sets(num_classes, batch, device="cpu"):
    """Labels (B,): 0 .. C-1, again and again; the rest is a random subset without repeats.

    [ours] So any B and C will do (theirs: a multiple of C); no matrix meets a class twice."""
    sets, rest = divmod(batch, num_classes)
    in_order = torch.arange(num_classes, device=device).repeat(sets)  # 0 .. C-1, 0 .. C-1, ...
    return torch.cat([in_order, torch.randperm(num_classes, device=device)[:rest]])


# ---- Losses --------------------------------------------------------------------------------------
# A loss of your own for the generator takes four edits with one name, loss_...: its term in
# `synthesize`; a flag for its weight; its entry in `alphas`, in `main`; its column in COLUMNS.


class BatchStatistics(torch.autograd.Function):
    """x (B, ch, h, w) -> mean and biased variance of each channel, float32 (ch,) even for bf16 x.
    In the place of `BatchStatistics.apply(x)` these two lines would do the same:

        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        return mean, var

    [ours] The kernel with which BatchNorm itself computes them reads x once, and the gradient is a
    single multiply-add (n = B h w):
        dL/dx = (dL/dmean + 2 (x - mean) dL/dvar) / n
    Composed from var_mean, a generator step takes 30 % longer (two Zen 3 cores, float32)."""

    @staticmethod
    def forward(ctx, x):
        scratch = torch.empty(2, x.shape[1], device=x.device)  # written by the kernel, unused
        mean, var = torch.batch_norm_update_stats(x, *scratch, momentum=0.0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]  # pixels in a channel
        slope = grad_var / (n / 2)
        offset = grad_mean / n - slope * mean
        slope = slope.to(x.dtype).view(1, -1, 1, 1)
        offset = offset.to(x.dtype).view(1, -1, 1, 1)
        return torch.addcmul(offset, x, slope)


def batch_norms(teacher):
    """T's BatchNorm layers for maps that have stored statistics, a list."""
    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
    return [layer for layer in layers if layer.running_mean is not None]


class BatchNormLoss:
    """L_BN = sum over T's BatchNorm2d layers of |mu_T - mu|_2 + |var_T - var|_2.

    mu and var are what a layer sees in T's last forward pass, mixed with an average over earlier
    batches: mu = m * mu_average + (1 - m) * mu_batch, the same for var [code]. With m = 0.9 the
    gradient is scaled by 0.1; without that, L_BN drowns the class term. The average outlives the
    generator. Hooks read the layers' inputs, and only while gradients are recorded, so that they
    cost nothing while the student learns. Call it for the loss of the last pass, a float32 scalar;
    `.update()` moves the average, once per batch (the first time, sets it).

    layers: as of `batch_norms`, on T's device; those that T's forward does not use add nothing."""

    def __init__(self, layers, momentum):
        self.momentum = momentum
        self.average = None  # of mu and var over earlier batches, a vector like `stored`
        # mu and var of each layer in T's last pass; until there is one, what is stored.
        self.seen = {layer: (layer.running_mean, layer.running_var) for layer in layers}
        for layer in layers:
            layer.register_forward_pre_hook(self.read)
        # All layers' mu and var lie in one vector, so that the loss is a few large operations, not
        # a few for each layer. owner[i] is the number of the layer's mu or var to which i belongs.
        vectors = [values for pair in self.seen.values() for values in pair]
        if layers:
            self.stored = torch.cat(vectors)
            owner = [torch.full_like(v, i, dtype=torch.long) for i, v in enumerate(vectors)]
            self.owner = torch.cat(owner)

    def read(self, layer, inputs):
        """A hook. inputs: a tuple with what the layer is about to normalise (B, ch, h, w)."""
        if torch.is_grad_enabled() and inputs[0].dim() == 4:  # a SyncBatchNorm may see vectors
            self.seen[layer] = BatchStatistics.apply(inputs[0])

    def mixed(self):
        """mu and var of all layers as last seen, in one vector, mixed with their average."""
        batch = torch.cat([values for pair in self.seen.values() for values in pair])
        if self.average is None:
            return batch  # at first there is none
        return self.momentum * self.average + (1 - self.momentum) * batch

    def __call__(self):
        """sum((mu_T - mu).norm() + (var_T - var).norm() for every layer), a scalar."""
        squares = (self.stored - self.mixed()).square()
        sums = squares.new_zeros(2 * len(self.seen)).index_add(0, self.owner, squares)
        return (sums + 1e-20).sqrt().sum()  # the slope of sqrt(0) would be infinite

    @torch.no_grad()
    def update(self):
        """The mixture of the last pass becomes the average."""
        self.average = self.mixed()


def adversarial_loss(student_logits, teacher_logits):
    """L_adv = -mean over the batch of 1[argmax S = argmax T] * KL(T || S): two (B, C) -> scalar.

    G lowers it with images for which S predicts T's class but with other probabilities than T:
    those that S can still learn from. Where S predicts another class there is enough to learn
    already, so the term is 0, and cannot push the image out of its class."""
    s, t = student_logits.float(), teacher_logits.float()  # (B, C)
    divergence = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True)
    agree = s.argmax(1) == t.argmax(1)  # (B,)
    return -(divergence.sum(1) * agree).mean()


def distillation_loss(student_logits, teacher_logits, temperature):
    """L_KD = tau^2 * KL(softmax(T / tau) || softmax(S / tau)), mean over the batch -> scalar.

    A large tau shows S how T ranks the wrong classes; tau^2 keeps the gradient's size."""
    s = (student_logits.float() / temperature).log_softmax(1)
    t = (teacher_logits.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


# ---- Memory bank and augmentation: M -------------------------------------------------------------
class MemoryBank:
    """M: the synthetic images, uint8 (capacity, ch, h, w), on the device; theirs: PNG files [code].

    S learns from all images so far, or it would forget. A ring: the newest replace the oldest.
    len() is the number of images in it, `.added` the number ever added."""

    def __init__(self, capacity, channels, image_size, device="cpu"):
        shape = (capacity, channels, image_size, image_size)
        self.images = torch.empty(shape, dtype=torch.uint8, device=device)
        self.added = 0  # images ever added

    def __len__(self):
        return min(self.added, len(self.images))

    def add(self, images):
        """images: uint8 (B, ch, h, w). If there are more than fit, the last ones are kept."""
        capacity = len(self.images)
        numbers = torch.arange(self.added, self.added + len(images), device=images.device)
        places = numbers[-capacity:] % capacity
        self.images[places] = images[-capacity:]
        self.added += len(images)

    def sample(self, count):
        """`count` images, uint8 (count, ch, h, w), drawn uniformly with replacement [ours]."""
        return self.images[torch.randint(len(self), (count,), device=self.images.device)]


class Augment:
    """Random crop after zero padding (of the pixels), random mirroring, normalisation; per image.

    images (B, ch, h, w), float in [0, 1] -> the same shape, normalised. Gradients pass through: G
    learns images that T classifies wherever they are cropped. `normalize` alone is for scoring.
    mean, std: a number per channel, as T was trained. padding: pixels of zeros on each side before
    the crop. flip: whether half of the images are mirrored."""

    def __init__(self, mean, std, padding, flip, device="cpu"):
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)
        self.padding = padding
        self.flip = flip

    def normalize(self, images):
        """Pixels in [0, 1] -> normalised as in T's training."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def __call__(self, images):
        B, ch, h, w = images.shape
        p, device = self.padding, images.device
        top, left = torch.randint(2 * p + 1, (2, B, 1), device=device)  # each crop's corner
        rows = top + torch.arange(h, device=device)  # (B, h)
        columns = left + torch.arange(w, device=device)  # (B, w)
        if self.flip:
            mirrored = torch.rand(B, 1, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        images = F.pad(images, (p, p, p, p))  # (B, ch, h + 2p, w + 2p)
        images = images.gather(2, rows[:, None, :, None].expand(B, ch, h, w + 2 * p))
        images = images.gather(3, columns[:, None, None, :].expand(B, ch, h, w))
        return self.normalize(images)


# ---- Phase 1. Over G and Z, minimise alpha_ce L_CE + alpha_bn L_BN + alpha_adv L_adv -------------
def synthesize(
    generator,
    noisy_layer,
    inputs,
    labels,
    teacher,
    student,
    bn_loss,
    augment,
    amp,
    *,
    steps,
    lr,
    alphas,
):
    """One batch of images for `labels` (B,), from `inputs` (B, D), by `steps` steps of a new Adam.

    inputs: e_y of each label, or one-hot vectors, or noise. teacher: frozen, in eval mode. amp: a
    torch.autocast. alphas: the weights of the terms by name; L_BN and L_adv are skipped at 0.
    Returns the images of the step with the lowest total loss, before augmentation, uint8
    (B, ch, h, w), and the terms of every step, a dict of (steps,)."""
    # [ours] S stays in eval mode. Theirs is in train mode from the second batch of an epoch on, so
    # half-made images change the statistics of its BatchNorm.
    student.eval()
    student.requires_grad_(False)
    parameters = [*generator.parameters(), *noisy_layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.5, 0.999), fused=True)
    best_loss, best_images = math.inf, 0.0  # the first step's replace them
    history = []
    for _ in tqdm(range(steps), "generator steps", leave=False, disable=None):
        hidden = noisy_layer(inputs)  # outside amp, so in float32
        with amp:
            images = generator(hidden)  # x^ = G(Z(e_y))
            views = augment(images)  # afresh at each step; T and S see the same
            teacher_logits = teacher(views).float()
            losses = {"loss_ce": F.cross_entropy(teacher_logits, labels)}  # T predicts y
            if alphas["loss_bn"]:
                losses["loss_bn"] = bn_loss()  # T's layers see what they saw in training
            if alphas["loss_adv"]:  # S predicts the same class with other probabilities
                losses["loss_adv"] = adversarial_loss(student(views), teacher_logits)
        loss = sum(alphas[name] * value for name, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Keep the best step's images without asking the device which step that is.
        better = loss.detach() < best_loss
        best_loss = torch.where(better, loss.detach(), best_loss)
        best_images = torch.where(better, images.detach(), best_images)
        history.append(torch.stack([*losses.values()]).detach())
    if alphas["loss_bn"]:
        bn_loss.update()  # the average moves once per batch, from the last step
    return (best_images * 255).round().byte(), dict(zip(losses, torch.stack(history, dim=1)))


# ---- Phase 2. Over S, minimise L_KD on images from M ---------------------------------------------
def distillation_batches(teacher, memory, augment, amp, batch, pool, reuse, mix):
    """Endless batches: views (batch, ch, h, w) of images in M, and T's logits on them (batch, C).

    For reuse = 1, each is new. Else [ours] T is queried on `pool` batches of new views in advance,
    and S passes `reuse` times over them, each time in another order; then come new ones. A share
    `mix` of the views is blended with another view (mixup) [ours]."""
    while True:
        views = augment(memory.sample(pool * batch).float() / 255)
        if mix:
            weight, chance = torch.rand(2, len(views), 1, 1, 1, device=views.device)
            weight = torch.where(chance < mix, weight, 0.0)  # of the other view
            views = views.lerp(views.roll(1, dims=0), weight)
        with torch.no_grad(), amp:
            logits = torch.cat([teacher(part) for part in views.split(batch)])
        for _ in range(reuse):
            for indices in torch.randperm(len(views), device=views.device).split(batch):
                yield views[indices], logits[indices]


def distill(
    teacher,
    student,
    memory,
    optimizer,
    augment,
    amp,
    *,
    steps,
    batch,
    temperature,
    reuse=1,
    mix=0.0,
):
    """One epoch: `steps` student steps on batches from M. Returns the mean of L_KD, a scalar.

    Only T's softened outputs are used, never the labels y. batch: images in a step. temperature:
    tau of L_KD. optimizer: of S; its state lives on. reuse (R), mix: see `distillation_batches`.
    R = 4 takes 35 % less time (two Zen 5 cores), mix 0.5 adds 3.0 points (1.2 to 4.8, CIFAR-10)."""
    student.train()
    student.requires_grad_(True)
    pool = 1 if reuse == 1 else math.ceil(steps / reuse)
    batches = distillation_batches(teacher, memory, augment, amp, batch, pool, reuse, mix)
    total = 0.0
    for _ in tqdm(range(steps), "student steps", leave=False, disable=None):
        views, teacher_logits = next(batches)
        with amp:
            loss = distillation_loss(student(views), teacher_logits, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return total / steps


# ---- The algorithm -------------------------------------------------------------------------------
def main(argv=None):
    """Distil a teacher into a student. Returns the last row of log.csv, a dict.

    argv: a list of flags; None: those of the command line. Raises UserError for what the user can
    put right. All is written to --out after every epoch, so nothing finished is ever lost."""
    start = time.perf_counter()
    args = parse_args(argv)
    device, fast_bf16 = pick_device(args.device)
    bf16 = args.amp and fast_bf16
    amp = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    torch.manual_seed(args.seed)  # for the weights of S; every epoch has a seed of its own

    # T and S, and the description of T's images and classes.
    teacher, info = load_teacher(args)
    teacher = teacher.to(device)
    C, channels, size = len(info["class_names"]), info["channels"], info["image_size"]
    student = load_student(args.student, C, channels, size).to(device)
    check_networks(teacher, student, info, args)
    layers = batch_norms(teacher) if args.alpha_bn else []
    augment = Augment(info["mean"], info["std"], args.crop_padding, args.flip, device)
    optimizer = torch.optim.SGD(
        student.parameters(),
        args.lr,
        momentum=0.9,
        weight_decay=args.weight_decay,
        nesterov=args.nesterov,
        fused=True,
    )

    # Real images, for scores alone. The first score is T's.
    test = test_batches(args, info) if args.eval else []
    teacher_accuracy = accuracy(teacher, test, augment, amp)
    print_teacher(args.teacher, info, layers, teacher_accuracy)
    if args.epochs == 0:
        return dict(teacher_accuracy=teacher_accuracy)

    # The input of Z for each class (C, D).
    if args.label_input == "lte":
        label_embeddings = embeddings_of(info["class_names"], args).to(device)
    elif args.label_input == "onehot":
        label_embeddings = torch.eye(C, device=device)
    else:
        label_embeddings = torch.zeros(C, 256, device=device)  # `make_batch` replaces them
    D = label_embeddings.shape[1]

    # The average of L_BN and the memory live through all epochs; Z and G for --generator-life.
    B = args.synthesis_batch
    all_batches = args.warmup_epochs * args.warmup_batches + args.epochs * args.batches
    memory = MemoryBank(args.bank_size or all_batches * B, channels, size, device)
    bn_loss = BatchNormLoss(layers, args.bn_momentum)

    def new_generator():
        """A new pair G, Z, since the images of an old pair grow alike [code]."""
        K = min(C, B)  # one image of each class goes through the same matrix
        noisy_layer = NoisyLayer(D, math.ceil(B / K), K).to(device)
        hidden_size = HIDDEN_SIZE
        if args.noisy_layer == "off":  # then all images of a class in a batch are the same
            noisy_layer, hidden_size = noisy_layer.norm, D
        generator = Generator(hidden_size, channels, size, args.generator_width)
        return generator.to(device, memory_format=torch.channels_last), noisy_layer

    def make_batch(generator, noisy_layer, alpha_adv):
        """Images uint8 (B, ch, h, w) of all classes, their labels (B,), the losses of each step."""
        if args.noisy_layer == "reinit":
            noisy_layer.reinitialize()  # once per batch, not per step [code]
        labels = class_sets(C, B, device)
        inputs = label_embeddings[labels]  # e_y (B, D)
        if args.label_input == "noise":
            inputs = torch.randn_like(inputs)
        images, losses = synthesize(
            generator,
            noisy_layer,
            inputs,
            labels,
            teacher,
            student,
            bn_loss,
            augment,
            amp,
            steps=args.generator_steps,
            lr=args.generator_lr,
            alphas=dict(loss_ce=args.alpha_ce, loss_bn=args.alpha_bn, loss_adv=alpha_adv),
        )
        return images, labels, losses

    # A run that was stopped goes on where its last whole epoch ended.
    num_epochs = args.warmup_epochs + args.epochs
    saved = load_checkpoint(args, info, device)
    rows = saved["rows"] if saved else []  # of log.csv, a dict for each epoch
    if len(rows) == num_epochs:
        print_line(f"nothing is left to do: {args.out} has all of its {num_epochs} epochs")
        return rows[-1]
    print_head(args, device, bf16)

    # Held-out synthetic images [ours]: S never learns from them, and they need no data.
    torch.manual_seed(epoch_seed(args.seed, -1))
    held_out = held_out_images(
        make_batch, new_generator(), args.agree_batches, all_batches, teacher, augment, amp
    )
    bn_loss.average = None  # the run itself begins without one

    generator, noisy_layer = new_generator()  # `restore` gives them their weights
    state = dict(student=student, optimizer=optimizer, generator=generator, noisy_layer=noisy_layer)
    if saved:
        restore(saved, args, state, bn_loss, memory)
        start -= rows[-1]["seconds"]  # spent before
    for epoch in tqdm(range(len(rows), num_epochs), "epochs", leave=False, disable=None):
        torch.manual_seed(epoch_seed(args.seed, epoch))
        row = dict.fromkeys(COLUMNS)
        row["epoch"] = epoch
        warm_up = epoch < args.warmup_epochs  # fills M; no L_adv, since S is not trained yet
        if epoch % args.generator_life == 0:
            generator, noisy_layer = new_generator()  # L_BN's average lives on [code]
            state |= dict(generator=generator, noisy_layer=noisy_layer)

        # Phase 1: new images for M.
        alpha_adv = 0.0 if warm_up else args.alpha_adv
        num_batches = args.warmup_batches if warm_up else args.batches
        batches = [make_batch(generator, noisy_layer, alpha_adv) for _ in range(num_batches)]
        images, labels, histories = zip(*batches)
        made = {}
        for name in histories[0]:
            made[name] = torch.stack([history[name] for history in histories])  # (batches, steps)
            row[name] = made[name][:, -1].mean().item()  # of the last steps
            check(math.isfinite(row[name]), f"{name} is {row[name]}: lower --lr or --generator-lr")
        made |= dict(images=torch.cat(images), labels=torch.cat(labels))
        memory.add(made["images"])
        row["images"] = len(memory)

        # Phase 2: S learns, on all of M.
        if not warm_up:
            progress = (epoch - args.warmup_epochs) / args.epochs
            cosine = (1 + math.cos(math.pi * progress)) / 2  # falls from 1 to 0
            optimizer.param_groups[0]["lr"] = 2e-4 + (args.lr - 2e-4) * cosine
            loss_kd = distill(
                teacher,
                student,
                memory,
                optimizer,
                augment,
                amp,
                steps=args.student_steps,
                batch=args.student_batch,
                temperature=args.temperature,
                reuse=args.reuse,
                mix=args.mix,
            )
            row["loss_kd"] = loss_kd.item()
            row["agree"] = accuracy(student, held_out, augment, amp)
            row["accuracy"] = accuracy(student, test, augment, amp)
        row["seconds"] = time.perf_counter() - start
        rows.append(row)
        print_row(row)
        save(args, info, state, bn_loss, rows, made)
    return rows[-1]


# ==================================================================================================
# Here the method ends. What follows surrounds it: networks, model files, text encoders, test
# images, scores, the files of a run, errors. You need not read it to understand the method.
# ==================================================================================================


# ---- Networks ------------------------------------------------------------------------------------
def conv(inputs, outputs, size, stride=1):
    """A convolution without bias, between so many channels. size: of the kernel, an odd number."""
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class WideBlock(nn.Module):
    """Twice BatchNorm, ReLU, 3x3 convolution; and a shortcut, a 1x1 convolution between widths.

    x (B, inputs, H, W) -> (B, outputs, H / stride, W / stride). ReLU and sum work in place."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv1 = conv(inputs, outputs, 3, stride)
        self.conv2 = conv(outputs, outputs, 3)
        self.shortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None

    def forward(self, x):
        h = F.relu(self.norm1(x), inplace=True)
        if self.shortcut is not None:
            x = self.shortcut(h)
        h = self.conv1(h)
        h = F.relu(self.norm2(h), inplace=True)
        return self.conv2(h).add_(x)


class WideResNet(nn.Module):
    """wrn{depth}_{width} of Zagoruyko and Komodakis (2016): (B, ch, h, w) -> logits (B, C)."""

    def __init__(self, depth, width, num_classes, channels=3):
        super().__init__()
        self.stem = conv(channels, 16, 3)
        self.blocks = nn.Sequential()
        inputs = 16
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for i in range((depth - 4) // 6):
                stride = 2 if stage > 0 and i == 0 else 1  # maps of full, half, quarter size
                self.blocks.append(WideBlock(inputs, outputs, stride))
                inputs = outputs
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        features = self.blocks(self.stem(images))  # (B, 64 width, H/4, W/4)
        features = F.relu(self.norm(features), inplace=True)
        return self.classifier(features.mean((2, 3)))


def build_model(name, num_classes, channels=3, image_size=32):
    """A network with random weights: wrn{depth}_{width}, or what torchvision has by that name.

    For images of up to 64 pixels, a ResNet gets a 3x3 stem, no max-pool and PyTorch's default
    initial weights; a VGG gets BatchNorm, max-pooling after its first three stages alone (four for
    64 pixels) and one linear layer [code]. Raises UserError for an unknown name."""
    # A wide ResNet is written above; torchvision has none for small images.
    wide = re.fullmatch(r"wrn(\d+)_([1-9]\d*)", name)
    if wide and int(wide[1]) in range(10, 1000, 6):  # depth = 6n + 4
        return WideResNet(int(wide[1]), int(wide[2]), num_classes, channels)
    from torchvision import models

    small = image_size <= SMALL_IMAGE
    if small and re.fullmatch(r"vgg\d\d", name):
        name += "_bn"  # torchvision's name for a VGG with BatchNorm
    known = name in models.list_models(module=models) and channels == 3
    check(known, f"no {name} for {channels} channels: use wrn16_1, or for 3 a torchvision name")
    model = models.get_model(name, weights=None, num_classes=num_classes)
    if not small:
        return model
    # Made for 224 pixels: for small images the first layers must not throw away so much.
    if isinstance(model, models.ResNet):
        model.conv1 = conv(3, 64, 3)
        model.maxpool = nn.Identity()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()
    if isinstance(model, models.VGG):
        pools = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.MaxPool2d)]
        kept = 4 if image_size == 64 else 3
        for i in pools[kept:]:
            model.features[i] = nn.Identity()
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, num_classes)
    return model


# ---- Model files, and networks of your own -------------------------------------------------------
INFO_KEYS = ["class_names", "channels", "image_size", "mean", "std"]  # what is kept of T's .info


def save_model(path, model, info):
    """One self-describing safetensors file: the weights, with `info`, what json can write, as
    metadata: architecture, class_names, channels, image_size, mean, std, accuracy, ..."""
    state = {name: tensor.cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in info.items()}
    with atomic_write(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(state, metadata))


def read_safetensors(path):
    """(tensors by name, metadata: strings by name) of a safetensors file."""
    with user_error(f"{path} is not an intact safetensors file"):
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def load_model(path, model=None):
    """The network in a model file: on the CPU, float32, in eval mode, its description as `.info`.

    model: a network to put the weights into, for one that `build_model` does not know. Raises
    UserError if the file is missing, cut, or not one of ours. Runs no code from it."""
    state, metadata = read_safetensors(path)
    with user_error(f"{path} is no model file of nayer.py: write a function, file.py:function"):
        info = {key: json.loads(text) for key, text in metadata.items()}
        if model is None:
            C = len(info["class_names"])
            model = build_model(info["architecture"], C, info["channels"], info["image_size"])
        model.load_state_dict(state)
    model.info = info
    return model.float().eval()


def network_from_file(place, **known):
    """(the nn.Module that `file.py:function` returns, its description): on the CPU, in float32, in
    eval mode. The description is its `.info`, a dict, or {}.

    known: passed to the function where its arguments have these names. Runs that file; an error in
    it keeps its traceback. A module of its folder that it imports at its top has no effect on what
    follows."""
    path, _, function = place.rpartition(":")
    check(Path(path).is_file(), f"there is no file {path}, of {place}")
    folder = Path(path).resolve().parent
    sys.path.insert(0, str(folder))  # for what lies beside it
    loaded = set(sys.modules)
    with mock.patch.object(sys, "argv", [path]):  # it must not read the flags of this program
        names = runpy.run_path(path)
        check(function in names, f"{path} has no function {function}")
        wanted = inspect.signature(names[function]).parameters
        model = names[function](**{key: known[key] for key in known if key in wanted})
    for name in set(sys.modules) - loaded:  # S's file may import another module of the same name
        neighbour = folder / name.partition(".")[0]
        if neighbour.is_dir() or neighbour.with_suffix(".py").exists():
            del sys.modules[name]
    check(isinstance(model, nn.Module), f"{place} gives a {type(model).__name__}, not an nn.Module")
    info = getattr(model, "info", {})
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
        info = info or getattr(model, "info", {})
    if not isinstance(info, dict):  # a layer or a method of that name
        info = {}
    model.cpu().float().eval()
    model.requires_grad_(True)
    model.register_forward_pre_hook(plain_input)
    model.register_forward_hook(logits_of)
    return model, info


def plain_input(model, inputs):
    """A hook: images in the usual order of dimensions, which `.view` needs; a copy, since the
    network may write into it."""
    return inputs[0].clone(memory_format=torch.contiguous_format)


def logits_of(model, inputs, output):
    """A hook: Hugging Face's networks give an object with the logits in it."""
    return getattr(output, "logits", output)


def load_teacher(args):
    """(T, info). T: frozen, in eval mode; a name in teachers/, a model file, or file.py:function.

    info: the network's description, a dict: class_names, in the order of its outputs; image_size
    in pixels; mean and std of the pixels in [0, 1], a number per channel; and here the number of
    channels. It stays beside the network, which may have a layer called info."""
    name = args.teacher
    if ".py:" in name:
        with torch.random.fork_rng(devices=[]):  # S's first weights follow from --seed alone
            teacher, info = network_from_file(name)
    else:
        path = Path(name)
        if path.suffix != ".safetensors":
            path = SHIPPED / f"{args.dataset}_{name}.safetensors"
            command = f"python teachers/train.py --dataset {args.dataset} --model {name}"
            text = f"no {path}: give a .safetensors, a file.py:function, or train it: {command}"
            check(path.exists(), text)
        teacher = load_model(path).to(memory_format=torch.channels_last)
        info = teacher.info
    for key in ("class_names", "image_size", "mean", "std"):
        check(key in info, f"{name} has no {key}: add it to the .info of the network (README.md)")
    info["class_names"] = [normalize_name(class_name) for class_name in info["class_names"]]
    mean = info["mean"] = [float(value) for value in info["mean"]]
    std = info["std"] = [float(value) for value in info["std"]]
    inside = all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(mean, std))
    text = f"mean {mean}, std {std} of {name}: one per channel, of pixels in [0, 1]: divide by 255"
    check(inside and len(mean) == len(std), text)
    info["channels"] = len(mean)
    teacher.requires_grad_(False)
    return teacher, info


def load_student(name, num_classes, channels, image_size):
    """S with random weights: a name that `build_model` accepts, or file.py:function, to which
    num_classes, channels and image_size are passed where its arguments have these names."""
    known = dict(num_classes=num_classes, channels=channels, image_size=image_size)
    if ".py:" in name:
        with mock.patch.object(torch, "manual_seed"):  # --seed alone decides the first weights
            return network_from_file(name, **known)[0]
    return build_model(name, **known).to(memory_format=torch.channels_last)


def check_networks(teacher, student, info, args):
    """Raises UserError for what would silently make a run worthless."""
    C = len(info["class_names"])
    shape = (4, info["channels"], info["image_size"], info["image_size"])
    brightness = torch.tensor([0.1, 1, 10, 100]).view(4, 1, 1, 1)  # so that logits leave [0, 1]
    learner = copy.deepcopy(student)  # train mode moves the statistics of its BatchNorm
    learner.train()
    for name, model in ((args.teacher, teacher), (args.student, learner)):
        images = (brightness * torch.rand(shape)).to(next(model.parameters()).device)
        logits = model(images.requires_grad_())
        found = getattr(logits, "shape", type(logits))
        text = f"{name} returns {found} for 4 images, not logits (4, {C} classes)"
        check(found == (4, C), text)
        check(logits.isfinite().all(), f"the logits of {name} are not finite: is it trained?")
        # Logarithms of probabilities will do. The logits of an untrained S may lie in [0, 1], too.
        in_unit = logits.min() >= 0 and logits.max() <= 1
        sum_to_one = (logits.sum(1) - 1).abs().max() < 0.01
        text = f"{name} returns probabilities: leave out the softmax or sigmoid at its end"
        check(not (in_unit and (sum_to_one or model is teacher)), text)
        if model is teacher:
            asleep = not any(layer.training for layer in teacher.modules())
            check(asleep, f"{name}.eval() does not reach all layers: see its train()")
            same = (logits - logits[0]).abs().max() < 1e-6
            check(not same, f"{name} returns the same logits for all images: is it trained?")
        if logits.requires_grad:
            logits.square().sum().backward()
        text = f"no gradient passes {name}: does it round, or use no_grad, detach or int8?"
        check(images.grad is not None and images.grad.any(), text)
    norms = batch_norms(teacher)
    check(norms or not args.alpha_bn, f"{args.teacher} has no BatchNorm2d: add --alpha-bn 0")
    if norms and not any(layer.running_mean.any() for layer in norms):
        print_line("warning: T's BatchNorm statistics are those of a new network: is it trained?")
    text = f"images of {info['image_size']} pixels need smaller batches: add --preset large"
    check(info["image_size"] <= SMALL_IMAGE or args.preset, text)


def normalize_name(name):
    """A name as people compare them: one Unicode form, no needless space."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


# ---- Text encoders -------------------------------------------------------------------------------
def load_text_encoder(name):
    """(tokenize, encoder) for `label_text_embeddings`. name: of the Hugging Face hub, or a folder.

    What was fetched before needs no hub. Reads safetensors only, runs no remote code."""
    from huggingface_hub import constants, get_session
    from transformers import AutoModel, AutoTokenizer, logging

    logging.disable_progress_bar()  # stderr stays empty in a run that ends well
    offline = True  # unless the hub answers at once; else transformers tries again for a minute
    with contextlib.suppress(Exception):
        get_session().head(constants.ENDPOINT, timeout=5)
        offline = False
    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=offline)
    encoder = AutoModel.from_pretrained(name, local_files_only=offline, use_safetensors=True)
    if tokenizer.pad_token is None:  # GPT-2's; the attention mask leaves out what it pads
        tokenizer.pad_token = tokenizer.eos_token
    # SigLIP was trained on texts of one length.
    padding = "max_length" if encoder.config.model_type.startswith("siglip") else True
    if encoder.config.is_encoder_decoder:  # T5
        encoder = encoder.get_encoder()
    options = dict(truncation=True, return_tensors="pt", return_token_type_ids=False)
    return partial(tokenizer, padding=padding, **options), encoder


def embeddings_of(class_names, args):
    """e_y of each class (C, D): from teachers/, where those of the presets are, or made now.

    UserError if there is no such encoder, or if it embeds two names alike."""
    path = SHIPPED / "label_embeddings.safetensors"
    if path.exists():
        tensors, about = read_safetensors(path)
        for dataset, made_of in about.items():
            if json.loads(made_of) == [args.text_encoder, args.prompt, class_names]:
                return tensors[dataset].float()
    remedy = "see --text-encoder, or do without: --label-input onehot"
    with user_error(f"no usable text encoder {args.text_encoder} here or on the hub; {remedy}"):
        tokenize, encoder = load_text_encoder(args.text_encoder)
        embeddings = label_text_embeddings(class_names, tokenize, encoder, args.prompt)
    # Are two the same but for rounding? Then G gets the same input for both classes. Two classes of
    # one name, such as ImageNet's cranes, are accepted.
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    close = distances < 1e-3 * embeddings.norm(dim=1).mean()
    for i, j in close.triu(1).nonzero().tolist():
        one, other = class_names[i], class_names[j]
        text = f"the text encoder embeds {one!r} and {other!r} alike: see --prompt and class_names"
        check(one == other, text)
    return embeddings


# ---- Test images: no line of this file reads a training image ------------------------------------
def image_folder(folder, class_names, channels, size):
    """torchvision's ImageFolder (a folder per class) of uint8 images (channels, size, size): they
    are converted to gray or colour, resized, cropped in the middle, and read when asked for.

    A label is the place of the folder's name in class_names."""
    from torchvision import datasets
    from torchvision.transforms import v2

    fit = [v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()]
    if channels == 1:
        fit.insert(0, v2.Grayscale())
    data = datasets.ImageFolder(folder, v2.Compose(fit))
    names = [normalize_name(name) for name in data.classes]
    unknown = set(names) - set(class_names)
    check(not unknown, f"the teacher has no class {sorted(unknown)}, folders in {folder}")
    data.target_transform = [class_names.index(name) for name in names].__getitem__
    return data


def test_digits(size):
    """500 of scikit-learn's digits that no teacher was trained on, enlarged from 8 pixels: pairs of
    an image, uint8 (1, size, size), and its label."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()  # 1,797 of 8x8 pixels, values 0 to 16
    images = torch.tensor(digits.images).float()[:, None] * (255 / 16)
    images = F.interpolate(images, size=size, mode="bilinear").round().byte()
    pairs = list(zip(images, digits.target))
    _, held_out = train_test_split(pairs, test_size=500, stratify=digits.target, random_state=0)
    return held_out


def test_batches(args, info):
    """Batches (images uint8 (n, channels, size, size), labels (n,)) to score on, a list in a fixed
    order, in CPU memory.

    Except for digits and CIFAR, they are in test/ of --data-root, a folder per class."""
    dataset, size = args.dataset, info["image_size"]
    root = args.data_root or Path("data")
    with user_error(f"no test images of {dataset} in {root}; nayer.py --no-eval needs none"):
        if dataset == "digits":
            data = test_digits(size)
        elif dataset in ("cifar10", "cifar100"):
            from torchvision import datasets
            from torchvision.transforms import v2

            fit = v2.Compose([v2.Resize(size), v2.PILToTensor()])
            kind = getattr(datasets, dataset.upper())
            data = kind(root, train=False, download=True, transform=fit)
        else:
            data = image_folder(root / "test", info["class_names"], info["channels"], size)
        return list(DataLoader(data, EVAL_BATCH))


# ---- Scores and what is printed ------------------------------------------------------------------
@torch.no_grad()
def predict(model, images, augment, amp):
    """The class (n,) that `model` predicts for each of `images`, uint8 (n, ch, h, w), on any
    device. Leaves it in eval mode."""
    model.eval()
    views = augment.normalize(images.to(augment.mean.device).float() / 255)
    with amp:
        return model(views).argmax(1)


def accuracy(model, batches, augment, amp):
    """Fraction in [0, 1] of images that `model` predicts right; None if there are none.

    batches: pairs of images, uint8 (n, ch, h, w), and labels (n,)."""
    right = []
    for images, labels in batches:
        right.append(predict(model, images, augment, amp).cpu() == labels.cpu())
    if not right:
        return None
    return torch.cat(right).double().mean().item()


def held_out_images(make_batch, pair, num_batches, all_batches, teacher, augment, amp):
    """Batches (images, labels) of synthetic images from which S never learns, for the column
    `agree` [ours]: how often S predicts T's class on held-out synthetic images. Prints how long
    the run's `all_batches` will take at this speed.

    pair: G and Z of their own, for batches without L_adv. Of the later half, for which L_BN has a
    longer average, the images whose label T predicts are kept; none if that is a single class."""
    made = []
    start = time.perf_counter()
    for _ in tqdm(range(num_batches), "held-out images", leave=False, disable=None):
        made.append(make_batch(*pair, alpha_adv=0.0))
    minutes = (time.perf_counter() - start) / max(num_batches, 1) * all_batches / 60
    if minutes > 1:
        print_line(f"time     about {minutes:.0f} min for all images, and more for the student")
    kept = []
    for images, labels, _ in made[num_batches // 2 :]:
        right = predict(teacher, images, augment, amp) == labels
        if len(labels[right].unique()) > 1:
            kept.append((images[right], labels[right]))
    return kept


# Columns of log.csv and the console, and their formats.
# agree: how often S predicts T's class on held-out synthetic images.
COLUMNS = dict(epoch="d", images="d", loss_ce=".4f", loss_bn=".4f", loss_adv=".4f", loss_kd=".4f")
COLUMNS |= dict(agree=".1%", accuracy=".2%", seconds=".1f")


def print_teacher(name, info, layers, score):
    """What is known of T, so that a wrong description is seen."""
    names = info["class_names"]
    shape = f"{info['channels']} x {info['image_size']} x {info['image_size']}"
    line = f"teacher  {name}, {len(layers)} BatchNorm layers in L_BN"
    if score is not None:
        line += f", predicts {score:.2%} of the test images right"
    print_line(line)
    print_line(f"classes  {len(names)}, {names[0]} to {names[-1]}")
    print_line(f"images   {shape}, mean {info['mean']}, std {info['std']}")


def print_head(args, device, bf16):
    """The head of the table."""
    precision = "float32, by --no-amp"
    if args.amp:
        precision = "bf16" if bf16 else "float32, since bf16 is not fast here"
    print_line(f"run      on {device} in {precision}, into {args.out}")
    print_line("".join(f" {name.removeprefix('loss_'):>8}" for name in COLUMNS))


def print_row(row):
    """A row of the table, a cell for each column; "-" for what was not measured."""
    line = ""
    for name, form in COLUMNS.items():
        cell = "-" if row[name] is None else format(row[name], form)
        line += f" {cell:>8}"
    print_line(line)


# ---- The files of a run --------------------------------------------------------------------------
# checkpoint.pt is written last in every epoch, so that a kill at any moment leaves this epoch's
# state or the one before; memory/ holds the bank's images, a file an epoch. No random state is
# kept: the random numbers of an epoch follow from --seed and the epoch alone [ours].
MAY_CHANGE = ["out", "resume", "preset", "data_root", "device", "eval"]  # in a run that goes on


def epoch_seed(seed, epoch):
    """A seed from the two, hashed, so that no two epochs share random numbers. epoch: its number;
    -1 for the held-out images. (The 0 is part of the seeds of all results in results/.)"""
    return random.Random(repr((seed, epoch, 0))).getrandbits(63)


@contextlib.contextmanager
def atomic_write(path):
    """with atomic_write(path) as temporary: write that file. Then it takes the place of `path` at
    once, so that a kill at any moment leaves the old one or the new one, whole."""
    temporary = Path(f"{path}.tmp")
    with user_error(f"cannot write {path}"):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)


def settings_of(args, info):
    """What decides the numbers of a run, as json can write it: the flags, but for MAY_CHANGE, and
    T's description. A file of a network counts by its name alone: it may move."""
    settings = {key: value for key, value in vars(args).items() if key not in MAY_CHANGE}
    settings["teacher"] = Path(args.teacher).name
    settings["student"] = Path(args.student).name
    return settings | {key: info[key] for key in INFO_KEYS}


def save(args, info, state, bn_loss, rows, made):
    """Write the table, a picture, the student, what the epoch has made, and last the checkpoint.

    state: what has a state_dict, by name. made: images (n, ch, h, w) and labels (n,) of the epoch,
    and its losses, each (batches, steps)."""
    from torchvision.utils import save_image

    out, row = args.out, rows[-1]
    settings = settings_of(args, info)
    epoch = f"epoch_{row['epoch']:03d}"
    with atomic_write(out / "log.csv") as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    columns = min(len(info["class_names"]), 20)  # a class each, if there are no more than 20
    last = made["images"][-args.synthesis_batch :]  # the epoch's last batch
    with atomic_write(out / f"samples/{epoch}.png") as temporary:
        picture = last[: 8 * columns].float() / 255
        save_image(picture, temporary, nrow=columns, pad_value=1.0, format="png")
    about = {key: info[key] for key in INFO_KEYS}
    about |= dict(
        architecture=args.student,
        accuracy=row["accuracy"],
        trained_on=f"images made from {args.teacher}",
        settings=settings,
    )
    save_model(out / "student.safetensors", state["student"], about)
    content = {name: tensor.cpu() for name, tensor in made.items()}
    save_tensors(out / f"memory/{epoch}.pt", content)
    content = {name: part.state_dict() for name, part in state.items()}
    content |= dict(settings=settings, average=bn_loss.average, rows=rows)
    save_tensors(out / "checkpoint.pt", content)


def save_tensors(path, content):
    """For `load_tensors`."""
    with atomic_write(path) as temporary:
        torch.save(content, temporary)


def load_tensors(path, device):
    """What torch.save wrote, with its tensors on the device. Runs no code from the file."""
    with user_error(f"{path} is not an intact file of this nayer.py"):
        return torch.load(path, map_location=device, weights_only=True)


def load_checkpoint(args, info, device):
    """What the checkpoint in --out holds, or None if there is none. UserError if there is one and
    no --resume, if it is damaged, or if it is of other settings."""
    path = args.out / "checkpoint.pt"
    if not path.exists():
        if args.resume:
            print_line(f"nothing to resume: there is no finished epoch in {args.out}")
        with user_error(f"cannot make {args.out}: choose another --out"):
            args.out.mkdir(parents=True, exist_ok=True)
        return None
    check(args.resume, f"{path} is of an earlier run: add --resume, or choose another --out")
    saved = load_tensors(path, device)
    new = settings_of(args, info)
    old = saved.get("settings", {})
    changed = [f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]
    check(not changed, f"{args.out} is of a run with other settings: {'; '.join(changed)}")
    return saved


def restore(saved, args, state, bn_loss, memory):
    """Put what `load_checkpoint` gave into these objects, and the images of all epochs into M. The
    run goes on as if it had not been stopped, on a CPU to the bit."""
    for name, part in state.items():
        part.load_state_dict(saved[name])
    bn_loss.average = saved["average"]
    for row in saved["rows"]:  # all epochs, so that the ring stands as it did
        path = args.out / f"memory/epoch_{row['epoch']:03d}.pt"
        memory.add(load_tensors(path, memory.images.device)["images"])


# ---- Errors and devices --------------------------------------------------------------------------
class UserError(Exception):
    """Something the user can put right: the program shows it as one line and exits with code 1."""


def check(condition, message):
    """UserError(message) unless the condition holds. message: what is wrong and what to do."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def user_error(message):
    """Any error in the block becomes a UserError: `message`, and its own words as the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        raise UserError(f"{message} ({reason})") from error


def pick_device(name):
    """(device, whether bf16 is fast on it). auto: cuda if it is there, else cpu. Sets PyTorch's
    precision of float32 products, and cuDNN's choice of kernels."""
    torch.set_float32_matmul_precision("high")  # TF32, where bf16 is not used
    torch.backends.cudnn.benchmark = True  # the fastest kernels that a trial finds
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    with user_error(f"there is no {device} here: use --device cpu"):
        torch.zeros(1, device=device)
    if device.type == "cuda":
        # Before Ampere bf16 is slow, and float16 would need scaled losses.
        return device, torch.cuda.get_device_capability() >= (8, 0)
    return device, name == "cpu" and torch.cpu._is_avx512_bf16_supported()


def run_script(main):
    """Run main() as a program: one clear line and an exit code in the place of a traceback.

    0: done. 1: what the user can put right, or what the machine lacks. 2: a wrong command line, see
    `parse_args`. 130: stopped by Ctrl-C. A bug here or in the user's file keeps its traceback."""
    warnings.simplefilter("ignore")  # of libraries
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return main()
    except KeyboardInterrupt:
        print("\nstopped: continue with the same command and --resume", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        line = str(error)
    except torch.OutOfMemoryError:  # of a GPU
        line = "out of memory: lower --synthesis-batch, --student-batch, --bank-size or --reuse"
    sys.exit(f"{Path(sys.argv[0]).name}: error: {line}")


if __name__ == "__main__":
    run_script(main)
