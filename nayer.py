# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.4",
#     "torchvision>=0.19",
#     "transformers>=4.45",
#     "safetensors>=0.4.5",
#     "scikit-learn>=1.4",
#     "matplotlib>=3.8",
#     "tqdm>=4.66",
# ]
# ///
"""NAYER: data-free knowledge distillation by noisy-layer generation, in one file.

A trained teacher T is given, its training images are not. A generator G learns to make images on
which T is sure of a chosen class and whose batch statistics match those stored in T's BatchNorm
layers; a student S learns from T on those images. Earlier methods feed G random noise. NAYER feeds
it the label-text embedding (LTE) of the class name, which is constant, and puts the randomness into
a noisy layer Z between the two, drawn anew for every batch:  x = G(Z(e_y)).

    python nayer.py                                      digits, on a laptop's CPU, nothing to download
    python nayer.py --dataset cifar10 --teacher wrn40_2 --student wrn16_2    the paper's job, one GPU
    python nayer.py --help

    paper   meaning                                      here
    T, S    teacher (frozen), student                    teacher, student
    G       generator                                    Generator
    Z       noisy layer                                  NoisyLayer, .reinitialize()
    e_y     label-text embedding of class y              label_embeddings (C, D)
    x^      synthetic images in [0, 1]                   images (B, ch, H, W)
    M       memory of synthetic images                   MemoryBank
    L_CE    cross-entropy of T's logits with y           --alpha-ce
    L_BN    distance to T's BatchNorm statistics         BatchNormLoss, --alpha-bn
    L_adv   where S agrees with T, drive them apart      adversarial_loss, --alpha-adv
    tau     distillation temperature                     distillation_loss, --temperature
    B images in a batch, C classes, D embedding size, H hidden size, N noisy matrices

Tags: [paper] in the paper, [code] only in the authors' published code, [ours] our own decision.
Paper: Tran et al., "NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free
Knowledge Distillation", CVPR 2024, arXiv 2310.00258.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import safetensors
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # its embeddings are shipped
NOISE_SIZE = 256  # numbers an image, for --label-input noise
SHIPPED = Path(__file__).resolve().parent / "teachers"  # trained teachers, label embeddings


class UserError(Exception):
    """Something the user can put right: shown as one line, exit code 1, no traceback."""


# ------------------------------------------------------------------------------------------------
# Flags and presets
# ------------------------------------------------------------------------------------------------

# What the images of a data set are like. A teacher file carries the same facts and has the last word.
CIFAR10_STATS = dict(mean=[0.4914, 0.4822, 0.4465], std=[0.2023, 0.1994, 0.2010])
CIFAR100_STATS = dict(mean=[0.5071, 0.4867, 0.4408], std=[0.2675, 0.2565, 0.2761])
IMAGES = {
    "digits": dict(image_size=16, channels=1, mean=[0.3052], std=[0.3185]),
    "cifar10": dict(image_size=32, channels=3, **CIFAR10_STATS),
    "cifar100": dict(image_size=32, channels=3, **CIFAR100_STATS),
    "tiny_imagenet": dict(image_size=64, channels=3, mean=[0.5] * 3, std=[0.5] * 3),
    "folder": dict(image_size=None, channels=3, mean=None, std=None),
}

# The published settings [code: the authors' scripts], and what differs for each data set.
PUBLISHED = dict(
    teacher="wrn40_2", student="wrn16_2", prompt="a photo of {class}",
    epochs=100, warmup_epochs=20, warmup_batches=10, batches=2,
    synthesis_batch=400, generator_steps=30, generator_width=64,
    alpha_ce=0.5, alpha_bn=10.0, alpha_adv=1.33,
    student_steps=400, student_batch=512, lr=0.2, crop_padding=4, flip=True,
)  # fmt: skip
PRESETS = {
    "digits": PUBLISHED | dict(  # [ours] small enough for a laptop
        teacher="wrn16_2", student="wrn16_1", prompt="a photo of the digit {class}",
        epochs=8, warmup_epochs=2, warmup_batches=4, batches=1,
        synthesis_batch=100, generator_steps=15, generator_width=32,
        alpha_ce=1.0, alpha_bn=3.0, alpha_adv=0.3,
        student_steps=40, student_batch=128, lr=0.2, crop_padding=1, flip=False,
    ),
    "cifar10": PUBLISHED,
    "cifar100": PUBLISHED | dict(generator_steps=40),
    "tiny_imagenet": PUBLISHED | dict(
        warmup_batches=20, batches=4, synthesis_batch=200, generator_steps=60,
        student_steps=1000, student_batch=256, lr=0.1,
    ),
    "folder": PUBLISHED,
}  # fmt: skip


def number(kind, low, high=math.inf):
    """An argparse type: a finite number of that kind in [low, high]."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and value < math.inf):
            upper = "" if high == math.inf else f" and at most {high}"
            kind_name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {kind_name} of at least {low}{upper}")
        return value

    return parse


