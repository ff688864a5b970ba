"""What strong guidance does to images, and what two remedies do about it.

    python examples/quickstart.py && python examples/guidance_pictures.py

The quickstart's retrained model generates the same prompts from the same seeds at guidance scale 7.5: as it is, with
guidance rescale (Lin et al. 2023, section 3.4), and with dynamic thresholding (Saharia et al. 2022, Imagen, section
2.3). The latter is made for pixels and cuts latents off at numbers that mean nothing to them; it is the one that the
paper's rescale replaces. Printed for each: the share of pixel values that the autoencoder puts outside of black to
white, so that they are clipped, and how far brightness is from the data's. Draws `guidance.png`.
"""

import argparse
from pathlib import Path

import torch
from landscapes import captions, read_landscapes
from quickstart_progress import quieten_libraries
from quickstart_report import by_prompt, draw_blocks

from zsnr_diffusers import ZeroSNRDDIMScheduler, load_pipeline
from zsnr_diffusers.evaluation import luminance_coverage, mean_luminance

GUIDANCE_SCALE, NUM_INFERENCE_STEPS = 7.5, 25
REMEDIES = {
    "none": {},
    "guidance_rescale=0.7": {"guidance_rescale": 0.7},
    "dynamic thresholding": {"thresholding": True},
}


def generate(pipe, seeds: int, guidance_rescale: float = 0.0, thresholding: bool = False) -> torch.Tensor:
    """Images `[prompts x seeds, 3, height, width]` as decoded: in [-1, 1], and beyond where they will be clipped."""
    pipe.scheduler = ZeroSNRDDIMScheduler.from_config(
        pipe.scheduler.config, thresholding=thresholding, sample_max_value=float("inf")
    )
    prompts = [prompt for prompt in captions() for _ in range(seeds)]
    latents = pipe(
        prompts,
        generator=[torch.Generator().manual_seed(seed) for _ in captions() for seed in range(seeds)],
        num_inference_steps=NUM_INFERENCE_STEPS,
        guidance_scale=GUIDANCE_SCALE,
        guidance_rescale=guidance_rescale,
        output_type="latent",
    ).images
    with torch.no_grad():
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample


def main(quickstart_dir: Path = Path("quickstart"), seeds: int = 16) -> dict[str, float]:
    """Generate, measure, draw.

    Args:
        quickstart_dir: where the quickstart put its models; the image goes there too.
        seeds: images per prompt.

    Returns:
        The share of clipped pixel values of each remedy.
    """
    if not (quickstart_dir / "retrained" / "model_index.json").exists():
        raise SystemExit(f"{quickstart_dir / 'retrained'} holds no pipeline; run examples/quickstart.py first.")
    quieten_libraries()
    pipe = load_pipeline(quickstart_dir / "retrained", keep_low_frequencies=0)
    pipe.set_progress_bar_config(desc="generating", leave=False)
    real = mean_luminance(read_landscapes(quickstart_dir / "landscapes"))
    print(f"guidance {GUIDANCE_SCALE:g}, {seeds * len(captions())} images each\n")
    print("| remedy | pixel values clipped | W1 of brightness to the data |")
    print("|---|---|---|")
    shares, pictures = {}, {}
    for name, settings in REMEDIES.items():
        decoded = generate(pipe, seeds, **settings)
        shares[name] = float((decoded.abs() > 1).float().mean())
        pictures[name] = pipe.image_processor.postprocess(decoded, "pil")
        w1 = luminance_coverage(mean_luminance(pictures[name]), real).w1
        print(f"| {name} | {shares[name]:.1%} | {w1:.3f} |")
    prompts = [prompt for prompt in captions() for _ in range(seeds)]
    blocks = {f"{name}: {share:.1%} clipped": by_prompt(pictures[name], prompts) for name, share in shares.items()}
    draw_blocks(quickstart_dir / "guidance.png", blocks, dict.fromkeys(blocks, 4), captions())
    print(f"\nPicture: {quickstart_dir / 'guidance.png'}")
    return shares


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart_dir", type=Path, default=Path("quickstart"), help="default: quickstart")
    parser.add_argument("--seeds", type=int, default=16, help="images per prompt (default: 16)")
    arguments = parser.parse_args()
    main(arguments.quickstart_dir, arguments.seeds)
