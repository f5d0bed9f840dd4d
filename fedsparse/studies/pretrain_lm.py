"""Make the packaged language model again: ``python -m fedsparse.studies.pretrain_lm``; ``--help`` lists its options.

A small Qwen2 (Qwen team 2024, arXiv:2407.10671) learns to continue documentation that no client of
``data=docs_answers`` holds: that of some modules of Python's standard library, and of the packages that the environment
pins beside it. Half of the sentences stand alone; the other half are questions in the tags of ``data=instructions``,
and the answer names the module or package that the sentence documents. So the model has met the form of a question, as
a chat model has, and no topic, code or sentence of a client. About a quarter of an hour of one core an epoch.

Shapes: ``N`` sentences, ``B`` of a batch, ``L`` tokens of the longest.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from fedsparse.core import files
from fedsparse.core.signals import command
from fedsparse.data.docs import HELD_OUT, held_by_clients, library, library_sentences
from fedsparse.data.tokens import PACKAGED_LM, fingerprint, load_tokenizer, need_transformers
from fedsparse.models.vision import seeded
from fedsparse.studies.pretrain import rate_share
from fedsparse.studies.pretrain_text import PACKAGES

BATCH = 64
IGNORED = -100  # of cross_entropy
APART = 2000  # sentences that measure it
PAD, USER, USER_END, ASSISTANT, END = SPECIAL = ("<|endoftext|>", "<user>", "</user>", "<assistant>", "</assistant>")
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


class Named(NamedTuple):
    """A sentence and the module or package that it documents."""

    name: str
    text: str


class Encoded(NamedTuple):
    """A sentence as ids: alone, and as a question whose answer starts at ``answer``."""

    alone: list[int]
    asked: list[int]
    answer: int


def corpus(packages: Path | None = None) -> list[Named]:
    """Read what no client holds: of equal sentences the first.

    Args:
        packages: the folder that ``PACKAGES`` lie in; None: that of the running Python.

    """
    taken = {sentence.text for sentence in held_by_clients()}
    root = Path(sysconfig.get_path("purelib")) if packages is None else packages
    found = dict[str, str]()
    for folder, names in ((library(), HELD_OUT), (root, PACKAGES)):
        for name, text in library_sentences(folder, set(names.split())):
            found.setdefault(text, name)
    return [Named(name.strip("_"), text) for text, name in found.items() if text not in taken]


def make_tokenizer(texts: Sequence[str], words: int) -> Any:
    """Learn a byte-level BPE of so many tokens (Sennrich et al. 2016; Radford et al. 2019): ``SPECIAL`` come first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def write_tokenizer(made: Any, folder: Path) -> None:
    """Write the two files that transformers builds a tokenizer from."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "tokenizer.json", made.to_str())
    config = f'{{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "{PAD}", "eos_token": "{END}"}}\n'
    files.write(folder / "tokenizer_config.json", config)


def encode(named: Sequence[Named], tokenizer: Any, longest: int) -> list[Encoded]:
    """Convert sentences to ids, each cut so that the question has at most ``longest`` tokens."""
    pad, user, user_end, assistant, end = (tokenizer.convert_tokens_to_ids(word) for word in SPECIAL)
    line: list[int] = tokenizer("\n")["input_ids"]
    answers = {name: tokenizer(name)["input_ids"] for name in {entry.name for entry in named}}
    found = []
    for text, (name, _) in zip(tokenizer([entry.text for entry in named])["input_ids"], named, strict=True):
        answer = answers[name]
        cut = text[: longest - len(answer) - len(line) - 4]
        question = [user, *cut, user_end, *line, assistant]
        found.append(Encoded([pad, *cut, pad], [*question, *answer, end], len(question)))
    return found


def batches(samples: Sequence[Encoded], generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Deal samples at random into batches of about equal length, half alone and half asked, padded at the right.

    Yields:
        Ids (B, L), targets (B, L) with IGNORED where there is none, and which targets are an answer's, bool (B, L).

    """
    order = torch.randperm(len(samples), generator=generator).tolist()
    asked = (torch.rand(len(samples), generator=generator) < 0.5).tolist()
    runs = [order[start : start + 16 * BATCH] for start in range(0, len(order), 16 * BATCH)]
    near = [i for run in runs for i in sorted(run, key=lambda i: len(samples[i].alone))]
    dealt = [near[start : start + BATCH] for start in range(0, len(near), BATCH)]
    for place in torch.randperm(len(dealt), generator=generator).tolist():
        yield padded([samples[i] for i in dealt[place]], [asked[i] for i in dealt[place]])