def parse_args(argv=None):
    """The command line -> a Namespace. A wrong one ends with one line on stderr and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="nayer.py",
        description="Data-free knowledge distillation by noisy-layer generation (NAYER, CVPR 2024).",
        epilog="The defaults are those of --dataset; add it before --help to see another's.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"nayer.py: error: {message}\n")
    count, positive, weight = number(int, 1), number(float, 1e-9), number(float, 0)
    switch = argparse.BooleanOptionalAction

    add = parser.add_argument_group("run").add_argument
    add("--dataset", choices=PRESETS, default="digits", help="preset, and what the student is scored on")
    add("--data-root", type=Path, default=Path("data"), help="where data sets and computed embeddings are kept")
    add("--out", type=Path, help="output folder (default: runs/<dataset>-<teacher>-<student>)")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of every random number of the run")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: the first of these that is there")
    add("--resume", action="store_true", help="continue the run in --out after its last finished epoch")
    add("--eval", action=switch, default=True, help="score every epoch on real test images")

    add = parser.add_argument_group("networks and class names").add_argument
    add("--teacher", help="a shipped or trained network's name, or a model file")
    add("--student", help="wrn{depth}_{width}, resnet18, vgg11, or any other name torchvision knows")
    add("--class-names", type=Path, help="text file, one name a line, in the order of the teacher's outputs")
    add("--text-encoder", default=TEXT_ENCODER, help="hub name or local folder")
    add("--prompt", help="the text that is embedded for each class, with {class} in it")
    add("--image-size", type=number(int, 8, 224), help="pixels, a multiple of 4 (default: the teacher's)")

    add = parser.add_argument_group("loop").add_argument
    add("--epochs", type=count, help="E, the epochs in which the student learns, after the warm-up")
    add("--warmup-epochs", type=number(int, 0), help="epochs that only fill the memory bank")
    add("--warmup-batches", type=count, help="batches synthesised in each warm-up epoch")
    add("--batches", type=count, help="batches synthesised in each epoch after the warm-up")

    add = parser.add_argument_group("generator").add_argument
    add("--synthesis-batch", type=number(int, 2), help="B, images in a synthesised batch")
    add("--generator-steps", type=count, help="g, optimisation steps for each batch")
    add("--generator-lr", type=positive, default=4e-3, help="of Adam, begun afresh for each batch")
    add("--generator-life", type=count, default=10, help="epochs after which the generator is replaced")
    add("--generator-width", type=count, help="f, channels of its last hidden layer")
    add("--alpha-ce", type=weight, help="weight of L_CE")
    add("--alpha-bn", type=weight, help="weight of L_BN; 0 for a teacher without BatchNorm")
    add("--alpha-adv", type=weight, help="weight of L_adv, which is off in the warm-up")
    add("--bn-momentum", type=number(float, 0, 1), default=0.9, help="share of the moving average in L_BN; 0: none")
    add("--label-input", choices=["lte", "onehot", "noise"], default="lte", help="what the noisy layer reads")
    add("--noisy-layer", choices=["reinit", "fixed", "off"], default="reinit", help="drawn anew for each batch, never, or left out")

    add = parser.add_argument_group("student").add_argument
    add("--student-steps", type=count, help="distillation steps in an epoch")
    add("--student-batch", type=number(int, 2), help="images in a distillation step")
    add("--lr", type=positive, help="of SGD (momentum 0.9, weight decay 1e-4), cosine to 2e-4 over E")
    add("--temperature", type=positive, default=20.0, help="tau, softens both distributions")
    add("--bank-size", type=count, help="most images kept, the oldest go first (default: all)")
    add("--crop-padding", type=number(int, 0, 28), help="pixels of zeros around an image before its random crop")
    add("--flip", action=switch, help="mirror half of the images")

    add = parser.add_argument_group("speed").add_argument
    add("--amp", action=switch, default=None, help="bf16 autocast (default: where the device has it)")
    add("--compile", action=switch, default=False, help="torch.compile for teacher, student and generator")

    dataset = parser.parse_known_args(argv)[0].dataset
    parser.set_defaults(**PRESETS[dataset])
    args = parser.parse_args(argv)
    if "{class}" not in args.prompt:
        parser.error(f"--prompt {args.prompt!r} has no place for the class name: write {{class}} where it belongs")
    if args.image_size and args.image_size % 4:
        parser.error(f"--image-size {args.image_size} is not a multiple of 4")
    args.out = args.out or Path("runs") / f"{dataset}-{Path(args.teacher).stem}-{args.student}"
    return args


# ------------------------------------------------------------------------------------------------
# Label-text embeddings (LTE)                                                                 e_y
# ------------------------------------------------------------------------------------------------


@torch.no_grad()
def label_text_embeddings(class_names, encoder, prompt):
    """What a language model makes of the class names: (C, D) float32, rows in the order of the names.

    encoder: hub name or local folder of a Hugging Face text model. One with `get_text_features` gives
    that [paper: the text tower of CLIP ViT-B/32, not normalised]; any other the mean of its last
    hidden states over the tokens of the text [ours]. prompt: holds "{class}". Raises UserError if the
    encoder is not there. Weights come from safetensors alone, and no remote code runs.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
        model = AutoModel.from_pretrained(encoder, use_safetensors=True, trust_remote_code=False).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"no text encoder {encoder!r} here or on the hub ({str(error).splitlines()[0]}); without one, the shipped "
            f"embeddings serve: {', '.join(shipped_embeddings())} with the default --text-encoder and --prompt"
        ) from None
    names = [name.replace("_", " ").replace("-", " ") for name in class_names]  # [code]
    padding = "max_length" if model.config.model_type.startswith("siglip") else True
    tokens = tokenizer([prompt.replace("{class}", name) for name in names], padding=padding, truncation=True, return_tensors="pt")
    if hasattr(model, "get_text_features"):
        features = model.get_text_features(**tokens)
        return getattr(features, "pooler_output", features).float()  # transformers 5 wraps the tensor
    hidden = model(**tokens).last_hidden_state.float()  # (C, tokens, D)
    mask = tokens["attention_mask"][:, :, None]  # (C, tokens, 1)
    return (hidden * mask).sum(1) / mask.sum(1)


def shipped_embeddings():
    """Names of the data sets whose label embeddings come with the project."""
    with safetensors.safe_open(SHIPPED / "label_embeddings.safetensors", "pt") as file:
        return sorted(file.keys())


def cached_embeddings(class_names, encoder, prompt, cache):
    """label_text_embeddings, computed once: looked up in the shipped file, then in the file `cache`.

    An entry is served only if encoder, prompt and class names are the very same. A local encoder is
    known by the contents of its folder, so that other weights under the same path count as another.
    """
    if Path(encoder).is_dir():
        digest = hashlib.sha256()
        for part in sorted(p for p in Path(encoder).iterdir() if p.is_file()):
            digest.update(part.name.encode() + part.read_bytes())
        identity = f"sha256:{digest.hexdigest()}"
    else:
        identity = encoder
    wanted = dict(encoder=identity, prompt=prompt, class_names=list(class_names))
    entries, metadata = {}, {}
    for path in (SHIPPED / "label_embeddings.safetensors", cache):
        if path.exists():
            entries, metadata = read_safetensors(path)
            for key, description in metadata.items():
                if json.loads(description) == wanted:
                    return entries[key].float()
    embeddings = label_text_embeddings(class_names, encoder, prompt)
    key = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    if not cache.exists():
        entries, metadata = {}, {}
    entries[key], metadata[key] = embeddings, json.dumps(wanted)
    write_atomically(cache, lambda path: safetensors.torch.save_file(entries, path, metadata))
    return embeddings


# ------------------------------------------------------------------------------------------------
# Noisy layer and generator                                                        x = G(Z(e_y))
# ------------------------------------------------------------------------------------------------


