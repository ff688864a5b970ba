"""A model on disk or on the Hub: folders, repos, single files and LoRAs, with what they say of their model."""

from typing import TYPE_CHECKING

from ..utils.lazy import lazy_names

if TYPE_CHECKING:
    from .custom_pipeline import write_custom_pipeline
    from .load import load_pipeline
    from .lora import load_lora, save_lora
    from .save import save_pipeline
    from .saved_model import SavedModel

# They pull in transformers, which takes seconds; who only reads a config does not wait for it.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "SavedModel": "saved_model",
        "load_lora": "lora",
        "load_pipeline": "load",
        "save_lora": "lora",
        "save_pipeline": "save",
        "write_custom_pipeline": "custom_pipeline",
    },
)

__all__ = ["SavedModel", "load_lora", "load_pipeline", "save_lora", "save_pipeline", "write_custom_pipeline"]
