"""How fast Stable Diffusion trains here: our trainer with and without caches beside a plain loop of stock parts.

    python examples/benchmarks/train_throughput.py --size 0.8M
    python examples/benchmarks/train_throughput.py --size 0.8M --channels_last --compile network
    python examples/benchmarks/train_throughput.py --size sd21 --device cuda --mixed_precision bf16 --batch_size 16 \
        --workers 8 --peak_tflops 989

The plain loop does what diffusers' text-to-image example does: it encodes images and captions in every step, with
AdamW, EMAModel and DDPMScheduler at their defaults. All three start from the same random weights and read the same
images. They take turns, so that a drift of the machine's speed meets all alike; printed are medians over the rounds,
and the median of each round's ratio to the plain loop. The shares of a step are measured in further rounds, since a
GPU must be waited for at every part. What an option of the trainer pays is seen by a run with it and one without, in
their ratios to the plain loop, which has none of them. A cache is filled before the clock starts; how long that takes
is printed.

Model FLOPs utilisation (MFU) counts the UNet's forward and backward pass alone, which all three need.
"""

import argparse
import contextlib
import functools
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
# transformers and diffusers announce, on import, what they would do with libraries that nobody here needs.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import datasets
import diffusers
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from landscapes import captions, make_landscapes
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from small_stable_diffusion import build_stable_diffusion, build_tokenizer, flawed_scheduler
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from zsnr_diffusers.training import TrainingConfig
from zsnr_diffusers.training.data.dataset import check_images
from zsnr_diffusers.training.run import prepare  # what `train` trains to the end; here it takes turns
from zsnr_diffusers.training.speed import matmul_precision
from zsnr_diffusers.training.stable_diffusion import StableDiffusionTask
from zsnr_diffusers.training.trainer import Trainer
from zsnr_diffusers.utils.distributed import Processes

PARTS = ("data", "VAE", "text", "forward", "backward", "optimizer", "EMA")
SPEED = ("channels_last", "compile", "use_8bit_adam", "allow_tf32")
"""Options of our trainer, which are its own here."""
PLAIN, ONLINE, CACHED = "plain loop", "ours, --cache none", "ours, --cache both"

# Models


def build_sd21() -> StableDiffusionPipeline:
    """The shape of Stable Diffusion 2.1, with random weights."""
    levels, tokenizer = 4, build_tokenizer(captions(), max_length=77)
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),  # the numbers of heads
            use_linear_projection=True,
        ),
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=2,
            latent_channels=4,
            sample_size=768,
        ),
        text_encoder=transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=49408,
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=23,
                num_attention_heads=16,
                hidden_act="gelu",
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval(),
        tokenizer=tokenizer,
        scheduler=flawed_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def small(resolution: int, **sizes: Any) -> Callable[[], StableDiffusionPipeline]:
    """A builder of a small Stable Diffusion."""
    return functools.partial(build_stable_diffusion, image_size=resolution, **sizes)


MODELS: dict[str, tuple[int, Callable[[], StableDiffusionPipeline]]] = {
    "tiny": (16, small(16, unet_channels=(8, 16), vae_channels=(8, 8, 8), text_width=8)),
    "0.8M": (64, small(64, unet_channels=(16, 32, 56))),
    "23.6M": (
        128,
        small(128, unet_channels=(64, 128, 264), unet_layers=2, vae_channels=(64, 128, 128), text_width=128),
    ),
    "sd21": (512, build_sd21),
}
"""Resolution and builder by size; the sizes but `sd21` are parameters of the UNet."""


