# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6", "torchvision>=0.21", "transformers>=4.48", "safetensors>=0.4.5",
#     "scikit-learn>=1.4", "matplotlib>=3.8", "tqdm>=4.66", "filelock>=3.15",
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
    x^      synthetic images in [0, 1]               images (B, ch, H, W)
    M       memory of synthetic images               MemoryBank
    L_CE    cross-entropy of T's logits with y       --alpha-ce
    L_BN    distance to T's BatchNorm statistics     BatchNormLoss, --alpha-bn
    L_adv   where S agrees with T, drive them apart  adversarial_loss, --alpha-adv
    L_KD    distance of S's answers from T's         distillation_loss, --temperature (tau)
    B images in a batch, C classes, D embedding size, H hidden size, N noisy matrices, K images of a
    matrix, E epochs with distillation, R uses of an answer of T

Tags: [paper] stated in the paper, [code] only in the authors' code, [ours] our own decision.

How to read this file: the loop is `main`, halfway down, with its pseudo-code above it. Before it
stand the presets; the parts of the method in the order of the paper, each under a banner; the two
half-steps of an epoch, `synthesize` (over G and Z) and `distill` (over S); and what the loop works
on, `Run`. A banner after `main` says where the method ends. What follows there surrounds it: flags,
networks, files, pictures, errors.

Where it departs from the authors' code:

 1. S stays in eval mode while G learns; theirs is in train mode from an epoch's second batch on.
 2. The result is the accuracy of the last epoch. The best, chosen on test images, stands beside.
 3. Convolutions compute in bf16 where that is fast (--no-amp: float32, on a GPU TF32).
 4. M is one tensor of rounded bytes on the device; theirs is a folder of truncated PNG files.
 5. The default text encoder is all-MiniLM-L6-v2; theirs is CLIP.
 6. L_BN's statistics have a gradient written by hand, and up-sampling and convolution are one
    operation: the same sums in less time.
 7. The random numbers of an epoch follow from the seed and the epoch, so that a resumed run
    repeats them.
 8. Off in the published presets: each answer of T used several times (--reuse), blended views
    (--mix), Nesterov's momentum.