def padded(samples: Sequence[Encoded], asked: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Lay samples out as a batch: see ``batches``."""
    rows = [sample.asked if question else sample.alone for sample, question in zip(samples, asked, strict=True)]
    x = torch.zeros(len(rows), max(map(len, rows)) - 1, dtype=torch.int64)
    y, answers = torch.full_like(x, IGNORED), torch.zeros(x.shape, dtype=torch.bool)
    for i, (row, sample, question) in enumerate(zip(rows, samples, asked, strict=True)):
        x[i, : len(row) - 1], y[i, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
        if question:
            answers[i, sample.answer - 1 : len(row) - 1] = True
    return x, y, answers


def train(net: nn.Module, samples: Sequence[Encoded], epochs: int, seed: int, rate: float = 3e-3) -> None:
    """Train a net: AdamW, warm-up and a cosine to zero; the loss is that of all targets plus that of the answers."""
    generator, steps = torch.Generator().manual_seed(seed), epochs * -(-len(samples) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, steps))
    for epoch in range(epochs):
        kept = []
        for number, (x, y, answers) in enumerate(batches(samples, generator), 1):
            kept.append(step(net, x, y, answers, optimizer))
            schedule.step()
            if number % 250 == 0:
                mean = torch.stack(kept).mean(0).tolist()
                where = f"epoch {epoch + 1}/{epochs}, step {number}"
                print(f"{where}: loss {mean[0]:.3f}, answers {mean[1]:.3f}", flush=True)
                kept.clear()


def step(net: nn.Module, x: Tensor, y: Tensor, answers: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """Take one step on a batch as ``batches`` yields it; returns the mean loss of targets and of answers (2,)."""
    losses = F.cross_entropy(net(input_ids=x).logits.transpose(1, 2), y, reduction="none")
    means = torch.stack([losses.sum() / (y != IGNORED).sum(), (losses * answers).sum() / answers.sum().clamp(min=1)])
    optimizer.zero_grad()
    means.sum().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    return means.detach()


@torch.no_grad()
def bits_per_character(net: nn.Module, samples: Sequence[Encoded], texts: Sequence[str]) -> float:
    """Measure sentences alone, each with its end: total log-loss in bits over total characters."""
    nats, size = 0.0, sum(map(len, texts))
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        x, y, _ = padded(part, [False] * len(part))
        nats += float(F.cross_entropy(net(input_ids=x).logits.transpose(1, 2), y, reduction="sum"))
    return nats / math.log(2) / size


@torch.no_grad()
def names_right(net: nn.Module, samples: Sequence[Encoded]) -> float:
    """Share of questions whose answer is right, every token of it."""
    right = 0
    for start in range(0, len(samples), BATCH):
        part = samples[start : start + BATCH]
        x, y, answers = padded(part, [True] * len(part))
        right += int(((net(input_ids=x).logits.argmax(-1) == y) | ~answers).all(1).sum())
    return right / len(samples)


def build(words: int, pad: int, end: int, seed: int) -> Any:
    """Build the net of so many tokens at random, in train mode."""
    transformers = need_transformers()
    config = transformers.Qwen2Config(
        vocab_size=words, pad_token_id=pad, eos_token_id=end, bos_token_id=None, use_cache=False, **SHAPE
    )
    return seeded(lambda: transformers.Qwen2ForCausalLM(config), seed)


def write_model(net: Any, folder: Path, notes: dict[str, str]) -> None:
    """Write configuration and weights, these as float16, as transformers reads them."""
    tensors = net.state_dict()
    tensors.pop("lm_head.weight", None)  # the embeddings'
    halves = {name: tensor.half().contiguous() for name, tensor in tensors.items()}
    files.write(folder / "model.safetensors", save(halves, {"format": "pt", **notes}))
    net.config.architectures = ["Qwen2ForCausalLM"]
    files.write(folder / "config.json", net.config.to_json_string(use_diff=True))


def _typed(options: argparse.Namespace) -> str:
    """Options that decide the weights, as they are typed."""
    some = "" if options.sentences is None else f" --sentences {options.sentences}"
    return f"--epochs {options.epochs} --words {options.words}{some} --seed {options.seed}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Make tokenizer and model, and write them as a folder that transformers loads."""
    parser = argparse.ArgumentParser(description="Make the packaged weights of qwen_tiny again.")
    parser.add_argument("--out", type=Path, default=PACKAGED_LM, help="the folder to write")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--words", type=int, default=2048, help="tokens of the vocabulary")
    parser.add_argument("--sentences", type=int, default=None, help="at most so many sentences")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    named = corpus()
    order = torch.randperm(len(named), generator=torch.Generator().manual_seed(options.seed)).tolist()
    apart, kept = ([named[i] for i in part] for part in (order[:APART], order[APART:][: options.sentences]))
    write_tokenizer(make_tokenizer([entry.text for entry in kept], options.words), options.out)
    tokenizer = load_tokenizer(str(options.out))
    net = build(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, options.seed)
    longest = SHAPE["max_position_embeddings"] // 2
    train(net, encode(kept, tokenizer, longest), options.epochs, options.seed)
    net.eval()
    measured = encode(apart, tokenizer, SHAPE["max_position_embeddings"])
    bits = bits_per_character(net, measured, [entry.text for entry in apart])
    notes = {
        "command": f"python -m fedsparse.studies.pretrain_lm {_typed(options)}",
        "bits_per_character": f"{bits:.3f}",
        "texts": fingerprint([f"{entry.name} {entry.text}" for entry in kept]),
    }
    write_model(net, options.out, notes)
    print(f"{len(apart)} sentences apart: {bits:.3f} bits per character, {names_right(net, measured):.1%} names right")
    print(f"wrote {options.out}, from {len(kept)} sentences")


if __name__ == "__main__":
    with command():
        main()
