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

    python nayer.py                            digits on a laptop's CPU, no download, 41 s
    python nayer.py --dataset cifar10          the published job, for a GPU
    python nayer.py --teacher file.py:load     your own network, and no data (see README.md)
    python nayer.py --help                     every flag and its default

Read on in this order: the label-text embeddings, Z and G, the losses, the memory bank, then the two
half-steps `synthesize` and `distill`, and `main`, which is the algorithm on one screen. What else a
program needs (clear errors, test images, checkpoints, pictures, the log) is in extras.py.

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

Tags: [paper] stated in the paper, [code] only in the authors' code, [ours] our own decision.
Paper: Tran et al., NAYER: Noisy Layer Data Generation for Efficient and Effective Data-free
Knowledge Distillation, CVPR 2024, arXiv 2310.00258.
"""

import argparse
import hashlib
import json
import logging
import math
import re
import shlex
import sys
from functools import cached_property
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

import extras  # what is not the method
from extras import UserError, explained, number, write_atomically

SHIPPED = Path(__file__).resolve().parent / "teachers"  # trained teachers, label embeddings
TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # the shipped embeddings are its
NOISE_SIZE = 256  # numbers per image, for --label-input noise

# ---- Flags and presets --------------------------------------------------------------------------


def parse_args(argv=None):
    """The command line -> a Namespace. A wrong one ends with one line on stderr and exit code 2.

    A tuple of defaults is a preset: for digits [ours: small, for a laptop; a weak L_adv keeps the
    images legible], cifar10, cifar100, tiny_imagenet [code: the authors' scripts; the defaults of
    their parser differ and belong to no published result]. A folder is treated as cifar10.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # which preset?
    early.add_argument("--dataset", nargs="?")
    early.add_argument("--teacher", nargs="?", default="")
    known = early.parse_known_args(argv)[0]
    dataset = known.dataset or ("folder" if ".py:" in known.teacher else "digits")
    column = dict(digits=0, cifar100=2, tiny_imagenet=3).get(dataset, 1)
    parser = argparse.ArgumentParser(
        prog="nayer.py",
        description="Data-free knowledge distillation by noisy-layer generation (NAYER).",
        epilog="Defaults are those of --dataset: name one before --help to see its own.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"nayer.py: error: {message}\n")
    count, positive, weight = number(int, 1), number(float, 1e-9), number(float, 0)
    switch = argparse.BooleanOptionalAction

    def add(flag, kind, default, text, **more):
        default = default[column] if isinstance(default, tuple) else default
        how = dict(action=kind) if kind in (switch, "store_true") else dict(type=kind)
        group.add_argument(flag, default=default, help=text, **how, **more)

    # fmt: off
    group = parser.add_argument_group("run")
    add("--dataset", str, dataset, "preset, and the images to score on", choices=extras.IMAGES)
    add("--data-root", Path, Path("data"), "folder of the data sets and of computed embeddings")
    add("--out", Path, None, "folder to write to (None: runs/<dataset>-<teacher>-<student>)")
    add("--seed", number(int, 0, 2**63 - 1), 0, "of all random numbers")
    add("--device", str, "auto", "auto: the first there is", choices=["auto", "cuda", "mps", "cpu"])
    add("--resume", "store_true", False, "go on after the last finished epoch of the run in --out")
    add("--eval", switch, True, "score the student on real test images after every epoch")
    group = parser.add_argument_group("networks and class names")
    add("--teacher", str, ("wrn16_2", *["wrn40_2"] * 3), "T: name, model file, file.py:function")
    add("--student", str, ("wrn16_1", *["wrn16_2"] * 3), "S: wrn16_1, ..., or file.py:function")
    add("--class-names", Path, None, "file with a name per line (None: those of the teacher)")
    add("--text-encoder", str, TEXT_ENCODER, "Hugging Face name, or local folder")
    add("--image-size", number(int, 8, 224), None, "pixels, a multiple of 4 (None: the teacher's)")
    add("--mean", float, None, "per channel, as T was trained (None: its file says)", nargs="+")
    add("--std", number(float, 1e-6), None, "likewise", nargs="+")
    add("--prompt", str, ("a photo of the digit {class}", *["a photo of {class}"] * 3), "to embed")
    group = parser.add_argument_group("loop")
    add("--warmup-epochs", number(int, 0), (2, 20, 20, 20), "epochs that only fill the memory bank")
    add("--warmup-batches", count, (4, 10, 10, 20), "batches synthesised per epoch of the warm-up")
    add("--epochs", count, (8, 100, 100, 100), "E: epochs that follow, with distillation")
    add("--batches", count, (1, 2, 2, 4), "batches synthesised in each of these")
    group = parser.add_argument_group("generator")
    add("--synthesis-batch", number(int, 2), (100, 400, 400, 200), "B: images in a batch")
    add("--generator-steps", count, (18, 30, 40, 60), "g: steps of Z and G for a batch")
    add("--generator-lr", positive, 4e-3, "of Adam, which starts afresh with every batch")
    add("--generator-life", count, 10, "epochs after which a brand-new generator replaces it")
    add("--generator-width", count, (32, 64, 64, 64), "f: channels of its last hidden layer")
    add("--alpha-ce", weight, (1.0, 0.5, 0.5, 0.5), "weight of L_CE")
    add("--alpha-bn", weight, (3.0, 10.0, 10.0, 10.0), "weight of L_BN; 0 if T has no BatchNorm")
    add("--alpha-adv", weight, (0.2, 1.33, 1.33, 1.33), "weight of L_adv, off in the warm-up")
    add("--bn-momentum", number(float, 0, 1), 0.9, "share of the moving average in L_BN; 0: none")
    add("--label-input", str, "lte", "what Z reads", choices=["lte", "onehot", "noise"])
    kinds = ["reinit", "fixed", "off"]
    add("--noisy-layer", str, "reinit", "Z: drawn for each batch, once, or none", choices=kinds)
    add("--images-per-matrix", count, None, "that share a matrix of Z (None: one of each class)")
    add("--lte-norm", switch, True, "the BatchNorm between the LTE and Z")
    group = parser.add_argument_group("student")
    add("--student-steps", count, (36, 400, 400, 1000), "distillation steps per epoch")
    add("--student-batch", number(int, 2), (128, 512, 512, 256), "images in a distillation step")
    add("--lr", positive, (0.2, 0.2, 0.2, 0.1), "of SGD (momentum 0.9), cosine over E to 2e-4")
    add("--temperature", positive, 20.0, "tau: softens the answers of T and S in L_KD")
    add("--bank-size", count, None, "most images kept, the oldest give way (None: all are kept)")
    add("--crop-padding", number(int, 0, 28), (1, 4, 4, 4), "zeros around an image before its crop")
    add("--flip", switch, (False, True, True, True), "mirror half of the images")
    group = parser.add_argument_group("speed")
    add("--amp", switch, None, "bf16 autocast (None: where the device is fast with it)")
    add("--compile", switch, False, "torch.compile for T, S and G")
    add("--deterministic", switch, False, "the same bits on every run on CUDA, too; slower")
    # fmt: on
    args = parser.parse_args(argv)
    if "{class}" not in args.prompt:
        parser.error(f"--prompt {args.prompt!r}: write {{class}} where the class name belongs")
    if args.image_size and args.image_size % 4:
        parser.error(f"--image-size {args.image_size} is not a multiple of 4")
    name = f"{dataset}-{Path(args.teacher).stem}-{Path(args.student).stem}"
    args.out = args.out or Path("runs") / name
    return args


# ---- Label-text embeddings (LTE) ------------------------------------------------------------ e_y


@torch.no_grad()
def label_text_embeddings(class_names, encoder, prompt):
    """What a language model makes of the class names: (C, D) float32, in the order of the names.

    encoder: Hugging Face name or local folder. A model with `get_text_features` gives that (the
    paper's is the text tower of CLIP ViT-B/32, D = 512, not normalised [code]); any other gives the
    mean of its last hidden states over the tokens [ours]. prompt: text with "{class}" in it.
    Raises UserError if there is no such encoder. Reads safetensors only, runs no remote code.
    """
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # silent retries when offline
    missing = f"no text encoder {encoder} here or on the hub; embeddings are shipped for digits, "
    missing += "cifar10, cifar100, tiny_imagenet (default encoder, prompt and class names)"
    with explained(missing):
        tokenizer = AutoTokenizer.from_pretrained(encoder, trust_remote_code=False)
        model = AutoModel.from_pretrained(encoder, use_safetensors=True, trust_remote_code=False)
    model.eval()
    names = [re.sub("[_-]", " ", name) for name in class_names]  # [code]
    texts = [prompt.replace("{class}", name) for name in names]
    padding = "max_length" if model.config.model_type.startswith("siglip") else True  # as trained
    how = dict(truncation=True, return_tensors="pt", return_token_type_ids=False)
    tokens = tokenizer(texts, padding=padding, **how)
    if hasattr(model, "get_text_features"):
        features = model.get_text_features(**tokens)
        return getattr(features, "pooler_output", features).float()  # transformers 5 wraps it
    hidden, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][:, :, None]
    return ((hidden * mask).sum(1) / mask.sum(1)).float()  # (C, tokens, D) -> (C, D)