Paper: Tran et al., NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free
Knowledge Distillation, CVPR 2024, arXiv 2310.00258.
"""

import argparse
import contextlib
import csv
import hashlib
import inspect
import json
import math
import os
import random
import re
import runpy
import shlex
import sys
import time
import traceback
import unicodedata
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest import mock

import filelock
import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm.auto import tqdm  # in a notebook: its kind of bar

# What only some runs need is imported where it is used, since importing it takes seconds:
# torchvision, matplotlib, scikit-learn, transformers.

SHIPPED = Path(__file__).resolve().parent / "teachers"  # trained teachers, label embeddings
TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # made the shipped embeddings
HIDDEN_SIZE = 1000  # H, what Z gives to G [code]
NOISE_SIZE = 256  # numbers per image, for --label-input noise
SCORED = 200  # images in a batch for scoring
SMALL = 64  # pixels; for larger images G is deeper [code], and test images stay on disk

# How a data set's images look, and were normalised for its teachers: flags, as you type them.
IMAGES = dict(
    digits="--image-size 12 --mean 0.3052 --std 0.3222",
    cifar10="--image-size 32 --mean 0.4914 0.4822 0.4465 --std 0.2023 0.1994 0.2010",
    cifar100="--image-size 32 --mean 0.5071 0.4867 0.4408 --std 0.2675 0.2565 0.2761",
    tiny_imagenet="--image-size 64 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5",
    folder="",  # its teacher, or your flags, say so
)

# A preset is a piece of command line that stands before yours, so that your flags win. What it
# leaves out is as in cifar10, the published run, whose settings are all here. The first three are
# those of the authors' scripts [code], but for the text encoder and --agree-batches.
# `python nayer.py --help` says what each flag means.
PRESETS = dict(
    cifar10=(
        f"--teacher wrn40_2 --student wrn16_2 --text-encoder {TEXT_ENCODER} "
        "--warmup-epochs 20 --warmup-batches 10 --epochs 100 --batches 2 "
        "--synthesis-batch 400 --generator-steps 30 --generator-lr 4e-3 --generator-life 10 "
        "--generator-width 64 --alpha-ce 0.5 --alpha-bn 10 --alpha-adv 1.33 --bn-momentum 0.9 "
        "--label-input lte --noisy-layer reinit "
        "--student-steps 400 --student-batch 512 --reuse 1 --mix 0 --lr 0.2 --weight-decay 1e-4 "
        "--no-nesterov --temperature 20 --crop-padding 4 --flip "
        "--seed 0 --device auto --no-compile --no-cuda-graph --no-deterministic --no-resume "
        "--data-root data --agree-batches 10"
    ),
    cifar100="--generator-steps 40",
    tiny_imagenet=(
        "--warmup-batches 20 --batches 4 --synthesis-batch 200 --generator-steps 60 "
        "--student-steps 1000 --student-batch 256 --lr 0.1"
    ),
    # [ours] Small, for a laptop: few images of 12 pixels, each answer of T serves S four times, a
    # weak L_adv keeps the images legible. A mirrored digit is no digit.
    digits=(
        "--teacher wrn10_2 --student wrn10_1 "
        "--warmup-epochs 2 --warmup-batches 4 --epochs 12 --batches 1 "
        "--synthesis-batch 100 --generator-steps 10 --generator-width 32 "
        "--alpha-ce 1 --alpha-bn 3 --alpha-adv 0.2 "
        "--student-steps 96 --student-batch 64 --reuse 4 --weight-decay 5e-4 --nesterov "
        "--crop-padding 1 --no-flip --agree-batches 4"
    ),
    # [ours] For CIFAR-10 in an hour on two cores: one generator for all epochs, few steps of it,
    # small student batches, each answer of T serves S four times, half of the views are blended.
    cpu=(
        "--student wrn16_1 --warmup-epochs 9 --warmup-batches 6 --epochs 28 --batches 4 "
        "--synthesis-batch 200 --generator-steps 8 --generator-life 1000 "
        "--student-steps 1200 --student-batch 64 --reuse 4 --mix 0.5 "
        "--lr 0.1 --weight-decay 5e-4 --nesterov"
    ),
    # [ours] For teachers of images above 64 pixels: smaller batches, and a limit to M.
    large="--student resnet18 --synthesis-batch 24 --student-batch 64 --bank-size 20000",
)


# ---- Label-text embeddings (LTE): e_y ------------------------------------------------------------
@torch.no_grad()
def label_text_embeddings(class_names, encoder, prompt):
    """What a language model makes of the class names: (C, D) float32, in the order of the names.

    encoder: Hugging Face name or local folder. A model with `get_text_features` gives that (the
    paper's is the text tower of CLIP ViT-B/32, D = 512, not normalised [code]); any other gives the
    mean of its last hidden states over the tokens [ours]. prompt: text with "{class}" in it. Raises
    UserError if there is no such encoder. Reads safetensors only, runs no remote code. The presets'
    names, prompts and encoder are looked up in teachers/."""
    shipped = SHIPPED / "label_embeddings.safetensors"
    if shipped.exists():
        tensors, about = read_safetensors(shipped)
        for dataset, made_of in about.items():
            if json.loads(made_of) == [encoder, prompt, class_names]:
                return tensors[dataset].float()  # (C, D)
    remedy = "see --text-encoder, or do without: --label-input onehot"
    with explained(f"no text encoder {encoder} here or on the hub, or not a usable one; {remedy}"):
        from huggingface_hub import constants, get_session
        from transformers import AutoModel, AutoTokenizer, logging

        logging.disable_progress_bar()  # stderr stays empty in a run that ends well
        offline = True  # unless the hub answers at once; what was fetched before needs no hub
        with contextlib.suppress(Exception):
            get_session().head(constants.ENDPOINT, timeout=5)
            offline = False
        safe = dict(trust_remote_code=False, local_files_only=offline)
        tokenizer = AutoTokenizer.from_pretrained(encoder, **safe)
        model = AutoModel.from_pretrained(encoder, use_safetensors=True, **safe)
        if tokenizer.pad_token is None:  # GPT-2's; the mask below leaves out what it fills up
            tokenizer.pad_token = tokenizer.eos_token
        if model.config.is_encoder_decoder:  # T5
            model = model.get_encoder()
        names = [re.sub("[_-]", " ", name) for name in class_names]  # [code]
        texts = [prompt.replace("{class}", name) for name in names]
        # SigLIP was trained on texts of one length.
        tokens = tokenizer(
            texts,
            padding="max_length" if model.config.model_type.startswith("siglip") else True,
            truncation=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        if hasattr(model, "get_text_features"):
            features = model.get_text_features(**tokens)
            return getattr(features, "pooler_output", features).float()  # transformers 5 wraps it
        hidden = model(**tokens).last_hidden_state  # (C, tokens, D)
        mask = tokens["attention_mask"][:, :, None]  # 0 where a short text was filled up
        return ((hidden * mask).sum(1) / mask.sum(1)).float()  # (C, D)


def check_distinct(embeddings, class_names):
    """UserError if two of the embeddings (C, D) are equal but for rounding: G would be told the
    same of both classes. Two classes of one name, such as ImageNet's cranes, are accepted."""
    distances = F.pdist(embeddings)  # of all pairs
    i, j = torch.combinations(torch.arange(len(class_names)))[distances.argmin()]
    one, other = class_names[i], class_names[j]
    apart = distances.min() > 1e-3 * embeddings.norm(dim=1).mean()
    remedy = "give them other --class-names, use --label-input onehot, or mend the encoder"
    check(apart or one == other, f"the text encoder cannot tell {one!r} from {other!r}: {remedy}")


# ---- Noisy layer and generator: x = G(Z(e_y)) ----------------------------------------------------
class NoisyLayer(nn.Module):
    """Z: inputs (B, D) -> hidden (B, H). BatchNorm1d, then N random matrices, re-drawn each batch.

    Row i goes through matrix i // images_per_matrix. One matrix serves one image of each class
    ("K-to-1", K = C) [paper]: inside such a set the images differ by their LTE, and two images of
    one class differ by their matrix. Matrices are trained with G; `reinitialize` draws them.
    num_matrices: N, at least B / images_per_matrix, rounded up. embedding_size: D."""

    def __init__(self, embedding_size, num_matrices, images_per_matrix, hidden_size=HIDDEN_SIZE):
        super().__init__()
        self.images_per_matrix = images_per_matrix
        self.norm = nn.BatchNorm1d(embedding_size)  # tells apart LTEs that lie close [paper]
        # Not a list of nn.Linear: N matrices in one tensor are one product and one Adam update.
        self.weight = nn.Parameter(torch.empty(num_matrices, embedding_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_matrices, 1, hidden_size))
        self.reinitialize()

    def reinitialize(self):
        """Draw all matrices from N(0, 1), not divided by the fan-in; bias 0; norm kept [code]."""
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

    [ours] A 3x3 window of doubled pixels holds only 2x2 different ones. So the weights that meet
    the same pixel are added up first, and a transposed convolution needs 4 products in place of 9.
    Without it a generator step takes 28 % longer (two Zen 3 cores, float32)."""

    def forward(self, maps):
        # Sums of 2x2 neighbours, 3x3 -> 4x4; then backwards, as a transposed convolution reads it.
        kernel = F.avg_pool2d(F.pad(self.weight, (1, 1, 1, 1)), 2, stride=1, divisor_override=1)
        kernel = kernel.flip(2, 3).transpose(0, 1)
        return F.conv_transpose2d(maps, kernel, stride=2, padding=1)


class Generator(nn.Module):
    """G: hidden (B, H) -> images (B, channels, image_size, image_size), float32 in [0, 1].

    A linear layer makes a small map; up-sampling and 3x3 convolutions double its size, two times
    for images of up to 64 pixels, four times for larger ones [code]. Always in train mode.
    width: f, the channels of the last hidden layer; the first two have 2f."""

    def __init__(self, hidden_size, channels, image_size, width=64):
        super().__init__()
        widths = [2 * width, 2 * width, width]
        if image_size > SMALL:
            widths += [width, width]
        side = math.ceil(image_size / 2 ** (len(widths) - 1))  # 8 for 32 pixels
        self.image_shape = (channels, image_size, image_size)
        self.shape = (widths[0], side, side)
        self.start = nn.Linear(hidden_size, math.prod(self.shape))
        layers = [nn.BatchNorm2d(widths[0])]
        for before, after in zip(widths, widths[1:]):
            layers += [UpsampleConv(before, after, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2, inplace=True)]
        layers.append(nn.Conv2d(width, channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden):
        maps = self.start(hidden).view(-1, *self.shape)  # (B, H) -> (B, 2f, side, side)
        maps = maps.contiguous(memory_format=torch.channels_last)
        images = self.layers(maps).float().sigmoid()
        size = self.image_shape[1]
        return images[:, :, :size, :size]  # (B, ch, s, s); for 68 pixels, 5 becomes 80


def class_sets(num_classes, batch, device="cpu", number=0):
    """Labels (B,): sets of all C classes in order; a random subset, without repeats, at the end.
    If B < C, B classes at equal distances; the batch of the next `number` takes the next ones.

    [ours] So any B and C will do (theirs: a multiple of C); no matrix meets a class twice."""
    classes = torch.arange(num_classes, device=device)
    if batch < num_classes:
        return (classes[:batch] * (num_classes // batch) + number) % num_classes
    sets, rest = divmod(batch, num_classes)
    in_order = classes.repeat(sets)  # 0 .. C-1, 0 .. C-1, ...
    return torch.cat([in_order, torch.randperm(num_classes, device=device)[:rest]])


# ---- Losses --------------------------------------------------------------------------------------
class BatchStatistics(torch.autograd.Function):
    """x (B, ch, H, W) -> mean and biased variance of each channel, float32 (ch,) even for bf16 x.
    In the place of `BatchStatistics.apply(x)` these two lines would do the same:

        var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        return mean, var

    [ours] The kernel with which BatchNorm itself computes them reads x once, and the gradient is a
    single multiply-add (n = B H W):
        dL/dx = (dL/dmean + 2 (x - mean) dL/dvar) / n
    Composed from var_mean, a generator step takes 30 % longer (two Zen 3 cores, float32)."""

    @staticmethod
    def forward(ctx, x):
        if x.device.type == "mps" or torch.compiler.is_compiling():  # both lack the kernel
            var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        else:
            scratch = torch.empty(2, x.shape[1], device=x.device)  # the kernel writes, nobody reads
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


class BatchNormLoss:
    """L_BN = sum over T's BatchNorm2d layers of |mu_T - mu|_2 + |var_T - var|_2.

    mu and var are what a layer sees in T's last forward pass, mixed with an average over earlier
    batches: mu = m * mu_average + (1 - m) * mu_batch, the same for var [code]. With m = 0.9 the
    gradient is scaled by 0.1; without that, L_BN drowns the class term. The average outlives the
    generator. Hooks read the layers' inputs, and only while gradients are recorded, so that they
    cost nothing while the student learns. Call it for the loss of the last pass, a float32 scalar;
    `.update()` moves the average, once per batch (the first time, sets it). Made when T is on its
    device. A layer that T's forward does not use adds nothing."""

    def __init__(self, teacher, momentum):
        self.momentum = momentum
        self.average = None  # over earlier batches, a vector like `stored`
        norms = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
        self.layers = [m for m in norms if m.running_mean is not None]  # with statistics to meet
        # mu and var of each layer: at first what T has stored, then what its last pass has seen.
        self.seen = [(m.running_mean, m.running_var) for m in self.layers]
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self.read, i))
        # All layers' mu and var lie in one vector, so that the loss is a few large operations, not
        # a few for each layer. `owner` tells to which layer's mu or var each number belongs.
        if self.layers:
            self.stored = self.mixed()
            vectors = [values for pair in self.seen for values in pair]
            owner = [torch.full_like(v, i, dtype=torch.long) for i, v in enumerate(vectors)]
            self.owner = torch.cat(owner)

    def read(self, i, layer, inputs):
        """A hook of layer i: inputs is a tuple with what it is about to normalise (B, ch, H, W)."""
        if torch.is_grad_enabled():
            self.seen[i] = BatchStatistics.apply(inputs[0])

    def mixed(self):
        """mu and var of all layers as last seen, in one vector, mixed with their average."""
        batch = torch.cat([values for pair in self.seen for values in pair])
        if self.average is None:
            return batch  # at first there is none
        return self.momentum * self.average + (1 - self.momentum) * batch

    def __call__(self):
        """sum((mu_T - mu).norm() + (var_T - var).norm() for every layer), a scalar."""
        squares = (self.stored - self.mixed()).square()
        sums = squares.new_zeros(2 * len(self.layers)).index_add(0, self.owner, squares)
        return (sums + 1e-20).sqrt().sum()  # the slope of sqrt(0) would be infinite

    @torch.no_grad()
    def update(self):
        """The mixture of the last pass becomes the average."""
        self.average = self.mixed()


def adversarial_loss(student_logits, teacher_logits):
    """L_adv = -mean over the batch of 1[argmax S = argmax T] * KL(T || S): (B, C) twice -> scalar.

    G lowers it with images on which S names T's class but is far from T's probabilities: those that
    S can still learn from. Where S names another class there is enough to learn already, so the
    term is 0, and cannot push the image away from its class altogether."""
    s, t = student_logits.float(), teacher_logits.float()  # (B, C)
    divergence = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True)
    agree = s.argmax(1) == t.argmax(1)  # (B,)
    return -(divergence.sum(1) * agree).mean()