class NoisyLayer(nn.Module):
    """Z: BatchNorm1d, then N random matrices, each for one set of distinct classes.

    inputs (B, D) -> hidden (B, H); B may be anything up to N * images_per_matrix. Row i goes through
    matrix i // images_per_matrix. One matrix serves one image of each class ("K-to-1", K = C) [paper]:
    within its set the classes differ by their LTE, and two images of one class differ by their matrix.
    """

    def __init__(self, embedding_size, num_matrices, images_per_matrix, hidden_size=1000):
        super().__init__()
        self.images_per_matrix = images_per_matrix
        self.norm = nn.BatchNorm1d(embedding_size)  # spreads LTEs that are close to each other [paper]
        self.weight = nn.Parameter(torch.empty(num_matrices, embedding_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_matrices, 1, hidden_size))
        self.reinitialize()

    def reinitialize(self):
        """Draw all matrices anew: N(0, 1), not divided by the fan-in, bias 0 [code]. Not the norm."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, inputs):
        B, D = inputs.shape
        missing = len(self.weight) * self.images_per_matrix - B  # the last set may be incomplete
        sets = F.pad(self.norm(inputs), (0, 0, 0, missing)).view(-1, self.images_per_matrix, D)
        return torch.baddbmm(self.bias, sets, self.weight).flatten(0, 1)[:B]  # (N, K, H) -> (B, H)


class Generator(nn.Module):
    """G: hidden (B, H) -> images (B, channels, image_size, image_size), float32 in [0, 1].

    A linear layer makes a small map, up-sampling and 3x3 convolutions enlarge it: twice for images of
    up to 64 pixels, four times for larger ones [code]. Always in train mode.
    """

    def __init__(self, hidden_size, channels, image_size, width=64):
        super().__init__()
        f = width
        widths = [2 * f, 2 * f, f] if image_size <= 64 else [2 * f, 2 * f, f, f, f]
        sizes = [math.ceil(image_size / 2**i) for i in reversed(range(len(widths)))]  # 8, 16, 32
        self.start = nn.Linear(hidden_size, widths[0] * sizes[0] ** 2)
        self.shape = (widths[0], sizes[0], sizes[0])
        layers = [nn.BatchNorm2d(widths[0])]
        for inputs, outputs, size in zip(widths, widths[1:], sizes[1:]):
            layers += [
                nn.Upsample(size=size, mode="nearest"),
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(f, channels, 3, padding=1))

    def forward(self, hidden):
        maps = self.start(hidden).view(-1, *self.shape)
        maps = maps.contiguous(memory_format=torch.channels_last)
        return self.layers(maps).float().sigmoid()


def generator_inputs(labels, label_embeddings):
    """What Z reads for labels (B,): their rows of label_embeddings (C, D); without these, noise."""
    if label_embeddings is None:
        return torch.randn(len(labels), NOISE_SIZE, device=labels.device)
    return label_embeddings[labels]


def class_sets(num_classes, batch, device="cpu"):
    """Labels (B,) in sets of distinct classes: all C in order, and a random subset as the last set."""
    whole, rest = divmod(batch, num_classes)
    in_order = torch.arange(num_classes, device=device).repeat(whole)
    return torch.cat([in_order, torch.randperm(num_classes, device=device)[:rest]])


# ------------------------------------------------------------------------------------------------
# Losses
# ------------------------------------------------------------------------------------------------


class BatchStatistics(torch.autograd.Function):
    """Mean and biased variance of x (B, ch, H, W) for each channel, float32 (ch,), also where x is bf16.

    [ours] The BatchNorm kernel reads x once, and the gradient is one multiply-add. Composed from
    var_mean, these statistics cost more time on a CPU than the teacher itself.
        dL/dx = (dL/dmean + 2 (x - mean) dL/dvar) / n        n = B H W
    """

    @staticmethod
    def forward(ctx, x):
        n = x.numel() // x.shape[1]
        mean, var = torch.zeros(2, x.shape[1], device=x.device)
        F.batch_norm(x, mean, var, training=True, momentum=1.0)  # writes the unbiased variance
        ctx.save_for_backward(x, mean)
        return mean, var * ((n - 1) / n)

    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]
        slope = 2 * grad_var / n
        offset = grad_mean / n - slope * mean
        offset, slope = (v.to(x.dtype).view(1, -1, 1, 1) for v in (offset, slope))
        return torch.addcmul(offset, x, slope)


class BatchNormLoss:
    """L_BN = sum over T's BatchNorm2d layers of |mu_T - mu|_2 + |var_T - var|_2   (biased variance).

    mu and var are those of the teacher's last forward pass, mixed with the average over earlier
    batches: mu = momentum * mu_average + (1 - momentum) * mu_batch [code]. The mix scales the gradient
    by 0.1; without it L_BN drowns the class term. Hooks read the inputs of the layers, and only where
    gradients are recorded, so they cost nothing while the student learns.

    `.value`: the loss (scalar, float32). `.update()`: once a batch, moves the average; the first call
    sets it. `.close()`: removes the hooks.
    """

    def __init__(self, teacher, momentum):
        self.layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
        self.momentum = momentum
        self.average = None  # [(mean, var)] of earlier batches, a pair for each layer
        self.batch = [None] * len(self.layers)  # the same, of the last forward pass
        self.hooks = [m.register_forward_pre_hook(self.reader(i)) for i, m in enumerate(self.layers)]

    def reader(self, index):
        def read(layer, inputs):
            if torch.is_grad_enabled():
                self.batch[index] = BatchStatistics.apply(inputs[0])

        return read

    @property
    def value(self):
        total = 0.0
        for i, (layer, (mean, var)) in enumerate(zip(self.layers, self.batch)):
            if self.average is not None:
                mean = torch.lerp(mean, self.average[i][0], self.momentum)
                var = torch.lerp(var, self.average[i][1], self.momentum)
            total = total + (layer.running_mean - mean).norm() + (layer.running_var - var).norm()
        return total

    @torch.no_grad()
    def update(self):
        batch = [(mean.detach(), var.detach()) for mean, var in self.batch]
        old = self.average or batch
        self.average = [tuple(torch.lerp(b, a, self.momentum) for b, a in zip(*pairs)) for pairs in zip(batch, old)]

    def close(self):
        for hook in self.hooks:
            hook.remove()

    def state_dict(self):
        return dict(average=self.average)

    def load_state_dict(self, state):
        self.average = state["average"]


def adversarial_loss(student_logits, teacher_logits):
    """L_adv = -mean over the batch of 1[argmax S = argmax T] * KL(T || S), logits (B, C) -> scalar.

    Minimised by images on which the student still names the teacher's class, but is less sure of it.
    """
    s, t = student_logits.float(), teacher_logits.float()
    divergence = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1)
    return -(divergence * (s.argmax(1) == t.argmax(1))).mean()


def distillation_loss(student_logits, teacher_logits, temperature):
    """L_KD = tau^2 * KL(softmax(T/tau) || softmax(S/tau)), mean over the batch: (B, C) -> scalar."""
    s, t = student_logits.float() / temperature, teacher_logits.float() / temperature
    return temperature**2 * F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True)


# ------------------------------------------------------------------------------------------------
# Memory bank and augmentation                                                                  M
# ------------------------------------------------------------------------------------------------


class MemoryBank:
    """M: the synthetic images, one uint8 tensor (capacity, ch, H, W) on the device.

    A ring: once it is full, new images replace the oldest. The authors keep PNG files [code].
    """

    def __init__(self, capacity, channels, image_size, device="cpu"):
        self.images = torch.empty(capacity, channels, image_size, image_size, dtype=torch.uint8, device=device)
        self.added = 0  # images ever added

    def __len__(self):
        return min(self.added, len(self.images))

    def add(self, images):
        """images (B, ch, H, W), uint8."""
        places = torch.arange(self.added, self.added + len(images), device=images.device) % len(self.images)
        self.images[places[-len(self.images) :]] = images[-len(self.images) :]
        self.added += len(images)

    def sample(self, count):
        """`count` images, uint8, drawn uniformly with replacement."""
        return self.images[torch.randint(len(self), (count,), device=self.images.device)]

    def state_dict(self):
        return dict(images=self.images[: len(self)].clone(), added=self.added)

    def load_state_dict(self, state):
        self.added = state["added"]
        self.images[: len(self)] = state["images"].to(self.images.device)


class Augment:
    """Random crop after zero padding (in pixel space), random mirroring, normalisation, all in one batch.

    images (B, ch, H, W), float in [0, 1] -> the same shape, normalised. Gradients pass through.
    """

    def __init__(self, mean, std, padding, flip, device="cpu"):
        self.mean, self.std = (torch.tensor(v, device=device).view(1, -1, 1, 1) for v in (mean, std))
        self.padding, self.flip = padding, flip

    def normalize(self, images):
        images = (images - self.mean) / self.std
        return images.contiguous(memory_format=torch.channels_last)

    def __call__(self, images):
        B, ch, H, W = images.shape
        shift = torch.randint(2 * self.padding + 1, (2, B, 1), device=images.device)
        rows = shift[0] + torch.arange(H, device=images.device)  # (B, H)
        columns = shift[1] + torch.arange(W, device=images.device)  # (B, W)
        if self.flip:
            mirrored = torch.rand(B, 1, device=images.device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        images = F.pad(images, [self.padding] * 4)
        images = images.gather(2, rows[:, None, :, None].expand(-1, ch, -1, images.shape[3]))
        images = images.gather(3, columns[:, None, None, :].expand(-1, ch, H, -1))
        return self.normalize(images)


# ------------------------------------------------------------------------------------------------
# Half-step 1.  Over G and Z, minimise  alpha_ce L_CE + alpha_bn L_BN + alpha_adv L_adv
# ------------------------------------------------------------------------------------------------


def synthesize(
    generator, noisy_layer, inputs, labels, teacher, student, bn_loss, augment, autocast,
    *, steps, lr, alpha_ce, alpha_bn, alpha_adv, tick=lambda: None,
):  # fmt: skip
    """One batch of images for `labels` (B,), from `inputs` (B, D), by `steps` steps of a new Adam.

    Returns the images of the step with the lowest total loss, un-augmented, uint8 (B, ch, H, W), and
    the losses of all steps (steps, 4): L_CE, L_BN, L_adv, their weighted sum. A term whose weight is 0
    is not computed and counts as 0. Nothing leaves the device inside the loop.
    """
    teacher.eval()
    student.eval().requires_grad_(False)  # in train mode it would learn the statistics of these images
    parameters = [*generator.parameters(), *noisy_layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.5, 0.999), fused=True)
    best_images, best_loss = None, torch.full((), torch.inf, device=labels.device)
    history = []
    for _ in range(steps):
        hidden = noisy_layer(inputs)
        with autocast:
            images = generator(hidden)  # (B, ch, H, W) in [0, 1]
        views = augment(images)  # afresh at each step, the same for teacher and student
        zero = torch.zeros((), device=labels.device)
        with autocast:
            teacher_logits = teacher(views)
            student_logits = student(views) if alpha_adv else None
        loss_ce = F.cross_entropy(teacher_logits.float(), labels)
        loss_bn = bn_loss.value if alpha_bn else zero
        loss_adv = adversarial_loss(student_logits, teacher_logits) if alpha_adv else zero
        loss = alpha_ce * loss_ce + alpha_bn * loss_bn + alpha_adv * loss_adv

        kept = images.detach()
        best_images = kept if best_images is None else torch.where(loss < best_loss, kept, best_images)
        best_loss = torch.minimum(loss.detach(), best_loss)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        history.append(torch.stack([loss_ce, loss_bn, loss_adv, loss]).detach())
        tick()
    return (best_images * 255).round().byte(), torch.stack(history)


# ------------------------------------------------------------------------------------------------
# Half-step 2.  Over S, minimise  L_KD  on images from M
# ------------------------------------------------------------------------------------------------


def distill(teacher, student, memory, optimizer, augment, autocast, *, steps, batch, temperature, tick=lambda: None):
    """One epoch of student steps. Returns the mean L_KD (a scalar tensor on the device)."""
    teacher.eval()
    student.train().requires_grad_(True)
    total = torch.zeros((), device=memory.images.device)
    for _ in range(steps):
        views = augment(memory.sample(batch).float() / 255)
        with autocast:
            with torch.no_grad():
                teacher_logits = teacher(views)
            student_logits = student(views)
        loss = distillation_loss(student_logits, teacher_logits, temperature)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.detach()
        tick()
    return total / steps


# ------------------------------------------------------------------------------------------------
# Networks and model files
# ------------------------------------------------------------------------------------------------


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, and a shortcut."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        h = F.relu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(h)
        return x + self.conv2(F.relu(self.norm2(self.conv1(h))))


class WideResNet(nn.Module):
    """wrn{depth}_{width} of Zagoruyko and Komodakis (2016): images (B, ch, H, W) -> logits (B, C)."""

    def __init__(self, depth, width, num_classes, channels=3):
        super().__init__()
        blocks, inputs = [], 16
        for group in range(3):  # at full, half and quarter resolution
            for i in range((depth - 4) // 6):
                outputs = 16 * width * 2**group
                blocks.append(WideBlock(inputs, outputs, stride=2 if group and i == 0 else 1))
                inputs = outputs
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        return self.classifier(features.mean((2, 3)))


def build_model(name, num_classes, channels=3, image_size=32):
    """A network with random weights: `wrn{depth}_{width}`, or any name that torchvision.models knows.

    Up to 64 pixels, ResNets get a 3x3 stem without max-pool, VGGs BatchNorm and one linear layer [code].
    Raises UserError for a name that is neither.
    """
    if match := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        depth, width = map(int, match.groups())
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise UserError(f"no Wide ResNet {name!r}: the depth is 10, 16, 22, ... (6n+4), the width at least 1")
        return WideResNet(depth, width, num_classes, channels)

    import torchvision.models as zoo  # here, since importing it takes a second that Wide ResNets can save

    small = image_size <= 64
    if small and re.fullmatch(r"vgg\d\d", name):
        name += "_bn"
    if name not in zoo.list_models(module=zoo):
        raise UserError(f"unknown network {name!r}: use wrn16_2, resnet18, vgg11 or another name of torchvision.models")
    model = zoo.get_model(name, weights=None, num_classes=num_classes)
    if small and isinstance(model, zoo.ResNet):
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small and isinstance(model, zoo.VGG):
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)
    if channels != 3:  # the first convolution reads the image
        path, old = next((p, m) for p, m in model.named_modules() if isinstance(m, nn.Conv2d))
        new = nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    return model


def write_atomically(path, write):
    """Call write(temporary path), then move that file to `path`, which is so never seen half-written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # a full disk has many names
        raise UserError(f"cannot write {path} ({str(error).splitlines()[0]})") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_safetensors(path):
    """(tensors by name, metadata). Raises UserError for anything but a whole safetensors file."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a whole safetensors file ({str(error).splitlines()[0]})") from None


def fingerprint(info, state):
    """sha256 over the description and the weights of a model file."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_model(path, model, info, half=False):
    """Write a self-describing safetensors file: the weights (half: in fp16) and `info` as metadata.

    info holds architecture, class_names, channels, image_size, mean, std, and what else is worth
    knowing (accuracy, trained_on, command): whatever json can write.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if half:
        state = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    metadata = {k: json.dumps(v) for k, v in info.items()}
    metadata |= {"format": "nayer-1", "sha256": fingerprint(info, state)}
    write_atomically(path, lambda temporary: safetensors.torch.save_file(state, temporary, metadata))


def load_model(path):
    """The network in a model file, float32, on the CPU, in eval mode; `.info` is its description.

    Raises UserError for a file that is missing, foreign or damaged. No code in the file is ever run.
    """
    if not Path(path).is_file():
        raise UserError(f"no model file {path}")
    state, metadata = read_safetensors(path)
    if metadata.pop("format", None) != "nayer-1":
        raise UserError(f"{path} is not one of our model files: nayer.save_model and teachers/train.py write them")
    checksum = metadata.pop("sha256", None)
    try:
        info = {name: json.loads(value) for name, value in metadata.items()}
        if fingerprint(info, state) != checksum:
            raise UserError(f"{path} is damaged: its contents do not match its checksum")
        model = build_model(info["architecture"], len(info["class_names"]), info["channels"], info["image_size"])
        model.load_state_dict(state)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: the weights do not fit the description ({reason})") from None
    model.info = info
    return model.eval()


def load_teacher(name, dataset):
    """A teacher by its name (teachers/<dataset>_<name>.safetensors) or by the path of its model file."""
    path = Path(name)
    if path.suffix != ".safetensors":
        path = SHIPPED / f"{dataset}_{name}.safetensors"
        if not path.exists():
            build_model(name, 10)  # an unknown network is worth its own message
            raise UserError(
                f"no trained {name} for {dataset} (looked for {path}); "
                f"make it with: python teachers/train.py --dataset {dataset} --model {name}"
            )
    return load_model(path)


# ------------------------------------------------------------------------------------------------
# Scoring on real test images (training never sees one)
# ------------------------------------------------------------------------------------------------


def digits(part):
    """scikit-learn's real handwritten digits, uint8 (N, 1, 16, 16), and labels; part 1: the 500 test images."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()  # 1,797 images of 8x8 pixels, values 0-16
    parts = train_test_split(data.images, data.target, test_size=500, stratify=data.target, random_state=0)
    images, labels = (torch.as_tensor(v) for v in parts[part::2])
    images = F.interpolate(images[:, None].float() * (255 / 16), size=16, mode="bilinear")
    return images.round().byte(), labels.long()


