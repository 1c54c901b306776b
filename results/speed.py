"""Speed: `python results/speed.py compare | profile | limit`, from the project's root.

compare  nayer.py, with and without bf16, with R = 4, and a plain loop in the way of the authors, in
         turns, on one device: a GPU if there is one
profile  where the time of both half-steps goes, by torch.profiler
limit    TFLOP/s of both half-steps, with and without --compile, and of a product of two matrices

CIFAR-10 shapes: wrn40_2 to wrn16_2, 400 images a generator step, 512 a student step. The plain loop
is written for this comparison: float32, PyTorch's usual memory layout, a list of linear layers for
Z, L_BN from composed operations, a teacher that is not frozen, the memory as PNG files behind a
DataLoader of four processes, a line printed at every step.
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

KNOWN = nayer.parse_args(nayer.IMAGES["cifar10"].split())
MEAN = KNOWN.mean
STD = KNOWN.std
STEPS = 10  # timed steps of a comparison
FEW = 3  # where one goes before that does not count: elsewhere, and of the slow plain generator
DEVICE, _ = nayer.pick_device("auto")


# ---- A plain loop --------------------------------------------------------------------------------
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

    def __init__(self, hidden_size, channels, image_size):
        super().__init__(hidden_size, channels, image_size)
        layers = []
        for layer in self.layers:
            if isinstance(layer, nayer.UpsampleConv):
                layers.append(nn.Upsample(scale_factor=2))
                layer = nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1, bias=False)
            layers.append(layer)
        self.layers = nn.Sequential(*layers)

    def forward(self, hidden):
        return self.layers(self.start(hidden).view(-1, *self.shape)).sigmoid()


class StatisticsHook:
    """The part of L_BN that one layer adds."""

    def __init__(self, module):
        module.register_forward_hook(self.read)

    def read(self, module, inputs, output):
        x = inputs[0]
        mean = x.mean((0, 2, 3))
        var = x.permute(1, 0, 2, 3).reshape(x.shape[1], -1).var(1, unbiased=False)
        self.value = (module.running_mean - mean).norm() + (module.running_var - var).norm()


class Pictures(Dataset):
    """The PNG files in a folder, again and again."""

    def __init__(self, folder):
        self.files = sorted(folder.glob("*.png"))
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self):
        return 512 * STEPS  # all timed: its processes read 8 batches ahead

    def __getitem__(self, index):
        return self.transform(Image.open(self.files[index % len(self.files)]).convert("RGB"))


def plain_generator_steps(teacher, student):
    """(seconds per step, the last step's images)"""
    generator = PlainGenerator(1000, 3, 32).to(DEVICE)
    noisy = PlainNoisyLayers(384, 40).to(DEVICE)
    labels = torch.arange(10, device=DEVICE).repeat(40)
    embeddings = torch.randn(10, 384, device=DEVICE)
    hooks = [StatisticsHook(m) for m in teacher.modules() if isinstance(m, nn.BatchNorm2d)]
    parameters = [*generator.parameters(), *noisy.parameters()]
    optimizer = torch.optim.Adam(parameters, 4e-3, (0.5, 0.999))
    crop = transforms.RandomCrop(32, padding=4)
    augment = transforms.Compose([crop, transforms.Normalize(MEAN, STD)])
    student.eval()
    for step in range(FEW + 1):
        if step == 1:  # the first one is not timed
            start = time.perf_counter()
        images = generator(noisy(embeddings[labels]))
        views = augment(images)
        answers = teacher(views)
        student_answers = student(views)
        loss_bn = sum(hook.value for hook in hooks)
        loss_ce = F.cross_entropy(answers, labels)
        loss_adv = nayer.adversarial_loss(student_answers, answers)
        loss = 0.5 * loss_ce + 10 * loss_bn + 1.33 * loss_adv
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # This waits for the device, so that the clock is read when the step is done.
        print(step, loss_ce.item(), loss_bn.item(), loss_adv.item(), file=sys.stderr)
    return (time.perf_counter() - start) / FEW, images.detach()


def save_pictures(folder, images):
    pixels = (images * 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    for k, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{k}.png")


def plain_student_steps(teacher, student, folder):
    """Seconds per step."""
    loader = DataLoader(Pictures(folder), batch_size=512, shuffle=True, num_workers=4)
    optimizer = torch.optim.SGD(student.parameters(), 0.2, 0.9, weight_decay=1e-4)
    student.train()
    start = time.perf_counter()
    for step, views in enumerate(loader):
        views = views.to(DEVICE)
        with torch.no_grad():
            answers = teacher(views)
        loss = nayer.distillation_loss(student(views), answers, 20)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, loss.item(), file=sys.stderr)
    return (time.perf_counter() - start) / STEPS


def plain_loop():
    """(seconds per generator step, seconds per student step)"""
    torch.manual_seed(0)
    teacher = nayer.load_model(ROOT / "teachers/cifar10_wrn40_2.safetensors").to(DEVICE)
    teacher.requires_grad_(True)
    student = nayer.build_model("wrn16_2", 10).to(DEVICE)
    generator_step, images = plain_generator_steps(teacher, student)
    with tempfile.TemporaryDirectory() as folder:
        save_pictures(Path(folder), images)
        student_step = plain_student_steps(teacher, student, Path(folder))
    return generator_step, student_step


# ---- The comparison ------------------------------------------------------------------------------
KINDS = {  # flags of nayer.py; with reuse R, the student steps are R passes over 16 batches
    "nayer.py --no-amp": f"--no-amp --student-steps {STEPS}",
    "nayer.py": f"--student-steps {STEPS}",
    "nayer.py --reuse 4": "--reuse 4 --student-steps 64",
}


def time_plain():
    """plain_loop in a process of its own."""
    command = [sys.executable, __file__, "plain"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    generator_step, student_step = done.stdout.split()
    return float(generator_step), float(student_step)


def time_shipped(flags):
    """Likewise of nayer.py, as its summary has it: of the second epoch. The first is warm-up."""
    with tempfile.TemporaryDirectory() as out:
        command = (
            "nayer.py --dataset cifar10 --warmup-epochs 0 --epochs 2 --batches 1 --no-eval "
            f"--agree-batches 0 --generator-steps {STEPS} --out {out}/run {flags}"
        )
        call = [sys.executable, *command.split()]
        subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        summary = json.loads((Path(out) / "run" / "summary.json").read_text())
    generator_step = summary["seconds_synthesis"] / STEPS
    student_step = summary["seconds_distillation"] / summary["settings"]["student_steps"]
    return generator_step, student_step


def median_and_range(values, digits):
    low = min(values)
    high = max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def compare(rounds=3):
    found = {kind: [] for kind in ("plain", *KINDS)}
    for _ in range(rounds):  # in turns, so that all meet the same machine
        for kind, pairs in found.items():
            pair = time_plain() if kind == "plain" else time_shipped(KINDS[kind])
            pairs.append(pair)
            print(kind, f"{pair[0]:.3f} {pair[1]:.3f}", flush=True)
    print("\n| | generator step (400), s | ratio | student step (512), s | ratio |")
    print("|---|---|---|---|---|")
    for kind, pairs in found.items():
        cells = [kind]
        for half in (0, 1):
            values = [pair[half] for pair in pairs]
            ratios = [plain[half] / pair[half] for plain, pair in zip(found["plain"], pairs)]
            cells.append(median_and_range(values, 2))
            cells.append(median_and_range(ratios, 1))
        print(f"| {' | '.join(cells)} |")


# ---- One half-step at a time ---------------------------------------------------------------------
def half_steps(flags=""):
    """{name: a function that makes so many steps of a half-step}"""
    args = nayer.parse_args(f"--dataset cifar10 --no-eval --out none {flags}".split())
    run = nayer.Run(args, nayer.load_teacher(args))
    labels = nayer.class_sets(10, args.synthesis_batch, run.device)
    inputs = run.label_embeddings[labels]
    memory = nayer.MemoryBank(2000, 3, 32, run.device)
    memory.add(torch.randint(256, memory.images.shape, dtype=torch.uint8, device=run.device))

    def synthesize(steps):
        _, losses = nayer.synthesize(
            run.generator,
            run.noisy_layer,
            inputs,
            labels,
            run.teacher,
            run.student,
            run.bn_loss,
            run.augment,
            steps=steps,
            lr=args.generator_lr,
            alpha_ce=args.alpha_ce,
            alpha_bn=args.alpha_bn,
            alpha_adv=args.alpha_adv,
        )
        return losses.sum().item()  # waits for the device

    def distill(steps):
        losses = nayer.distill(
            run.teacher,
            run.student,
            memory,
            run.optimizer,
            run.augment,
            steps=steps,
            batch=args.student_batch,
            temperature=args.temperature,
        )
        return losses.sum().item()

    return dict(synthesize=synthesize, distill=distill)


def profile():
    for name, step in half_steps().items():
        step(1)
        with torch.profiler.profile() as record:
            step(FEW)
        print(f"{name}, {FEW} steps\n")
        print(record.key_averages().table(sort_by="self_cpu_time_total", row_limit=14))


def seconds(step):
    """Of one step, after one that does not count."""
    step(1)
    start = time.perf_counter()
    step(FEW)
    return (time.perf_counter() - start) / FEW


def count_flop(step):
    """Of one step; one multiply-add is two."""
    with FlopCounterMode(display=False) as counter:
        step(1)
    return counter.get_total_flops()


def limit_of_a_product():
    device, _ = nayer.pick_device("auto")
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device=device)

    def multiply(times):
        for _ in range(times):
            product = matrix @ matrix
        return product[0, 0].item()  # waits for the device

    tflop = 2 * 4096**3 / 1e12
    print(f"matrix product: {tflop / seconds(multiply):.3f} TFLOP/s in bf16")


def limit():
    limit_of_a_product()
    tflop = {}
    for flags in ("", "--compile"):
        for name, step in half_steps(flags).items():
            start = time.perf_counter()
            step(1)
            first = time.perf_counter() - start
            if flags == "":
                tflop[name] = count_flop(step) / 1e12
            took = seconds(step)
            line = f"{name} {flags}".ljust(22)
            line += f" first step {first:.1f} s, then {took:.3f} s: "
            line += f"{tflop[name]:.3f} TFLOP, {tflop[name] / took:.3f} TFLOP/s"
            print(line, flush=True)


def plain():
    generator_step, student_step = plain_loop()
    print(generator_step, student_step)


ACTIONS = dict(compare=compare, profile=profile, limit=limit, plain=plain)

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in ACTIONS:
        sys.exit(__doc__)
    nayer.run_script(ACTIONS[sys.argv[1]])