def distillation_loss(student_logits, teacher_logits, temperature):
    """L_KD = tau^2 * KL(softmax(T / tau) || softmax(S / tau)), mean over the batch -> scalar.

    A large tau shows S which wrong classes T finds less wrong; tau^2 keeps the gradient's size."""
    s = (student_logits.float() / temperature).log_softmax(1)
    t = (teacher_logits.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


# ---- Memory bank and augmentation: M -------------------------------------------------------------
class MemoryBank:
    """M: the synthetic images, uint8 (capacity, ch, H, W), on the device; theirs: PNG files [code].

    S learns from all images so far, or it would forget. A ring: the newest replace the oldest.
    len() is the number of images in it, `.added` the number ever added."""

    def __init__(self, capacity, channels, image_size, device="cpu"):
        shape = (capacity, channels, image_size, image_size)
        self.images = torch.empty(shape, dtype=torch.uint8, device=device)
        self.added = 0  # images ever added

    def __len__(self):
        return min(self.added, len(self.images))

    def add(self, images):
        """images: uint8 (B, ch, H, W). If there are more than fit, the last ones are kept."""
        capacity = len(self.images)
        numbers = torch.arange(self.added, self.added + len(images), device=images.device)
        places = numbers[-capacity:] % capacity
        self.images[places] = images[-capacity:]
        self.added += len(images)

    def sample(self, count):
        """`count` images, uint8 (count, ch, H, W), drawn uniformly with replacement [ours]."""
        return self.images[torch.randint(len(self), (count,), device=self.images.device)]


class Augment:
    """Random crop after zero padding (of the pixels), random mirroring, normalisation; per image.

    images (B, ch, H, W), float in [0, 1] -> the same shape, normalised. Gradients pass through: G
    learns images that T knows wherever they are cropped. `normalize` alone is for scoring.
    mean, std: a number per channel, as T was trained. padding: pixels of zeros on each side before
    the crop. flip: whether half of the images are mirrored."""

    def __init__(self, mean, std, padding, flip, device="cpu"):
        self.mean = torch.tensor(mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=device).view(-1, 1, 1)
        self.padding = padding
        self.flip = flip

    def normalize(self, images):
        """Pixels in [0, 1] -> as T was trained to see them."""
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def __call__(self, images):
        B, ch, H, W = images.shape
        p, device = self.padding, images.device
        top, left = torch.randint(2 * p + 1, (2, B, 1), device=device)  # each crop's corner
        rows = top + torch.arange(H, device=device)  # (B, H)
        columns = left + torch.arange(W, device=device)  # (B, W)
        if self.flip:
            mirrored = torch.rand(B, 1, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        images = F.pad(images, (p, p, p, p))  # (B, ch, H + 2p, W + 2p)
        images = images.gather(2, rows[:, None, :, None].expand(B, ch, H, W + 2 * p))
        images = images.gather(3, columns[:, None, None, :].expand(B, ch, H, W))
        return self.normalize(images)


# ---- Half-steps ----------------------------------------------------------------------------------
# An epoch has two: many steps of Z and G, then many steps of S. Each defines `step()`, a single
# one, and `repeat` is its loop. A step changes tensors in place and reads no number from the
# device: so nothing waits for it, and a GPU can record it.
def repeat(step, times, record=False):
    """step() again and again. Returns what it gave, a tensor each time, stacked (times, ...).

    record: see `recorded`. Not the first step, in which kernels are tried out, networks compiled,
    and the optimizer's state made."""
    results = []
    for i in tqdm(range(times), leave=False, disable=None):
        if record and i == 1:
            step = recorded(step)
        results.append(step())
    return torch.stack(results)


def recorded(step):
    """The step as a CUDA graph [ours]: one launch for all its kernels. A step has a thousand, and
    Python launches them more slowly than a large GPU runs them.

    What is recorded are kernels and addresses of memory. So the step must work on the same tensors
    each time, all on the GPU; random numbers are drawn anew at each replay, but a Python number
    stays what it was. UserError if the step reads a number from the GPU, which a recording cannot.
    """
    graph = torch.cuda.CUDAGraph()
    with explained("a step cannot be recorded: leave out --cuda-graph"):
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            result = step()  # this computes nothing: `replay` does

    def replay():
        graph.replay()
        return result.clone()

    return replay


# ---- Half-step 1. Over G and Z, minimise alpha_ce L_CE + alpha_bn L_BN + alpha_adv L_adv ---------
# To add a term, touch five places: its name in LOSSES; in `synthesize` its weight in the signature,
# and its value in the sum and in the stack of `step`; in `Run.make_images` the argument; the flag,
# a line of FLAGS such as "--alpha-tv  float 0 9  weight of L_TV", and its default, in PRESETS.
# The terms, as `synthesize` stacks them; columns of log.csv and of the console follow from these.
LOSSES = ("loss_ce", "loss_bn", "loss_adv")


def synthesize(
    generator,
    noisy_layer,
    inputs,
    labels,
    teacher,
    student,
    bn_loss,
    augment,
    *,
    steps,
    lr,
    alpha_ce,
    alpha_bn,
    alpha_adv,
    record=False,
):
    """One batch of images for `labels` (B,), from `inputs` (B, D), by `steps` steps of a new Adam.

    inputs: e_y of each label, or what takes its place. teacher: frozen, in eval mode. augment: an
    `Augment`. lr: of Adam. alpha_*: the weights of the terms; with alpha_bn or alpha_adv of 0 that
    term is not computed and counts as 0. record: see `repeat`. Returns the images of the step with
    the lowest total loss, before augmentation, uint8 (B, ch, H, W), and the losses of every step
    (steps, 4): those of LOSSES, and their weighted sum. Call bn_loss.update() after it."""
    # S stays in eval mode: the authors' is in train mode from the second batch of an epoch on, so
    # that the statistics of its BatchNorm are overwritten by half-made images [code].
    student.eval()
    student.requires_grad_(False)
    parameters = [*generator.parameters(), *noisy_layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.5, 0.999), fused=True, capturable=record)
    zero = torch.zeros((), device=labels.device)
    best_loss = torch.full_like(zero, math.inf)
    best_images = torch.zeros(len(labels), *generator.image_shape, device=labels.device)

    def step():
        images = generator(noisy_layer(inputs))  # x^ = G(Z(e_y))
        views = augment(images)  # afresh at each step; T and S see the same
        # A network may write into its input, hence the copy. In bf16 where fast: see Run.on_device.
        teacher_logits = teacher(views.clone()).float()
        # T must say y, T's layers must see what they saw in training; where S says y, too, it
        # must be far from T still.
        loss_ce = F.cross_entropy(teacher_logits, labels)
        loss_bn = bn_loss() if alpha_bn else zero
        loss_adv = adversarial_loss(student(views), teacher_logits) if alpha_adv else zero
        loss = alpha_ce * loss_ce + alpha_bn * loss_bn + alpha_adv * loss_adv
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # Keep the best step's images, in place, without asking the device which step that is.
        better = loss.detach() < best_loss
        best_images.copy_(torch.where(better, images.detach(), best_images))
        best_loss.copy_(torch.where(better, loss.detach(), best_loss))
        return torch.stack([loss_ce, loss_bn, loss_adv, loss]).detach()

    losses = repeat(step, steps, record)
    return (best_images * 255).round().byte(), losses


# ---- Half-step 2. Over S, minimise L_KD on images from M -----------------------------------------
def blend(views, fraction):
    """Mixup [ours]: each view, with probability `fraction`, is blended with another one."""
    weight, chance = torch.rand(2, len(views), 1, 1, 1, device=views.device)
    weight = weight * (chance < fraction)  # of the other; 0 for the views that stay as they are
    return views.lerp(views.roll(1, dims=0), weight)


def lessons(teacher, memory, augment, batch, pool, reuse, mix):
    """Endless batches to learn from: views (batch, ch, H, W) and T's logits on them (batch, C).

    T is asked about `pool` batches of new views in advance, which stay in memory as float32, and S
    passes `reuse` times over them, each time in another order; then come new ones. mix: see
    `blend`."""
    while True:
        views = augment(memory.sample(pool * batch).float() / 255)
        if mix:
            views = blend(views, mix)
        with torch.no_grad():
            logits = torch.cat([teacher(part.clone()) for part in views.split(batch)])
        for _ in range(reuse):
            for chosen in torch.randperm(len(views), device=views.device).split(batch):
                yield views[chosen], logits[chosen]


def distill(
    teacher,
    student,
    memory,
    optimizer,
    augment,
    *,
    steps,
    batch,
    temperature,
    reuse=1,
    mix=0.0,
    record=False,
):
    """One epoch: `steps` student steps on batches from M. Returns L_KD at every step (steps,).

    Nothing but T's softened answers is learnt from; the labels that G was asked for play no part.
    batch: images in a step. temperature: tau of L_KD. optimizer: of S; its state lives on.
    reuse R > 1 [ours]: an epoch has 1/R as many views, and S learns from each R times. R = 4 takes
    36 % less time (two Zen 5 cores).
    mix [ours]: share of views blended with another; 0.5: +3.0 points (1.2 to 4.8) on CIFAR-10.
    record: see `repeat`; for R = 1 alone, since otherwise each step reads another place."""
    student.train()
    student.requires_grad_(True)
    # Batches that T is asked about in advance; for R = 1 new views at every step.
    pool = 1 if reuse == 1 else math.ceil(steps / reuse)
    batches = lessons(teacher, memory, augment, batch, pool, reuse, mix)

    def step():
        views, teacher_logits = next(batches)
        loss = distillation_loss(student(views), teacher_logits, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return repeat(step, steps, record and reuse == 1)


def learning_rate(peak, progress):
    """Learning rate of S at `progress` in [0, 1) of the E epochs: a cosine from peak to 2e-4."""
    return 2e-4 + (peak - 2e-4) * (1 + math.cos(math.pi * progress)) / 2


# ---- What the loop works on ----------------------------------------------------------------------
class Run:
    """T, S, Z, G, M, the label embeddings, the images to score on, and the tables of the run.

    Built from the flags and a teacher with `.info`; `resume` puts a checkpoint into it. Raises
    UserError for what the user can put right."""

    def __init__(self, args, teacher):
        self.args = args
        self.device, fast_bf16 = pick_device(args.device)
        if args.amp is None:
            args.amp = fast_bf16  # in the flags, since the checkpoint keeps them
        torch.set_float32_matmul_precision("high")  # TF32, where bf16 is not used
        # The fastest kernels that a trial finds, or those that give the same bits each time.
        torch.backends.cudnn.benchmark = not args.deterministic
        torch.use_deterministic_algorithms(args.deterministic)
        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what these insist on
        # A recording needs another stream than the default one. The whole run uses it, since what
        # backward() keeps belongs to the stream of the step that made it.
        self.record = args.cuda_graph and self.device.type == "cuda"
        if self.record:
            torch.cuda.set_stream(torch.cuda.Stream())
        self.info = info = teacher.info
        self.shape = (info["channels"], info["image_size"])
        self.take_networks(teacher)
        self.augment = Augment(info["mean"], info["std"], args.crop_padding, args.flip, self.device)
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            args.lr,
            momentum=0.9,
            weight_decay=args.weight_decay,
            nesterov=args.nesterov,
            fused=True,
        )
        # What G is told of the classes, and where its images go.
        names = info["class_names"]
        if args.label_input == "lte":
            embeddings = label_text_embeddings(names, args.text_encoder, args.prompt)
            check_distinct(embeddings, names)
        elif args.label_input == "onehot":
            embeddings = torch.eye(len(names))
        else:
            embeddings = torch.zeros(len(names), NOISE_SIZE)  # noise takes their place
        self.label_embeddings = embeddings.to(self.device)  # (C, D)
        self.new_generator()  # for a checkpoint to be loaded into; an epoch makes its own
        batches = args.warmup_epochs * args.warmup_batches + args.epochs * args.batches
        capacity = args.bank_size or batches * args.synthesis_batch
        self.memory = MemoryBank(capacity, *self.shape, self.device)

        # What tells how good S is, and the tables that say so.
        self.test = None  # batches of real images, for the column `accuracy`
        self.rows = []  # of log.csv, a dict for each epoch; `main` fills the last one
        if args.eval:
            with explained(f"no test images of {args.dataset}; --no-eval distils without them"):
                self.test = test_batches(
                    args.dataset, args.data_root, names, *self.shape, self.device
                )
            info["accuracy"] = accuracy(self.teacher, self.test, self.augment)

    def take_networks(self, teacher):
        """T and S on the device, and L_BN, which reads T's layers; tried out as they will be used.

        What is wrong with a network is found here, before the first step, and not after the whole
        warm-up. The first line on the console says what T was taken for."""
        args, info = self.args, self.info
        self.teacher = self.on_device(teacher)
        read = self.teacher if args.alpha_bn else nn.Identity()  # without L_BN no layer is read
        self.bn_loss = BatchNormLoss(read, args.bn_momentum)
        logits = self.try_out(self.teacher, args.teacher)
        text = f"{args.teacher} gives all images the same logits: is it trained?"
        check((logits[0] - logits[1]).abs().max() > 1e-6, text)
        C = logits.shape[1]
        names = info["class_names"] = info["class_names"] or [f"class {k}" for k in range(C)]
        check(len(names) == C, f"{len(names)} class names, but {args.teacher} has {C} outputs")
        # Of the layers that this pass has met, the mean has a gradient.
        norms = sum(mean.requires_grad for mean, _ in self.bn_loss.seen)
        source = "--class-names" if args.class_names else "its description"
        line = (
            f"{args.teacher}: {C} classes, {names[0]} to {names[-1]} by {source}, "
            f"{norms} BatchNorm layers, "
            f"{self.shape[0]} x {self.shape[1]} x {self.shape[1]} pixels, "
            f"mean {info['mean']}, std {info['std']}, preset {args.preset}"
        )
        if info.get("accuracy"):
            line += f", {info['accuracy']:.2%}, {info.get('trained_on')}"
        say(line)
        check(norms or args.alpha_bn == 0, f"{args.teacher} uses no BatchNorm2d: add --alpha-bn 0")
        if norms and not any(layer.running_mean.any() for layer in self.bn_loss.layers):
            say("warning: T's BatchNorm statistics are those of a new network: is it trained?")
        self.student = self.on_device(load_student(args.student, C, *self.shape))
        self.student.eval()
        outputs = self.try_out(self.student, args.student).shape[1]
        check(outputs == C, f"{args.student} has {outputs} outputs, the teacher {C}")
        learner = self.on_device(load_student(args.student, C, *self.shape))
        learner.train()  # as S learns; this moves BatchNorm's statistics, hence another one
        self.try_out(learner, args.student)

    def try_out(self, model, name):
        """`trial` with two images of noise; returns T's or S's logits.

        A network that cannot take channels_last, the fastest order of dimensions for convolutions,
        is changed, so that its images, weights and maps are in the usual order. The noise has a
        generator of its own: a check must not change what a run draws."""
        noise = torch.Generator().manual_seed(0)
        images = torch.randn(2, *self.shape, self.shape[1], generator=noise).to(self.device)
        images = images.contiguous(memory_format=torch.channels_last).requires_grad_()
        with contextlib.suppress(UserError):
            return trial(model, name, images)
        model.to(memory_format=torch.contiguous_format)
        model.forward = partial(rows_first, model.forward)
        return trial(model, name, images)

    def on_device(self, model):
        """T, S or G on the device, to compute in bf16 where that is fast. Their weights, the
        losses, the optimizers and Z stay in float32."""
        model.to(self.device, memory_format=torch.channels_last)
        model.forward = partial(answer, model.forward, self.device.type, self.args.amp)
        if self.args.compile:
            torch._dynamo.config.cache_size_limit = 64  # networks share code, in several modes
            model.compile(dynamic=False)
        return model

    def new_generator(self):
        """A brand-new pair Z, G: the images of an old one come to resemble each other.

        --noisy-layer off: only the BatchNorm of Z is kept, and G reads D numbers in place of H."""
        args = self.args
        C, D = self.label_embeddings.shape
        hidden_size = HIDDEN_SIZE
        images_per_matrix = min(C, args.synthesis_batch)  # K: one image of each class
        num_matrices = math.ceil(args.synthesis_batch / images_per_matrix)  # N
        self.noisy_layer = NoisyLayer(D, num_matrices, images_per_matrix).to(self.device)
        if args.noisy_layer == "off":  # then all images of a class in a batch are the same
            self.noisy_layer = self.noisy_layer.norm
            hidden_size = D
        self.generator = self.on_device(Generator(hidden_size, *self.shape, args.generator_width))

    def make_images(self, num_batches, alpha_adv):
        """Make `num_batches` new batches. Returns their images, uint8 (n, ch, H, W), their labels
        (n,), and the losses of the generator steps (batches, steps, len(LOSSES) + 1)."""
        args = self.args
        made = []
        for _ in range(num_batches):
            if args.noisy_layer == "reinit":
                self.noisy_layer.reinitialize()  # once per batch, not per step [code]
            B = args.synthesis_batch
            number = self.memory.added // B + len(made)  # of this batch
            labels = class_sets(len(self.label_embeddings), B, self.device, number)
            inputs = self.label_embeddings[labels]  # e_y (B, D)
            if args.label_input == "noise":
                inputs = torch.randn_like(inputs)
            images, losses = synthesize(
                self.generator,
                self.noisy_layer,
                inputs,
                labels,
                self.teacher,
                self.student,
                self.bn_loss,
                self.augment,
                steps=args.generator_steps,
                lr=args.generator_lr,
                alpha_ce=args.alpha_ce,
                alpha_bn=args.alpha_bn,
                alpha_adv=alpha_adv,
                record=self.record,
            )
            if args.alpha_bn:
                self.bn_loss.update()  # the average moves once per batch, from the last step
            made.append((images, labels, losses))
        images, labels, losses = zip(*made)
        return torch.cat(images), torch.cat(labels), torch.stack(losses)


# ---- The algorithm -------------------------------------------------------------------------------
#     for every epoch:                       the first ones, the warm-up, only fill M
#         every `--generator-life` epochs: a brand-new Z and G
#         for every batch:                   Run.make_images
#             re-draw Z; labels y: sets of all classes; their embeddings e_y
#             g steps over Z and G           synthesize, half-step 1
#         M += the images of each batch's best step
#         after the warm-up:
#             steps over S, on images of M   distill, half-step 2
def main(argv=None):
    """Distil a teacher into a student. Returns the summary, a dict, as in summary.json.

    argv: a list of flags; None: those of the command line. Raises UserError for what the user can
    put right. All is written to --out after every epoch, so nothing finished is ever lost."""
    start = time.perf_counter()
    run = begin(sys.argv[1:] if argv is None else argv)
    args = run.args
    if run.rows:
        start -= run.rows[-1]["seconds"]  # of the sittings before
    epochs = range(len(run.rows), args.warmup_epochs + args.epochs)
    for epoch in tqdm(epochs, "epochs", leave=False, disable=None):
        row = dict.fromkeys(COLUMNS)
        row["epoch"] = epoch
        run.rows.append(row)
        seed_epoch(args.seed, epoch)
        warm_up = epoch < args.warmup_epochs  # fills M; no L_adv, since S knows nothing yet
        num_batches = args.warmup_batches if warm_up else args.batches
        alpha_adv = 0.0 if warm_up else args.alpha_adv
        if epoch % args.generator_life == 0:
            run.new_generator()  # a brand-new Z and G; the average of L_BN lives on [code]

        # Half-step 1: new images for M.
        began = time.perf_counter()
        images, labels, losses = run.make_images(num_batches, alpha_adv)
        check_finite(losses, f"epoch {epoch}, [batch, step, loss]")
        means = losses[:, -1, :-1].mean(0)  # of the last steps, without the weighted sum
        row.update(zip(LOSSES, means.tolist(), strict=True))
        run.memory.add(images)
        row["images"] = len(run.memory)
        row["seconds_synthesis"] = time.perf_counter() - began

        # Half-step 2: S learns, on all of M.
        if not warm_up:
            began = time.perf_counter()
            progress = (epoch - args.warmup_epochs) / args.epochs
            run.optimizer.param_groups[0]["lr"] = learning_rate(args.lr, progress)
            losses_kd = distill(
                run.teacher,
                run.student,
                run.memory,
                run.optimizer,
                run.augment,
                steps=args.student_steps,
                batch=args.student_batch,
                temperature=args.temperature,
                reuse=args.reuse,
                mix=args.mix,
                record=run.record,
            )
            check_finite(losses_kd, f"epoch {epoch}, student [step]")
            row["loss_kd"] = losses_kd.mean().item()
            row["seconds_distillation"] = time.perf_counter() - began
            score(run, row)
        row["seconds"] = time.perf_counter() - start
        show(row)
        save(run, images.cpu(), labels.cpu(), losses.cpu())
    return finish(run)


# ==================================================================================================
# Here the method ends. What follows surrounds it: flags, networks, model files, images to score on,
# scores and pictures, the files of a run, errors. You need not read it to understand the method.
# ==================================================================================================


# ---- Flags ---------------------------------------------------------------------------------------
ABOUT = """Data-free knowledge distillation by noisy-layer generation (NAYER).
T teacher, S student, G generator, Z noisy layer, M memory of synthetic images, L_... losses."""
USUAL = """The usual commands:
    python nayer.py                         digits on a CPU, no download
    python nayer.py --dataset cifar10       the published settings, for a GPU
    python nayer.py --teacher file.py:load  your own network, and no data; see README.md
The defaults are the preset's: --help with another --dataset or --preset shows others."""

# Each flag, what it takes (see `kind_of`), and what --help says, with two spaces between. A line
# alone heads a group. To add a flag, write a line here, and its default into the preset cifar10.
FLAGS = """
run
--dataset          digits|cifar10|cifar100|tiny_imagenet|folder  that T was trained on
--preset           digits|cifar10|cifar100|tiny_imagenet|cpu|large  whose settings are the defaults
--data-root        path         folder of the data sets, for scoring alone
--out              path         to write to (default: runs/<dataset>-<teacher>-<student>)
--seed             int 0 9e18   of all random numbers
--device           auto|cuda|mps|cpu  where to compute; auto: cuda if it is there
--resume           switch       go on after the last finished epoch of the run in --out
--eval             switch       score the student on real test images after every epoch
--agree-batches    int 0 1e9    batches made before the run, on which S is judged
--amp              switch       bf16 autocast (default: where the device is fast with it)
--compile          switch       torch.compile for T, S and G
--cuda-graph       switch       record the steps and replay them; not yet run on a GPU
--deterministic    switch       same seed, same bits, also on a GPU; slower there
networks and class names
--teacher          text         T: name, model file, file.py:function
--student          text         S: name, or file.py:function
--class-names      names        file with a name per line (default: those of the teacher)
--text-encoder     text         Hugging Face name, or local folder
--image-size       int 8 512    pixels (default: the teacher's)
--mean             pixels       of pixels in [0, 1], per channel (default: the teacher's)
--std              pixels       of pixels likewise (default: the teacher's)
--prompt           text         that is embedded; {class} stands for a class name
loop
--warmup-epochs    int 0 1e9    epochs that only fill M
--warmup-batches   int 1 1e9    batches synthesised in each of these
--epochs           int 1 1e9    epochs that follow, with distillation (E)
--batches          int 1 1e9    batches synthesised in each of these
generator
--synthesis-batch  int 2 1e9    images in a batch (B)
--generator-steps  int 1 1e9    steps of Z and G for a batch
--generator-lr     float 1e-9 1e38  of Adam, which starts afresh with every batch
--generator-life   int 1 1e9    epochs until a new generator replaces it
--generator-width  int 1 1e9    channels of its last hidden layer
--alpha-ce         float 0 1e38   weight of L_CE
--alpha-bn         float 0 1e38   weight of L_BN; 0 if T has no BatchNorm
--alpha-adv        float 0 1e38   weight of L_adv, off in the warm-up
--bn-momentum      float 0 1    share of the moving average in L_BN; 0: none
--label-input      lte|onehot|noise  what Z reads
--noisy-layer      reinit|fixed|off  matrices drawn for each batch, for each generator, or none
student
--student-steps    int 1 1e9    distillation steps per epoch
--student-batch    int 2 1e9    images in a student step
--reuse            int 1 1e9    times that S learns from an answer of T (R)
--mix              float 0 1    share of views blended with another
--lr               float 2e-4 1e38  of SGD, falls as a cosine over --epochs to 2e-4
--weight-decay     float 0 1e38   of SGD (momentum 0.9)
--nesterov         switch       look ahead: Nesterov's kind of momentum
--temperature      float 1e-9 1e9  softens the answers of T and S in L_KD (tau)
--bank-size        int 1 1e9    most images kept, the oldest give way (default: all are kept)
--crop-padding     int 0 28     zeros around an image to crop
--flip             switch       mirror half of the images
"""


def number(kind, low, high):
    """An argparse type: a number of this kind, int or float, in [low, high]. argparse shows the
    error's text after the name of the flag."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:  # nan is in no interval
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message where text is no number at all
    return parse


def kind_of(text):
    """How argparse takes what FLAGS calls: a|b, one of these; switch, --flag and --no-flag; path;
    text; int or float, with the least and the most that it may be; pixels, a number per channel;
    names, a file of them."""
    kind, *limits = text.split()
    if "|" in kind:
        return dict(choices=kind.split("|"))
    if kind == "switch":
        return dict(action=argparse.BooleanOptionalAction)
    if kind == "pixels":
        return dict(type=float, nargs="+")
    types = dict(int=int, float=float, path=Path, text=str, names=read_names)
    if limits:
        return dict(type=number(types[kind], *map(float, limits)))
    return dict(type=types[kind])


def parse_args(argv=None, image_size=SMALL):
    """The command line -> a Namespace. A wrong one ends with one line on stderr and exit code 2.

    The flags of the preset become the defaults, which --help shows, too; the user's flags win.
    image_size: the teacher's, as soon as it is known; for large images another preset is usual."""
    parser = argparse.ArgumentParser(
        "nayer.py",
        usage=argparse.SUPPRESS,  # so that an error is one line
        description=ABOUT,
        epilog=USUAL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,  # until the preset is known, whose defaults it shows
    )
    for line in FLAGS.strip().splitlines():
        if line[0] != "-":
            group = parser.add_argument_group(line)
            continue
        flag, kind, text = re.split(" {2,}", line)
        if "default:" not in text:
            text += " (default: %(default)s)"
        group.add_argument(flag, help=text, **kind_of(kind))

    # Which preset? A first look at the command line finds it. Unknown flags are refused below.
    asked, _ = parser.parse_known_args(argv)
    dataset, preset, scored = asked.dataset, asked.preset, "--eval"
    if dataset is None:
        dataset = "digits"
        if ".py:" in str(asked.teacher):  # a network of the user's, who may have no image
            dataset, scored = "folder", "--no-eval"
    if preset is None:
        preset = dataset if dataset in PRESETS else "cifar10"
        if (asked.image_size or image_size) > SMALL:
            preset = "large"
    subject = "the digit {class}" if dataset == "digits" else "{class}"
    flags = f"--dataset {dataset} --preset {preset} --prompt 'a photo of {subject}' {scored}"
    flags = shlex.split(f"{PRESETS['cifar10']} {PRESETS[preset]} {flags}")
    parser.set_defaults(**vars(parser.parse_args(flags)))
    parser.add_argument("-h", "--help", action="help", help="show this and end")
    args = parser.parse_args(argv)
    if "{class}" not in args.prompt:
        parser.error(f"--prompt {args.prompt!r}: write {{class}} where the class name belongs")
    if args.out is None:
        args.out = Path(f"runs/{dataset}-{Path(args.teacher).stem}-{Path(args.student).stem}")
    return args


# ---- Networks ------------------------------------------------------------------------------------
def conv(inputs, outputs, size, stride=1):
    """A convolution that keeps the size of the maps, or halves it with stride 2; no bias.

    inputs, outputs: channels. size: of the kernel, an odd number."""
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
    """wrn{depth}_{width} of Zagoruyko and Komodakis (2016): (B, ch, H, W) -> logits (B, C)."""

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

    small = image_size <= SMALL
    if small and re.fullmatch(r"vgg\d\d", name):
        name += "_bn"  # torchvision's name for a VGG with BatchNorm
    known = name in models.list_models(module=models) and channels == 3
    text = f"no {name} for {channels} channels: use wrn16_1, ... or, for 3, a torchvision name; "
    check(known, text + OWN_NETWORK)
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
INFO = "class_names channels image_size mean std accuracy trained_on architecture command".split()
OWN_NETWORK = "for a network of yours write a function that returns it: file.py:function"


def tensors_of(model):
    """The tensors of its state, by name: weights and statistics."""
    state = model.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def save_model(path, model, info):
    """One self-describing safetensors file: the weights, with `info`, what json can write, as
    metadata: architecture, class_names, channels, image_size, mean, std, accuracy, ..."""
    state = {name: t.cpu().contiguous().clone() for name, t in tensors_of(model).items()}
    metadata = {key: json.dumps(value) for key, value in info.items()}
    with replaced(path) as temporary:
        temporary.write_bytes(safetensors.torch.save(state, metadata))


def read_safetensors(path):
    """(tensors by name, metadata: strings by name) of a safetensors file. UserError if it is
    missing, cut, or something else."""
    with explained(f"{path} is not an intact safetensors file"):
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}