def image_folder(folder, channels, image_size):
    """A torchvision ImageFolder of uint8 images (channels, image_size, image_size), resized and cropped."""
    from PIL import Image
    from torchvision import datasets
    from torchvision.transforms import v2

    def read(path):
        try:
            with Image.open(path) as image:
                return image.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError) as error:
            raise UserError(f"unreadable image {path} ({error})") from None

    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}: it should hold a folder of images for each class (--no-eval: no scoring)")
    resize = v2.Compose([v2.Resize(image_size), v2.CenterCrop(image_size), v2.PILToTensor()])
    try:
        return datasets.ImageFolder(folder, transform=resize, loader=read)
    except FileNotFoundError as error:
        raise UserError(str(error).splitlines()[0]) from None


def decode(dataset):
    """All images of a small ImageFolder at once: uint8 (N, ch, H, W), and the labels (N,)."""
    return torch.stack([image for image, _ in dataset]), torch.tensor(dataset.targets)


def test_batches(dataset, root, info, device):
    """The test images as batches (uint8 images, labels): in memory on the device, or streamed if large."""
    if dataset == "digits":
        images, labels = digits(1)
    elif dataset in ("cifar10", "cifar100"):
        from torchvision import datasets

        kind = datasets.CIFAR10 if dataset == "cifar10" else datasets.CIFAR100
        try:
            test = kind(root, train=False, download=True)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"no {dataset} in {root} and no download ({error}): unpack its python archive there as "
                f"{root / kind.base_folder}, or distil without scoring: --no-eval"
            ) from None
        images, labels = torch.from_numpy(test.data).permute(0, 3, 1, 2), torch.tensor(test.targets)
    else:
        test = image_folder(root / "test", info["channels"], info["image_size"])
        if unknown := set(test.classes) - set(info["class_names"]):
            raise UserError(f"{root / 'test'} has classes that the teacher does not know: {sorted(unknown)[:3]}")
        order = [info["class_names"].index(name) for name in test.classes]
        test.targets = [order[t] for t in test.targets]
        test.samples = [(path, order[t]) for path, t in test.samples]
        if info["image_size"] > 64:
            return torch.utils.data.DataLoader(test, batch_size=100, num_workers=2)
        images, labels = decode(test)
    return list(zip(images.to(device).split(500), labels.to(device).split(500)))


