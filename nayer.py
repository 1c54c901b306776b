# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.4", "torchvision>=0.19", "transformers>=4.45", "safetensors>=0.4.5",
#     "scikit-learn>=1.4", "matplotlib>=3.8", "tqdm>=4.66",
# ]
# ///
"""NAYER: data-free knowledge distillation by noisy-layer generation, in one file.

A trained teacher T is given, its training images are not. A generator G learns to make images on
which T is sure of a chosen class and whose batch statistics match those stored in T's BatchNorm
layers; a student S learns from T on those images. Earlier methods feed G random noise. NAYER feeds
it the label-text embedding (LTE) of the class name, which is constant, and puts the randomness into
a noisy layer Z between the two, drawn anew for every batch:  x = G(Z(e_y)).

    python nayer.py                            digits on a laptop's CPU, no download
    python nayer.py --dataset cifar10          the published job, for a GPU
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
    B images in a batch, C classes, D embedding size, H hidden size, N noisy matrices

Tags: [paper] stated in the paper, [code] only in the authors' code, [ours] our own decision. The
algorithm is `main`, at the end. Paper: Tran et al., NAYER: Noisy Layer Data Generation for
Efficient and Effective Data-free Knowledge Distillation, CVPR 2024, arXiv 2310.00258.
"""

# fmt: off
import argparse
import contextlib
import ctypes
import json
import math
import os
import random
import re
import runpy
import shlex
import signal
import sys
import time
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from torchvision import datasets, models, utils
from torchvision.transforms import v2
from tqdm import tqdm

SHIPPED = Path(__file__).resolve().parent / "teachers"  # trained teachers, label embeddings
TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # the shipped embeddings are its
NOISE_SIZE = 256  # numbers per image, for --label-input noise
PRESETS = ["digits", "cifar10", "cifar100", "tiny_imagenet", "cpu"]  # columns in parse_args
SMALL = 64  # pixels; larger images need a deeper generator [code], and stay on disk until needed
IMAGES = dict(  # pixels, channels, mean and standard deviation per channel
    digits=(16, 1, [0.3052], [0.3185]),
    cifar10=(32, 3, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
    cifar100=(32, 3, [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761]),
    tiny_imagenet=(64, 3, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    folder=(None, 3, None, None),
)

# ---- Flags and presets --------------------------------------------------------------------------
def number(kind, low, high=math.inf):
    """An argparse type: a finite number of this kind in [low, high]."""
    def parse(text):
        if not low <= (value := kind(text)) <= high or value == math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low}, {high}]")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message where text is no number at all
    return parse

