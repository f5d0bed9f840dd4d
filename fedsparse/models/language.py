"""Builder of language models: transformers' own Qwen2, which continues a text.

Shapes: ``B`` texts, ``L`` tokens, ``V`` tokens of the vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fedsparse.core.checks import check_choice
from fedsparse.data.tokens import need_transformers, only_local, place_of, quiet_transformers
from fedsparse.models.text import unavailable
from fedsparse.models.text_net import TextNet
from fedsparse.models.vision import seeded

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LanguageModel(TextNet):
    """Calls a causal language model of transformers with ids alone.

    Texts are padded at the right. A place attends to itself and those before it alone, so that padding changes nothing
    that counts, and no mask is needed, which could not be stacked over clients.

    Args:
        net: such as ``Qwen2ForCausalLM``; its parameters are this module's, under ``net.``.

    Attributes:
        words: V.

    """

    sequences = True
    stackable = True

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.longest = net.config.max_position_embeddings
        self.words: int = net.config.vocab_size

    def forward(self, x: Tensor) -> Tensor:
        """Tell the next token of every place: ids (B, L) -> logits (B, L, V), float32 or wider."""
        logits: Tensor = self.net(input_ids=x, use_cache=False).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def qwen(
    tokenizer: str,
    checkpoint: str | None = None,
    base_dtype: str = "float32",
    quantise: str = "none",
    pretrained: bool = True,
    seed: int = 0,
) -> LanguageModel:
    """Build transformers' ``Qwen2ForCausalLM`` (Qwen team 2024, arXiv:2407.10671) with pre-trained weights.

    Args:
        tokenizer: name of weights and tokenizer: ``qwen_tiny``, which is packaged, or one of the Hugging Face hub,
            downloaded once, such as ``Qwen/Qwen1.5-1.8B-Chat``.
        checkpoint: a folder that transformers' ``save_pretrained`` wrote, used instead.
        base_dtype: ``float32``, or ``bfloat16``, in which weights cannot train: with low-rank adapters (``lora=r8``).
        quantise: ``none``; ``nf4`` (Dettmers et al. 2023) or ``int8`` (Dettmers et al. 2022), by bitsandbytes,
            likewise with adapters.
        pretrained: start from these weights; else at random, from ``seed``.
        seed: decides the weights if they are random.

    Returns:
        A module: ids (B, L) -> logits (B, L, V).

    Raises:
        ValueError: transformers or bitsandbytes is not installed, or the weights cannot be had or are not Qwen2's.

    """
    need_transformers()  # before it is asked to be quiet
    check_choice("model.base_dtype", base_dtype, *DTYPES)
    check_choice("model.quantise", quantise, "none", "nf4", "int8")
    if quantise != "none" and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"model.quantise={quantise} needs bitsandbytes, which is not installed: pip install bitsandbytes"
        )
    place = checkpoint or place_of(tokenizer)
    with quiet_transformers():
        config = _config(place, checkpoint)
        options = {"dtype": DTYPES[base_dtype], **_quantised(quantise, DTYPES[base_dtype])}
        net = _weights(place, checkpoint, options) if pretrained else _random(config, DTYPES[base_dtype], seed)
    return LanguageModel(net.train())  # transformers hands it over in eval mode


def _config(place: str, checkpoint: str | None) -> Any:
    """Read the configuration."""
    try:
        config = need_transformers().AutoConfig.from_pretrained(place, trust_remote_code=False, **only_local(place))
    except (OSError, ValueError) as error:
        raise unavailable(place, checkpoint, error) from error
    if config.model_type != "qwen2":
        raise ValueError(f"{place} is a {config.model_type}; this model takes Qwen2's weights")
    return config


def _random(config: Any, dtype: torch.dtype, seed: int) -> Any:
    return seeded(lambda: need_transformers().Qwen2ForCausalLM(config), seed).to(dtype)


def _quantised(quantise: str, dtype: torch.dtype) -> dict[str, Any]:
    """Choose the options of ``from_pretrained`` that quantise the linear layers."""
    if quantise == "none":
        return {}
    make = need_transformers().BitsAndBytesConfig
    if quantise == "int8":
        return {"quantization_config": make(load_in_8bit=True)}
    return {
        "quantization_config": make(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype),
    }


def _weights(place: str, checkpoint: str | None, options: dict[str, Any]) -> Any:
    """Load weights; none may be missing, or of another shape."""
    try:
        net, found = need_transformers().Qwen2ForCausalLM.from_pretrained(
            place, output_loading_info=True, **options, **only_local(place)
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise unavailable(place, checkpoint, error) from error
    if lacking := sorted(found["missing_keys"]):
        raise ValueError(f"{place} does not fit Qwen2: {lacking[0]} is missing")
    return net