def load_model(path, model=None):
    """The network in a model file: on the CPU, float32, in eval mode, its description as `.info`.

    model: a network to put the weights into, for one that `build_model` does not know. Raises
    UserError if the file is missing, cut, or not one of ours. Runs no code from it."""
    state, metadata = read_safetensors(path)
    with explained(f"{path} is not an intact model file of nayer.py; {OWN_NETWORK}"):
        info = {key: json.loads(text) for key, text in metadata.items()}
        name = info["architecture"]
        if model is None:
            check(".py:" not in name, f"{path}: give the network of {name} to load_model, too")
            model = build_model(
                name, len(info["class_names"]), info["channels"], info["image_size"]
            )
        whole = model.state_dict()  # with what is no tensor, and the versions that some ask for
        lost = tensors_of(model).keys() - state.keys()
        check(not lost, f"{path} lacks {lost}")
        whole.update(state)
        model.load_state_dict(whole)
    model.info = info
    model.float().eval()
    return model


def network_from_file(place, **known):
    """The nn.Module that `file.py:function` returns: on the CPU, in float32, not wrapped.

    known: what the function is given of this if it has an argument of that name. Runs that file.
    UserError with the reason if anything in it fails."""
    path, _, function = place.rpartition(":")
    argv = mock.patch.object(sys, "argv", [path])  # it must not read the flags of this program
    with explained(f"no network from {place}", path), argv, torch.enable_grad():
        sys.path.insert(0, str(Path(path).resolve().parent))  # for what lies beside it
        names = runpy.run_path(path)
        functions = [name for name, value in names.items() if inspect.isfunction(value)]
        check(function in names, f"{path} has no {function}, it has {', '.join(functions)}")
        make = names[function]
        wanted = inspect.signature(make).parameters
        model = make(**{key: value for key, value in known.items() if key in wanted})
        model = getattr(model, "module", model)  # of DataParallel
        check(isinstance(model, nn.Module), f"{place}: {type(model).__name__}, not an nn.Module")
        model.eval()  # torch.export's networks cannot do this, TorchScript's not the next line
        return model.cpu().float().requires_grad_()


