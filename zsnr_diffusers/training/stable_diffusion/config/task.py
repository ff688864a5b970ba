"""What a task on Stable Diffusion reads."""

from dataclasses import dataclass

from ...config import ComputeConfig, TaskConfig
from ...config.data import ONE_SOURCE
from .data import CaptionedDataConfig
from .guidance import DistillationConfig
from .model import AdapterConfig, BaseConfig


@dataclass
class StableDiffusionTaskConfig(DistillationConfig, AdapterConfig, CaptionedDataConfig, BaseConfig, TaskConfig):
    """What a task on Stable Diffusion reads: base, adapter, data, objective, and the teacher of a distillation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distill_steps is not None:
            self._check_student()

    def _check_student(self) -> None:
        """Refuse a distillation of what is not a LoRA, or is none that predicts v at zero terminal SNR."""
        asked = f"--distill_steps={self.distill_steps}"
        if not self.trains_adapter:
            raise ValueError(
                f"{asked}: the base is the teacher, and the student is a LoRA of it: pass --lora_rank, of 16 "
                "to 128, or --lora_weights."
            )
        if self.prediction_type != "v_prediction" or not self.rescale_betas_zero_snr:
            raise ValueError(
                f"{asked} is for v_prediction at zero terminal SNR, where sampling starts from pure noise: leave out "
                "--prediction_type and --rescale_betas_zero_snr."
            )

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


@dataclass
class EncodingConfig(StableDiffusionTaskConfig, ComputeConfig):
    """What encodes data beforehand: a task, and how it is computed; nothing is trained.

    Raises:
        ValueError: as in `TrainingConfig`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.has_data:
            raise ValueError(ONE_SOURCE)