def embedding_key(class_names, encoder, prompt):
    """A hash of all three (of a local encoder, of its files): a change of any makes another key."""
    if Path(encoder).is_dir():
        files = sorted(file for file in Path(encoder).iterdir() if file.is_file())
        encoder = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    key = json.dumps([encoder, prompt, list(class_names)])
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def cached_embeddings(class_names, encoder, prompt, folder):
    """label_text_embeddings, computed once: shipped, or kept in `folder` by an earlier run."""
    # A file per key, so that runs side by side cannot spoil each other's entries.
    key = embedding_key(class_names, encoder, prompt)
    cache = folder / f"label_embeddings_{key}.safetensors"
    for path in (SHIPPED / "label_embeddings.safetensors", cache):
        if path.exists() and key in (entries := extras.read_safetensors(path)[0]):
            return entries[key].float()
    embeddings = label_text_embeddings(class_names, encoder, prompt)
    write_atomically(cache, lambda file: safetensors.torch.save_file({key: embeddings}, file))
    return embeddings


# ---- Noisy layer and generator ---------------------------------------------------- x = G(Z(e_y))


class NoisyLayer(nn.Module):
    """Z: inputs (B, D) -> hidden (B, H). BatchNorm1d, then N random matrices, re-drawn each batch.

    Row i goes through matrix i // images_per_matrix. One matrix serves one image of each class
    ("K-to-1", K = C) [paper]: inside such a set the images differ by their LTE, and two images of
    one class differ by their matrix. Matrices are trained with G; only `reinitialize` draws them.
    """

    def __init__(
        self, embedding_size, num_matrices, images_per_matrix, hidden_size=1000, norm=True
    ):
        super().__init__()
        self.images_per_matrix = images_per_matrix
        # Tells apart LTEs that lie close [paper].
        self.norm = nn.BatchNorm1d(embedding_size) if norm else nn.Identity()
        # Not a list of nn.Linear: N matrices in one tensor are one product and one Adam update.
        self.weight = nn.Parameter(torch.empty(num_matrices, embedding_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_matrices, 1, hidden_size))  # (N, 1, H)
        self.reinitialize()

    def reinitialize(self):
        """Draw all matrices from N(0, 1), not divided by the fan-in; bias 0; norm kept [code]."""
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, inputs):
        B, D = inputs.shape
        gap = len(self.weight) * self.images_per_matrix - B  # the last set may be incomplete
        sets = F.pad(self.norm(inputs), (0, 0, 0, gap)).view(-1, self.images_per_matrix, D)
        hidden = torch.baddbmm(self.bias, sets, self.weight)  # (N, K, D) @ (N, D, H) -> (N, K, H)
        return hidden.flatten(0, 1)[:B]  # (B, H)