def gigaflops(pipe: StableDiffusionPipeline, resolution: int) -> dict[str, float]:
    """What a training image costs each network, in 1e9 operations, a multiply-add being two."""

    def count(run: Callable[[], Any]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 1e9

    with torch.device("meta"):  # shapes are all that matters
        unet, vae = UNet2DConditionModel.from_config(pipe.unet.config), AutoencoderKL.from_config(pipe.vae.config)
        text_encoder = type(pipe.text_encoder)(pipe.text_encoder.config).requires_grad_(False)
        vae.requires_grad_(False)
        pixels = torch.empty(1, 3, resolution, resolution)
        ids = torch.zeros(1, pipe.tokenizer.model_max_length, dtype=torch.long)
        latents, states = vae.encode(pixels).latent_dist.mean, text_encoder(ids)[0]
        timestep = torch.zeros(1)
        return {
            "UNet forward + backward": count(lambda: unet(latents, timestep, states).sample.sum().backward()),
            "VAE encoder": count(lambda: vae.encode(pixels)),
            "text encoder": count(lambda: text_encoder(ids)),
        }


# The clock


class Stopwatch:
    """Seconds by part of a step, while it is on."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on, self.seconds = device, False, Counter[str]()
        self._inner = 0.0

    def now(self) -> float:
        """The time when the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time what is inside, without the parts that are timed within it."""
        if not self.on:
            yield
            return
        started, outer, self._inner = self.now(), self._inner, 0.0
        yield
        spent = self.now() - started
        self.seconds[part] += spent - self._inner
        self._inner = outer + spent

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Time every call of an attribute."""
        call = getattr(owner, name)

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(part):
                return call(*args, **kwargs)

        setattr(owner, name, timed)

    def each(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, timed as data."""
        while True:
            with self("data"):
                batch = next(batches)
            yield batch


# The contestants: each yields its loss, step by step


def plain_loop(base: Path, data: Path, args: argparse.Namespace, watch: Stopwatch) -> Iterator[float]:
    """Encode and train with stock parts, as a script would."""
    device = watch.device
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.mixed_precision)
    pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    vae, text_encoder, unet = pipe.vae.to(device), pipe.text_encoder.to(device), pipe.unet.to(device).train()
    for frozen in (vae, text_encoder):
        frozen.requires_grad_(False).to(half or torch.float32)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    ema = EMAModel(unet.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config)
    ema.to(device)
    scheduler = stock_scheduler(pipe)
    scaler = torch.amp.GradScaler(device.type, enabled=args.mixed_precision == "fp16")
    for pixel_values, input_ids in watch.each(plain_batches(pipe.tokenizer, data, args)):
        loss = plain_loss(vae, text_encoder, unet, scheduler, pixel_values.to(device), input_ids.to(device), watch)
        with watch("backward"):
            scaler.scale(loss).backward()
        with watch("optimizer"):
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        with watch("EMA"):
            ema.step(unet.parameters())
        yield loss.item()


def plain_loss(
    vae: Any,
    text_encoder: Any,
    unet: Any,
    scheduler: DDPMScheduler,
    pixel_values: torch.Tensor,
    input_ids: torch.Tensor,
    watch: Stopwatch,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Mean v-loss of a batch."""
    with torch.no_grad(), watch("VAE"):
        latents = vae.encode(pixel_values.to(vae.dtype)).latent_dist.sample(generator) * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(latents),), generator=generator, device=latents.device)
    noisy, target = (f(latents, noise, timesteps) for f in (scheduler.add_noise, scheduler.get_velocity))
    with torch.no_grad(), watch("text"):
        states = text_encoder(input_ids)[0]
    with watch("forward"), torch.autocast(latents.device.type, vae.dtype, enabled=vae.dtype != torch.float32):
        output = unet(noisy, timesteps, states, return_dict=False)[0]
    return F.mse_loss(output.float(), target.float())


def stock_scheduler(pipe: StableDiffusionPipeline) -> DDPMScheduler:
    """Stock's own zero terminal SNR and v."""
    return DDPMScheduler.from_config(
        pipe.scheduler.config, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )


def plain_batches(tokenizer: Any, data: Path, args: argparse.Namespace) -> Iterator[Any]:
    """Images and token ids, shuffled, without end."""
    rows = datasets.load_dataset("imagefolder", data_dir=str(data), split="train")

    def sample(row: dict[str, list[Any]]) -> dict[str, list[Any]]:
        size = (args.resolution, args.resolution)
        fitted = [ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BILINEAR) for image in row["image"]]
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1 for image in fitted]
        ids = tokenizer(row["text"], padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"pixels": pixels, "ids": list(ids)}

    loader = DataLoader(
        rows.with_transform(sample),
        args.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=args.workers,
        collate_fn=lambda many: tuple(torch.stack([one[name] for one in many]) for name in ("pixels", "ids")),
    )
    while True:
        yield from loader


