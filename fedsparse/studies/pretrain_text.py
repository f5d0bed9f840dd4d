"""Make the packaged text model again: ``python -m fedsparse.studies.pretrain_text``; ``--help`` lists its options.

A small BERT learns to fill in masked words (Devlin et al. 2019) of documentation that no client of ``data=stdlib_docs``
holds: that of some modules of Python's standard library, and of the packages that the environment pins beside it.
Masked words are told twice, from their own place and from the pooled output, so that the pooler, which the
classification head is given, learns too. About fifty minutes of one core.

Shapes: ``N`` sentences, ``B`` of a batch, ``L`` tokens, ``M`` masked places, ``V`` words, ``D`` hidden size.
"""

from __future__ import annotations

import argparse
import sysconfig
from collections.abc import Sequence
from importlib.metadata import metadata, packages_distributions, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from fedsparse.core import files
from fedsparse.core.signals import command
from fedsparse.data.docs import held_by_clients, held_out, library_sentences
from fedsparse.data.tokens import PACKAGED, fingerprint, load_tokenizer, need_transformers, tokens
from fedsparse.studies.pretrain import rate_share

BATCH = 64
IGNORED = -100  # of cross_entropy
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# Of what `make setup` installs: what is written about networks, data, systems and tools, and no copy of Python's own.
PACKAGES = """IPython PIL _pytest absl aiohttp alembic anyio attr build click cliff cloudpickle cmd2 colorlog coverage
    datasets dateutil debugpy dill distro filelock fontTools fsspec grpc h11 httpcore httpx huggingface_hub hydra
    hypothesis ipykernel jedi jinja2 joblib jsonschema jupyter_client lightning mako markdown matplotlib multidict mypy
    narwhals nbclient nbformat networkx numpy omegaconf opentelemetry packaging pandas parso pexpect pip platformdirs
    pluggy prompt_toolkit psutil pyarrow pydantic pygments pyparsing referencing requests rich setuptools
    sortedcontainers sqlalchemy stevedore submitit tornado tqdm traitlets typer urllib3 wandb werkzeug yaml yarl zmq"""
SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "max_position_embeddings": 128,
    "type_vocab_size": 1,
    "hidden_dropout_prob": 0.0,  # few passes over few sentences
    "attention_probs_dropout_prob": 0.0,
}