def parse_args(argv=None):
    """The command line -> a Namespace. A wrong one ends with one line on stderr and exit code 2.
    A tuple of defaults has a value for each preset: digits [ours: small; a weak L_adv keeps images
    legible], cifar10 (and folders), cifar100, tiny_imagenet [code: the authors' scripts; no result
    belongs to their parser's defaults], cpu [ours: the best wrn16_1 in an hour of two cores]."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # which preset?
    for flag in ("--dataset", "--teacher", "--preset"):
        early.add_argument(flag, nargs="?")
    known = early.parse_known_args(argv)[0]  # all other flags may still be wrong
    data = known.dataset or ("folder" if ".py:" in (known.teacher or "") else "digits")
    preset = known.preset or (data if data in PRESETS else "cifar10")
    column = PRESETS.index(preset) if preset in PRESETS else 0  # argparse refuses it below
    look = dict(formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    parser = argparse.ArgumentParser("nayer.py", description=__doc__.split("\n")[0], **look)
    parser.error = lambda message: parser.exit(2, f"nayer.py: error: {message}\n")
    count, positive, weight = number(int, 1), number(float, 1e-9), number(float, 0)
    switch = argparse.BooleanOptionalAction
    def add(flag, kind, default, text, **more):
        default = default[column] if isinstance(default, tuple) else default  # a preset's
        how = dict(action=kind) if kind in (switch, "store_true") else dict(type=kind)
        group.add_argument(flag, default=default, help=text, **how, **more)
    group = parser.add_argument_group("run")
    add("--dataset", str, data, "the images to score on", choices=IMAGES)
    add("--preset", str, preset, "whose defaults; cpu: the best in an hour", choices=PRESETS)
    add("--data-root", Path, Path("data"), "folder of the data sets, for scoring alone")
    add("--out", Path, None, "folder to write to (None: runs/<dataset>-<teacher>-<student>)")
    add("--seed", number(int, 0, 2**63 - 1), 0, "of all random numbers")
    add("--device", str, "auto", "auto: the first there is", choices=["auto", "cuda", "mps", "cpu"])
    add("--resume", "store_true", False, "go on after the last finished epoch of the run in --out")
    add("--eval", switch, True, "score the student on real test images after every epoch")
    add("--amp", switch, None, "bf16 autocast (None: where the device is fast with it)")
    add("--compile", switch, False, "torch.compile for T, S and G")
    group = parser.add_argument_group("networks and class names")
    add("--teacher", str, ("wrn16_2", *["wrn40_2"] * 4), "T: name, model file, file.py:function")
    add("--student", str, ("wrn16_1", *["wrn16_2"] * 3, "wrn16_1"), "S: name, or file.py:function")
    add("--class-names", Path, None, "file with a name per line (None: those of the teacher)")
    add("--text-encoder", str, TEXT_ENCODER, "Hugging Face name, or local folder")
    add("--image-size", number(int, 8, 224), None, "pixels, a multiple of 4 (None: the teacher's)")
    add("--mean", float, None, "per channel, as T was trained (None: its file says)", nargs="+")
    add("--std", number(float, 1e-6), None, "likewise", nargs="+")
    add("--prompt", str, ("a photo of the digit {class}", *["a photo of {class}"] * 4), "to embed")
    group = parser.add_argument_group("loop")
    add("--warmup-epochs", number(int, 0), (2, 20, 20, 20, 9), "epochs that only fill M")
    add("--warmup-batches", count, (4, 10, 10, 20, 6), "batches synthesised in each of these")
    add("--epochs", count, (8, 100, 100, 100, 28), "E: epochs that follow, with distillation")
    add("--batches", count, (1, 2, 2, 4, 4), "likewise, in each of these")
    group = parser.add_argument_group("generator")
    add("--synthesis-batch", number(int, 2), (100, 400, 400, 200, 200), "B: images in a batch")
    add("--generator-steps", count, (10, 30, 40, 60, 8), "g: steps of Z and G for a batch")
    add("--generator-lr", positive, 4e-3, "of Adam, which starts afresh with every batch")
    add("--generator-life", count, (*[10] * 4, 1000), "epochs until a new generator replaces it")
    add("--generator-width", count, (32, *[64] * 4), "f: channels of its last hidden layer")
    add("--alpha-ce", weight, (1.0, *[0.5] * 4), "weight of L_CE")
    add("--alpha-bn", weight, (3.0, *[10.0] * 4), "weight of L_BN; 0 if T has no BatchNorm")
    add("--alpha-adv", weight, (0.2, *[1.33] * 4), "weight of L_adv, off in the warm-up")
    add("--bn-momentum", number(float, 0, 1), 0.9, "share of the moving average in L_BN; 0: none")
    add("--label-input", str, "lte", "what Z reads", choices=["lte", "onehot", "noise"])
    kinds = ["reinit", "fixed", "off"]  # Z drawn for each batch; once; no Z at all
    add("--noisy-layer", str, "reinit", "drawn for each batch, once, or no Z at all", choices=kinds)
    add("--images-per-matrix", count, None, "that share a matrix of Z (None: one of each class)")
    add("--lte-norm", switch, True, "the BatchNorm between the LTE and Z")
    group = parser.add_argument_group("student")
    add("--student-steps", count, (64, 400, 400, 1000, 1200), "distillation steps per epoch")
    add("--student-batch", number(int, 2), (64, 512, 512, 256, 64), "images in a student step")
    add("--reuse", count, (4, 1, 1, 1, 4), "R: times that S learns from an answer of T")
    add("--mix", number(float, 0, 1), (*[0.0] * 4, 0.5), "share of views blended with another")
    add("--lr", positive, (0.2, 0.2, 0.2, 0.1, 0.1), "of SGD, falls as a cosine over E to 2e-4")
    add("--weight-decay", weight, (5e-4, *[1e-4] * 3, 5e-4), "of SGD (momentum 0.9)")
    add("--nesterov", switch, (True, *[False] * 3, True), "look ahead: Nesterov's kind of momentum")
    add("--temperature", positive, 20.0, "tau: softens the answers of T and S in L_KD")
    add("--bank-size", count, None, "most images kept, the oldest give way (None: all are kept)")
    add("--crop-padding", number(int, 0, 28), (1, *[4] * 4), "zeros around an image to crop")
    add("--flip", switch, (False, *[True] * 4), "mirror half of the images")
    args = parser.parse_args(argv)
    if "{class}" not in args.prompt:
        parser.error(f"--prompt {args.prompt!r}: write {{class}} where the class name belongs")
    if args.image_size and args.image_size % 4:
        parser.error(f"--image-size {args.image_size} is not a multiple of 4")
    args.out = args.out or Path(f"runs/{data}-{Path(args.teacher).stem}-{Path(args.student).stem}")
    return args

# ---- Label-text embeddings (LTE) ------------------------------------------------------------ e_y
@torch.no_grad()
def label_text_embeddings(class_names, encoder, prompt):
    """What a language model makes of the class names: (C, D) float32, in the order of the names.
    encoder: Hugging Face name or local folder. A model with `get_text_features` gives that (the
    paper's is the text tower of CLIP ViT-B/32, D = 512, not normalised [code]); any other gives the
    mean of its last hidden states over the tokens [ours]. prompt: text with "{class}" in it. Raises
    UserError if there is no such encoder. Reads safetensors only, runs no remote code. The presets'
    names, prompts and encoder are looked up in teachers/."""
    shipped = SHIPPED / "label_embeddings.safetensors"
    tensors, about = read_safetensors(shipped) if shipped.exists() else ({}, {})
    for dataset, text in about.items():
        if json.loads(text) == [encoder, prompt, class_names]:
            return tensors[dataset].float()  # (C, D)
    with explained(f"no text encoder {encoder} here or on the hub; see --text-encoder"):
        from transformers import AutoModel, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
        model = AutoModel.from_pretrained(encoder, use_safetensors=True, trust_remote_code=False)
    texts = [prompt.replace("{class}", re.sub("[_-]", " ", name)) for name in class_names]  # [code]
    padding = "max_length" if model.config.model_type.startswith("siglip") else True  # as trained
    how = dict(truncation=True, return_tensors="pt", return_token_type_ids=False)
    tokens, model = tokenizer(texts, padding=padding, **how), model.eval()
    if hasattr(model, "get_text_features"):
        features = model.get_text_features(**tokens)
        return getattr(features, "pooler_output", features).float()  # transformers 5 wraps it
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][:, :, None]
    return ((hidden * mask).sum(1) / mask.sum(1)).float()  # (C, tokens, D) -> (C, D)

# ---- Noisy layer and generator ---------------------------------------------------- x = G(Z(e_y))
class NoisyLayer(nn.Module):
    """Z: inputs (B, D) -> hidden (B, H). BatchNorm1d, then N random matrices, re-drawn each batch.
    Row i goes through matrix i // images_per_matrix. One matrix serves one image of each class
    ("K-to-1", K = C) [paper]: inside such a set the images differ by their LTE, and two images of
    one class differ by their matrix. Matrices are trained with G; `reinitialize` draws them."""
    def __init__(self, embedding_size, num_matrices, images_per_matrix, hidden_size=1000):
        super().__init__()
        self.images_per_matrix = images_per_matrix
        self.norm = nn.BatchNorm1d(embedding_size)  # tells apart LTEs that lie close [paper]
        # Not a list of nn.Linear: N matrices in one tensor are one product and one Adam update.
        self.weight = nn.Parameter(torch.empty(num_matrices, embedding_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_matrices, 1, hidden_size))  # (N, 1, H)
        self.reinitialize()
    def reinitialize(self):
        """Draw all matrices from N(0, 1), not divided by the fan-in; bias 0; norm kept [code]."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)
    def forward(self, inputs):
        # torch.cat([rows @ W + b for rows, W, b in zip(sets, self.weight, self.bias)]), K rows a
        # set, as one product: the last set is filled up with zeros, and cut back.
        (B, D), K = inputs.shape, self.images_per_matrix
        sets = F.pad(self.norm(inputs), (0, 0, 0, len(self.weight) * K - B)).view(-1, K, D)
        hidden = torch.baddbmm(self.bias, sets, self.weight)  # (N, K, D) @ (N, D, H) -> (N, K, H)
        return hidden.flatten(0, 1)[:B]  # (B, H)

class UpsampleConv(nn.Conv2d):
    """Doubles the maps (nearest pixel), then convolves: (B, ch, h, w) -> (B, out, 2h, 2w).
    [ours] A 3x3 window of doubled pixels holds only 2x2 different ones. So the weights that meet
    the same pixel are added up first, and a transposed convolution needs 4 products in place of 9.
    Without it a generator step takes 28 % longer (two Zen 3 cores, float32)."""
    def forward(self, maps):
        kernel = F.avg_pool2d(F.pad(self.weight, [1] * 4), 2, 1, divisor_override=1)  # 3x3 -> 4x4
        kernel = kernel.flip(2, 3).transpose(0, 1)  # a transposed convolution reads it backwards
        return F.conv_transpose2d(maps, kernel, stride=2, padding=1)

class Generator(nn.Module):
    """G: hidden (B, H) -> images (B, channels, image_size, image_size), float32 in [0, 1].
    A linear layer makes a small map; up-sampling and 3x3 convolutions enlarge it, twice for images
    of up to 64 pixels, four times for larger ones [code]. Stays in train mode for all its life."""
    def __init__(self, hidden_size, channels, image_size, width=64):
        super().__init__()
        f, self.image_size = width, image_size
        widths = [2 * f, 2 * f, f] + ([] if image_size <= SMALL else [f, f])
        start = math.ceil(image_size / 2 ** (len(widths) - 1))  # 8, to become 16 and 32
        self.shape = (widths[0], start, start)
        self.start = nn.Linear(hidden_size, math.prod(self.shape))  # H -> 2f (s/4)^2
        layers = [nn.BatchNorm2d(widths[0])]  # then twice: up, conv, BN, LeakyReLU
        for before, after in zip(widths, widths[1:]):
            layers += [UpsampleConv(before, after, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.LeakyReLU(0.2, inplace=True)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(f, channels, 3, padding=1))
    def forward(self, hidden):
        maps = self.start(hidden).view(-1, *self.shape)  # (B, H) -> (B, 2f, s/4, s/4)
        images = self.layers(maps.contiguous(memory_format=torch.channels_last)).float().sigmoid()
        return images[:, :, : self.image_size, : self.image_size]  # doubling makes 80 of 68

def class_sets(num_classes, batch, device="cpu"):
    """Labels (B,): sets of all C classes in order; a random subset, without repeats, at the end.
    [ours] So any B and C will do (theirs: a multiple of C); no matrix meets a class twice."""
    sets, rest = divmod(batch, num_classes)
    in_order = torch.arange(num_classes, device=device).repeat(sets)  # 0 .. C-1, 0 .. C-1, ...
    return torch.cat([in_order, torch.randperm(num_classes, device=device)[:rest]])

# ---- Losses --------------------------------------------------------------------------------------
class BatchStatistics(torch.autograd.Function):
    """x (B, ch, H, W) -> mean and biased variance of each channel, float32 (ch,) even for bf16 x.
    [ours] Half of BatchNorm's own kernel reads x, and the gradient is one multiply-add, n = B H W:
        dL/dx = (dL/dmean + 2 (x - mean) dL/dvar) / n
    Composed from var_mean, a generator step takes 30 % longer (two Zen 3 cores, float32)."""
    @staticmethod
    def forward(ctx, x):
        if x.device.type == "mps" or torch.compiler.is_compiling():  # both lack the kernel
            var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
        else:  # it wants two vectors to update; a share of 0 leaves them as they are
            unused = torch.zeros(2, x.shape[1], device=x.device)
            mean, var = torch.batch_norm_update_stats(x, *unused, 0.0)
        ctx.save_for_backward(x, mean)
        return mean, var
    @staticmethod
    def backward(ctx, grad_mean, grad_var):
        x, mean = ctx.saved_tensors
        n = x.numel() // x.shape[1]  # pixels in a channel
        slope = 2 * grad_var / n
        offset = grad_mean / n - slope * mean
        offset, slope = (v.to(x.dtype).view(1, -1, 1, 1) for v in (offset, slope))
        return torch.addcmul(offset, x, slope)

class BatchNormLoss:
    """L_BN = sum over T's BatchNorm2d layers of |mu_T - mu|_2 + |var_T - var|_2.
    mu and var are what the layers see in T's last forward pass, mixed with an average over earlier
    batches: mu = m * mu_average + (1 - m) * mu_batch, the same for var [code]. With m = 0.9 the
    gradient is scaled by 0.1; without that, L_BN drowns the class term. The average outlives the
    generator. Hooks read the layers' inputs, and only while gradients are recorded, so that they
    cost nothing while the student learns. `.value` is the loss of the last pass, a float32 scalar;
    `.update()` moves the average, once per batch (first, sets it); `.close()` ends the hooks."""
    def __init__(self, teacher, momentum):
        layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d | nn.SyncBatchNorm)]
        self.layers = [m for m in layers if m.running_mean is not None]  # with statistics to meet
        self.momentum, self.average, self.target = momentum, None, None
        self.seen = {}  # number of a layer -> (mu, var), of the layers that T really passes
        hook = nn.Module.register_forward_pre_hook
        self.hooks = [hook(m, partial(self.read, i)) for i, m in enumerate(self.layers)]
    def read(self, i, layer, inputs):
        if torch.is_grad_enabled():
            self.seen[i] = BatchStatistics.apply(inputs[0])
    def mixed(self):
        """All layers' mu and var, one after the other in one vector, mixed with the average."""
        batch = torch.cat([part for statistics in self.seen.values() for part in statistics])
        if self.average is None:
            return batch  # at first there is none
        return self.momentum * self.average + (1 - self.momentum) * batch
    @property
    def value(self):
        if self.target is None:  # the same vector of what T has stored; and whose each number is
            seen = [self.layers[i] for i in self.seen]
            parts = [part for m in seen for part in (m.running_mean, m.running_var)]
            owner = torch.arange(len(parts)).repeat_interleave(torch.tensor([*map(len, parts)]))
            self.target, self.owner = torch.cat(parts), owner.to(parts[0].device)
        squares = (self.target - self.mixed()).square()
        sums = squares.new_zeros(2 * len(self.seen)).index_add(0, self.owner, squares)
        return (sums + 1e-20).sqrt().sum()  # the slope of sqrt(0) would be infinite
    @torch.no_grad()
    def update(self):
        self.average = self.mixed() if self.seen else None
    def close(self):
        for hook in self.hooks:
            hook.remove()