class UpsampleConv(nn.Conv2d):
    """Doubles the maps (nearest pixel), then convolves: (B, ch, h, w) -> (B, out, 2h, 2w).

    [ours] A 3x3 window of doubled pixels holds only 2x2 different ones. So the weights that meet
    the same pixel are added up first, and a transposed convolution needs 4 products in place of 9.
    """

    def forward(self, maps):
        kernel = F.avg_pool2d(F.pad(self.weight, [1] * 4), 2, 1, divisor_override=1)  # 3x3 -> 4x4
        kernel = kernel.flip(2, 3).transpose(0, 1)  # a transposed convolution reads it backwards
        return F.conv_transpose2d(maps, kernel, stride=2, padding=1)


class Generator(nn.Module):
    """G: hidden (B, H) -> images (B, channels, image_size, image_size), float32 in [0, 1].

    A linear layer makes a small map; up-sampling and 3x3 convolutions enlarge it, twice for images
    of up to 64 pixels, four times for larger ones [code]. Stays in train mode for all its life.
    """

    def __init__(self, hidden_size, channels, image_size, width=64):
        super().__init__()
        f = width
        widths = [2 * f, 2 * f, f] if image_size <= 64 else [2 * f, 2 * f, f, f, f]
        start = math.ceil(image_size / 2 ** (len(widths) - 1))  # 8, to become 16 and 32
        self.shape, self.image_size = (widths[0], start, start), image_size
        self.start = nn.Linear(hidden_size, math.prod(self.shape))
        layers = [nn.BatchNorm2d(widths[0])]
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

    [ours] The authors' B is a multiple of C. With the subset any B and C will do, and no matrix
    of Z ever serves two images of one class.
    """
    sets, rest = divmod(batch, num_classes)
    in_order = torch.arange(num_classes, device=device).repeat(sets)
    return torch.cat([in_order, torch.randperm(num_classes, device=device)[:rest]])


def generator_inputs(labels, label_embeddings):
    """What Z reads for labels (B,): their rows of label_embeddings (C, D); where D is 0, noise."""
    if label_embeddings.shape[1] == 0:
        return torch.randn(len(labels), NOISE_SIZE, device=labels.device)
    return label_embeddings[labels]


# ---- Losses --------------------------------------------------------------------------------------


class BatchStatistics(torch.autograd.Function):
    """x (B, ch, H, W) -> mean and biased variance of each channel, float32 (ch,) even for bf16 x.

    [ours] Composed from var_mean, these two cost more time on a CPU than the teacher itself. Here
    the first half of BatchNorm's own kernel reads x, and the gradient is one multiply-add:
        dL/dx = (dL/dmean + 2 (x - mean) dL/dvar) / n        n = B H W
    """

    @staticmethod
    def forward(ctx, x):
        n = x.numel() // x.shape[1]
        if x.device.type == "mps" or torch.compiler.is_compiling():  # both lack the kernel
            var, mean = torch.var_mean(x.float(), (0, 2, 3))
        else:
            mean, var = torch.zeros(2, x.shape[1], device=x.device)
            torch.batch_norm_update_stats(x, mean, var, 1.0)  # sets both, var unbiased
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
    """L_BN = sum over T's BatchNorm2d layers of |mu_T - mu|_2 + |var_T - var|_2.

    mu and var are what the layers see in T's last forward pass, mixed with an average over earlier
    batches: mu = momentum * mu_average + (1 - momentum) * mu_batch [code]. With momentum 0.9 the
    gradient is scaled by 0.1; without that, L_BN drowns the class term. The average outlives the
    generator. Hooks read the layers' inputs, and only while gradients are recorded, so that they
    cost nothing while the student learns.

    .value     the loss of the last forward pass, a scalar, float32
    .update()  moves the average, once per batch; the first call sets it
    .close()   removes the hooks
    """

    def __init__(self, teacher, momentum):
        kinds = (nn.BatchNorm2d, nn.SyncBatchNorm)
        modules = [m for m in teacher.modules() if isinstance(m, kinds)]
        self.layers = [m for m in modules if m.running_mean is not None]
        self.momentum, self.average = momentum, None  # [(mu, var) for each layer]
        self.batch = [None] * len(self.layers)  # likewise, of the last forward pass
        self.hooks = [
            m.register_forward_pre_hook(self.reader(i)) for i, m in enumerate(self.layers)
        ]

    def reader(self, index):
        def read(layer, inputs):
            if torch.is_grad_enabled():
                self.batch[index] = BatchStatistics.apply(inputs[0])

        return read

    @property
    def value(self):
        total = 0.0
        for i, (layer, (mu, var)) in enumerate(zip(self.layers, self.batch)):
            if self.average is not None:
                mu = torch.lerp(mu, self.average[i][0], self.momentum)
                var = torch.lerp(var, self.average[i][1], self.momentum)
            total = total + (layer.running_mean - mu).norm() + (layer.running_var - var).norm()
        return total

    @torch.no_grad()
    def update(self):
        old = self.average or self.batch
        self.average = [
            tuple(torch.lerp(now, before, self.momentum) for now, before in zip(*pairs))
            for pairs in zip(self.batch, old)
        ]

    def close(self):
        for hook in self.hooks:
            hook.remove()

    def state_dict(self):
        return dict(average=self.average)

    def load_state_dict(self, state):
        self.average = state["average"]


def adversarial_loss(student_logits, teacher_logits):
    """L_adv = -mean over the batch of 1[argmax S = argmax T] * KL(T || S): (B, C) twice -> scalar.

    G lowers it with images on which S names T's class but is far from T's probabilities: those that
    S can still learn from. Where S names another class there is enough to learn already, so the
    term is 0, and cannot push the image away from its class altogether.
    """
    s, t = student_logits.float(), teacher_logits.float()
    divergence = F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True)
    return -(divergence.sum(1) * (s.argmax(1) == t.argmax(1))).mean()


def distillation_loss(student_logits, teacher_logits, temperature):
    """L_KD = tau^2 * KL(softmax(T / tau) || softmax(S / tau)), mean over the batch -> scalar.

    A large tau shows S which wrong classes T finds less wrong; tau^2 keeps the gradient's size.
    """
    s = (student_logits.float() / temperature).log_softmax(1)
    t = (teacher_logits.float() / temperature).log_softmax(1)
    return temperature**2 * F.kl_div(s, t, reduction="batchmean", log_target=True)


# ---- Memory bank and augmentation ------------------------------------------------------------- M


class MemoryBank:
    """M: the synthetic images as one uint8 tensor (capacity, ch, H, W) on the device.

    S learns from all images made so far, not only from the latest batch, or it would forget. A
    ring: once it is full, new images replace the oldest. (The authors keep PNG files, read anew by
    a DataLoader after every batch, and cut values to bytes where we round [code].)
    """

    def __init__(self, capacity, channels, image_size, device="cpu"):
        shape = (capacity, channels, image_size, image_size)
        self.images = torch.empty(shape, dtype=torch.uint8, device=device)
        self.added = 0  # images ever added

    def __len__(self):
        return min(self.added, len(self.images))

    def add(self, images):
        """images: uint8 (B, ch, H, W)."""
        images = images[-len(self.images) :]
        places = torch.arange(self.added, self.added + len(images), device=images.device)
        self.images[places % len(self.images)] = images
        self.added += len(images)

    def sample(self, count):
        """`count` images, uint8, drawn uniformly with replacement [ours]."""
        return self.images[torch.randint(len(self), (count,), device=self.images.device)]


class Augment:
    """Random crop after zero padding (of the pixels), random mirroring, normalisation; per image.

    images (B, ch, H, W), float in [0, 1] -> the same shape, normalised. Gradients pass through, so
    that G learns images that T knows wherever they are cropped. `normalize` alone is for scoring.
    """

    def __init__(self, mean, std, padding, flip, device="cpu"):
        self.mean, self.std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (mean, std))
        self.padding, self.flip = padding, flip

    def normalize(self, images):
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)

    def __call__(self, images):
        (B, ch, H, W), device = images.shape, images.device
        shift = torch.randint(2 * self.padding + 1, (2, B, 1), device=device)
        rows = shift[0] + torch.arange(H, device=device)  # (B, H)
        columns = shift[1] + torch.arange(W, device=device)  # (B, W)
        if self.flip:
            mirrored = torch.rand(B, 1, device=device) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        images = F.pad(images, [self.padding] * 4)
        images = images.gather(2, rows[:, None, :, None].expand(-1, ch, -1, images.shape[3]))
        images = images.gather(3, columns[:, None, None, :].expand(-1, ch, H, -1))
        return self.normalize(images)


# ---- Half-step 1. Over G and Z, minimise alpha_ce L_CE + alpha_bn L_BN + alpha_adv L_adv ---------


def synthesize(
    generator, noisy_layer, inputs, labels, teacher, student, bn_loss, augment, autocast,
    *, steps, lr, alpha_ce, alpha_bn, alpha_adv, tick=lambda: None,
):  # fmt: skip
    """One batch of images for `labels` (B,), from `inputs` (B, D), by `steps` steps of a new Adam.

    Returns the images of the step with the lowest total loss, before augmentation, uint8
    (B, ch, H, W), and the losses of every step (steps, 4): L_CE, L_BN, L_adv, their weighted sum.
    A term of weight 0 is not computed and counts as 0. Nothing leaves the device inside the loop.
    """
    # S stays in eval mode: the authors' is in train mode from the second batch of an epoch on, so
    # that the statistics of its BatchNorm are overwritten by half-made images [code].
    student.eval().requires_grad_(False)
    parameters = [*generator.parameters(), *noisy_layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr, betas=(0.5, 0.999), fused=True)
    zero = torch.zeros((), device=labels.device)
    best_images, best_loss, history = None, zero + torch.inf, []
    for _ in range(steps):
        hidden = noisy_layer(inputs)
        with autocast:
            images = generator(hidden)
            views = augment(images)  # afresh at each step; T and S see the same
            teacher_logits = teacher(views).float()
            student_logits = student(views) if alpha_adv else None

        loss_ce = F.cross_entropy(teacher_logits, labels)  # be what y says
        loss_bn = bn_loss.value if alpha_bn else zero  # look like what T has seen
        loss_adv = adversarial_loss(student_logits, teacher_logits) if alpha_adv else zero  # be new
        loss = alpha_ce * loss_ce + alpha_bn * loss_bn + alpha_adv * loss_adv

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


def distill(
    teacher, student, memory, optimizer, augment, autocast,
    *, steps, batch, temperature, tick=lambda: None,
):  # fmt: skip
    """One epoch: `steps` student steps on batches from M. Returns L_KD at every step (steps,).

    Nothing but T's softened answers is learnt from; the labels that G was asked for play no part.
    """
    student.train().requires_grad_(True)
    history = []
    for _ in range(steps):
        views = augment(memory.sample(batch).float() / 255)
        with autocast:
            with torch.no_grad():  # which puts the hooks of L_BN to sleep, too
                teacher_logits = teacher(views)
            student_logits = student(views)
        loss = distillation_loss(student_logits, teacher_logits, temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.detach())
        tick()
    return torch.stack(history)


# ---- Networks and model files -------------------------------------------------------------------


class WideBlock(nn.Module):
    """Twice BatchNorm, ReLU, 3x3 convolution; and a shortcut, a 1x1 convolution between widths."""

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
        h = F.relu(self.norm1(x), inplace=True)  # in place: half of the time is memory traffic
        x = x if self.shortcut is None else self.shortcut(h)
        return self.conv2(F.relu(self.norm2(self.conv1(h)), inplace=True)).add_(x)


class WideResNet(nn.Module):
    """wrn{depth}_{width} of Zagoruyko and Komodakis (2016): (B, ch, H, W) -> logits (B, C)."""

    def __init__(self, depth, width, num_classes, channels=3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks, inputs = [], 16
        for outputs in (16 * width, 32 * width, 64 * width):  # at full, half, quarter resolution
            for i in range((depth - 4) // 6):
                stride = 2 if i == 0 and outputs > 16 * width else 1
                blocks.append(WideBlock(inputs, outputs, stride))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.classifier = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images):
        features = F.relu(self.norm(self.blocks(self.stem(images))), inplace=True)
        return self.classifier(features.mean((2, 3)))


def build_model(name, num_classes, channels=3, image_size=32):
    """A network with random weights: wrn{depth}_{width}, or what torchvision has by that name.

    For images of up to 64 pixels, a ResNet gets a 3x3 stem and no max-pool, a VGG gets BatchNorm
    and one linear layer [code]. Raises UserError for an unknown name.
    """
    if match := re.fullmatch(r"wrn(\d+)_(\d+)", name):
        depth, width = map(int, match.groups())
        if depth < 10 or depth % 6 != 4 or width < 1:
            raise UserError(f"no Wide ResNet {name}: depth 10, 16, 22, ..., width 1, 2, ...")
        return WideResNet(depth, width, num_classes, channels)
    import torchvision.models as zoo  # not above: it takes a second, which Wide ResNets can save

    small = image_size <= 64
    name += "_bn" if small and re.fullmatch(r"vgg\d\d", name) else ""
    if name not in zoo.list_models(module=zoo):
        raise UserError(f"unknown network {name}: use wrn16_2, resnet18 or a torchvision name")
    model = zoo.get_model(name, weights=None, num_classes=num_classes)
    if small and isinstance(model, zoo.ResNet):
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if small and isinstance(model, zoo.VGG):
        model.avgpool, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Linear(512, num_classes)
    if channels != 3:  # a first convolution of its own
        path, old = next(pair for pair in model.named_modules() if isinstance(pair[1], nn.Conv2d))
        shape = (channels, old.out_channels, old.kernel_size, old.stride, old.padding)
        parent, _, attribute = path.rpartition(".")
        new = nn.Conv2d(*shape, bias=old.bias is not None)
        setattr(model.get_submodule(parent), attribute, new)
    return model


def save_model(path, model, info):
    """One self-describing safetensors file: the weights, with `info` as metadata.

    info: architecture, class_names, channels, image_size, mean, std, and whatever else json can
    write and a reader would ask for: accuracy, trained_on, command.
    """
    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    metadata = info | dict(sha256=extras.fingerprint(info, state))
    metadata = {key: json.dumps(value) for key, value in metadata.items()}
    write_atomically(Path(path), lambda file: safetensors.torch.save_file(state, file, metadata))


def load_model(path, model=None):
    """The network in a model file: on the CPU, float32, in eval mode, its description as `.info`.

    model: a network to put the weights into, for one that `build_model` does not know. Raises
    UserError if the file is missing, damaged, or not one of ours. Runs no code from it.
    """
    state, metadata = extras.read_safetensors(path)
    with explained(f"{path} is not an intact model file of nayer.py or teachers/train.py"):
        info = {key: json.loads(text) for key, text in metadata.items()}
        if info.pop("sha256") != extras.fingerprint(info, state):
            raise ValueError("its checksum does not match")
        if model is None and ".py:" in info["architecture"]:
            raise ValueError(f"give the network of {info['architecture']} to load_model, too")
        shape = (len(info["class_names"]), info["channels"], info["image_size"])
        model = model or build_model(info["architecture"], *shape)
        model.load_state_dict(state)
    model.info = info
    return model.float().eval()


def load_teacher(args):
    """T with its description as `.info`: file.py:function, a model file, or a name in teachers/."""
    name, path = args.teacher, SHIPPED / f"{args.dataset}_{args.teacher}.safetensors"
    if ".py:" in name:
        return extras.foreign_teacher(args)
    if name.endswith(".safetensors"):
        return load_model(name)
    if not path.exists():
        build_model(name, 10)  # complains of an unknown name
        command = f"python teachers/train.py --dataset {args.dataset} --model {name}"
        raise UserError(f"no trained {name} for {args.dataset} in {SHIPPED}; make it: {command}")
    return load_model(path)


# ---- Around the loop: score, log, checkpoint ----------------------------------------------------


@torch.no_grad()
def accuracy(model, batches, augment, autocast):
    """Fraction in [0, 1] of images that `model` gets right; batches: (images uint8, labels)."""
    model.eval()
    correct, seen, device = 0, 0, augment.mean.device
    for images, labels in batches:
        with autocast:
            logits = model(augment.normalize(images.to(device).float() / 255))
        correct += (logits.argmax(1) == labels.to(device)).sum()
        seen += len(labels)
    return float(correct) / seen


@torch.no_grad()
def agreement(teacher, student, images, augment, autocast):
    """Fraction of `images`, uint8 (B, ch, H, W), on which S names the class that T names."""
    device, labels = augment.mean.device, []
    for part in images.split(500):
        views = augment.normalize(part.to(device).float() / 255)
        with autocast:
            labels.append(teacher(views).argmax(1))
    return accuracy(student, zip(images.split(500), labels), augment, autocast)


class Run:
    """What surrounds the loop: T, S, the LTE, M, the test images, the journal, the checkpoint."""

    STATEFUL = "student optimizer bn_loss noisy_layer generator journal".split()

    def __init__(self, args):
        self.args = args
        self.device, fast_bf16 = extras.pick_device(args.device)
        self.rank, self.ranks = extras.join_ranks(self.device)  # 0, 1 without torchrun
        torch.manual_seed(args.seed + self.rank)  # each rank makes its own noise
        extras.set_determinism(args.deterministic)
        torch.set_float32_matmul_precision("high")  # TF32, where bf16 is not used
        args.amp = fast_bf16 if args.amp is None else args.amp
        # One context for T, S and G; losses, statistics and optimizers stay in float32.
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=args.amp)
        self.journal = extras.Journal(args, self.device, self.rank, self.ranks)
        self.load_networks()
        names = self.info["class_names"]
        self.embeddings = dict(
            lte=lambda: cached_embeddings(names, args.text_encoder, args.prompt, args.data_root),
            onehot=lambda: torch.eye(len(names)),
            noise=lambda: torch.empty(len(names), 0),  # see generator_inputs
        )[args.label_input]().to(self.device)
        wanted = args.warmup_epochs * math.prod(self.share(args.warmup_batches))
        wanted += args.epochs * math.prod(self.share(args.batches))
        capacity = extras.bank_capacity(wanted, args.bank_size, *self.shape, self.device)
        self.memory = MemoryBank(capacity, *self.shape, self.device)
        self.bank = "all" if capacity == wanted else str(capacity)
        look = (args.crop_padding, args.flip, self.device)
        self.augment = Augment(self.info["mean"], self.info["std"], *look)
        self.new_generator()
        self.test, self.teacher_accuracy = None, self.info.get("accuracy")
        if args.eval and self.rank == 0:
            with explained(f"no test images of {args.dataset}; --no-eval distils without them"):
                place = (args.dataset, args.data_root, names, *self.shape, self.device)
                self.test = extras.test_batches(*place)
            self.teacher_accuracy = accuracy(self.teacher, self.test, self.augment, self.autocast)

    def load_networks(self):
        """T, frozen; what it says of its images, unless a flag says otherwise; S; L_BN's hooks."""
        args = self.args
        self.teacher = load_teacher(args).requires_grad_(False)
        self.info = info = dict(self.teacher.info)
        if args.image_size not in (None, size := info["image_size"]):
            raise UserError(f"--image-size {args.image_size}, but the teacher reads {size} pixels")
        info["mean"], info["std"] = args.mean or info["mean"], args.std or info["std"]
        self.shape = (info["channels"], info["image_size"])
        if not len(info["mean"]) == len(info["std"]) == self.shape[0]:
            raise UserError(f"--mean and --std take one number per channel: {self.shape[0]}")
        classes = extras.count_outputs(self.teacher, args.teacher, *self.shape)
        if args.class_names:
            info["class_names"] = extras.read_class_names(args.class_names)
        if len(info["class_names"]) != classes:
            names = len(info["class_names"])
            raise UserError(f"{names} class names, but {args.teacher} has {classes} outputs")
        self.bn_loss = BatchNormLoss(self.teacher, args.bn_momentum)
        if args.alpha_bn and not self.bn_loss.layers:
            raise UserError(f"{args.teacher} has no BatchNorm2d for L_BN: add --alpha-bn 0")
        if ".py:" in args.student:
            self.student = extras.network_from_file(args.student)
        else:
            self.student = build_model(args.student, classes, *self.shape)
        if (outputs := extras.count_outputs(self.student, args.student, *self.shape)) != classes:
            raise UserError(f"{args.student} has {outputs} outputs, the teacher {classes}")
        for model in (self.teacher, self.student):
            model.to(self.device, memory_format=torch.channels_last)
            if args.compile:
                extras.compile_network(model)
        self.learner = extras.data_parallel(self.student, self.ranks)  # S itself without torchrun
        # SGD without Nesterov; main() moves its learning rate, so there is no scheduler to save.
        weights = self.student.parameters()
        self.optimizer = torch.optim.SGD(weights, args.lr, 0.9, weight_decay=1e-4, fused=True)

    def new_generator(self):
        """A brand-new pair Z, G: the images of an old one come to resemble each other."""
        args, D, hidden_size = self.args, self.embeddings.shape[1] or NOISE_SIZE, 1000
        # H = 1000 with Z [code]; without it, what G reads has the size of the input itself.
        if args.noisy_layer == "off":  # G reads e_y itself: one image per class and step
            self.noisy_layer, hidden_size = nn.BatchNorm1d(D) if args.lte_norm else nn.Identity(), D
        else:
            K = min(args.images_per_matrix or len(self.embeddings), args.synthesis_batch)
            num_matrices = math.ceil(args.synthesis_batch / K)
            self.noisy_layer = NoisyLayer(D, num_matrices, K, hidden_size, args.lte_norm)
        self.generator = Generator(hidden_size, *self.shape, args.generator_width)
        self.noisy_layer.to(self.device)
        self.generator.to(self.device, memory_format=torch.channels_last)
        if args.compile:
            extras.compile_network(self.generator)

    def share(self, num_batches):
        """This rank's share of an epoch's synthesis: number of batches, images in each."""
        own = math.ceil(num_batches / self.ranks)
        return own, math.ceil(num_batches * self.args.synthesis_batch / (own * self.ranks))

    @cached_property  # the teacher is frozen: its weights are hashed once, not at every checkpoint
    def checkpoint(self):
        """Knows what must be the same on --resume: all that a number in the log depends on."""
        free = ("out", "data_root", "device", "resume", "eval", "compile")  # change nothing
        settings = {key: str(value) for key, value in vars(self.args).items() if key not in free}
        settings |= dict(ranks=str(self.ranks), bank=self.bank)
        settings["class names"] = ", ".join(self.info["class_names"])
        settings["teacher's weights"] = extras.fingerprint(self.info, self.teacher.state_dict())
        settings["label embeddings"] = extras.fingerprint({}, {"": self.embeddings})
        return extras.Checkpoint(self.args.out, settings, self.rank, self.device)

    def save(self, epoch, images):
        """student.safetensors, and all that is needed to go on after `epoch`."""
        about = dict(
            architecture=self.args.student, accuracy=self.journal.rows[-1]["accuracy"],
            trained_on=f"images synthesised from {self.args.teacher}, for {self.args.dataset}",
            command=shlex.join(["python", *sys.argv]),
        )  # fmt: skip
        if self.rank == 0:
            save_model(self.args.out / "student.safetensors", self.student, self.info | about)
        state = {name: getattr(self, name).state_dict() for name in self.STATEFUL}
        self.checkpoint.save(epoch, state, images, self.memory)

    def resume(self):
        """Go back to the checkpoint in --out, if there is one. Returns the epoch to begin with."""
        state = self.checkpoint.open(self.args.resume, self.args.warmup_epochs)
        if state is None:
            return 0
        with explained(f"{self.args.out} holds no checkpoint of this run"):
            for name in self.STATEFUL:
                getattr(self, name).load_state_dict(state[name])
            return self.checkpoint.refill(self.memory)