class MaskedWords(nn.Module):
    """Tells masked words from their places and from the pooled output, by the word embeddings themselves.

    Args:
        bert: a ``BertModel`` with its pooler.

    """

    def __init__(self, bert: Any) -> None:
        super().__init__()
        size, words = bert.config.hidden_size, bert.config.vocab_size
        self.bert = bert
        self.place, self.whole = (nn.Sequential(nn.Linear(size, size), nn.GELU(), nn.LayerNorm(size)) for _ in range(2))
        self.bias = nn.Parameter(torch.zeros(2, words))

    def forward(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss from the places and that from the pooled output: ids (B, L), words or IGNORED (B, L)."""
        out = self.bert(input_ids=x, attention_mask=(x != 0).long())
        masked = targets != IGNORED
        embeddings, wanted = self.bert.get_input_embeddings().weight, targets[masked]
        place = self.place(out.last_hidden_state[masked]) @ embeddings.T + self.bias[0]
        whole = self.whole(out.pooler_output) @ embeddings.T + self.bias[1]
        return F.cross_entropy(place, wanted), F.cross_entropy(whole[masked.nonzero()[:, 0]], wanted)


def package_sentences(root: Path | None = None) -> list[str]:
    """Read the documentation of ``PACKAGES``, without sentences that clients hold.

    Args:
        root: the folder that they lie in; None: that of the running Python.

    """
    taken = {sentence.text for sentence in held_by_clients()}
    folder = Path(sysconfig.get_path("purelib")) if root is None else root
    found = dict.fromkeys(text for _, text in library_sentences(folder, set(PACKAGES.split())))
    return [text for text in found if text not in taken]


def make_vocabulary(texts: Sequence[str], size: int) -> list[str]:
    """Learn so many word pieces from texts, lower-cased as BERT does it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    made.train_from_iterator(texts, trainer)
    found = made.get_vocab()
    return sorted(found, key=found.__getitem__)


def mask_words(x: Tensor, words: int, generator: torch.Generator, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """Hide a share of the tokens: of ten, eight become [MASK], one another word, one stays (Devlin et al. 2019).

    Args:
        x: ids (B, L); special tokens are never hidden.
        words: V.
        generator: decides which.
        share: of the tokens.

    Returns:
        What the net is given, and what it has to tell, IGNORED elsewhere: both (B, L).

    """
    draw, kind = (torch.rand(x.shape, generator=generator) for _ in range(2))
    chosen = (draw < share) & (x >= len(SPECIAL))
    other = torch.randint(len(SPECIAL), words, x.shape, generator=generator)
    given = torch.where(chosen & (kind < 0.8), SPECIAL.index("[MASK]"), x)
    return torch.where(chosen & (kind >= 0.9), other, given), torch.where(chosen, x, IGNORED)


def batches(x: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Deal ids (N, L) at random into batches of about equal length, without columns of padding alone."""
    order = torch.randperm(len(x), generator=generator)
    lengths = (x != 0).sum(1)
    near = torch.cat([run[lengths[run].argsort(stable=True)] for run in order.split(16 * BATCH)])
    dealt = near.split(BATCH)
    shuffled = [dealt[i] for i in torch.randperm(len(dealt), generator=generator).tolist()]
    return [x[rows, : int(lengths[rows].max())] for rows in shuffled]


def train(net: MaskedWords, x: Tensor, epochs: int, seed: int, rate: float = 2e-3) -> float:
    """Train on ids (N, L): AdamW, warm-up and a cosine to zero; returns the last epoch's mean loss at the places."""
    generator, mean = torch.Generator().manual_seed(seed), float("nan")
    steps = epochs * -(-len(x) // BATCH)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, steps))
    for epoch in range(epochs):
        losses = torch.stack([step(net, batch, optimizer, generator) for batch in _stepping(x, generator, schedule)])
        mean = float(losses[:, 0].mean())
        print(
            f"epoch {epoch + 1}/{epochs}: loss {mean:.3f}, from the pooled output {losses[:, 1].mean():.3f}", flush=True
        )
    return mean


def _stepping(x: Tensor, generator: torch.Generator, schedule: Any) -> Any:
    for batch in batches(x, generator):
        yield batch
        schedule.step()


def step(net: MaskedWords, x: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> Tensor:
    """Take one step on ids (B, L); returns both losses (2,)."""
    losses = torch.stack(net(*mask_words(x, net.bias.shape[1], generator)))
    optimizer.zero_grad()
    losses.sum().backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    return losses.detach()


def write_tokenizer(words: Sequence[str], folder: Path) -> None:
    """Write the two files that transformers builds a tokenizer from."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "vocab.txt", "\n".join(words) + "\n")
    config = '{"tokenizer_class": "BertTokenizer", "do_lower_case": true, "model_max_length": 128}\n'
    files.write(folder / "tokenizer_config.json", config)


def write_model(bert: Any, folder: Path, notes: dict[str, str]) -> None:
    """Write configuration and weights, these as float16, as transformers reads them."""
    halves = {f"bert.{name}": tensor.half().contiguous() for name, tensor in bert.state_dict().items()}
    files.write(folder / "model.safetensors", save(halves, {"format": "pt", **notes}))
    files.write(folder / "config.json", bert.config.to_json_string(use_diff=True))


def licences() -> list[str]:
    """List the packages whose documentation is read, with version and licence as each states them, as a table."""
    made_by = packages_distributions()
    named = sorted({name for package in PACKAGES.split() for name in made_by.get(package, ())}, key=str.lower)
    rows = [f"| {name} | {version(name)} | {_licence(name)} |" for name in named]
    return ["| package | version | licence |", "|---|---|---|", *rows]


def _licence(name: str) -> str:
    """Licence of a package: its SPDX expression, else its classifiers, else its first line on it."""
    facts = metadata(name)
    classifiers = [entry.rpartition(" :: ")[2] for entry in facts.get_all("Classifier") or () if "License ::" in entry]
    return facts["License-Expression"] or ", ".join(classifiers) or str(facts["License"]).splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make vocabulary and model, and write them as a folder that transformers loads."""
    parser = argparse.ArgumentParser(description="Make the packaged weights of bert_tiny again.")
    parser.add_argument("--out", type=Path, default=PACKAGED, help="the folder to write")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--words", type=int, default=4200, help="size of the vocabulary")
    parser.add_argument("--sentences", type=int, default=None, help="at most so many sentences")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--licences", action="store_true", help="list the packages that it reads, and stop")
    options = parser.parse_args(arguments)
    if options.licences:
        print("\n".join(licences()))
        return
    texts = list(dict.fromkeys([*held_out(), *package_sentences()]))[: options.sentences]
    write_tokenizer(make_vocabulary(texts, options.words), options.out)
    tokenizer = load_tokenizer(str(options.out))
    net = build(len(tokenizer), options.seed)
    loss = train(net, tokens(texts, tokenizer, SHAPE["max_position_embeddings"]).long(), options.epochs, options.seed)
    typed = f"--epochs {options.epochs} --words {options.words} --seed {options.seed}"
    command = f"python -m fedsparse.studies.pretrain_text {typed}"
    write_model(net.bert, options.out, {"command": command, "loss": f"{loss:.3f}", "texts": fingerprint(texts)})
    print(f"wrote {options.out}, from {len(texts)} sentences")


def build(words: int, seed: int) -> MaskedWords:
    """Build the net of so many words at random."""
    transformers = need_transformers()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MaskedWords(transformers.BertModel(transformers.BertConfig(vocab_size=words, **SHAPE)))


if __name__ == "__main__":
    with command():
        main()