def adversarial_loss(student_logits, teacher_logits):
    """L_adv = -mean over the batch of 1[argmax S = argmax T] * KL(T || S): (B, C) twice -> scalar.
    G lowers it with images on which S names T's class but is far from T's probabilities: those that
    S can still learn from. Where S names another class there is enough to learn already, so the
    term is 0, and cannot push the image away from its class altogether."""
    s, t = student_logits.float(), teacher_logits.float()  # (B, C)
    divergence = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True)
    return -(divergence.sum(1) * (s.argmax(1) == t.argmax(1))).mean()

def distillation_loss(student_logits, teacher_logits, temperature):
    """L_KD = tau^2 * KL(softmax(T / tau) || softmax(S / tau)), mean over the batch -> scalar.
    A large tau shows S which wrong classes T finds less wrong; tau^2 keeps the gradient's size."""
    s = (student_logits.float() / temperature).log_softmax(1)
    t = (teacher_logits.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)

# ---- Memory bank and augmentation ------------------------------------------------------------- M
class MemoryBank:
    """M: the synthetic images, uint8 (capacity, ch, H, W), on the device; theirs: PNG files [code].
    S learns from all images so far, or it would forget. A ring: the newest replace the oldest."""
    def __init__(self, capacity, channels, image_size, device="cpu"):
        shape = (capacity, channels, image_size, image_size)
        self.images = torch.empty(shape, dtype=torch.uint8, device=device)
        self.added = 0  # images ever added
    def __len__(self):
        return min(self.added, len(self.images))
    def add(self, images):
        """images: uint8 (B, ch, H, W)."""
        kept = slice(-len(self.images), None)  # of more images than it holds, the last
        places = torch.arange(self.added, self.added + len(images), device=images.device)[kept]
        self.images[places % len(self.images)] = images[kept]
        self.added += len(images)
    def sample(self, count):
        """`count` images, uint8, drawn uniformly with replacement [ours]."""
        return self.images[torch.randint(len(self), (count,), device=self.images.device)]

