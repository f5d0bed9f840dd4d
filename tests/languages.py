"""A small Qwen2 at random, batches of sequences, and files of instructions."""

from __future__ import annotations

import json

import torch

from fedsparse.core.targets import IGNORED

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.5,
}


def qwen2(seed=0, **options):
    """Transformers' own net."""
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**{**SHAPE, **options})).eval()


def sequences(count, longest=9, seed=0, words=40):
    """Ids (count, longest) padded at the right, and targets: of each row the last few tokens that there are."""
    g = torch.Generator().manual_seed(seed)
    x = torch.zeros(count, longest, dtype=torch.int32)
    y = torch.full((count, longest), IGNORED)
    for i in range(count):
        length = int(torch.randint(4, longest + 2, (), generator=g))
        ids = torch.randint(2, words, (length,), generator=g)
        given = int(torch.randint(1, length, (), generator=g))
        x[i, : length - 1] = ids[:-1]
        y[i, given - 1 : length - 1] = ids[given:]
    return x, y


def write_jsonl(path, rows):
    """Write objects, or text as it stands, a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
