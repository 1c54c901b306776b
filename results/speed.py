"""Speed: `python results/speed.py compare | profile | size | limit`, from the project's root.

compare  nayer.py, with and without bf16, with R = 4, and a plain loop in the way of the authors, in
         turns
profile  where the time of both half-steps goes, by torch.profiler
size     cost against batch size and bank size
limit    TFLOP/s of both half-steps, with and without --compile, and of a product of two matrices

CIFAR-10 shapes: wrn40_2 to wrn16_2, 400 images a generator step, 512 a student step. The plain loop
is written for this comparison: float32, PyTorch's usual memory layout, a list of linear layers for
Z, L_BN from composed operations, a teacher that is not frozen, the memory as PNG files behind a
DataLoader, a line printed at every step.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import nayer  # noqa: E402

MEAN, STD = nayer.IMAGES["cifar10"][2:]
STEPS = 10  # timed steps of a comparison
FEW = 3  # where one goes before that does not count: elsewhere, and of the slow plain generator


class PlainNoisyLayers(nn.Module):
    def __init__(self, embedding_size, count):
        super().__init__()
        self.norm = nn.BatchNorm1d(embedding_size)
        self.layers = nn.ModuleList(nn.Linear(embedding_size, 1000) for _ in range(count))

    def forward(self, inputs):
        sets = self.norm(inputs).chunk(len(self.layers))
        return torch.cat([layer(rows) for layer, rows in zip(self.layers, sets)])


class PlainGenerator(nayer.Generator):
    """Up-sampling and convolution one after the other, and no change to channels-last."""

    def __init__(self, *args):
        super().__init__(*args)
        layers = []
        for layer in self.layers:
            if isinstance(layer, nayer.UpsampleConv):
                sizes = (layer.in_channels, layer.out_channels, 3)
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(*sizes, padding=1, bias=False)]
            else:
                layers.append(layer)
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden):
        return self.layers(self.start(hidden).view(-1, *self.shape)).sigmoid()


class StatisticsHook:
    def __init__(self, module):
        self.average = None
        module.register_forward_hook(self.read)

    def read(self, module, inputs, output):
        x = inputs[0]
        mean = x.mean((0, 2, 3))
        var = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1).var(1, unbiased=False)
        self.value = (module.running_mean - mean).norm() + (module.running_var - var).norm()


class Pictures(Dataset):
    def __init__(self, folder):
        self.files = sorted(folder.glob("*.png"))
        crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
        scale = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        self.transform = transforms.Compose([*crop, *scale])

    def __len__(self):
        return 512 * STEPS  # all timed: its processes read 8 batches ahead

    def __getitem__(self, index):
        return self.transform(Image.open(self.files[index % len(self.files)]).convert("RGB"))


def plain_loop():
    """(seconds per generator step, seconds per student step)"""
    torch.manual_seed(0)
    teacher = nayer.load_model(ROOT / "teachers/cifar10_wrn40_2.safetensors").requires_grad_(True)
    student, generator = nayer.build_model("wrn16_2", 10), PlainGenerator(1000, 3, 32)
    hooks = [StatisticsHook(m) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    noisy, labels = PlainNoisyLayers(384, 40), torch.arange(10).repeat(40)
    embeddings = torch.randn(10, 384)
    optimizer = torch.optim.Adam([*generator.parameters(), *noisy.parameters()], 4e-3, (0.5, 0.999))
    augment = transforms.Compose(
        [transforms.RandomCrop(32, padding=4), transforms.Normalize(MEAN, STD)]
    )
    student.eval()
    for step in range(FEW + 1):
        if step == 1:  # the first one is not timed
            start = time.perf_counter()
        images = generator(noisy(embeddings[labels]))
        views = augment(images)
        answers, student_answers = teacher(views), student(views)
        loss_bn = sum(hook.value for hook in hooks)
        loss_ce = F.cross_entropy(answers, labels)
        loss_adv = nayer.adversarial_loss(student_answers, answers)
        loss = 0.5 * loss_ce + 10 * loss_bn + 1.33 * loss_adv
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, loss_ce.item(), loss_bn.item(), loss_adv.item(), file=sys.stderr)
    generator_step = (time.perf_counter() - start) / FEW
    with tempfile.TemporaryDirectory() as folder:
        for k, image in enumerate((images.detach() * 255).byte().permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image).save(Path(folder) / f"{k}.png")
        loader = DataLoader(Pictures(Path(folder)), batch_size=512, shuffle=True, num_workers=4)
        optimizer = torch.optim.SGD(student.parameters(), 0.2, 0.9, weight_decay=1e-4)
        student.train()
        start = time.perf_counter()
        for step, views in enumerate(loader):
            with torch.no_grad():
                answers = teacher(views)
            loss = nayer.distillation_loss(student(views), answers, 20)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(step, loss.item(), file=sys.stderr)
        student_step = (time.perf_counter() - start) / STEPS
    return generator_step, student_step


def shipped(*flags):
    """Likewise of nayer.py, as log.csv has it: every step counts, the first too. With reuse R, the
    steps are R passes over one pool of 16 batches, and T's answers to it are shared by all."""
    steps = 16 * int(flags[1]) if "--reuse" in flags else STEPS
    with tempfile.TemporaryDirectory() as out:
        command = "nayer.py --dataset cifar10 --epochs 1 --warmup-epochs 0 --batches 1 --no-eval"
        command += f" --generator-steps {STEPS} --student-steps {steps} --out {out}/run"
        subprocess.run([sys.executable, *command.split(), *flags], cwd=ROOT, check=True, stdout=-3)
        summary = json.loads((Path(out) / "run" / "summary.json").read_text())
    return summary["seconds_synthesis"] / STEPS, summary["seconds_distillation"] / steps


