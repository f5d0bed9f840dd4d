"""Small texts, and folders as transformers and AG News have them."""

from __future__ import annotations

import csv

import torch

WORDS = {0: "minister election treaty", 1: "goal match team", 2: "market shares profit", 3: "chip software orbit"}


def news(count, shift=0):
    """Rows of class 1 to 4, title and description, with the quotes and commas that the real files have."""
    rows = []
    for i in range(count):
        topic = (i + shift) % 4
        words = WORDS[topic].split()
        title = f'The "{words[i % 3]}", again {i + shift}'
        rows.append(
            (topic + 1, title, f"{words[(i + 1) % 3]} and {words[0]}, says {words[i % 3]}" + " again" * (i % 5))
        )
    return rows


def write_csvs(folder, train=96, test=24):
    """Write the classic files; every field is quoted, quotes are doubled."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count, shift in (("train", train, 0), ("test", test, 1000)):
        with (folder / f"{part}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, quoting=csv.QUOTE_ALL).writerows(news(count, shift))
    return folder


def write_bert(folder, kind="BertForSequenceClassification", **options):
    """Write a random BERT and a tokenizer of a few words and all letters, as ``save_pretrained`` does."""
    import transformers

    letters = [chr(c) for c in range(97, 123)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *[f"##{c}" for c in letters], *'0123456789,"']
    words += [word for topic in WORDS.values() for word in topic.split()]
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    shape["max_position_embeddings"] = 64
    config = transformers.BertConfig(vocab_size=len(words), **{**shape, **options})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        getattr(transformers, kind)(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return folder