@torch.no_grad()
def accuracy(model, batches, augment, autocast):
    """Fraction in [0, 1] of the test images that the model (put into eval mode) gets right."""
    model.eval()
    correct, seen = 0, 0
    for images, labels in batches:
        with autocast:
            logits = model(augment.normalize(images.to(augment.mean.device).float() / 255))
        correct += (logits.argmax(1) == labels.to(logits.device)).sum()
        seen += len(labels)
    return float(correct) / seen


# ------------------------------------------------------------------------------------------------
# Pictures, the log, the checkpoint
# ------------------------------------------------------------------------------------------------


def draw_samples(path, images, labels, class_names, rows=8, columns=20):
    """A grid with one column for each class (at most 20, evenly chosen), its name on top."""
    from PIL import Image, ImageDraw

    classes = torch.linspace(0, len(class_names) - 1, min(columns, len(class_names))).long().tolist()
    side = images.shape[-1]
    scale = max(1, 64 // side)
    cell = side * scale + 2
    grid = Image.new("RGB", (cell * len(classes), 14 + cell * rows), "white")
    draw = ImageDraw.Draw(grid)
    for column, label in enumerate(classes):
        draw.text((column * cell + 1, 1), class_names[label][: cell // 6], fill="black")
        for row, pixels in enumerate(images[labels == label][:rows].cpu()):
            picture = Image.fromarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())
            picture = picture.resize((cell - 2, cell - 2), Image.Resampling.NEAREST)
            grid.paste(picture, (column * cell, 14 + row * cell))
    path.parent.mkdir(parents=True, exist_ok=True)
    grid.save(path)


def draw_curve(path, log, teacher_accuracy):
    """Accuracy (with the teacher's as a line) and losses against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    learned = [row for row in log if row["accuracy"] is not None]
    if learned:
        left.plot([row["seconds"] for row in learned], [100 * row["accuracy"] for row in learned], "o-", label="student")
    if teacher_accuracy is not None:
        left.axhline(100 * teacher_accuracy, color="gray", linestyle="--", label="teacher")
    left.set(xlabel="seconds", ylabel="test accuracy in %", title="Student against teacher")
    for name, title in dict(loss_ce="$L_{CE}$", loss_bn="$L_{BN}$", loss_adv="$-L_{adv}$", loss_kd="$L_{KD}$").items():
        points = [(row["seconds"], abs(row[name])) for row in log if row[name]]
        right.plot(*zip(*points), ".-", label=title) if points else None
    right.set(xlabel="seconds", yscale="log", title="Losses, unweighted, at the last step of a batch")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def write_csv(path, rows):
    def write(temporary):
        with open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write_atomically(path, write)


def peak_memory_mb(device):
    """Most memory used so far, in MB: device memory on CUDA, resident set elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def save_checkpoint(path, settings, epoch, parts):
    """Everything a run needs to go on after `epoch` epochs as if it had never stopped."""
    rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])
    states = {name: part.state_dict() for name, part in parts.items()}
    state = dict(format=1, settings=settings, epoch=epoch, states=states, rng=rng)
    write_atomically(path, lambda temporary: torch.save(state, temporary))