def our_run(base: Path, data: Path, args: argparse.Namespace, cache: str) -> Trainer:
    """What `train` runs, before its first step."""
    config = TrainingConfig(
        pretrained_model_name_or_path=str(base),
        train_data_dir=str(data),
        output_dir=str(data.parent / "run"),
        cache=cache,
        resolution=args.resolution,
        train_batch_size=args.batch_size,
        mixed_precision=args.mixed_precision,
        dataloader_num_workers=args.workers,
        report_to="none",
        **{name: getattr(args, name) for name in SPEED},
    )
    accelerator = Accelerator(mixed_precision=args.mixed_precision, cpu=args.device == "cpu")
    task = StableDiffusionTask(config)
    samples = task.samples(check_images(task.rows, config))
    task.plan_cache(accelerator, samples)
    return prepare(config, accelerator, Processes(), task, samples)


def our_loop(run: Trainer, watch: Stopwatch, allow_tf32: bool) -> Iterator[float]:
    """Our trainer, timed from outside."""
    for owner, name, part in (
        (run.task, "autoencoder", "VAE"),
        (run.task, "text_encoder", "text"),
        (run.task, "predict", "forward"),  # the text encoder is in it, or nothing else
        (run.accelerator, "backward", "backward"),
        (run.accelerator, "clip_grad_norm_", "optimizer"),
        (run.optimization.optimizer, "step", "optimizer"),
        (run.network, "update_average", "EMA"),
    ):
        watch.watch(owner, name, part)
    with run.batches(run.config.max_train_steps) as batches:
        timed = watch.each(batches)
        while True:
            with matmul_precision(allow_tf32):
                loss = run.train_step(timed)
            yield loss


# The contest


class Contestant:
    """A loop with what was measured of it."""

    def __init__(self, name: str, make: Callable[[Stopwatch], Iterator[float]], device: torch.device) -> None:
        self.name, self.watch = name, Stopwatch(device)
        before, started = memory(device), time.perf_counter()
        self.losses = make(self.watch)
        next(self.losses)
        self.setup = time.perf_counter() - started
        self.own_memory = memory(device) - before
        self.step_memory = 0.0
        self.seconds: list[float] = []
        self.shares: dict[str, float] = {}

    def steps(self, count: int) -> float:
        """Seconds per step."""
        device = self.watch.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before, started = memory(device), self.watch.now()
        for _ in range(count):
            next(self.losses)
        seconds = (self.watch.now() - started) / count
        if device.type == "cuda":
            self.step_memory = max(self.step_memory, torch.cuda.max_memory_allocated(device) / 1e9 - before)
        return seconds

    def measure_shares(self, count: int) -> None:
        """Where the time of a step goes."""
        self.watch.on = True
        total = self.steps(count) * count
        self.watch.on = False
        self.shares = {part: self.watch.seconds[part] / total for part in PARTS}
        self.shares["rest"] = 1 - sum(self.shares.values())