def answer(forward, device_type, bf16, images):
    """How T, S and G are called: `forward(images)`, with bf16 for convolutions and products.

    What a classifier gives may be the logits (B, C), or hold them under that name, as a dict or an
    object: so do Hugging Face's, and Inception in train mode, whose other answers are not used."""
    with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
        found = forward(images)
    if isinstance(found, dict):
        return found["logits"]
    return getattr(found, "logits", found)


def rows_first(forward, images):
    """For a network that flattens its maps by `.view`, which channels_last does not allow."""
    return forward(images.contiguous())


def trial(model, name, images):
    """T's or S's logits (2, C) for two images (2, ch, H, W) that require a gradient, asked for as
    the run will do it: in its mode, on its device, in its precision and order of dimensions.

    name: of the network, for the message. UserError if it fails, if the answers are no logits, or
    if no gradient would pass, which G and S learn by. The teacher is never in train mode."""
    with explained(f"{name} gives no logits for images {list(images.shape)}", name):
        logits = model.forward(images.clone())  # not compiled
        count, classes = logits.shape
    text = f"{name} gives {count} x {classes} numbers for two images, not logits (2, classes)"
    check(count == 2 and classes > 1, text)
    check(logits.isfinite().all(), f"the answers of {name} are not finite: is it trained?")
    # Logarithms of probabilities will do: a softmax of them is the same.
    is_softmax = logits.min() >= 0 and (logits.sum(1) - 1).abs().max() < 0.01
    check(not is_softmax, f"{name} gives probabilities: leave out the softmax at its end")
    with explained(f"no gradient passes {name}: has its forward a no_grad?", name):
        logits.sum().backward()
    return logits