def load_checkpoint(path, settings, parts, device):
    """Put the saved states into `parts`, if the settings are the same. Returns the finished epochs."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        old, epoch, states, rng = (saved[k] for k in ("settings", "epoch", "states", "rng"))
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, EOFError, pickle.PickleError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path} is not a whole checkpoint of this program ({reason})") from None
    if saved["format"] != 1:
        raise UserError(f"{path} has format {saved['format']}, this program reads format 1")
    differing = sorted(k for k in old | settings if old.get(k) != settings.get(k))
    if differing:
        changes = ", ".join(f"{k} {old.get(k)} -> {settings.get(k)}" for k in differing)
        raise UserError(f"{path} was made with other settings ({changes}): use the same, or another --out")
    for name, part in parts.items():
        part.load_state_dict(states[name])
    torch.set_rng_state(rng[0].cpu())
    if len(rng) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(rng[1].cpu())
    return epoch


def check_finite(epoch, batch, **losses):
    """Stop the run at the first loss that is not a finite number."""
    for name, value in losses.items():
        if not math.isfinite(value):
            where = f"epoch {epoch}" + (f", batch {batch}" if batch is not None else "")
            raise UserError(f"{name} is {value} in {where}: lower the learning rate or try --no-amp")


class Journal:
    """What a run tells: seconds by kind of work, a row for each epoch, log.csv, generator.csv."""

    def __init__(self, out, warmup_epochs, total_epochs):
        self.out, self.warmup_epochs, self.total_epochs = out, warmup_epochs, total_epochs
        self.start = time.perf_counter()
        self.spent = dict(synthesis=0.0, distillation=0.0, evaluation=0.0)  # seconds in this epoch
        self.rows, self.steps = [], []  # of log.csv, of generator.csv

    @contextlib.contextmanager
    def timed(self, kind):
        start = time.perf_counter()
        yield
        self.spent[kind] += time.perf_counter() - start

    def add_batch(self, epoch, batch, losses):
        """losses (steps, 4) of one synthesised batch."""
        for step, (ce, bn, adv, total) in enumerate(losses.tolist()):
            check_finite(epoch, batch, loss_ce=ce, loss_bn=bn, loss_adv=adv)
            row = dict(epoch=epoch, batch=batch, step=step)
            self.steps.append(row | dict(loss_ce=ce, loss_bn=bn, loss_adv=adv, loss=total))

    def add_epoch(self, epoch, images, loss_kd, accuracy, device, generator_images, student_images):
        """Complete the epoch's row and print it. Its losses: mean over the last steps of its batches."""
        last = {s["batch"]: s for s in self.steps if s["epoch"] == epoch}.values()
        row = dict(epoch=epoch, images=images)
        row |= {k: sum(s[k] for s in last) / len(last) for k in ("loss_ce", "loss_bn", "loss_adv")}
        best = max([accuracy, *(r["accuracy"] or 0.0 for r in self.rows)]) if accuracy is not None else None
        row |= dict(loss_kd=loss_kd, accuracy=accuracy, best=best, seconds=time.perf_counter() - self.start)
        row |= {f"seconds_{kind}": seconds for kind, seconds in self.spent.items()}
        row["generator_images_per_second"] = generator_images / self.spent["synthesis"]
        row["student_images_per_second"] = student_images / self.spent["distillation"] if student_images else None
        row["peak_memory_mb"] = peak_memory_mb(device)
        self.spent = dict.fromkeys(self.spent, 0.0)
        self.rows.append(row)
        self.print_row(row)

    def print_row(self, row):
        ends = [0.0] + [r["seconds"] for r in self.rows]
        lengths = [end - start for start, end in zip(ends, ends[1:])]
        learning = lengths[self.warmup_epochs :]  # the epochs after the warm-up take longer
        left = (self.total_epochs - max(len(lengths), self.warmup_epochs)) * sum(learning) / max(1, len(learning))
        left = f"{left:.0f}" if learning else "-"
        show = lambda value, form: "-" if value is None else format(value, form)  # noqa: E731
        cells = [row["epoch"], row["images"]]
        cells += [show(row[k], ".4f") for k in ("loss_ce", "loss_bn", "loss_adv", "loss_kd")]
        cells += [show(row[k], ".2%") for k in ("accuracy", "best")] + [f"{row['seconds']:.1f}", left]
        print(LINE.format(*cells), flush=True)

    def write(self):
        write_csv(self.out / "log.csv", self.rows)
        write_csv(self.out / "generator.csv", self.steps)

    def state_dict(self):
        return dict(rows=self.rows, steps=self.steps)

    def load_state_dict(self, state):
        self.rows, self.steps = state["rows"], state["steps"]
        self.start -= self.rows[-1]["seconds"]


