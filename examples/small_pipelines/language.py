"""Texts for transformers that denoise: the tokenizers and encoders of large language models, small and random.

No vocabulary is downloaded. T5's knows a few words and all letters, the others spell a text byte by byte.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from landscapes import captions
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

TEXT_WIDTH = 16
"""Features of a token; another number than the width of CLIP, as it is with trained ones."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A conversation as Qwen's models read it."""

QWEN_MARKS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
)
"""Special tokens of Qwen's vocabularies."""


def _load(kind: str, tokenizer: Tokenizer, **config: Any) -> Any:
    """A tokenizer of the class `kind`, through files, which all versions of transformers read."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder, "tokenizer.json")))
        config = {"tokenizer_class": kind, **config}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return getattr(transformers, kind).from_pretrained(folder)


# T5 and its kin


def t5_tokenizer(max_length: int = 512) -> Any:
    """T5's, for a few words; it spells others."""
    words = sorted({word for text in [*captions(), "a cat", "snow"] for word in text.lower().split()})
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0)]
    pieces += [(f"▁{word}", -2.0) for word in words] + [(letter, -5.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    marks = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _load("T5TokenizerFast", tokenizer, model_max_length=max_length, extra_ids=0, **marks)


def t5_config(kind: str = "T5Config", **changes: Any) -> Any:
    """For `t5_tokenizer`; also the config of UMT5."""
    config: dict[str, Any] = {
        "vocab_size": len(t5_tokenizer()),
        "d_model": TEXT_WIDTH,
        "d_kv": 8,
        "d_ff": 2 * TEXT_WIDTH,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }
    return getattr(transformers, kind)(**{**config, **changes})


def t5_encoder(**changes: Any) -> Any:
    """The encoder of T5 v1.1, `TEXT_WIDTH` features for each token."""
    return transformers.T5EncoderModel(t5_config(**changes))


def umt5_encoder(**changes: Any) -> Any:
    """The multilingual one, in which each layer has positions of its own."""
    return transformers.UMT5EncoderModel(t5_config("UMT5Config", **changes))


# Language models that read bytes


def byte_tokenizer(
    kind: str = "Qwen2TokenizerFast",
    marks: tuple[str, ...] = QWEN_MARKS,
    template: str = CHATML,
    start: str | None = None,
    **config: Any,
) -> Any:
    """A byte-level vocabulary without merges, hence a token for each byte, and special tokens.

    Args:
        kind: The class, of transformers.
        marks: Special tokens; the first is used for padding unless `config` says otherwise.
        template: What a conversation becomes, in Jinja.
        start: The special token that every text starts with, if any.
        config: What else the tokenizer's config has.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    words = pre_tokenizers.Split(Regex(r"\s?\S+|\s"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
        )
        config = {"bos_token": start, **config}
    settings = {"pad_token": marks[0], "eos_token": marks[0], "model_max_length": 2048, "chat_template": template}
    return _load(kind, tokenizer, **{"padding_side": "right", **settings, **config})


_DECODER: dict[str, Any] = {
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 2 * TEXT_WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def decoder_config(kind: str, tokenizer: Any = None, **changes: Any) -> Any:
    """The config of a decoder such as Llama, Qwen or Gemma, for `byte_tokenizer` or another one."""
    vocabulary = len(byte_tokenizer() if tokenizer is None else tokenizer)
    return getattr(transformers, kind)(**{**_DECODER, "vocab_size": vocabulary, **changes})


def gemma_tokenizer(**config: Any) -> Any:
    """For Gemma, in bytes; it starts each text with a mark and pads to the right."""
    marks = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    return byte_tokenizer("PreTrainedTokenizerFast", marks, start="<bos>", **{"eos_token": "<eos>", **config})


def gemma2(**changes: Any) -> Any:
    """Gemma 2, `TEXT_WIDTH` features for each token."""
    return transformers.Gemma2Model(decoder_config("Gemma2Config", gemma_tokenizer(), **changes))


def qwen3() -> Any:
    """Qwen 3, `TEXT_WIDTH` features for each token."""
    return transformers.Qwen3Model(decoder_config("Qwen3Config"))


def t5_gemma_config() -> Any:
    """Of T5Gemma, for `gemma_tokenizer`."""
    return decoder_config("T5GemmaModuleConfig", gemma_tokenizer(), dropout_rate=0.0)


def t5_gemma_encoder() -> Any:
    """The encoder of T5Gemma, `TEXT_WIDTH` features for each token."""
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    return T5GemmaEncoder(t5_gemma_config())


# Those that see

_POSITIONS = {"rope_type": "default", "type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
"""Of time, height and width, half as many as a head has features."""

_IMAGE_TOKENS = {
    "image_token_id": 256 + QWEN_MARKS.index("<|image_pad|>"),
    "video_token_id": 256 + QWEN_MARKS.index("<|video_pad|>"),
    "vision_start_token_id": 256 + QWEN_MARKS.index("<|vision_start|>"),
    "vision_end_token_id": 256 + QWEN_MARKS.index("<|vision_end|>"),
}


def qwen2_5_vl(**changes: Any) -> Any:
    """Qwen 2.5 VL for `byte_tokenizer`, `TEXT_WIDTH` features for each token."""
    text = {**_DECODER, "vocab_size": len(byte_tokenizer()), "rope_scaling": dict(_POSITIONS), **changes}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_IMAGE_TOKENS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


class SeeingProcessor:
    """Texts and images for models that see, as a processor of transformers gives them; an image becomes four tokens.

    Those of transformers cannot be made without torchvision, which their processors of videos need.
    """

    def __init__(self, patch_size: int = 14) -> None:
        side = 4 * patch_size
        self.tokenizer = byte_tokenizer()
        self.image_processor = transformers.Qwen2VLImageProcessor(
            min_pixels=side * side, max_pixels=side * side, patch_size=patch_size
        )

    def __call__(self, text: Any = None, images: Any = None, padding: Any = True, **options: Any) -> Any:
        """Tokens of the texts, with as many for an image as it has features, and the patches of the images."""
        options.pop("videos", None)
        texts = [text] if isinstance(text, str) else list(text)
        seen = {} if images is None else self.image_processor(images=images, return_tensors="pt")
        if seen:
            tokens = iter((seen["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
            parts = [text.split("<|image_pad|>") for text in texts]
            texts = [first + "".join("<|image_pad|>" * next(tokens) + part for part in rest) for first, *rest in parts]
        inputs = self.tokenizer(texts, padding=padding, **options)
        seeing = inputs["input_ids"] == _IMAGE_TOKENS["image_token_id"]
        return transformers.BatchFeature({**inputs, **seen, "mm_token_type_ids": seeing.long()})

    def apply_chat_template(self, conversation: Any, tokenize: bool = False, **options: Any) -> Any:
        """A conversation as text, or as tokens, one list for each conversation."""
        text = self.tokenizer.apply_chat_template(
            conversation, tokenize=False, chat_template=CHATML, **_known(options)
        )
        return self.tokenizer([text] if isinstance(text, str) else text).input_ids if tokenize else text

    def batch_decode(self, *arguments: Any, **options: Any) -> Any:
        """Of the tokenizer."""
        return self.tokenizer.batch_decode(*arguments, **options)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in ("add_generation_prompt", "enable_thinking")}


def qwen2_vl() -> Any:
    """Qwen 2 VL for `byte_tokenizer`, `TEXT_WIDTH` features for each token."""
    text = {**_DECODER, "vocab_size": len(byte_tokenizer()), "rope_scaling": dict(_POSITIONS)}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": TEXT_WIDTH, "num_heads": 2, "mlp_ratio": 2}
    config = transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **_IMAGE_TOKENS)
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen3_vl(**changes: Any) -> Any:
    """Qwen 3 VL for `byte_tokenizer`, `TEXT_WIDTH` features for each token."""
    text = {**_DECODER, "vocab_size": len(byte_tokenizer()), "rope_scaling": dict(_POSITIONS), **changes}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": TEXT_WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **_IMAGE_TOKENS)
    return transformers.Qwen3VLForConditionalGeneration(config)


def mistral3() -> Any:
    """Mistral 3 for `byte_tokenizer`, `TEXT_WIDTH` features for each token."""
    text = {**_DECODER, "vocab_size": len(byte_tokenizer()), "model_type": "mistral"}
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=0)
    return transformers.Mistral3ForConditionalGeneration(config)
