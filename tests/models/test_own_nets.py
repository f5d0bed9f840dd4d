"""Networks and losses of one's own: what the builder says holds, what cannot be trained is refused before round 1."""

from __future__ import annotations

import pytest
import torch
from composed import composed
from hydra.errors import InstantiationException
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from fedsparse.simulation.module import ClientModule

QUIET = ["pictures=false", "calibration.cache=null", "federation.num_clients=5", "federation.local_steps=3"]


def plain(in_features, hidden, num_classes, seed):
    torch.manual_seed(seed)
    net = nn.Sequential()
    net.add_module("flat", nn.Flatten())
    net.add_module("one", nn.Linear(in_features, hidden))
    net.add_module("act", nn.ReLU())
    net.add_module("two", nn.Linear(hidden, 16))
    net.add_module("act2", nn.ReLU())
    net.add_module("head", nn.Linear(16, num_classes))
    return net


def frozen(**sizes):
    net = plain(**sizes)
    net.one.requires_grad_(False)
    net.two.bias.requires_grad_(False)
    return net


def frozen_head(**sizes):
    net = plain(**sizes)
    net.head.requires_grad_(False)
    return net


def old_weight_norm(**sizes):
    net = plain(**sizes)
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.two)
    return net


def weight_norm(**sizes):
    net = plain(**sizes)
    parametrizations.weight_norm(net.two)
    return net


def orthogonal(**sizes):
    net = plain(**sizes)
    parametrizations.orthogonal(net.two)
    return net


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def doubled(**sizes):
    net = plain(**sizes)
    parametrize.register_parametrization(net.two, "weight", Doubled())
    return net


def spectral_norm(**sizes):
    net = plain(**sizes)
    parametrizations.spectral_norm(net.two)
    return net


def old_spectral_norm(**sizes):
    net = plain(**sizes)
    nn.utils.spectral_norm(net.two)
    return net


def transposed(**sizes):
    net = plain(**sizes)
    net.one.weight = nn.Parameter(net.one.weight.detach().t().contiguous().t())
    assert not net.one.weight.is_contiguous()
    return net


class Images(nn.Module):
    """Convolutions whose weights lie channels last."""

    def __init__(self, num_classes):
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)
        self.head = nn.Linear(8 * 16, num_classes)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        return self.head(self.conv2(self.conv(x).relu()).relu().flatten(1))


def channels_last(num_classes, seed, **sizes):
    torch.manual_seed(seed)
    return Images(num_classes)


def empty(**sizes):
    net = plain(**sizes)
    net.register_parameter("nothing", nn.Parameter(torch.zeros(0, 3)))
    return net


def half(**sizes):
    return plain(**sizes).to(torch.bfloat16)


def partly_half(**sizes):
    net = plain(**sizes)
    net.two.half()
    return net


def on_meta(**sizes):
    return plain(**sizes).to("meta")


def lazy(num_classes, **sizes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))


def complex_numbers(**sizes):
    net = plain(**sizes)
    net.register_parameter("phase", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))
    return net


def sharing_memory(**sizes):
    net = plain(**sizes)
    net.register_parameter("other", nn.Parameter(net.two.weight.data))
    return net


class Counts(nn.Module):
    """Counts its forwards, in an attribute or a buffer."""

    def __init__(self, net, buffer):
        super().__init__()
        self.net, self.head, self.calls = net, net.head, 0
        del net.head
        self.buffer = buffer
        if buffer:
            self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        if self.training and self.buffer:
            self.mean.mul_(0.9).add_(0.1 * x.mean())
        elif self.training:
            self.calls += 1
        return self.head(self.net(x))


def counting(**sizes):
    return Counts(plain(**sizes), False)


def averaging(**sizes):
    return Counts(plain(**sizes), True)


class Remembers(nn.Module):
    """Keeps the mean of what it saw in a buffer that its first forward in training makes."""

    def __init__(self, net):
        super().__init__()
        self.net, self.head = net, net.head
        del net.head

    def forward(self, x):
        if self.training:
            self.register_buffer("seen", x.mean(), persistent=False)
        return self.head(self.net(x))


def remembering(**sizes):
    return Remembers(plain(**sizes))


class Branching(nn.Module):
    """Decides by its input, which vmap cannot."""

    def __init__(self, net):
        super().__init__()
        self.net, self.scale = net, nn.Parameter(torch.ones(64))
        self.head = net.head
        del net.head

    def forward(self, x):
        x = x.flatten(1) * self.scale
        return self.head(self.net(-x if x.sum() < 0 else x))


def branching(**sizes):
    return Branching(plain(**sizes))