class Augment:
    """Random crop after zero padding (of the pixels), random mirroring, normalisation; per image.
    images (B, ch, H, W), float in [0, 1] -> the same shape, normalised. Gradients pass through: G
    learns images that T knows wherever they are cropped. `normalize` alone is for scoring."""
    def __init__(self, mean, std, padding, flip, device="cpu"):
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
        self.padding, self.flip = padding, flip
    def normalize(self, images):
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
    def __call__(self, images):
        (B, ch, H, W), device = images.shape, images.device
        shift = torch.randint(2 * self.padding + 1, (2, B, 1), device=device)  # a crop's corner
        rows = shift[0] + torch.arange(H, device=device)  # (B, H)
        columns = shift[1] + torch.arange(W, device=device)  # (B, W)
        if self.flip:
            mirrored = torch.rand(B, 1, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        images = F.pad(images, [self.padding] * 4)  # (B, ch, H + 2p, W + 2p)
        images = images.gather(2, rows[:, None, :, None].expand(-1, ch, -1, images.shape[3]))
        images = images.gather(3, columns[:, None, None, :].expand(-1, ch, H, -1))
        return self.normalize(images)

# ---- Half-step 1. Over G and Z, minimise alpha_ce L_CE + alpha_bn L_BN + alpha_adv L_adv ---------
def synthesize(generator, noisy_layer, inputs, labels, teacher, student, bn_loss, augment,
               *, steps, lr, alpha_ce, alpha_bn, alpha_adv, tick=lambda: None):
    """One batch of images for `labels` (B,), from `inputs` (B, D), by `steps` steps of a new Adam.
    Returns the images of the step with the lowest total loss, before augmentation, uint8
    (B, ch, H, W), and the losses of every step (steps, 4): L_CE, L_BN, L_adv, their weighted sum.
    A term of weight 0 is not computed and counts as 0. Nothing leaves the device in the loop."""
    # S stays in eval mode: the authors' is in train mode from the second batch of an epoch on, so
    # that the statistics of its BatchNorm are overwritten by half-made images [code].
    student.eval().requires_grad_(False)
    parameters = [*generator.parameters(), *noisy_layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.5, 0.999), fused=True)
    zero = torch.zeros((), device=labels.device)
    best_images, best_loss, history = None, zero + torch.inf, []
    for _ in range(steps):
        images = generator(noisy_layer(inputs))  # x^ = G(Z(e_y))
        views = augment(images)  # afresh at each step; T and S see the same
        teacher_logits = teacher(views).float()  # and the hooks of bn_loss read along
        loss_ce = F.cross_entropy(teacher_logits, labels)  # be what y says
        loss_bn = bn_loss.value if alpha_bn else zero  # look like what T has seen
        loss_adv = adversarial_loss(student(views), teacher_logits) if alpha_adv else zero  # be new
        loss = alpha_ce * loss_ce + alpha_bn * loss_bn + alpha_adv * loss_adv  # of G and Z
        # Keep the best step's images without asking the device which step that is.
        shown, better = images.detach(), loss.detach() < best_loss
        best_images = shown if best_images is None else torch.where(better, shown, best_images)
        best_loss = torch.where(better, loss.detach(), best_loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(torch.stack([loss_ce, loss_bn, loss_adv, loss]).detach())
        tick()
    return (best_images * 255).round().byte(), torch.stack(history)

# ---- Half-step 2. Over S, minimise L_KD on images from M -----------------------------------------
def distill(teacher, student, memory, optimizer, augment,
            *, steps, batch, temperature, reuse=1, mix=0.0, tick=lambda: None):
    """One epoch: `steps` student steps on batches from M. Returns L_KD at every step (steps,).
    Nothing but T's softened answers is learnt from; the labels that G was asked for play no part.
    reuse R > 1 [ours]: T answers 1/R of the epoch's views, and S passes R times over them. R = 4
    takes 36 % less time (two Zen 5 cores); in pools of 16 batches S learns 0.1 to 1.7 points less.
    mix [ours]: share of views blended with another; 0.5: +3.0 points (1.2 to 4.8) on CIFAR-10."""
    student.train().requires_grad_(True)
    most = max(1, 2**27 // (batch * memory.images[0].numel()))  # batches of views in 512 MiB
    history, pool = [], min(-(-steps // reuse), most) if reuse > 1 else 1  # R = 1: always new ones
    for step in range(steps):
        if step % (pool * reuse) == 0:  # a new pool of views, and T's answers to them
            views = augment(memory.sample(pool * batch).float() / 255)
            if mix:
                weight, chosen = torch.rand(2, len(views), 1, 1, 1, device=views.device)
                views = views.lerp(views.roll(1, 0), weight * (chosen < mix))
            with torch.no_grad():
                answers = torch.cat([teacher(part) for part in views.split(batch)])
        if step % pool == 0:  # a new pass over the pool, in another order
            rows = torch.randperm(len(views), device=views.device).split(batch)
        now = rows[step % pool]  # the whole of it for R = 1
        loss = distillation_loss(student(views[now]), answers[now], temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
        tick()
    return torch.stack(history)

# ---- Networks -----------------------------------------------------------------------------------
def conv(inputs, outputs, size, stride=1):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)

class WideBlock(nn.Module):
    """Twice BatchNorm, ReLU, 3x3 convolution; and a shortcut, a 1x1 convolution between widths."""
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1, self.conv2 = conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3)
        self.shortcut = conv(inputs, outputs, 1, stride) if inputs != outputs else None
    def forward(self, x):
        h = F.relu(self.norm1(x), inplace=True)
        x = x if self.shortcut is None else self.shortcut(h)  # between widths the sum needs it
        return self.conv2(F.relu(self.norm2(self.conv1(h)), inplace=True)).add_(x)

class WideResNet(nn.Module):
    """wrn{depth}_{width} of Zagoruyko and Komodakis (2016): (B, ch, H, W) -> logits (B, C)."""
    def __init__(self, depth, width, num_classes, channels=3):
        super().__init__()
        self.stem, self.blocks, inputs = conv(channels, 16, 3), nn.Sequential(), 16
        for outputs in (16 * width, 32 * width, 64 * width):  # at full, half, quarter resolution
            for i in range((depth - 4) // 6):
                stride = 2 if i == 0 and outputs > 16 * width else 1
                self.blocks.append(WideBlock(inputs, outputs, stride))
                inputs = outputs
        self.norm, self.classifier = nn.BatchNorm2d(inputs), nn.Linear(inputs, num_classes)
        for layer in filter(lambda m: isinstance(m, nn.Conv2d), self.modules()):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    def forward(self, images):
        features = F.relu(self.norm(self.blocks(self.stem(images))), inplace=True)
        return self.classifier(features.mean((2, 3)))  # (B, 64 width, H/4, W/4) -> (B, C)

def build_model(name, num_classes, channels=3, image_size=32):
    """A network with random weights: wrn{depth}_{width}, or what torchvision has by that name.
    For images of up to 64 pixels, a ResNet gets a 3x3 stem, no max-pool and PyTorch's default
    initial weights; a VGG gets BatchNorm, max-pooling after its first three stages alone (four for
    64 pixels) and one linear layer [code]. Raises UserError for an unknown name."""
    small, wide = image_size <= SMALL, re.fullmatch(r"wrn(\d+)_([1-9]\d*)", name)
    if wide and int(wide[1]) in range(10, 1000, 6):
        return WideResNet(int(wide[1]), int(wide[2]), num_classes, channels)
    name += "_bn" if small and re.fullmatch(r"vgg\d\d", name) else ""
    known = name in models.list_models(module=models)
    check(known, f"unknown network {name}: use wrn16_1, wrn40_2, ... or a torchvision name")
    model = models.get_model(name, weights=None, num_classes=num_classes)
    if small and isinstance(model, models.ResNet):
        model.conv1, model.maxpool = conv(3, 64, 3), nn.Identity()
        for layer in filter(lambda m: isinstance(m, nn.Conv2d), model.modules()):
            layer.reset_parameters()
    if small and isinstance(model, models.VGG):
        pools = [i for i, layer in enumerate(model.features) if isinstance(layer, nn.MaxPool2d)]
        for i in pools[4 if image_size == 64 else 3 :]:  # the rest
            model.features[i] = nn.Identity()
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)
    if channels != 3:  # the first convolution is made anew
        first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        weight = first.weight[:, :1].detach().repeat(1, channels, 1, 1)
        first.in_channels, first.weight = channels, nn.Parameter(weight)
        first.reset_parameters()
    return model

# ---- Model files, and networks of your own ------------------------------------------------------
def save_model(path, model, info):
    """One self-describing safetensors file: the weights, with `info`, what json can write, as
    metadata: architecture, class_names, channels, image_size, mean, std, accuracy, ..."""
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    metadata = {key: json.dumps(value) for key, value in info.items()}
    write_atomically(path, lambda file: safetensors.torch.save_file(state, file, metadata))

def read_safetensors(path):
    """(tensors by name, metadata)"""
    with explained(f"{path} is not an intact safetensors file"):
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}

def load_model(path, model=None):
    """The network in a model file: on the CPU, float32, in eval mode, its description as `.info`.
    model: a network to put the weights into, for one that `build_model` does not know. Raises
    UserError if the file is missing, cut, or not one of ours. Runs no code from it."""
    state, metadata = read_safetensors(path)
    with explained(f"{path} is not an intact model file of nayer.py or teachers/train.py"):
        info = {key: json.loads(text) for key, text in metadata.items()}
        known = model is not None or ".py:" not in info["architecture"]
        check(known, f"{path}: give the network of {info['architecture']} to load_model, too")
        shape = (len(info["class_names"]), info["channels"], info["image_size"])
        model = model or build_model(info["architecture"], *shape)
        model.load_state_dict(state)
    model.info = info
    return model.float().eval()

def network_from_file(place):
    """The nn.Module that `file.py:function` returns: on the CPU, in float32, not wrapped."""
    path, _, function = place.rpartition(":")
    with explained(f"no network from {place}"):
        sys.path.insert(0, str(Path(path).resolve().parent))  # for what lies beside it
        model = runpy.run_path(path)[function]()  # runs that file
        model = model.module if isinstance(model, nn.DataParallel) else model
        check(isinstance(model, nn.Module), f"{place}: {type(model).__name__}, not an nn.Module")
        return model.cpu().float().requires_grad_(True)

@torch.no_grad()
def count_outputs(model, name, channels, image_size):
    """C, by a forward pass on two black images in both modes. UserError if one fails."""
    before = {key: value.clone() for key, value in model.state_dict().items()}  # see the end
    with explained(f"{name} does not take {channels} channels of {image_size}x{image_size} pixels"):
        for training in (True, False):
            logits = model.train(training)(torch.zeros(2, channels, image_size, image_size))
            shape = [*getattr(logits, "shape", [])] or type(logits).__name__
            text = f"{name} gives {shape} for two images, not logits (2, classes)"
            check(len(shape) == 2 and shape[0] == 2, text)
    model.load_state_dict(before)  # train mode has moved its statistics
    return logits.shape[1]

def load_teacher(args):
    """T, frozen, with its description as `.info`: a name in teachers/, a model file, or
    file.py:function, which cannot describe itself: --dataset and the flags do."""
    name, own, known = args.teacher, ".py:" in args.teacher, SHIPPED / "class_names.json"
    path = Path(name) if ".safetensors" in name else SHIPPED / f"{args.dataset}_{name}.safetensors"
    command = f"python teachers/train.py --dataset {args.dataset} --model {name}"
    check(own or ".safetensors" in name or path.exists(), f"no {path}; make it: {command}")
    teacher = network_from_file(name) if own else load_model(path)
    if own:
        teacher.info = dict(zip(("image_size", "channels", "mean", "std"), IMAGES[args.dataset]))
        names = json.loads(known.read_text()) if known.exists() else {}
        teacher.info |= dict(architecture=name, class_names=names.get(args.dataset))
    info, flags = teacher.info, ("image_size", "mean", "std")  # a flag goes before a file
    info |= {key: getattr(args, key) for key in flags if getattr(args, key)}
    if args.class_names:  # they go before those of the teacher
        with explained(f"cannot read --class-names {args.class_names}"):
            lines = args.class_names.read_text(encoding="utf-8").splitlines()
        info["class_names"] = lines = [line.strip() for line in lines if line.strip()]
        check(len({*lines}) == len(lines), f"--class-names {args.class_names} has a name twice")
    missing = ["--" + key.replace("_", "-") for key in flags if not info[key]]
    if not info["class_names"] and args.label_input == "lte":
        missing += ["--class-names (or --label-input onehot, which does without names)"]
    check(not missing, f"{name} does not describe itself: add {', '.join(missing)}")
    info["channels"] = channels = len(info["mean"]) if own else info["channels"]
    fits = len(info["mean"]) == len(info["std"]) == channels
    check(fits, f"--mean and --std take one number per channel: {channels}")
    C = count_outputs(teacher, name, channels, info["image_size"])  # also shows that T takes them
    info["class_names"] = names = info["class_names"] or [f"class {k}" for k in range(C)]
    check(len(names) == C, f"{len(names)} class names, but {name} has {C} outputs")
    return teacher.requires_grad_(False)

# ---- Images to score on: no line of this file reads a training image ----------------------------
def image_folder(folder, channels, size):
    """torchvision's ImageFolder (a folder per class) of uint8 images (channels, size, size): they
    are resized, cropped in the middle, and converted to gray or colour."""
    fit = [v2.Resize(size), v2.CenterCrop(size), v2.Grayscale(), v2.PILToTensor()]
    return datasets.ImageFolder(folder, v2.Compose(fit if channels == 1 else fit[:2] + fit[3:]))

def test_batches(dataset, root, class_names, channels, image_size, device):
    """Batches (images uint8 (500, channels, size, size), labels) to score on, in a fixed order:
    small images are decoded once and stay on the device, large ones are read for each pass."""
    size = IMAGES[dataset][0] or image_size
    check(size == image_size, f"the teacher reads {image_size} pixels, {dataset} has {size}")
    if dataset == "digits":
        from sklearn import datasets as small
        from sklearn import model_selection
        pixels, labels = small.load_digits(return_X_y=True)  # (1797, 64), values 0 to 16
        how = dict(test_size=500, stratify=labels, random_state=0)  # no teacher saw these 500
        _, pixels, _, labels = model_selection.train_test_split(pixels, labels, **how)
        images = torch.tensor(pixels).float().view(-1, 1, 8, 8) * (255 / 16)
        data = list(zip(F.interpolate(images, size=16, mode="bilinear").round().byte(), labels))
    elif dataset in ("cifar10", "cifar100"):
        kind, fit = getattr(datasets, dataset.upper()), v2.PILToTensor()
        with explained(f"{root / kind.base_folder} is missing or damaged; no download"):
            data = kind(root, train=False, download=True, transform=fit)
    elif dataset == "tiny_imagenet":  # the official archive: one folder, and a table
        val, wnids = root / "tiny-imagenet-200/val", root / "tiny-imagenet-200/wnids.txt"
        check(wnids.exists(), f"unpack tiny-imagenet-200.zip in {root}")
        data, wnids = image_folder(val, channels, size), wnids.read_text().split()
        rows = map(str.split, (val / "val_annotations.txt").read_text().splitlines())
        data.samples = [(str(val / "images" / row[0]), wnids.index(row[1])) for row in rows]
    else:
        data = image_folder(root / "test", channels, size)  # class folders
        unknown = sorted(set(data.classes) - set(class_names))
        check(not unknown, f"the teacher knows no class {unknown[:1]}, a folder in {root / 'test'}")
        data.samples = [(path, class_names.index(data.classes[k])) for path, k in data.samples]
    workers = min(8, os.cpu_count() or 1) if size > SMALL else 0  # processes that decode
    batches = torch.utils.data.DataLoader(data, batch_size=500, num_workers=workers)
    return batches if workers else [(images.to(device), y.to(device)) for images, y in batches]

# ---- Errors, files, devices ---------------------------------------------------------------------
class UserError(Exception):
    """Something the user can put right: the program shows it as one line and exits with code 1."""

def check(condition, message):
    """UserError(message) unless the condition holds."""
    if not condition:
        raise UserError(message)

@contextlib.contextmanager
def explained(message):
    """Any error in the block becomes a UserError: `message`, and the first line of the reason."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        lines = (str(error).strip() or type(error).__name__).splitlines()
        reason = lines[-1 if "worker" in lines[0] else 0][:200]  # a worker's begins with its place
        raise UserError(f"{message} ({reason})") from error

def write_atomically(path, write):
    """write(a temporary path), then move that file to `path`, which is never seen half-written."""
    temporary = Path(f"{path}.tmp")
    with explained(f"cannot write {path}"):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            os.replace(temporary, path)  # the file system does it at once, or not at all
        finally:
            temporary.unlink(missing_ok=True)  # after an error, a full disk say

def run_script(main):
    """Run main() as a program: one clear line and an exit code in the place of a traceback."""
    def stop(signum, frame):
        raise KeyboardInterrupt(signum)
    signal.signal(signal.SIGTERM, stop)
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps large freed blocks for the
        for parameter in (-1, -3):  # next step; else a generator step takes 14 % longer (Zen 3)
            ctypes.CDLL("libc.so.6").mallopt(parameter, 2**31 - 1)
    command = shlex.join(["python", *(arg for arg in sys.argv if arg != "--resume")])
    command = "the same torchrun command and" if "RANK" in os.environ else command
    kept = f"finished epochs are kept: go on with {command} --resume"
    hints = {"by peer|NCCL": f"another process of this run has ended; {kept}"}
    memory = "out of memory: lower --synthesis-batch, --student-batch or --bank-size"
    hints["out of memory|allocate memory|tried to allocate"] = memory
    try:
        main()
    except KeyboardInterrupt as signum:
        print(f"\nstopped; {kept}", file=sys.stderr)
        sys.exit(143 if signum.args else 130)  # 128 + SIGTERM, 128 + SIGINT
    except (UserError, OSError, RuntimeError) as error:
        known = [hint for part, hint in hints.items() if re.search(part, str(error))]
        if isinstance(error, RuntimeError) and not known:
            raise  # a fault of this program
        line = known[0] if isinstance(error, RuntimeError) else str(error).strip().splitlines()[-1]
        sys.exit(f"{Path(sys.argv[0]).name}: error: {line}")

def pick_device(name):
    """(device, whether bf16 is fast on it); auto: cuda, else mps, else cpu."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(n for n in there if there[n]) if name == "auto" else name
    check(there[name], f"there is no {name} device here: leave --device out, or use --device cpu")
    if name == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()  # torchrun's
        check(local < gpus, f"{gpus} GPUs here: lower --nproc-per-node to it")
        torch.cuda.set_device(local)
        return torch.device(name, local), torch.cuda.get_device_capability() >= (8, 0)  # Ampere
    bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)  # not in torch 2.4
    return torch.device(name), name == "cpu" and bf16()

# ---- Scores and pictures ------------------------------------------------------------------------
@torch.no_grad()
def accuracy(model, batches, augment):
    """Fraction in [0, 1] of images that `model` gets right; batches: (images uint8, labels)."""
    model, correct, seen, device = model.eval(), 0, 0, augment.mean.device
    for images, labels in batches:
        answers = model(augment.normalize(images.to(device).float() / 255)).argmax(1)
        correct, seen = correct + (answers == labels.to(device)).sum(), seen + len(labels)
    return float(correct) / seen

@torch.no_grad()
def agreement(teacher, student, images, augment):
    """Fraction of `images`, uint8 (B, ch, H, W), on which S names the class that T names."""
    parts = images.split(500)  # no more at once than a scoring batch
    named = [teacher(augment.normalize(part.float() / 255)).argmax(1) for part in parts]
    return accuracy(student, zip(parts, named), augment)

def draw_samples(path, images, labels, class_names):
    """Images uint8 (B, ch, H, W): a column for each of at most 20 classes, its name on top."""
    shown, side = labels.unique().tolist(), images.shape[-1] + 1  # with a line between two
    shown = shown[:: math.ceil(len(shown) / 20)]
    columns, names = [images[labels == k][:8].cpu() for k in shown], [class_names[k] for k in shown]
    cells = [column[row] for row in range(min(map(len, columns))) for column in columns]
    grid = utils.make_grid(torch.stack(cells), len(shown), padding=1, pad_value=255)
    axes = Figure(figsize=(0.7 * len(shown), 0.7 * len(cells) / len(shown) + 0.5)).subplots()
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    upright = max(map(len, names)) > 8  # long names stand
    axes.set_xticks([side * (k + 0.5) for k in range(len(names))], names, rotation=90 * upright)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelleft=False)
    axes.spines[:].set_visible(False)
    axes.figure.savefig(path, dpi=100, format="png", bbox_inches="tight")

