"""What a run writes, and how its images are sampled."""

import functools
from dataclasses import dataclass

from ...config import OutputConfig, option
from ..previews import Preview, read_previews
from .guidance import GuidanceConfig


@dataclass
class PreviewConfig(OutputConfig):
    """Output options, with the prompts of the previews."""

    validation_prompts: list[str] = option([], "Prompts of the previews, of four images each.")  # noqa: RUF009
    validation_prompts_file: str | None = option(
        None,
        "File of more of them, one to a line. In .jsonl with settings of its own: prompt, negative_prompt, seed or "
        "seeds, width, height, guidance_scale, guidance_rescale, num_inference_steps. In other files a line is the "
        "prompt, perhaps with options as kohya's scripts have them: --n negative prompt, --d seed, --w, --h, --l "
        "guidance scale, --s steps; lines that begin with # are left out.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.previews  # noqa: B018  what is wrong with the file is said before any work

    @functools.cached_property
    def previews(self) -> list[Preview]:
        """The previews of `validation_prompts` and `validation_prompts_file`.

        Raises:
            ValueError: a line of the file is wrong.
        """
        more = [] if self.validation_prompts_file is None else read_previews(self.validation_prompts_file)
        return [*map(Preview, self.validation_prompts), *more]


@dataclass
class GuidedOutputConfig(GuidanceConfig, PreviewConfig):
    """Output options; previews use guidance."""

    def recommended_call(self) -> dict[str, float]:
        """Arguments of a pipeline's call that the model card recommends."""
        return {"guidance_scale": self.guidance_scale, "guidance_rescale": self.guidance_rescale}