def with_adapters(**sizes):
    peft = pytest.importorskip("peft")
    net = peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["one", "two"]), plain(**sizes))
    net.head.requires_grad_(True)
    return net


def of(name):
    return f"model._target_=test_own_nets.{name}"


def model(folder):
    return load_file(folder / "model.safetensors")


def start(name):
    return globals()[name](in_features=64, hidden=64, num_classes=10, seed=0).state_dict()


@pytest.mark.parametrize("cohort", [1, 3])
@pytest.mark.parametrize("options", [["mask_rule=dense"], ["mask_rule=least_sensitive"]], ids=str)
def test_what_the_builder_froze_keeps_its_bits_and_is_not_sent(run_in, options, cohort):
    summary, folder = run_in("run", *QUIET, of("frozen"), *options, f"federation.cohort={cohort}")
    after, before = model(folder), start("frozen")
    for name in ("one.weight", "one.bias", "two.bias"):
        assert torch.equal(after[name], before[name]), name
    assert not torch.equal(after["two.weight"], before["two.weight"])
    trainable = 64 * 16 + 16 * 10 + 10
    messages = summary["rounds"] * 3
    assert summary["bytes_dense"] == messages * (48 + 4 * trainable)
    if "mask_rule=dense" in options:
        assert summary["bytes_up"] == summary["bytes_dense"]
        assert summary["trainable_fraction"] == trainable / summary["num_parameters"]


NORMS = ["weight_norm", "old_weight_norm", "spectral_norm", "old_spectral_norm", "orthogonal", "doubled"]
PRUNE = "sparsity.mode=prune"


@pytest.mark.parametrize("options", [["federation.cohort=1"], ["federation.cohort=3", "trainer.precision=64-true"]])
def test_of_a_net_with_adapters_only_they_and_the_head_train_and_travel(run_in, options):
    summary, folder = run_in("run", *QUIET, of("with_adapters"), "mask_rule=dense", *options)
    after, before = model(folder), start("with_adapters")
    moved = {name for name in before if not torch.equal(after[name], before[name].to(after[name].dtype))}
    assert moved == {name for name in before if "lora" in name or "head" in name}
    size = sum(before[name].numel() for name in moved)
    assert summary["bytes_up"] == summary["rounds"] * 3 * (48 + size * (8 if options[1:] else 4))


