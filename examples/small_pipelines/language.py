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
    kind: str = "Qwen2TokenizerFast", marks: tuple[str, ...] = QWEN_MARKS, template: str = CHATML, **config: Any
) -> Any:
    """A byte-level vocabulary without merges, hence a token for each byte, and special tokens.

    Args:
        kind: The class, of transformers.
        marks: Special tokens; the first is used for padding unless `config` says otherwise.
        template: What a conversation becomes, in Jinja.
        config: What else the tokenizer's config has.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    words = pre_tokenizers.Split(Regex(r"\s?\S+|\s"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    settings = {"pad_token": marks[0], "eos_token": marks[0], "model_max_length": 2048, "chat_template": template}
    return _load(kind, tokenizer, **{"padding_side": "right", **settings, **config})


def decoder_config(kind: str, tokenizer: Any = None, **changes: Any) -> Any:
    """The config of a decoder such as Llama, Qwen or Gemma, for `byte_tokenizer` or another one."""
    config: dict[str, Any] = {
        "vocab_size": len(tokenizer or byte_tokenizer()),
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
    return getattr(transformers, kind)(**{**config, **changes})