LINE = "{:>5} {:>7} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7}"
HEADER = LINE.format("epoch", "images", "CE", "BN", "adv", "KD", "accuracy", "best", "seconds", "left")


# ------------------------------------------------------------------------------------------------
# The algorithm
# ------------------------------------------------------------------------------------------------


def pick_device(name):
    """auto: cuda, else mps, else cpu. Raises UserError for a device that is not there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(n for n in there if there[n]) if name == "auto" else name
    if not there[name]:
        raise UserError(f"no {name} device on this machine: leave --device out, or use --device cpu")
    return torch.device(name)


def has_bf16(device):
    """Whether bf16 is fast here: CUDA from Ampere on, CPUs with AVX-512 BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def prepare(args):
    """Everything that the loop works on: T, S, the LTE, M, the losses, the test images."""
    device = pick_device(args.device)
    amp = has_bf16(device) if args.amp is None else args.amp
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # TF32, where bf16 is not used

    teacher = load_teacher(args.teacher, args.dataset)
    info = dict(teacher.info)
    if args.image_size not in (None, info["image_size"]):
        size = info["image_size"]
        raise UserError(f"--image-size {args.image_size}, but the teacher reads {size} pixels")
    if args.class_names:
        info["class_names"] = read_class_names(args.class_names, len(info["class_names"]))
    names, channels, image_size = info["class_names"], info["channels"], info["image_size"]
    if args.label_input == "lte":
        cache = args.data_root / "label_embeddings.safetensors"
        embeddings = cached_embeddings(names, args.text_encoder, args.prompt, cache)
    else:
        embeddings = torch.eye(len(names)) if args.label_input == "onehot" else None

    student = build_model(args.student, len(names), channels, image_size)
    for model in (teacher, student):
        model.to(device, memory_format=torch.channels_last)
        if args.compile:
            model.compile()
    teacher.requires_grad_(False)  # frozen: no weight gradients are computed, only to be thrown away
    augment = Augment(info["mean"], info["std"], args.crop_padding, args.flip, device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=amp)
    batches = args.warmup_epochs * args.warmup_batches + args.epochs * args.batches
    capacity = min(args.bank_size or math.inf, batches * args.synthesis_batch)
    bn_loss = BatchNormLoss(teacher, args.bn_momentum)
    if args.alpha_bn and not bn_loss.layers:
        raise UserError("the teacher has no BatchNorm2d layer, which L_BN needs: add --alpha-bn 0")
    test = test_batches(args.dataset, args.data_root, info, device) if args.eval else None
    teacher_accuracy = accuracy(teacher, test, augment, autocast) if test else info.get("accuracy")

    free = ("out", "data_root", "device", "resume", "eval", "compile")  # may change on --resume
    settings = {k: str(v) for k, v in vars(args).items() if k not in free} | dict(amp=amp)
    settings["teacher"] = fingerprint(info, teacher.state_dict())[:16]
    settings["label_embeddings"] = None if embeddings is None else fingerprint({}, dict(e=embeddings))[:16]
    return SimpleNamespace(
        device=device, amp=amp, autocast=autocast, augment=augment, info=info, settings=settings,
        teacher=teacher, student=student, num_classes=len(names), test=test, teacher_accuracy=teacher_accuracy,
        label_embeddings=None if embeddings is None else embeddings.to(device),
        memory=MemoryBank(capacity, channels, image_size, device), bn_loss=bn_loss,
        optimizer=torch.optim.SGD(student.parameters(), args.lr, momentum=0.9, weight_decay=1e-4, fused=True),
    )  # fmt: skip