def memory(device: torch.device) -> float:
    """GB in use on a GPU; on a CPU the most that the process ever used."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)


def contest(contestants: Sequence[Contestant], args: argparse.Namespace) -> None:
    """Rounds in which each makes some steps."""
    for one in contestants:
        one.steps(args.steps)  # fills caches
    for _ in range(args.rounds):
        for one in contestants:
            one.seconds.append(one.steps(args.steps))
    for one in contestants:
        one.measure_shares(args.steps * max(1, args.rounds // 4))


def report(contestants: Sequence[Contestant], flops: dict[str, float], args: argparse.Namespace) -> None:
    """Print all."""
    print(
        f"\n{args.size}, {args.resolution} x {args.resolution}, batch {args.batch_size}, {args.mixed_precision} "
        f"mixed precision on {args.device}, {args.threads} thread(s), {args.workers} workers"
    )
    print("GFLOP per image: " + ", ".join(f"{name} {value:,.4g}" for name, value in flops.items()))
    peak = args.peak_tflops and args.peak_tflops * 1e3 / flops["UNet forward + backward"]
    print(f"\n{'':20}{'images/s':>10}{'of plain':>10}{'set up in':>11}" + f"{'MFU':>8}" * bool(peak))
    for one in contestants:
        speed = args.batch_size / statistics.median(one.seconds)
        ratio = statistics.median(a / b for a, b in zip(contestants[0].seconds, one.seconds, strict=True))
        row = f"{one.name:20}{speed:10.2f}{ratio:9.2f}x{one.setup:9.1f} s"
        print(row + (f"{speed / peak:8.1%}" if peak else ""))
    print(f"\n{'share of a step':20}" + "".join(f"{part:>10}" for part in (*PARTS, "rest")))
    for one in contestants:
        print(f"{one.name:20}" + "".join(f"{share:10.1%}" for share in one.shares.values()))
    print()
    if args.device == "cpu":
        print(f"peak memory of the process, all contestants together: {memory(torch.device('cpu')):.2f} GB")
    else:
        for one in contestants:
            print(f"{one.name:20}peak memory {one.own_memory + one.step_memory:.2f} GB")


def plot(contestants: Sequence[Contestant], path: Path) -> None:
    """A bar per contestant, as long as its step, divided into parts."""
    figure = Figure(figsize=(9, 1 + 0.5 * len(contestants)), layout="constrained")
    axes = figure.subplots()
    names = [one.name for one in contestants]
    left = np.zeros(len(names))
    for part in (*PARTS, "rest"):
        width = [1e3 * statistics.median(one.seconds) * max(one.shares[part], 0) for one in contestants]
        axes.barh(names, width, left=left, label=part)
        left += width
    axes.invert_yaxis()
    axes.set_xlabel("ms per step")
    figure.legend(ncols=len(PARTS) + 1, fontsize="small", frameon=False, loc="outside upper center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Throughput of training.", epilog=__doc__)
    parser.add_argument("--size", choices=MODELS, default="0.8M", help="of the model (default: 0.8M)")
    parser.add_argument("--resolution", type=int, help="pixels per side (default: the model's)")
    parser.add_argument("--batch_size", type=int, default=8, help="default: 8")
    parser.add_argument("--images", type=int, default=64, help="different images (default: 64)")
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round (default: 4)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--mixed_precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--workers", type=int, default=0, help="processes that read images, of each (default: 0)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--peak_tflops", type=float, help="of the device, for MFU: 989 for an H100 in bf16")
    parser.add_argument("--without", nargs="+", default=[], choices=[ONLINE, CACHED], help="to save memory")
    parser.add_argument("--channels_last", action="store_true", help="in ours, as are the next three")
    parser.add_argument("--compile", default="none", choices=["none", "blocks", "network"])
    parser.add_argument("--use_8bit_adam", action="store_true")
    parser.add_argument("--allow_tf32", action="store_true")
    parser.add_argument("--plot", type=Path, help="image of the shares to write")
    args = parser.parse_args(argv)
    args.resolution = args.resolution or MODELS[args.size][0]
    return args


def main(argv: Sequence[str] | None = None) -> list[Contestant]:
    """Build, measure, print."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    for library in (datasets, diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as folder:
        base, data = Path(folder, "base"), make_landscapes(Path(folder, "data"), args.images, args.resolution)
        pipe = MODELS[args.size][1]()
        pipe.save_pretrained(base)
        flops = gigaflops(pipe, args.resolution)
        makers: dict[str, Callable[[Stopwatch], Iterator[float]]] = {
            PLAIN: lambda watch: plain_loop(base, data, args, watch),
            ONLINE: lambda watch: our_loop(our_run(base, data, args, "none"), watch, args.allow_tf32),
            CACHED: lambda watch: our_loop(our_run(base, data, args, "both"), watch, args.allow_tf32),
        }
        contestants = [Contestant(name, make, device) for name, make in makers.items() if name not in args.without]
        contest(contestants, args)
        report(contestants, flops, args)
        if args.plot:
            plot(contestants, args.plot)
        return contestants


if __name__ == "__main__":
    main()
