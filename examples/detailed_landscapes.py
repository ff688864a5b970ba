r"""A larger model of landscapes, whose captions say more than how bright they are: forty minutes on one CPU core.

    python examples/detailed_landscapes.py

"a dim autumn landscape in cold light from the left under a narrow sky" is one of 216 captions. A Stable Diffusion of
stock classes with four times the weights of the quickstart's is trained from nothing on 4,000 such images, with v-loss
on zero terminal SNR. Few-step samplers and `zsnr calibrate` are compared on it:

    python examples/benchmarks/trained_network.py --pipeline detailed/trained --prompts_file detailed/prompts.txt \
        --num_prompts 24 --seeds 1 --guidance_scale 7.5 --steps 4 5 6 8 10
    zsnr calibrate detailed/trained --prompts_file detailed/prompts.txt --guidance_scale 7.5 --output_dir detailed/fast

Everything lands in `--output_dir`; `samples.png` shows captions and images. Run it again and it goes on where it was.
"""

import argparse
import os
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

# Before torch is imported, for the reason given in `quickstart.py`.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from landscapes import detailed_captions, make_landscapes
from quickstart_progress import Advance, Part, quieten_libraries, run_parts
from small_stable_diffusion import build_stable_diffusion, train_vae_on_landscapes
from small_training import train_stable_diffusion

from zsnr_diffusers import load_pipeline
from zsnr_diffusers.evaluation import generate_images, sample_grid

CHANNELS, TEXT_WIDTH = (32, 64, 128), 128
ROWS, SEEDS = 8, 4
"""Captions and images of each in the picture."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    images: int = 4000
    vae_steps: int = 800
    steps: int = 6000


class DetailedLandscapes:
    """What is made, in which folder, of which sizes.

    Args:
        folder: where everything goes.
        seed: decides on all randomness.
        sizes: how much of everything.
    """

    def __init__(self, folder: Path, seed: int, sizes: Sizes) -> None:
        self.folder, self.seed, self.sizes = folder, seed, sizes
        self.data, self.untrained, self.trained = folder / "landscapes", folder / "untrained", folder / "trained"
        self.prompts, self.picture = folder / "prompts.txt", folder / "samples.png"

    def parts(self) -> list[Part]:
        """Everything that takes time, with the seconds that one core needs for it."""
        sizes = self.sizes
        return [
            Part("drawing landscapes", sizes.images / 350, self.draw_landscapes, self.prompts),
            Part("training the autoencoder", sizes.vae_steps / 18, self.train_autoencoder, self.untrained),
            Part("training the model", sizes.steps / 2.6, self.train, self.trained / "model_index.json"),
            Part("images", 10, self.draw_samples, self.picture),
        ]

    def draw_landscapes(self, advance: Advance) -> None:
        """Draw the training images, and write down all captions, shuffled."""
        make_landscapes(self.data, self.sizes.images, seed=self.seed, detailed=True)
        captions = detailed_captions()
        random.Random(self.seed).shuffle(captions)
        self.prompts.write_text("\n".join(captions) + "\n", encoding="utf-8")

    def train_autoencoder(self, advance: Advance) -> None:
        """Save a pipeline with a trained autoencoder and an untrained UNet."""
        pipe = build_stable_diffusion(
            self.seed, unet_channels=CHANNELS, text_width=TEXT_WIDTH, texts=detailed_captions()
        )
        train_vae_on_landscapes(pipe.vae, self.data, self.sizes.vae_steps, self.seed, advance)
        pipe.save_pretrained(self.untrained)

    def train(self, advance: Advance) -> None:
        """Train with the defaults of `zsnr train`: v-loss on zero terminal SNR."""
        steps = self.sizes.steps
        train_stable_diffusion(
            self.trained,
            steps,
            lambda step: advance(step / steps),
            pretrained_model_name_or_path=str(self.untrained),
            train_data_dir=str(self.data),
            cache_dir=str(self.folder / "cache"),
            learning_rate=1e-3,
            lr_warmup_steps=min(100, steps // 4),
            checkpointing_steps=1000,
            seed=self.seed,
        )
        shutil.rmtree(self.folder / "cache")

    def draw_samples(self, advance: Advance) -> None:
        """Draw some captions with images of them."""
        pipe = load_pipeline(self.trained)
        prompts = self.prompts.read_text(encoding="utf-8").splitlines()[:ROWS]
        conditions = [prompt for prompt in prompts for _ in range(SEEDS)]
        images = generate_images(
            pipe,
            conditions,
            [*range(SEEDS)] * len(prompts),
            num_inference_steps=20,
            batch_size=8,
            guidance_scale=3.0,
        )
        rows = [images[SEEDS * i : SEEDS * (i + 1)] for i in range(len(prompts))]
        sample_grid(rows, prompts, cell=128).save(self.picture)


def main(output_dir: Path = Path("detailed"), seed: int = 0, sizes: Sizes | None = None) -> None:
    """Draw the data, train, show samples.

    Args:
        output_dir: where everything goes.
        seed: decides on all randomness.
        sizes: how much of everything.
    """
    quieten_libraries()
    sizes = sizes or Sizes()
    parts = DetailedLandscapes(output_dir, seed, sizes).parts()
    run_parts(parts, output_dir / "progress.json", {"seed": seed, **asdict(sizes)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("detailed"), help="default: detailed")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    arguments = parser.parse_args()
    main(arguments.output_dir, arguments.seed)