def load_teacher(args):
    """T, frozen, in eval mode, with its description as `.info`: a name in teachers/, a model file,
    or file.py:function.

    `.info` is a dict: class_names, in the order of T's outputs; image_size in pixels; mean and std
    of the pixels in [0, 1], a number per channel; channels; accuracy and other remarks. A
    network of the user may bring one along, with the keys of INFO. A flag goes before what `.info`
    says, and that before what is known of --dataset. UserError names all that is missing."""
    # Where it comes from.
    name = args.teacher
    if ".py:" in name:
        teacher = network_from_file(name)
        own = getattr(teacher, "info", None)
        teacher.info = dict(own) if isinstance(own, dict) else {}  # else it is not ours
        text = f"the .info of {name} has {list(teacher.info)}, and may have {INFO}"
        check(teacher.info.keys() <= set(INFO), text)
    elif ".safetensors" in name:
        teacher = load_model(name)
    else:
        check(re.fullmatch(r"\w+", name), f"no teacher {name}; {OWN_NETWORK}")
        path = SHIPPED / f"{args.dataset}_{name}.safetensors"
        command = f"python teachers/train.py --dataset {args.dataset} --model {name}"
        check(path.exists(), f"no {path}; make it: {command}")
        teacher = load_model(path)
    # What it is: its classes, and the images that it was trained on.
    info = teacher.info
    known = vars(parse_args(IMAGES[args.dataset].split()))  # of these, the four below
    names_file = SHIPPED / "class_names.json"
    if names_file.exists():
        known["class_names"] = json.loads(names_file.read_text()).get(args.dataset)
    text = "class_names is a list of words, mean and std lists of numbers, image_size 8 to 512"
    with explained(f"the description of {name}: {text}"):
        missing = []
        for key in ("class_names", "image_size", "mean", "std"):
            info[key] = getattr(args, key) or info.get(key) or known[key]
            optional = key == "class_names" and args.label_input != "lte"
            if not info[key] and not optional:
                missing.append("--" + key.replace("_", "-"))
        text = f"{name} does not describe itself: add {' '.join(missing)}, or an .info with it"
        check(not missing, text + " (--label-input onehot needs no names)")
        info["class_names"] = [plain(name) for name in (info["class_names"] or [])[:]]
        info["image_size"] = number(int, 8, 512)(info["image_size"])
        mean = info["mean"] = [float(value) for value in info["mean"]]
        std = info["std"] = [float(value) for value in info["std"]]
    channels = info["channels"] = len(mean)
    fits = channels in (1, 3) and len(std) == channels
    check(fits, f"--mean and --std take a number for each channel, 1 or 3: here {channels}")
    inside = all(0 <= m <= 1 and 0 < s <= 1 for m, s in zip(mean, std))
    check(inside, f"mean {mean} and std {std} of {name}: pixels are in [0, 1], divide by 255")
    # A resumed run must meet the same weights, wherever the file lies.
    weights = [tensor.numpy().tobytes() for tensor in tensors_of(teacher).values()]
    info["sha256"] = hashlib.sha256(b"".join(weights)).hexdigest()
    return teacher.requires_grad_(False)


def plain(name):
    """A name as people compare them: one Unicode form, no needless space."""
    return unicodedata.normalize("NFC", " ".join(name.split()))


def read_names(path):
    """The lines of a file of class names, a list in their order, none of them twice.

    Empty lines are passed over, and the mark with which some editors begin a file. (`.info` may
    have a name twice, as ImageNet does.)"""
    with explained(f"cannot read --class-names {path}: write it in UTF-8"):
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    first = {}  # the number of its line for each name
    for i, line in enumerate(lines, 1):
        name = plain(line)
        if name:
            before = first.setdefault(name, i)
            check(before == i, f"--class-names {path}: lines {before} and {i} are both {name!r}")
    check(first, f"--class-names {path} is empty")
    return list(first)


