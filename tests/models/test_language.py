"""Language models: transformers' own logits, PEFT's with adapters, padding, and what cannot be loaded."""

from __future__ import annotations

import time

import pytest
import torch
from languages import qwen2, sequences
from safetensors import safe_open
from torch import nn

from fedsparse.data.tokens import PACKAGED_LM, load_tokenizer
from fedsparse.models.language import LanguageModel, qwen
from fedsparse.models.lora import lora
from fedsparse.models.stacked import stacks

transformers = pytest.importorskip("transformers", reason="transformers is in the extra text")


def adapted(net, **options):
    made = lora(LanguageModel(net), **{"r": 4, "alpha": 8, "dropout": 0.0, **options})
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    return made.eval()


def saved(folder, **options):
    qwen2(**options).save_pretrained(folder)
    return str(folder)


def test_the_packaged_model_is_transformers_own_and_small():
    net = qwen("qwen_tiny").eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(PACKAGED_LM, dtype=torch.float32).eval()
    x, _ = sequences(4, 30, words=2048)
    assert torch.equal(net(x), theirs(input_ids=x.long()).logits)
    assert sum(p.numel() for p in net.parameters()) == 903_168
    assert sum(path.stat().st_size for path in PACKAGED_LM.iterdir()) < 2_000_000
    assert (net.longest, net.words, net.vocabulary) == (256, 2048, 0)
    with safe_open(PACKAGED_LM / "model.safetensors", "pt") as opened:
        assert "pretrain_lm" in opened.metadata()["command"]


def test_the_packaged_model_tells_words_and_its_tokenizer_any_text():
    """Bits per byte of a sentence that it never saw: far fewer than the eight of chance."""
    tokenizer, text = load_tokenizer("qwen_tiny"), "Return the name of the file, or None if there is no such file. Ünï!"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    known = torch.tensor([tokenizer("Return the name of the file that was read last.")["input_ids"]])
    logits = qwen("qwen_tiny").eval()(known[:, :-1])
    nats = nn.functional.cross_entropy(logits[0], known[0, 1:], reduction="sum")
    assert nats.item() / 0.693 / len("Return the name of the file that was read last.") < 3
    special = [tokenizer.convert_tokens_to_ids(word) for word in ("<|endoftext|>", "<user>", "</user>", "<assistant>")]
    assert special == [0, 1, 2, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.eos_token) == (0, 4, "</assistant>")


def test_a_checkpoints_logits_are_transformers_own(tmp_path):
    x, _ = sequences(3)
    net = qwen("ignored", checkpoint=saved(tmp_path)).eval()
    assert torch.equal(net(x), qwen2()(input_ids=x.long()).logits)
    other = [qwen("ignored", checkpoint=str(tmp_path), pretrained=False, seed=seed) for seed in (0, 0, 1)]
    weights = [net.net.model.embed_tokens.weight for net in other]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers' older name
def test_with_adapters_logits_are_those_of_a_peft_model():
    peft = pytest.importorskip("peft", reason="peft is in the extra lora")
    x, _ = sequences(3)
    net = adapted(qwen2())
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    theirs = peft.get_peft_model(qwen2(), config).eval()
    own = {f"base_model.model.{name.removeprefix('net.')}": tensor for name, tensor in net.state_dict().items()}
    assert not theirs.load_state_dict(own, strict=False).unexpected_keys
    assert torch.equal(net(x), theirs(input_ids=x.long()).logits)
    assert not torch.equal(net(x), qwen2()(input_ids=x.long()).logits)


def test_padding_at_the_right_changes_no_logits_of_the_text_and_padding_at_the_left_would():
    net, (x, _) = LanguageModel(qwen2()), sequences(1, 6)
    text = x[:, : int((x != 0).sum())]
    none = torch.zeros(1, 3, dtype=torch.int32)
    alone, right, left = net(text), net(torch.cat([text, none], 1)), net(torch.cat([none, text], 1))
    torch.testing.assert_close(right[:, : text.shape[1]], alone, rtol=1e-5, atol=1e-5)
    assert (left[:, 3:] - alone).abs().max() > 0.1


def test_clients_stack_in_one_forward_with_adapters():
    """Not under vmap; ``stacks`` compares with ``functional_call``."""
    net, (x, _) = adapted(qwen2()), sequences(2)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    assert len(names) == 8
    assert stacks(net, names, x)
    assert net.stackable


def test_a_base_of_half_precision_has_adapters_and_logits_in_float32(tmp_path):
    net = qwen("ignored", checkpoint=saved(tmp_path), base_dtype="bfloat16")
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    made = lora(net, r=2, alpha=4)
    assert {p.dtype for p in made.parameters() if p.requires_grad} == {torch.float32}
    assert made(sequences(2)[0]).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"base_dtype": "float16"}, "model.base_dtype is 'float16'; it must be float32 or bfloat16"),
        ({"quantise": "fp4"}, "model.quantise is 'fp4'; it must be none, nf4 or int8"),
        ({"checkpoint": "nowhere/at/all"}, "model.checkpoint=nowhere/at/all cannot be loaded.*no such folder"),
    ],
)
def test_what_cannot_be_built_is_one_line(options, line):
    with pytest.raises(ValueError, match=line) as caught:
        qwen("qwen_tiny", **options)
    assert "\n" not in str(caught.value)


def test_quantised_weights_need_a_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("fedsparse.models.language.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="model.quantise=nf4 needs bitsandbytes.*pip install bitsandbytes"):
        qwen("qwen_tiny", quantise="nf4")


def test_weights_of_another_family_or_with_holes_are_refused(tmp_path):
    from text_files import write_bert

    with pytest.raises(ValueError, match="is a bert; this model takes Qwen2's weights"):
        qwen("ignored", checkpoint=str(write_bert(tmp_path / "bert")))
    net = qwen2()
    tensors = {name: t.clone() for name, t in net.state_dict().items() if "layers.1.mlp" not in name}
    net.save_pretrained(tmp_path / "holes", state_dict=tensors)
    with pytest.raises(ValueError, match="does not fit Qwen2: .*layers.1.mlp.* is missing"):
        qwen("ignored", checkpoint=str(tmp_path / "holes"))


def test_a_hub_that_does_not_answer_is_one_line_at_once(monkeypatch):
    """The first request fails, and no other is made: 49 seconds of retries were made before."""

    def refuse(self, name, timeout=None):
        assert timeout <= 5
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    from fedsparse.data.tokens import hub_answers

    hub_answers.cache_clear()
    try:
        began = time.perf_counter()
        for build in (load_tokenizer, qwen):
            with pytest.raises(ValueError, match=r"folder and set model.checkpoint=<folder>") as caught:
                build("Qwen/Qwen1.5-1.8B-Nobody")
            assert "\n" not in str(caught.value)
        assert time.perf_counter() - began < 10
    finally:
        hub_answers.cache_clear()


def test_a_folder_that_is_missing_is_named_as_such():
    with pytest.raises(ValueError, match="the tokenizer of /no/such/folder cannot be had .no such folder."):
        load_tokenizer("/no/such/folder")
