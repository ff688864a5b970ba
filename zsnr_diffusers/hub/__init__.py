"""Models on disk or on the Hub: folders, repos, single files and LoRAs, and the metadata they record."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .custom_pipeline import write_custom_pipeline
    from .load import load_pipeline
    from .lora import load_lora, save_lora
    from .lora_extract import ExtractedLora, KeptShare, extract_lora
    from .save import save_pipeline
    from .saved_model import SavedModel

# They import transformers, which takes seconds; code that only reads a config does not wait for it.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "custom_pipeline": "write_custom_pipeline",
        "load": "load_pipeline",
        "lora": "load_lora save_lora",
        "lora_extract": "ExtractedLora KeptShare extract_lora",
        "save": "save_pipeline",
        "saved_model": "SavedModel",
    },
)

__all__ = [
    "ExtractedLora",
    "KeptShare",
    "SavedModel",
    "extract_lora",
    "load_lora",
    "load_pipeline",
    "save_lora",
    "save_pipeline",
    "write_custom_pipeline",
]