# ---- The algorithm ------------------------------------------------------------------------------


def main(argv=None):
    """Distil a teacher into a student. Returns the summary, a dict, as in summary.json.

    argv: a list of flags; None: those of the command line. Raises UserError for what the user can
    put right. Everything is written to --out after every epoch, so nothing finished is ever lost.
    """
    args = parse_args(argv)
    run = Run(args)
    first_epoch = run.resume()
    teacher, student, bn_loss, memory = run.teacher, run.student, run.bn_loss, run.memory
    journal = run.journal
    journal.header(run.info["class_names"], run.shape[1], run.teacher_accuracy, run.embeddings)

    for epoch in range(first_epoch, args.warmup_epochs + args.epochs):
        warm_up = epoch < args.warmup_epochs  # fills M; no L_adv, since S knows nothing yet
        num_batches, batch_size = run.share(args.warmup_batches if warm_up else args.batches)
        if epoch % args.generator_life == 0:
            run.new_generator()  # a brand-new Z and G; the average of L_BN lives on [code]
        fresh, agree, score = [], None, None
        student_steps = 0 if warm_up else args.student_steps
        journal.begin(epoch, num_batches * args.generator_steps + student_steps)
        for batch in range(num_batches):
            if args.noisy_layer == "reinit":
                run.noisy_layer.reinitialize()  # once per batch, not per step [code]
            labels = class_sets(len(run.embeddings), batch_size, run.device)
            images, losses = synthesize(
                run.generator, run.noisy_layer, generator_inputs(labels, run.embeddings), labels,
                teacher, student, bn_loss, run.augment, run.autocast, tick=journal.tick,
                steps=args.generator_steps, lr=args.generator_lr, alpha_ce=args.alpha_ce,
                alpha_bn=args.alpha_bn, alpha_adv=0.0 if warm_up else args.alpha_adv,
            )  # fmt: skip
            journal.add_batch(batch, losses)
            bn_loss.update()  # the average moves once per batch, from the last step
            fresh.append(images)
        memory.add(fresh := torch.cat(fresh))
        journal.lap("synthesis")

        # S learns only after the warm-up, when M holds enough. Test first: the fresh are new to it.
        if not warm_up:
            agree = agreement(teacher, student, fresh, run.augment, run.autocast)
            journal.lap("evaluation")
            progress = (epoch - args.warmup_epochs) / args.epochs  # cosine from --lr to 2e-4
            rate = 2e-4 + (args.lr - 2e-4) * (1 + math.cos(math.pi * progress)) / 2
            run.optimizer.param_groups[0]["lr"] = rate
            losses = distill(
                teacher, run.learner, memory, run.optimizer, run.augment, run.autocast,
                steps=student_steps, batch=math.ceil(args.student_batch / run.ranks),
                temperature=args.temperature, tick=journal.tick,
            )  # fmt: skip
            extras.same_buffers(student, run.ranks)
            journal.add_distillation(losses)
            journal.lap("distillation")
            if run.test:
                score = accuracy(student, run.test, run.augment, run.autocast)
        diversity = extras.class_diversity(teacher, images, labels, run.augment, run.autocast)
        journal.lap("evaluation")
        journal.add_epoch(memory, fresh, agree, score, diversity)
        journal.draw(images, labels, run.info["class_names"])
        run.save(epoch, fresh)
    return journal.finish(run.teacher_accuracy, run.info["class_names"])


if __name__ == "__main__":
    extras.run_script(main)