def draw_curve(path, rows, teacher_accuracy):
    """Against seconds: test accuracy, with the teacher's as a line; the unweighted losses."""
    left, right = Figure(figsize=(10, 4), layout="constrained").subplots(1, 2)
    left.axhline(teacher_accuracy or math.nan, color="gray", linestyle="--", label="teacher")
    for column in ("accuracy", "agree", "loss_ce", "loss_bn", "loss_adv", "loss_kd"):
        axes = right if column.startswith("loss") else left
        points = [(row["seconds"], abs(row[column])) for row in rows if row.get(column)]
        axes.plot(*zip(*points or [(0, math.nan)]), ".-", label=column)
    left.set(xlabel="seconds", title="Accuracy, and agreement with T on images apart")
    right.set(xlabel="seconds", yscale="log", title="Losses, unweighted, without their signs")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    left.figure.savefig(path, dpi=100, format="png")

# ---- The run: what the loop works on, and what it leaves on disk --------------------------------
class Run:
    """T, S, Z, G, M, the label embeddings and the test images; the table of epochs; the checkpoint.
    checkpoint.pt is written last in every epoch, so that a kill at any moment leaves this epoch's
    state or the one before; memory/ holds the bank's images, a file an epoch. No random state is
    kept: the numbers of an epoch follow from --seed, the epoch and the rank alone [ours]."""
    FREE = "out preset data_root device resume eval compile".split()  # flags that change no number
    SHOWN = dict(epoch="d", images="d", loss_ce=".4f", loss_bn=".4f", loss_adv=".4f", loss_kd=".4f")
    SHOWN |= dict(agree=".1%", accuracy=".2%", best=".2%", seconds=".1f", left=".0f")  # on a line
    SPENT = "seconds_synthesis", "seconds_distillation", "seconds_evaluation"  # since the start
    STEP = "epoch batch step loss_ce loss_bn loss_adv loss".split()  # a row of generator.csv
    def __init__(self, args):
        self.args, (self.device, fast_bf16) = args, pick_device(args.device)
        args.amp = fast_bf16 if args.amp is None else args.amp  # where bf16 pays
        self.rank = int(os.environ.get("RANK", 0))  # this process among those of torchrun
        self.ranks = int(os.environ.get("WORLD_SIZE", 1))  # of how many
        self.share = lambda count: math.ceil(count / self.ranks)  # what each rank has to do of it
        self.say = partial(print, flush=True) if self.rank == 0 else lambda text: None
        torch.manual_seed(args.seed)  # for the weights of S; begin() seeds the epochs
        torch.backends.cudnn.benchmark = True  # the fastest kernels that a trial finds
        torch.set_float32_matmul_precision("high")  # TF32, where bf16 is not used
        self.teacher, name = load_teacher(args), args.student
        self.info = info = self.teacher.info
        self.names, self.shape = info["class_names"], (info["channels"], info["image_size"])
        size = (len(self.names), *self.shape)  # C, ch, H
        self.student = network_from_file(name) if ".py:" in name else build_model(name, *size)
        outputs = count_outputs(self.student, name, *self.shape)
        check(outputs == size[0], f"{name} has {outputs} outputs, the teacher {size[0]}")
        self.bn_loss = BatchNormLoss(self.teacher, args.bn_momentum)
        possible = self.bn_loss.layers or not args.alpha_bn
        check(possible, f"{args.teacher} has no BatchNorm2d for L_BN: add --alpha-bn 0")
        look = (info["mean"], info["std"], args.crop_padding, args.flip, self.device)
        self.augment, self.learner = Augment(*look), self.place(self.student)
        self.place(self.teacher)
        self.test, self.teacher_accuracy = None, info.get("accuracy")
        if args.eval and self.rank == 0:  # a download, if any, before the others begin to wait
            with explained(f"no test images of {args.dataset}; --no-eval distils without them"):
                place = (args.dataset, args.data_root, self.names, *self.shape, self.device)
                self.test = test_batches(*place)
                self.teacher_accuracy = accuracy(self.teacher, self.test, self.augment)
        if self.ranks > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            how = dict(broadcast_buffers=False, gradient_as_bucket_view=True)
            self.learner = nn.parallel.DistributedDataParallel(self.student, **how)
        how = dict(weight_decay=args.weight_decay, nesterov=args.nesterov, fused=True)
        self.optimizer = torch.optim.SGD(self.student.parameters(), args.lr, 0.9, **how)
        self.label_embeddings = torch.eye(size[0], device=self.device)  # one-hot
        if args.label_input == "lte":
            lte = label_text_embeddings(self.names, args.text_encoder, args.prompt)
            self.label_embeddings = lte.to(self.device)
        made = args.warmup_epochs * self.share(args.warmup_batches)  # batches, by this rank
        made = (made + args.epochs * self.share(args.batches)) * args.synthesis_batch
        room = min(made, self.share(args.bank_size or made * self.ranks))  # by default for all
        self.memory = MemoryBank(room, *self.shape, self.device)
        self.new_generator()
    def place(self, model):
        """T, S or G on the device, to compute in bf16 where that is fast. Their weights, the
        losses, the optimizers and Z stay in float32."""
        model.to(self.device, memory_format=torch.channels_last)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.amp)
        model.forward = autocast(model.forward)  # casts weights and maps on their way
        if self.args.compile:
            torch._dynamo.config.cache_size_limit = 64  # T and S share code, in several modes
            model.compile(dynamic=False)
        return model
    def new_generator(self):
        """A brand-new pair Z, G: the images of an old one come to resemble each other."""
        args, (C, D), hidden_size = self.args, self.label_embeddings.shape, 1000  # H [code]
        D = NOISE_SIZE if args.label_input == "noise" else D
        K = min(args.images_per_matrix or C, args.synthesis_batch)
        self.noisy_layer = NoisyLayer(D, math.ceil(args.synthesis_batch / K), K, hidden_size)
        if not args.lte_norm:
            self.noisy_layer.norm = nn.Identity()
        if args.noisy_layer == "off":  # G reads the normalised e_y: one image per class and step
            self.noisy_layer, hidden_size = self.noisy_layer.norm, D
        self.noisy_layer.to(self.device)
        self.generator = self.place(Generator(hidden_size, *self.shape, args.generator_width))
    def begin(self, epoch, steps):
        """The epoch's random numbers, its row, its clock, its progress bar (none in a pipe)."""
        key = repr((self.args.seed, epoch, self.rank))  # no two epochs or ranks share it
        torch.manual_seed(random.Random(key).getrandbits(63))
        for buffer in self.student.buffers() if self.ranks > 1 else ():
            dist.broadcast(buffer, 0)  # BatchNorm's statistics: each rank has seen other images
        self.row = {k: self.rows[-1][k] if self.rows else 0.0 for k in ("seconds", *self.SPENT)}
        self.row["epoch"], self.clock, hide = epoch, time.perf_counter(), self.rank > 0 or None
        self.bar = tqdm(total=steps, desc=f"epoch {epoch}", leave=False, disable=hide)
    def lap(self, kind):
        """The time since the last lap went into `kind`."""
        self.clock, before = time.perf_counter(), self.clock
        for name in ("seconds", f"seconds_{kind}"):
            self.row[name] += self.clock - before
    def finite(self, losses, place):
        """losses (steps, n) as lists. UserError that names the first step with one not finite."""
        for step, values in enumerate(rows := losses.tolist()):
            text = f"a loss became {values} in epoch {self.row['epoch']}, {place} step {step}"
            check(all(map(math.isfinite, values)), f"{text}: lower the learning rate, or --no-amp")
        return rows
    def keep(self, epoch, images):
        """An epoch's images go to M, but those of epoch -1 are for `agree` [ours]: made without
        L_adv by a generator apart, which is thrown away. S never meets them, nor their like."""
        if epoch >= 0:
            return self.memory.add(images)
        self.held, self.bn_loss.average = images[len(images) // 2 :], None  # the earlier are poor
    def end_epoch(self, images, labels):
        """Print the epoch's row, then write all files."""
        args, row, epoch = self.args, self.row, self.row["epoch"]
        before = self.rows[-1]["seconds"] if self.rows else 0.0  # when this epoch began
        ends = [v[3:6] for v in self.steps if v[0] == epoch and v[2] == args.generator_steps - 1]
        row |= zip(self.STEP[3:6], (sum(v) / len(ends) for v in zip(*ends)))  # means of last steps
        self.rows.append(row)  # of log.csv
        row["best"] = max((r["accuracy"] for r in self.rows if "accuracy" in r), default=None)
        ahead = args.warmup_epochs + args.epochs - 1 - epoch  # epochs
        if epoch < args.warmup_epochs:  # in generator steps of an image, a view is 0.15 + 0.3 / R
            views = args.student_steps * args.student_batch * (0.15 + 0.3 / args.reuse)
            later = args.batches * args.synthesis_batch + views / args.generator_steps  # images
            now = (ahead - args.epochs) * args.warmup_batches * args.synthesis_batch
            ahead = (now + args.epochs * later) / len(images) / self.ranks
        row |= dict(images=len(self.memory) * self.ranks, left=ahead * (row["seconds"] - before))
        cells = ((row.get(name), form) for name, form in self.SHOWN.items())
        self.bar.close()  # before the line, which takes its place
        self.say("".join(f"{'-' if v is None else format(v, form):>9}" for v, form in cells))
        mine = dict(average=self.bn_loss.average, images=images.cpu(), labels=labels.cpu())
        mine |= dict(generator=self.generator.state_dict(), noisy=self.noisy_layer.state_dict())
        everyone = [mine] * self.ranks  # each rank has its own Z, G and average
        if self.ranks > 1:  # to rank 0, which goes on when all have finished the epoch
            dist.gather_object(mine, everyone if self.rank == 0 else None)
        if self.rank == 0:
            self.write(epoch, everyone)
    def write(self, epoch, everyone):
        """The tables, a picture, the student, the epoch's images, and last the checkpoint."""
        args, out, columns = self.args, self.args.out, [*self.SHOWN, *self.SPENT]
        rows = [[row.get(name) for name in columns] for row in self.rows]
        for name, table in (("log", [columns, *rows]), ("generator", [self.STEP, *self.steps])):
            cells = (["" if v is None else str(v) for v in row] for row in table)
            text = "".join(",".join(row) + "\n" for row in cells)
            write_atomically(out / f"{name}.csv", partial(Path.write_text, data=text))
        made = {k: torch.cat([one.pop(k) for one in everyone]) for k in ("images", "labels")}
        last = {k: v[-args.synthesis_batch :] for k, v in made.items()}  # the epoch's last batch
        draw = partial(draw_samples, class_names=self.names, **last)
        write_atomically(out / f"samples/epoch_{epoch:03d}.png", draw)
        info = {k: self.info[k] for k in ("class_names", "channels", "image_size", "mean", "std")}
        info |= dict(architecture=args.student, accuracy=self.row.get("accuracy"))
        info |= dict(trained_on=f"images made from {args.teacher}", command=shlex.join(sys.argv))
        save_model(out / "student.safetensors", self.student, info)
        write_atomically(out / f"memory/epoch_{epoch:03d}.pt", partial(torch.save, made))
        state = dict(settings=self.settings, rows=self.rows, steps=self.steps, everyone=everyone)
        state |= dict(student=self.student.state_dict(), optimizer=self.optimizer.state_dict())
        write_atomically(out / "checkpoint.pt", partial(torch.save, state))
    def resume(self):
        """Go back to the checkpoint in --out, if there is one. Returns the epoch to begin with."""
        args, path, self.rows, self.steps = self.args, self.args.out / "checkpoint.pt", [], []
        new = self.settings = {k: str(v) for k, v in vars(args).items() if k not in self.FREE}
        weights = sum(t.double().sum().item() for t in self.teacher.state_dict().values())
        self.settings |= dict(ranks=str(self.ranks), names=str(self.names), weights=str(weights))
        if not path.exists():
            return -1
        check(args.resume, f"{args.out} holds a run: go on with --resume, or choose another --out")
        load = partial(torch.load, map_location=self.device, weights_only=True)
        with explained(f"{path} is not an intact checkpoint of this nayer.py"):
            state = load(path)
            self.rows, self.steps, old = state["rows"], state["steps"], state["settings"]
            if self.rows[-1]["epoch"] < args.warmup_epochs:  # the cosine over E has not begun
                old["epochs"] = new["epochs"]
            changed = [f"{k} {old.get(k)} -> {new[k]}" for k in new if old.get(k) != new[k]]
            check(not changed, f"{path} is of a run with other settings: {'; '.join(changed)}")
            mine = state["everyone"][self.rank]
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.generator.load_state_dict(mine["generator"])
            self.noisy_layer.load_state_dict(mine["noisy"])
            for row in self.rows:  # all epochs, so that the ring stands as it did
                made = load(args.out / f"memory/epoch_{row['epoch']:03d}.pt")
                self.keep(row["epoch"], made["images"].chunk(self.ranks)[self.rank])
            self.bn_loss.average = mine["average"]  # of L_BN
        return self.rows[-1]["epoch"] + 1
    def finish(self):
        """summary.json, curve.png, the last line on the console. Returns the summary."""
        out, last = self.args.out, self.rows[-1]
        summary = dict(student_accuracy=last.get("accuracy"), best_accuracy=last["best"])
        summary |= dict(teacher_accuracy=self.teacher_accuracy, agree=last["agree"])
        self.say("\n" + ", ".join(f"{k} {v or math.nan:.2%}" for k, v in summary.items()))
        versions = dict(python=sys.version.split()[0], torch=torch.__version__)
        summary |= dict(device=str(self.device), versions=versions, settings=self.settings) | last
        if self.rank == 0:
            text = json.dumps(summary, indent=2) + "\n"
            write_atomically(out / "summary.json", partial(Path.write_text, data=text))
            draw = partial(draw_curve, rows=self.rows, teacher_accuracy=self.teacher_accuracy)
            write_atomically(out / "curve.png", draw)
        if self.ranks > 1:
            dist.barrier()  # gloo may abort a rank that leaves while it still holds a tensor
            dist.destroy_process_group()
        return summary

# ---- The algorithm ------------------------------------------------------------------------------
def main(argv=None):
    """Distil a teacher into a student. Returns the summary, a dict, as in summary.json.
    argv: a list of flags; None: those of the command line. Raises UserError for what the user can
    put right. All is written to --out after every epoch, so nothing finished is ever lost."""
    run = Run(args := parse_args(argv))
    teacher, student, bn_loss, memory = run.teacher, run.student, run.bn_loss, run.memory
    first_epoch = run.resume()
    run.say(f"{args.dataset}: {args.teacher} -> {args.student}, {run.device}{', bf16' * args.amp}")
    if run.device.type == "cpu" and args.preset in PRESETS[1:4]:
        run.say("the published settings take days on a CPU; --preset cpu takes 40 to 70 minutes")
    run.say("".join(f"{name.removeprefix('loss_'):>9}" for name in run.SHOWN))
    for epoch in range(first_epoch, args.warmup_epochs + args.epochs):
        warm_up = epoch < args.warmup_epochs  # fills M; no L_adv, since S knows nothing yet
        num_batches = run.share(args.warmup_batches if warm_up else args.batches)
        num_batches = 10 if epoch < 0 else num_batches  # epoch -1 is for `agree` alone, see keep
        student_steps = 0 if warm_up else args.student_steps  # S does not learn yet
        run.begin(epoch, num_batches * args.generator_steps + student_steps)
        if epoch % args.generator_life == 0:
            run.new_generator()  # a brand-new Z and G; the average of L_BN lives on [code]
        fresh = []  # this epoch's images and their labels
        for batch in range(num_batches):
            if args.noisy_layer == "reinit":
                run.noisy_layer.reinitialize()  # once per batch, not per step [code]
            labels = class_sets(len(run.names), args.synthesis_batch, run.device)
            e_y = run.label_embeddings[labels]  # (B, D); one-hot rows with --label-input onehot
            if args.label_input == "noise":
                e_y = torch.randn(len(labels), NOISE_SIZE, device=run.device)
            images, losses = synthesize(
                run.generator, run.noisy_layer, e_y, labels, teacher, student, bn_loss, run.augment,
                steps=args.generator_steps, lr=args.generator_lr, alpha_ce=args.alpha_ce,
                alpha_bn=args.alpha_bn, alpha_adv=0.0 if warm_up else args.alpha_adv,
                tick=run.bar.update)
            losses = enumerate(run.finite(losses, f"batch {batch},"))
            run.steps += [(epoch, batch, step, *values) for step, values in losses]
            bn_loss.update()  # the average moves once per batch, from the last step
            fresh.append((images, labels))  # uint8 (B, ch, H, W), (B,)
        images, labels = map(torch.cat, zip(*fresh))
        run.keep(epoch, images)  # in M, or for `agree`
        run.lap("synthesis")
        if not warm_up:  # S learns, on all of M
            progress = (epoch - args.warmup_epochs) / args.epochs  # cosine from --lr to 2e-4
            rate = 2e-4 + (args.lr - 2e-4) * (1 + math.cos(math.pi * progress)) / 2
            run.optimizer.param_groups[0]["lr"] = rate
            losses = distill(
                teacher, run.learner, memory, run.optimizer, run.augment, steps=student_steps,
                batch=run.share(args.student_batch), temperature=args.temperature,
                reuse=args.reuse, mix=args.mix, tick=run.bar.update)
            run.finite(losses[:, None], "student")  # waits for the device
            run.row["loss_kd"] = losses.mean().item()
            run.lap("distillation")
            run.row["agree"] = agreement(teacher, student, run.held, run.augment)
            if run.test:
                run.row["accuracy"] = accuracy(student, run.test, run.augment)
            run.lap("evaluation")
        run.end_epoch(images, labels)
    return run.finish()

if __name__ == "__main__":
    run_script(main)
