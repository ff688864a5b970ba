import re

import pytest
import throughput_loops as loops
import throughput_models as models
import torch
import train_throughput as bench
from landscapes import make_landscapes
from PIL import Image

TINY = ["--size", "tiny", "--images", "8", "--batch_size", "2", "--rounds", "1", "--steps", "1"]


@pytest.mark.full
def test_prints_speed_shares_and_memory_and_draws(tmp_path, capsys):
    contestants = bench.main([*TINY, "--peak_tflops", "0.001", "--plot", str(tmp_path / "shares.png")])
    text = capsys.readouterr().out
    flops = models.gigaflops(models.MODELS["tiny"][1](), 16)["UNet forward + backward"]
    assert [one.name for one in contestants] == [bench.PLAIN, bench.ONLINE, bench.CACHED]
    for one in contestants:
        speed, ratio, mfu = re.search(rf"{one.name} +([\d.]+) +([\d.]+)x .* ([\d.]+)%\n", text).groups()
        assert float(speed) == pytest.approx(2 / one.seconds[0], rel=0.01)
        assert float(ratio) == pytest.approx(contestants[0].seconds[0] / one.seconds[0], abs=0.01)
        assert float(mfu) == pytest.approx(100 * flops * float(speed), abs=0.1)  # of 1e9 operations per second
        assert sum(one.shares.values()) == pytest.approx(1)
        assert {part for part, share in one.shares.items() if share <= 0} <= {"rest"} | (
            {"VAE", "text"} if one.name == bench.CACHED else set()
        )
    assert contestants[2].shares["VAE"] == contestants[2].shares["text"] == 0
    assert "peak memory" in text
    with Image.open(tmp_path / "shares.png") as image:
        assert image.width > 1000


def test_both_loops_compute_the_same_loss(tmp_path):
    """Of the same inputs; float32 keeps seven digits."""
    args = bench.parse_arguments(TINY)
    data, base = make_landscapes(tmp_path / "data", 8, 16), tmp_path / "base"
    pipe = models.MODELS["tiny"][1]()
    pipe.save_pretrained(base)
    pixels, ids = next(loops.plain_batches(pipe.tokenizer, data, args))
    plain = loops.plain_loss(
        *(pipe.vae, pipe.text_encoder, pipe.unet.train(), loops.stock_scheduler(pipe), pixels, ids),
        *(loops.Stopwatch(torch.device("cpu")), torch.Generator().manual_seed(0)),
    )
    draw = torch.Generator().manual_seed(0)
    batch = {"pixel_values": ((pixels + 1) * 127.5).round().to(torch.uint8), "input_ids": ids}  # as loaders hand it
    batch |= {name: torch.randn(2, 4, 4, 4, generator=draw) for name in ("posterior_noise", "noise")}
    batch["timestep"] = torch.randint(1000, (2,), generator=draw)
    run = loops.our_run(base, data, args, "none")
    assert run._compute_losses(batch).mean().item() == pytest.approx(plain.item(), rel=1e-5)
    batch["timestep"] = batch["timestep"] // 2
    assert run._compute_losses(batch).mean().item() != pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.full
def test_the_shape_of_stable_diffusion_and_its_operations():
    """A layer of the text encoder: four projections, two of the perceptron, and the attention, each twice."""
    with torch.device("meta"):
        pipe = models.build_sd21()
    assert sum(p.numel() for p in pipe.unet.parameters()) == 865_910_724  # as published
    tokens, width = 77, 1024
    layer = 2 * (tokens * (4 * width**2 + 2 * 4 * width**2) + 2 * tokens**2 * width)
    assert models.gigaflops(pipe, 64)["text encoder"] == pytest.approx(23 * layer / 1e9)


def test_options_of_the_trainer_reach_it(tmp_path, monkeypatch):
    args = bench.parse_arguments([*TINY, "--channels_last"])
    data, base = make_landscapes(tmp_path / "data", 8, 16), tmp_path / "base"
    models.MODELS["tiny"][1]().save_pretrained(base)
    run = loops.our_run(base, data, args, "none")
    assert run.task.config.channels_last
    assert {name: getattr(run.task.config, name) for name in loops.SPEED[1:]} == {
        "compile": "none",
        "use_8bit_adam": False,
        "allow_tf32": False,
    }
    assert run.network.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.full
def test_bf16_takes_turns_with_float32(monkeypatch, capsys):
    monkeypatch.setitem(models.MODELS, "23.6M", models.MODELS["tiny"])  # of which ratios are aimed at
    command = [*TINY, "--size", "23.6M", "--bf16", "--without", bench.ONLINE]
    plain, cached, half = bench.main(command)
    assert [plain.name, cached.name, half.name] == [bench.PLAIN, bench.CACHED, bench.HALF]
    text = capsys.readouterr().out
    assert re.search(rf"{bench.CACHED} .*x .* s +([\d.]+)x   1.60x\n", text)
    assert re.search(rf"{bench.HALF} .*x .* s +([\d.]+)x   2.40x\n", text)
    assert cached.shares["VAE"] == half.shares["VAE"] == 0


def test_each_trainer_keeps_its_precision(tmp_path):
    """All accelerators of a process share their state."""
    args = bench.parse_arguments(TINY)
    data, base = make_landscapes(tmp_path / "data", 8, 16), tmp_path / "base"
    models.MODELS["tiny"][1]().save_pretrained(base)
    runs = [loops.our_run(base, data, args, "none", precision) for precision in ("no", "bf16", "no")]
    assert [run.accelerator.mixed_precision for run in runs] == ["no", "bf16", "no"]
    losses = []
    for run in runs:
        with run.batches(1) as batches:
            losses.append(run.train_step(batches))
    assert losses[0] == losses[2] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.full
def test_measures_a_part(capsys):
    (plain, cached) = bench.main([*TINY, "--without", bench.ONLINE])
    assert (plain.name, cached.name) == (bench.PLAIN, bench.CACHED)
    assert bench.ONLINE not in capsys.readouterr().out
