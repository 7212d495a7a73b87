"""Tiny random encoders with a word tokenizer, saved as a Hugging Face directory; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

WORDS = [f"w{i}" for i in range(40)]


def tiny_bert(**options: Any) -> Any:
    """Two layers, 32 wide, 64 positions; options go to BertModel."""
    from transformers import BertConfig, BertModel

    size = {"vocab_size": 44, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**size, intermediate_size=64, max_position_embeddings=64, initializer_range=0.3)
    return BertModel(config, **options)


def save_encoder(folder: Path, model: Any, pad: bool = True, special: bool = True) -> str:
    """Write the model and a tokenizer of :data:`WORDS`; the directory."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: at for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"unk_token": "[UNK]", "eos_token": "[SEP]", "cls_token": "[CLS]"} | ({"pad_token": "[PAD]"} if pad else {})
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)