@pytest.mark.parametrize(
    ("net", "options", "says"),
    [
        (
            "frozen",
            ["model.trainable=[one.*]"],
            "model.trainable=.*names only parameters that .* froze",
        ),
        ("frozen_head", [], "head.init=probe would change head.*builder froze.*set head.init=random"),
        ("frozen_head", ["model.trainable=head", "head.init=random"], "builder froze"),
        ("half", [], "one.weight is torch.bfloat16; clients train float32"),
        ("partly_half", [], "two.weight is torch.float16; clients train float32"),
        ("on_meta", [], "one.weight has no values yet"),
        ("lazy", [], "1.weight has no values yet"),
        ("complex_numbers", [], "phase is torch.complex64; clients train float32"),
        ("sharing_memory", [], "other and two.weight share memory|two.weight and other share memory"),
        ("counting", ["federation.cohort=3"], "cannot stack this model: its calls changes.*federation.cohort=1"),
        ("averaging", ["federation.cohort=3"], "cannot stack this model: its mean changes.*federation.cohort=1"),
        ("remembering", ["federation.cohort=3"], "cannot stack this model: its seen changes.*federation.cohort=1"),
        ("spectral_norm", ["federation.cohort=3"], "cannot stack this model: its two.*federation.cohort=1"),
        ("old_spectral_norm", ["federation.cohort=3"], "cannot stack this model: its two.*federation.cohort=1"),
        ("branching", ["federation.cohort=3"], "cannot stack this model: vmap.*federation.cohort=1"),
        *((name, [PRUNE], f"{PRUNE} .*the weight of two is computed.*sparsity.mode=freeze") for name in NORMS),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line_before_round_1(run_in, net, options, says):
    with pytest.raises(ValueError, match=says) as said:
        run_in("run", *QUIET, of(net), "mask_rule=random", *options)
    assert "\n" not in str(said.value)


def test_a_frozen_head_stays_as_it_was_built(run_in):
    _, folder = run_in("run", *QUIET, of("frozen_head"), "mask_rule=dense", "head.init=random")
    assert torch.equal(model(folder)["head.weight"], start("frozen_head")["head.weight"])


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # of vmap, for weight_norm
@pytest.mark.parametrize("net", ["weight_norm", "old_weight_norm", "doubled", "transposed", "channels_last", "empty"])
def test_several_clients_at_once_train_it_as_one_after_the_other(run_in, net):
    options = [*QUIET, of(net), "mask_rule=random", "sparsity.mode=freeze"]
    one, first = run_in("one", *options, "federation.cohort=1", *(["evaluation=per_client"] * ("weight" in net)))
    three, second = run_in("three", *options, "federation.cohort=3")
    assert one["bytes_total"] == three["bytes_total"]
    for name, tensor in model(first).items():
        torch.testing.assert_close(tensor, model(second)[name], rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(tensor, start(net)[name]) for name, tensor in model(first).items())


@pytest.mark.parametrize("net", ["spectral_norm", "averaging", "counting", "branching", "orthogonal"])
def test_what_cannot_be_stacked_trains_one_client_at_a_time_and_auto_knows(run_in, net):
    summary, _ = run_in("run", *QUIET, of(net), "mask_rule=random", "federation.cohort=1")
    assert summary["dropped_updates"] == 0
    if net in ("spectral_norm", "counting"):
        auto, _ = run_in("auto", *QUIET, of(net), "mask_rule=random", "federation.cohort=auto")
        assert (auto["cohort"], auto["global_sha256"]) == (1, summary["global_sha256"])


class Scalar(ClientModule):
    def losses(self, forward, x, y):
        return F.cross_entropy(forward(x), y)


class Column(ClientModule):
    def losses(self, forward, x, y):
        return F.cross_entropy(forward(x), y, reduction="none").unsqueeze(1)


class Whole(ClientModule):
    def losses(self, forward, x, y):
        return (forward(x).argmax(1) != y).long()


class Detached(ClientModule):
    def losses(self, forward, x, y):
        return F.cross_entropy(forward(x).detach(), y, reduction="none")


class NotANumber(ClientModule):
    def losses(self, forward, x, y):
        return F.cross_entropy(forward(x), y, reduction="none") * float("nan")


class OneArgument(ClientModule):
    def losses(self, logits, y):
        return F.cross_entropy(logits, y, reduction="none")


class Nothing(ClientModule):
    def losses(self, forward, x, y):
        F.cross_entropy(forward(x), y, reduction="none")


class OfGivenLogits(ClientModule):
    """Right in training, and a scalar where an evaluation hands logits in."""

    def losses(self, forward, x, y):
        logits = forward(x)
        return F.cross_entropy(logits, y, reduction="none" if logits.requires_grad else "mean")


class Smoothed(ClientModule):
    def losses(self, forward, x, y):
        return F.cross_entropy(forward(x), y, reduction="none", label_smoothing=0.1)


LOSSES = {
    "Scalar": "torch.float32 of shape \\(\\) for 2 samples",
    "Column": "of shape \\(2, 1\\) for 2 samples",
    "Whole": "torch.int64 of shape \\(2,\\)",
    "Detached": "has no gradient",
    "NotANumber": "\\[nan, nan\\] for the first 2 samples",
    "OneArgument": "too many positional arguments",
    "Nothing": "it returned NoneType",
    "OfGivenLogits": "of shape \\(\\) for 2 samples",
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_is_not_one_number_a_sample_is_refused_before_round_1(run_in, name):
    says = f"^{name}: losses\\(forward, x, y\\) must return \\(B,\\).*{LOSSES[name]}"
    with pytest.raises(ValueError, match=says):
        run_in("run", *QUIET, f"client._target_=test_own_nets.{name}", "mask_rule=random")


def test_a_right_loss_of_ones_own_trains(run_in):
    summary, _ = run_in("run", *QUIET, "client._target_=test_own_nets.Smoothed", "mask_rule=random")
    assert summary["test/acc"] > 0.5


def test_any_net_starts_from_a_file_of_weights(run_in):
    """All but the head, which stays as it was built; the builder knows nothing of files."""
    from fedsparse.job.assemble import assemble

    own = [f"model._target_={plain.__module__}.plain", "model.hidden=24", "head.init=random"]
    _, first = run_in("first", *own, *QUIET)
    trained, start = load_file(first / "model.safetensors"), ["model=mlp", "logger=csv", *own]
    given = assemble(composed(*start, f"model.checkpoint={first / 'model.safetensors'}")).problem.net.state_dict()
    fresh = assemble(composed(*start)).problem.net.state_dict()
    for name, value in given.items():
        assert torch.equal(value, (fresh if name.startswith("head") else trained)[name]), name
    with pytest.raises(InstantiationException, match=r"of another shape one\.weight \(24x64, not 8x64\)"):
        assemble(composed(*start, "model.hidden=8", f"model.checkpoint={first / 'model.safetensors'}"))
    with pytest.raises(InstantiationException, match=r"there is no model checkpoint nowhere\.safetensors"):
        assemble(composed(*start, "model.checkpoint=nowhere.safetensors"))