def compare(rounds=3):
    kinds = {"plain": None, "nayer.py --no-amp": ["--no-amp"], "nayer.py": []}
    kinds["nayer.py --reuse 4"] = ["--reuse", "4"]
    found = {kind: [] for kind in kinds}
    for _ in range(rounds):  # in turns, so that all meet the same machine
        for kind, flags in kinds.items():
            if flags is None:
                command = [sys.executable, __file__, "plain"]
                text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[kind].append(tuple(map(float, text.split())))
            else:
                found[kind].append(shipped(*flags))
            print(kind, *(f"{value:.3f}" for value in found[kind][-1]), flush=True)
    print("\n| | generator step (400), s | ratio | student step (512), s | ratio |")
    print("|---|---|---|---|---|")
    for kind, pairs in found.items():
        cells = [kind]
        for column in (0, 1):
            values = [pair[column] for pair in pairs]
            ratios = [plain[column] / pair[column] for plain, pair in zip(found["plain"], pairs)]
            cells.append(f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})")
            cells.append(f"{statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})")
        print(f"| {' | '.join(cells)} |")


def parts(synthesis_batch=400, bank_size=2000, flags=""):
    """The two half-steps of nayer.py, ready to be called with a number of steps."""
    args = f"--dataset cifar10 --no-eval --out none --synthesis-batch {synthesis_batch} {flags}"
    run = nayer.Run(nayer.parse_args(args.split()))
    labels = nayer.class_sets(10, synthesis_batch, run.device)
    inputs = run.label_embeddings[labels]
    memory = nayer.MemoryBank(bank_size, 3, 32, run.device)
    memory.add(torch.randint(256, memory.images.shape, dtype=torch.uint8, device=run.device))

    def synthesis(steps):
        return nayer.synthesize(
            run.generator, run.noisy_layer, inputs, labels, run.teacher, run.student, run.bn_loss,
            run.augment, steps=steps, lr=4e-3, alpha_ce=0.5, alpha_bn=10.0, alpha_adv=1.33,
        )[1].sum().item()  # fmt: skip

    def distillation(steps, batch=512):
        return nayer.distill(
            run.teacher, run.student, memory, run.optimizer, run.augment,
            steps=steps, batch=batch, temperature=20.0,
        ).sum().item()  # fmt: skip

    return synthesis, distillation


def profile():
    for name, step in zip(("synthesize", "distill"), parts()):
        step(1)
        with torch.profiler.profile() as record:
            step(FEW)
        print(f"{name}, {FEW} steps\n")
        print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=14))


def seconds(step, *more):
    """Of one step, after one that does not count."""
    step(1, *more)
    start = time.perf_counter()
    step(FEW, *more)
    return (time.perf_counter() - start) / FEW


def size():
    for batch in (200, 400):
        print(f"generator step, batch {batch}: {seconds(parts(batch)[0]):.3f} s")
    for bank in (10_000, 100_000):
        step = parts(bank_size=bank)[1]
        for batch in (256, 512):
            print(f"student step, batch {batch}, bank {bank}: {seconds(step, batch):.3f} s")


def limit():
    device = nayer.pick_device("auto")[0]
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)
    took = seconds(lambda times: [matrix @ matrix for _ in range(times)][0][0, 0].item())
    print(f"matrix product: {2 * 4096**3 / took / 1e12:.3f} TFLOP/s in bf16")
    work = []  # FLOP a step; one multiply-add is two
    for flags in ("", "--compile"):
        for index, step in enumerate(parts(flags=flags)):
            start = time.perf_counter()
            step(1)
            first = time.perf_counter() - start
            if not flags:
                with FlopCounterMode(display=False) as counter:
                    step(1)
                work.append(counter.get_total_flops())
            took = seconds(step)
            name = f"{('synthesize', 'distill')[index]} {flags}"
            speed = f"{work[index] / 1e12:.3f} TFLOP, {work[index] / took / 1e12:.3f} TFLOP/s"
            print(f"{name:22} first step {first:.1f} s, then {took:.3f} s: {speed}", flush=True)


if __name__ == "__main__":
    action = sys.argv[1] if len(sys.argv) == 2 else ""
    if action == "plain":
        print(*plain_loop())
    elif action in ("compare", "profile", "size", "limit"):
        nayer.run_script(globals()[action])
    else:
        sys.exit(__doc__)