def load_student(name, num_classes, channels, image_size):
    """S with random weights: a name that `build_model` knows, or file.py:function, which is given
    num_classes, channels and image_size if it asks for them."""
    if ".py:" not in name:
        return build_model(name, num_classes, channels, image_size)
    return network_from_file(
        name, num_classes=num_classes, channels=channels, image_size=image_size
    )


# ---- Images to score on: no line of this file reads a training image -----------------------------
def read_image(mode, path):
    """A picture in this mode of Pillow's, RGB or L. UserError that names it if that cannot be.

    Pillow would cut off what is brighter than 255 in an image of 16 or 32 bits per channel."""
    from PIL import Image

    with explained(f"cannot read the image {path}"), Image.open(path) as image:
        deep = image.mode.startswith(("I", "F"))
        check(not deep, f"{path} has more than 8 bits per channel: convert it to 8")
        return image.convert(mode)


def image_folder(folder, channels, size):
    """torchvision's ImageFolder (a folder per class) of uint8 images (channels, size, size): they
    are resized, cropped in the middle, and converted to gray or colour.

    Reads nothing but names until an image is asked for; threads read a batch. Hidden files are left
    out. Raises an error if there is no folder."""
    from torchvision import datasets
    from torchvision.transforms import v2

    class Folder(datasets.ImageFolder):
        def __getitems__(self, numbers):
            with ThreadPoolExecutor() as pool:
                return list(pool.map(self.__getitem__, numbers))

    def is_wanted(path):
        hidden = re.search(r"[/\\](\.|__MACOSX)", path[len(str(folder)) :])
        return datasets.folder.is_image_file(path) and not hidden

    fit = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])
    read = partial(read_image, "L" if channels == 1 else "RGB")
    data = Folder(folder, fit, loader=read, is_valid_file=is_wanted, allow_empty=True)
    left_out = sum(path.is_file() for path in Path(folder).rglob("*")) - len(data)
    if left_out > 0:
        say(f"{left_out} files in {folder} are left out: no images, or hidden")
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


def label_by_name(data, class_names):
    """An `image_folder`, with the labels that its folders' names have in class_names. UserError for
    a folder with images that is none of these, and if there is no image."""
    check(data.samples, f"no image in {data.root}")
    samples = []
    for path, k in data.samples:
        name = plain(data.classes[k])
        check(name in class_names, f"the teacher knows no class {name!r}, a folder in {data.root}")
        samples.append((path, class_names.index(name)))
    data.samples = samples
    return data


def test_batches(dataset, root, class_names, channels, image_size, device):
    """Batches (images uint8 (n, channels, size, size), labels (n,)) to score on, in a fixed
    order: small images are decoded once and stay on the device, large ones are read for each pass.

    root: the folder of the data sets; but for digits and CIFAR, with the images in test/, a folder
    per class. class_names: in the order of T's outputs. UserError if images are missing, damaged,
    or not what T was trained on."""
    if dataset == "digits":
        data = test_digits(image_size)
    elif dataset in ("cifar10", "cifar100"):
        from torchvision import datasets
        from torchvision.transforms import v2

        kind = getattr(datasets, dataset.upper())
        with explained(f"{root / kind.base_folder} is missing or damaged; no download"):
            fit = v2.Compose([v2.Resize(image_size), v2.PILToTensor()])
            data = kind(root, train=False, download=True, transform=fit)
    else:
        data = label_by_name(image_folder(root / "test", channels, image_size), class_names)
    check(
        len(data[0][0]) == channels, f"T reads {channels} channels, {dataset} others: see --dataset"
    )
    batches = torch.utils.data.DataLoader(data, SCORED)
    if image_size > SMALL:
        return batches
    return [(images.to(device), labels.to(device)) for images, labels in batches]


# ---- Scores and pictures -------------------------------------------------------------------------
@torch.no_grad()
def predict(model, images, augment):
    """The class (n,) that `model` names for each of `images`, uint8 (n, ch, H, W). The model is in
    eval mode, and all are on one device."""
    views = augment.normalize(images.float() / 255).split(SCORED)
    # `forward` is not compiled: that would be done anew for each size of a batch.
    return torch.cat([model.forward(part).argmax(1) for part in views])


def accuracy(model, batches, augment):
    """Fraction in [0, 1] of images that `model` gets right. Leaves it in eval mode.

    batches: pairs of images, uint8 (n, ch, H, W), and labels (n,), on any device."""
    model.eval()
    device = augment.mean.device
    right = []
    for images, labels in batches:
        answers = predict(model, images.to(device), augment)
        right.append(answers == labels.to(device))
    right = torch.cat(right)
    return right.sum().item() / len(right)


def agreement_batches(run):
    """Made images for the column `agree` [ours], the fraction of them on which S names T's class.
    It needs no real image and no label, so it tells how good S is where there are none.

    Batches as of `test_batches`, made before the first epoch, without L_adv, by a generator of
    their own, which is thrown away. S never learns from them. The earlier half is left out, since
    L_BN had a shorter average, and those that T takes for another class than the one asked for."""
    path = run.args.out / "agree.pt"
    if not run.args.agree_batches:
        return []
    if run.rows:  # of a run that goes on
        return load_tensors(path, run.device)
    seed_epoch(run.args.seed, -1)
    run.new_generator()
    images, labels, _ = run.make_images(run.args.agree_batches, alpha_adv=0.0)
    run.bn_loss.average = None  # the run itself begins without one
    images = images.chunk(2)[1]
    labels = labels.chunk(2)[1]
    answers = predict(run.teacher, images, run.augment)
    as_asked = answers == labels
    most = answers.bincount().max() / len(answers)
    kept = []
    if most > 0.9:
        say(f"warning: T names one class for {most:.0%} of its images: `agree` stays empty")
    elif as_asked.any():
        kept = [(images[as_asked], labels[as_asked])]
    save_tensors(path, kept)
    return kept


def score(run, row):
    """Fill the columns `agree`, `accuracy` and `best` of the row, the last of run.rows."""
    if run.agreement:
        row["agree"] = accuracy(run.student, run.agreement, run.augment)
    if run.test:
        row["accuracy"] = accuracy(run.student, run.test, run.augment)
        row["best"] = max(r["accuracy"] for r in run.rows if r["accuracy"] is not None)


def draw_samples(path, images, labels, class_names):
    """A picture of a batch, uint8 (B, ch, H, W) with labels (B,) as of `class_sets`: a row for each
    of the first 8 sets, a column for each of their first 20 classes, its name on top."""
    from matplotlib.figure import Figure

    K = min(len(class_names), len(images))  # images in a set
    sets = images[: len(images) // K * K].unflatten(0, (-1, K))[:8, :20]
    framed = F.pad(sets, (1, 1, 1, 1), value=255)
    rows, columns, _, height, width = framed.shape
    picture = framed.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, -1)
    axes = Figure(figsize=(0.7 * columns, 0.7 * rows + 0.5)).subplots()
    axes.imshow(picture.expand(-1, -1, 3).numpy(), interpolation="nearest")
    for i, k in enumerate(labels[:columns]):
        place = (i + 0.5) * width
        axes.text(place, -2, class_names[k], rotation=45, parse_math=False)
    axes.axis("off")
    axes.figure.savefig(path, format="png", bbox_inches="tight")


# ---- The files of a run --------------------------------------------------------------------------
# checkpoint.pt is written last in every epoch, so that a kill at any moment leaves this epoch's
# state or the one before; memory/ holds the bank's images, a file an epoch. No random state is
# kept: the random numbers of an epoch follow from --seed and the epoch alone [ours].
# FREE: what a resumed run may change: it decides rounding at most, or its content is compared.
# SHOWN: columns on the console, and their formats.
FREE = (
    "out preset data_root device resume eval compile cuda_graph deterministic teacher class_names"
).split()
TEACHER = "class_names channels image_size mean std".split()  # what is kept of its description
PARTS = "student optimizer generator noisy_layer".split()  # of Run, in the checkpoint
SHOWN = dict(epoch="d", images="d", **dict.fromkeys([*LOSSES, "loss_kd"], ".4f"))
SHOWN |= dict(agree=".1%", accuracy=".2%", best=".2%", seconds=".1f")
COLUMNS = [*SHOWN, "seconds_synthesis", "seconds_distillation"]  # of log.csv


def seed_epoch(seed, epoch):
    """Seed torch from the two, hashed, so that no two epochs share random numbers. (The 0 is there
    for the sake of the published students: without it, all would be others.)

    epoch: its number; -1 for the images that `agree` is read on."""
    torch.manual_seed(random.Random(repr((seed, epoch, 0))).getrandbits(63))


def say(text):
    """A line on the console. stdout has the table and warnings, stderr the bars and errors."""
    tqdm.write(text)  # the bars make room
    sys.stdout.flush()


def show(row):
    """A row of the table on the console, a cell for each column of SHOWN; "-" for what was not
    measured."""
    line = ""
    for name, form in SHOWN.items():
        cell = "-" if row[name] is None else format(row[name], form)
        line += f" {cell:>8}"
    say(line)