def read_class_names(path, num_classes):
    """One name a line -> a list. Raises UserError unless there is one for each output of the teacher."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read --class-names {path} ({error})") from None
    if len(names) != num_classes:
        raise UserError(f"{path} has {len(names)} class names, the teacher has {num_classes} outputs")
    return names


def new_generator(args, run):
    """A brand-new pair Z, G."""
    embedding_size = NOISE_SIZE if run.label_embeddings is None else run.label_embeddings.shape[1]
    if args.noisy_layer == "off":
        noisy_layer, hidden_size = nn.BatchNorm1d(embedding_size), embedding_size
    else:
        per_matrix = min(run.num_classes, args.synthesis_batch)
        num_matrices = math.ceil(args.synthesis_batch / per_matrix)
        noisy_layer, hidden_size = NoisyLayer(embedding_size, num_matrices, per_matrix), 1000
    info = run.info
    generator = Generator(hidden_size, info["channels"], info["image_size"], args.generator_width)
    if args.compile:
        generator.compile()
    return noisy_layer.to(run.device), generator.to(run.device, memory_format=torch.channels_last)


def cosine(epoch, epochs, high, low=2e-4):
    """Learning rate in epoch 0 .. epochs-1: `high` at first, on its way to `low`."""
    return low + (high - low) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def main(argv=None):
    """Distil a teacher into a student. Returns the summary, a dict, as it stands in summary.json."""
    args = parse_args(argv)
    journal = Journal(args.out, args.warmup_epochs, args.warmup_epochs + args.epochs)
    torch.manual_seed(args.seed)
    run = prepare(args)
    teacher, student, memory, bn_loss = run.teacher, run.student, run.memory, run.bn_loss
    noisy_layer, generator = new_generator(args, run)
    parts = dict(student=student, optimizer=run.optimizer, memory=memory, bn_loss=bn_loss, journal=journal)
    parts |= dict(noisy_layer=noisy_layer, generator=generator)
    print_header(args, run)
    first_epoch = open_output(args, run, parts)

    for epoch in range(first_epoch, args.warmup_epochs + args.epochs):
        warm_up = epoch < args.warmup_epochs
        num_batches = args.warmup_batches if warm_up else args.batches
        student_steps = 0 if warm_up else args.student_steps
        steps = num_batches * args.generator_steps + student_steps
        bar = tqdm(total=steps, desc=f"epoch {epoch}", leave=False, disable=None)
        loss_kd = score = None

        if epoch % args.generator_life == 0:
            noisy_layer, generator = new_generator(args, run)
            parts |= dict(noisy_layer=noisy_layer, generator=generator)
        with journal.timed("synthesis"):
            for batch in range(num_batches):
                if args.noisy_layer == "reinit":
                    noisy_layer.reinitialize()
                labels = class_sets(run.num_classes, args.synthesis_batch, run.device)
                images, losses = synthesize(
                    generator, noisy_layer, generator_inputs(labels, run.label_embeddings), labels,
                    teacher, student, bn_loss, run.augment, run.autocast,
                    steps=args.generator_steps, lr=args.generator_lr, alpha_ce=args.alpha_ce,
                    alpha_bn=args.alpha_bn, alpha_adv=0.0 if warm_up else args.alpha_adv, tick=bar.update,
                )  # fmt: skip
                bn_loss.update()
                memory.add(images)
                journal.add_batch(epoch, batch, losses)

        if not warm_up:
            rate = cosine(epoch - args.warmup_epochs, args.epochs, args.lr)
            run.optimizer.param_groups[0]["lr"] = rate
            with journal.timed("distillation"):
                loss_kd = distill(
                    teacher, student, memory, run.optimizer, run.augment, run.autocast,
                    steps=student_steps, batch=args.student_batch, temperature=args.temperature, tick=bar.update,
                ).item()  # fmt: skip
                check_finite(epoch, None, loss_kd=loss_kd)
            if run.test:
                with journal.timed("evaluation"):
                    score = accuracy(student, run.test, run.augment, run.autocast)

        bar.close()
        generated = num_batches * args.generator_steps * args.synthesis_batch
        journal.add_epoch(epoch, len(memory), loss_kd, score, run.device, generated, student_steps * args.student_batch)
        draw_samples(args.out / f"samples/epoch_{epoch:03d}.png", images, labels, run.info["class_names"])
        save_model(args.out / "student.safetensors", student, student_info(args, run, score))
        save_checkpoint(args.out / "checkpoint.pt", run.settings, epoch + 1, parts)
        journal.write()
    return finish(args, run, journal)


def open_output(args, run, parts):
    """Make the output folder, or go back to its checkpoint. Returns the epoch to begin with."""
    checkpoint = args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    for leftover in args.out.glob("*.tmp"):  # of a run that was killed while writing
        leftover.unlink()
    if not checkpoint.exists():
        return 0
    if not args.resume:
        raise UserError(f"{args.out} holds a run already: --resume continues it, another --out keeps it")
    return load_checkpoint(checkpoint, run.settings, parts, run.device)


def print_header(args, run):
    """What is distilled into what, where, with which versions."""
    known = run.teacher_accuracy
    known = "not known" if known is None else f"{known:.2%}" + ("" if run.test else " (by its file)")
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    print(f"data set  {args.dataset}, {run.num_classes} classes, {run.info['image_size']} pixels")
    print(f"networks  {args.teacher} -> {args.student}, teacher accuracy {known}")
    print(f"machine   {run.device}, {'bf16' if run.amp else 'fp32'}, {versions}, seed {args.seed}\n")
    print(HEADER, flush=True)


def library_versions():
    return {"python": platform.python_version()} | {n: version(n) for n in ("torch", "torchvision", "safetensors")}


def student_info(args, run, score):
    """The description that goes into the student's file: it can be a teacher in its turn."""
    return run.info | dict(
        architecture=args.student,
        accuracy=score,
        trained_on=f"images that nayer.py synthesised from {args.teacher}",
        command="python nayer.py " + shlex.join(sys.argv[1:]),
    )


def finish(args, run, journal):
    """summary.json, curve.png, the last lines on the console."""
    rows, totals = journal.rows, {}
    for kind in ("synthesis", "distillation", "evaluation"):
        totals[f"seconds_{kind}"] = sum(row[f"seconds_{kind}"] for row in rows)
    batches = args.warmup_epochs * args.warmup_batches + args.epochs * args.batches
    generator_steps, student_steps = batches * args.generator_steps, args.epochs * args.student_steps
    summary = dict(
        dataset=args.dataset,
        teacher=args.teacher,
        student=args.student,
        device=str(run.device),
        seed=args.seed,
        teacher_accuracy=run.teacher_accuracy,
        student_accuracy=rows[-1]["accuracy"],
        best_accuracy=rows[-1]["best"],
        epochs=len(rows),
        images_synthesized=batches * args.synthesis_batch,
        generator_steps=generator_steps,
        student_steps=student_steps,
        seconds_total=rows[-1]["seconds"],
        **totals,
        seconds_per_generator_step=totals["seconds_synthesis"] / generator_steps,
        seconds_per_student_step=totals["seconds_distillation"] / student_steps,
        generator_images_per_second=generator_steps * args.synthesis_batch / totals["seconds_synthesis"],
        student_images_per_second=student_steps * args.student_batch / totals["seconds_distillation"],
        peak_memory_mb=max(row["peak_memory_mb"] for row in rows),
        amp=run.amp,
        versions=library_versions(),
    )
    write_text = lambda path: path.write_text(json.dumps(summary, indent=2) + "\n")  # noqa: E731
    write_atomically(args.out / "summary.json", write_text)
    draw_curve(args.out / "curve.png", rows, run.teacher_accuracy)
    show = lambda value: "not scored" if value is None else f"{value:.2%}"  # noqa: E731
    print(f"\nstudent   last {show(summary['student_accuracy'])}, best {show(summary['best_accuracy'])}", end="")
    print(f", teacher {show(run.teacher_accuracy)}")
    split = ", ".join(f"{kind.partition('_')[2]} {seconds:.1f}" for kind, seconds in totals.items())
    print(f"seconds   {summary['seconds_total']:.1f} in all: {split}")
    print(f"files     {args.out}/: student.safetensors, log.csv, summary.json, curve.png, samples/")
    return summary


def run_script(main):
    """Run main() as a program: one line and an exit code where it would have been a traceback."""

    def terminate(signum, frame):
        raise KeyboardInterrupt("SIGTERM")

    signal.signal(signal.SIGTERM, terminate)
    command = f"python {shlex.join(arg for arg in sys.argv if arg != '--resume')} --resume"
    try:
        main()
    except UserError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except OSError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt as stop:
        print(f"\nstopped; the last finished epoch is kept, go on with: {command}", file=sys.stderr)
        sys.exit(143 if stop.args else 130)


if __name__ == "__main__":
    run_script(main)