def check_finite(losses, place):
    """UserError that names the first of the `losses`, a tensor of any shape, that is not finite.

    place: words for the epoch, and names for the dimensions of `losses`."""
    bad = (~losses.isfinite()).nonzero().tolist()
    if bad:
        raise UserError(f"a loss is not finite, {place} = {bad[0]}: lower --lr or --generator-lr")


@contextlib.contextmanager
def replaced(path):
    """with replaced(path) as temporary: write that file. Then it takes the place of `path` at once,
    so that a kill at any moment leaves the old one or the new one, whole."""
    temporary = Path(f"{path}.tmp")
    with explained(f"cannot write {path}"):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)  # the file system does it at once, or not at all
        finally:
            temporary.unlink(missing_ok=True)  # after an error, a full disk say


def write_table(path, rows):
    """rows: dicts with the same keys, the columns of a csv file. None is an empty cell."""
    with replaced(path) as temporary, open(temporary, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


def settings_of(run):
    """What decides the numbers of a run, as json can write it: the flags, but for FREE, and what
    the teacher is, wherever its file lies."""
    settings = {key: value for key, value in vars(run.args).items() if key not in FREE}
    return settings | {key: run.info[key] for key in (*TEACHER, "sha256")}


def save(run, images, labels, losses):
    """Write the table, a picture, the student, what the epoch has made, and last the checkpoint.

    images: uint8 (n, ch, H, W). labels: (n,). losses: (batches, steps, len(LOSSES) + 1). All of the
    epoch, and on the CPU. UserError if a file cannot be written."""
    args, out, info, row = run.args, run.args.out, run.info, run.rows[-1]
    epoch = f"epoch_{row['epoch']:03d}"
    write_table(out / "log.csv", run.rows)
    last = slice(-args.synthesis_batch, None)  # the epoch's last batch
    with replaced(out / f"samples/{epoch}.png") as temporary:
        draw_samples(temporary, images[last], labels[last], info["class_names"])
    about = {key: info[key] for key in TEACHER}
    about |= dict(
        architecture=args.student,
        accuracy=row["accuracy"],
        trained_on=f"images made from {args.teacher}",
        command=run.command,
    )
    save_model(out / "student.safetensors", run.student, about)
    save_tensors(out / f"memory/{epoch}.pt", dict(images=images, labels=labels, losses=losses))
    # All but what is made anew before the next step: a generator whose life is over, Z's matrices.
    state = {name: getattr(run, name).state_dict() for name in PARTS}
    if len(run.rows) % args.generator_life == 0:
        del state["generator"], state["noisy_layer"]
    elif args.noisy_layer == "reinit":
        del state["noisy_layer"]["weight"], state["noisy_layer"]["bias"]
    state |= dict(settings=settings_of(run), average=run.bn_loss.average, rows=run.rows)
    save_tensors(out / "checkpoint.pt", state)


def save_tensors(path, content):
    """For `load_tensors`. UserError if it cannot be written."""
    with replaced(path) as temporary:
        torch.save(content, temporary)


def load_tensors(path, device):
    """What torch.save wrote, with its tensors on the device. Runs no code from the file. UserError
    if it is missing or damaged."""
    with explained(f"{path} is not an intact file of this nayer.py"):
        return torch.load(path, map_location=device, weights_only=True)


def begin(argv):
    """The run that these flags ask for. A checkpoint in --out is put into it, and it goes on as if
    it had not been stopped, on a CPU to the bit; UserError if that is damaged, or of other
    settings."""
    args = parse_args(argv)
    torch.manual_seed(args.seed)  # for the weights of S; each epoch has a seed of its own
    teacher = load_teacher(args)
    args = parse_args(argv, teacher.info["image_size"])
    lock, state = open_folder(args)
    run = Run(args, teacher)
    run.lock = lock
    run.command = shlex.join(["nayer.py", *argv])
    precision = "bf16" if args.amp else "float32 (bf16 is not wanted, or not fast here)"
    say(f"on {run.device} in {precision}, into {args.out}")
    # The head of the table. Each column has nine letters, without the `loss_` of its name.
    say("".join(f" {name.removeprefix('loss_'):>8}" for name in SHOWN))
    if state:
        with explained(f"{args.out}/checkpoint.pt is not of this nayer.py"):
            resume(run, state)
    run.agreement = agreement_batches(run)
    return run


def open_folder(args):
    """(the lock on --out, the state of the checkpoint there, or None in a new folder). Where a run
    goes on, args.amp becomes what it was.

    UserError if there is a checkpoint and no --resume, if it is damaged, or if another run is at
    work there: each holds a lock, which the operating system takes back when its process ends,
    however it ends. A second cell of the same notebook is not refused."""
    with explained(f"cannot write to {args.out}, or another run does: choose another --out"):
        lock = filelock.FileLock(args.out / "lock", timeout=0, is_singleton=True)
        lock.acquire()  # makes the folder
    path = args.out / "checkpoint.pt"
    if not path.exists():
        return lock, None
    check(args.resume, f"{path} is of a run: go on with --resume, or choose another --out")
    state = load_tensors(path, pick_device(args.device)[0])
    with explained(f"{path} is not of this nayer.py"):
        if args.amp is None:  # as it was, also on another machine
            args.amp = state["settings"]["amp"]
    return lock, state


def resume(run, state):
    """Go back to the state that a checkpoint holds."""
    new, old = settings_of(run), state["settings"]
    changed = [f"{key} {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]
    check(not changed, f"{run.args.out} is of a run with other settings: {'; '.join(changed)}")
    for name in PARTS:
        whole = getattr(run, name).state_dict()
        whole.update(state.get(name, {}))  # what is not kept stays as it is: see `save`
        getattr(run, name).load_state_dict(whole)
    run.bn_loss.average = state["average"]
    run.rows = state["rows"]
    for row in run.rows:  # all epochs, so that the ring stands as it did
        made = load_tensors(run.args.out / f"memory/epoch_{row['epoch']:03d}.pt", run.device)
        run.memory.add(made["images"])


NEXT = """The student is {out}/student.safetensors, its images are in {out}/samples.
(README.md says how a network of your own is loaded.)
export it:           python -c "import nayer, torch; \
S = nayer.load_model(r'{out}/student.safetensors'); \
torch.export.save(torch.export.export(S, (torch.rand{shape},)), 'student.pt2')"
your own teacher:    python nayer.py --teacher my_teacher.py:load (see README.md)"""


def finish(run):
    """summary.json and the last lines on the console. Returns the summary: the scores, in [0, 1] or
    None, the last row of log.csv, and the settings."""
    args, out, last = run.args, run.args.out, run.rows[-1]
    summary = dict(
        student_accuracy=last["accuracy"],
        best_accuracy=last["best"],
        teacher_accuracy=run.info.get("accuracy"),
    )
    say(NEXT.format(out=out, shape=(2, *run.shape, run.shape[1])))
    summary |= last | dict(device=str(run.device), torch=torch.__version__, teacher=args.teacher)
    summary["settings"] = settings_of(run)
    run.lock.release()  # the run is complete: the summary adds nothing to its files
    with replaced(out / "summary.json") as temporary:
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
    return summary


# ---- Errors and devices --------------------------------------------------------------------------
class UserError(Exception):
    """Something the user can put right: the program shows it as one line and exits with code 1."""


def check(condition, message):
    """UserError(message) unless the condition holds. message: one line that says what is wrong and
    what to do."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def explained(message, file=""):
    """Any error in the block becomes a UserError: `message`, and as the reason the kind of error,
    what it says, and, where it arose in the user's `file` or file.py:function, in which line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        place = ""
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # on one line
        for frame in traceback.extract_tb(error.__traceback__):
            if file.startswith(frame.filename):
                place = f", line {frame.lineno} of {frame.filename}"
        raise UserError(f"{message} ({reason}{place})") from error


def pick_device(name):
    """(device, whether bf16 is fast on it). auto: cuda if it is there, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    # Whether it is there, an operation tells.
    with explained(f"there is no {device} here: use --device cpu"):
        torch.zeros(1, device=device)
    if device.type == "cuda":
        # Before Ampere bf16 is slow, and float16 would need scaled losses.
        return device, torch.cuda.get_device_capability() >= (8, 0)
    return device, name == "cpu" and torch.cpu._is_avx512_bf16_supported()


def run_script(main):
    """Run main() as a program: one clear line and an exit code in the place of a traceback.

    0: done. 1: what the user can put right, or what the machine lacks. 2: a wrong command line, see
    `parse_args`. 130: stopped by Ctrl-C. A fault of this program keeps its traceback."""

    warnings.simplefilter("ignore")  # of libraries: a letter that a font has not, an old default
    sys.stdout.reconfigure(errors="backslashreplace")  # for a console without some letter
    try:
        return main()
    except KeyboardInterrupt:  # Ctrl-C
        print("\nstopped: go on with the same command and --resume", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        line = str(error)
    except RuntimeError as error:
        if re.search("out of memory|allocate memory|tried to allocate", str(error)):
            line = "out of memory: lower --synthesis-batch, --student-batch, --bank-size or --reuse"
        elif "No working C++ compiler" in str(error):
            line = "--compile finds no compiler here: install one, or leave --compile out"
        else:
            raise
    sys.exit(f"{Path(sys.argv[0]).name}: error: {line}")


if __name__ == "__main__":
    run_script(main)
