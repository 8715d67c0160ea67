"""Small modules, each with one habit that a step has to get along with."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

WIDTH, CLASSES, EXAMPLES = 6, 3, 8
Criterion = Callable[[Any, Any], Tensor]


class Case(NamedTuple):
    """A network and what it is trained on."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]
    targets: Callable[[], Any]
    criterion: Callable[[nn.Module], Criterion] = lambda model: F.cross_entropy
    refused: str | None = None
    """Part of the error where no step can be right; None where it must be exact."""
    dtype: torch.dtype | None = torch.float64
    """Dtype that the network is cast to; None leaves it."""
    momentum: dict[str, float] = {"momentum": 0.9, "weight_decay": 0.01}  # noqa: RUF012
    """Settings of the base optimizer."""


def vectors() -> Tensor:
    """Return inputs, shape (examples, width)."""
    return torch.randn(EXAMPLES, WIDTH, dtype=torch.float64)


def sequences() -> Tensor:
    """Return inputs, shape (examples, length, width)."""
    return torch.randn(EXAMPLES, 5, WIDTH, dtype=torch.float64)


def tokens() -> Tensor:
    """Return inputs, shape (examples, length)."""
    return torch.randint(7, (EXAMPLES, 5))


def images() -> Tensor:
    """Return inputs, shape (examples, channels, height, width)."""
    return torch.randn(EXAMPLES, 2, 4, 4, dtype=torch.float64)


def classes() -> Tensor:
    """Return targets, shape (examples,)."""
    return torch.randint(CLASSES, (EXAMPLES,))


def block() -> nn.Sequential:
    """Return two layers with statistics in between."""
    return nn.Sequential(
        nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)
    )


class Around(nn.Module):
    """A block between two layers, called in some way."""

    def __init__(
        self, call: Callable[..., Tensor], inner: Callable[[], nn.Module] = block
    ) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(WIDTH, WIDTH), inner()
        self.last, self._call = nn.Linear(WIDTH, CLASSES), call

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        out: Tensor = self.last(self._call(self.inner, torch.tanh(self.first(x))))
        return out


def plainly(inner: nn.Module, x: Tensor) -> Tensor:
    """Call it."""
    out: Tensor = inner(x)
    return out


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    kept = operation is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def checkpointed(inner: nn.Module, x: Tensor, *, reentrant: bool) -> Tensor:
    """Call it, and again in the backward pass."""
    out: Tensor = checkpoint(inner, x, use_reentrant=reentrant)
    return out


def selectively(inner: nn.Module, x: Tensor) -> Tensor:
    """Call it, and what is cheap of it again in the backward pass."""
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    out: Tensor = checkpoint(inner, x, use_reentrant=False, context_fn=contexts)
    return out


def in_pieces(inner: Any, x: Tensor) -> Tensor:
    """Call it by two pieces, one of which is called again."""
    call: Any = checkpoint_sequential
    out: Tensor = call(inner, 2, x, use_reentrant=False)
    return out


def with_dropout() -> nn.Module:
    """Return a block that draws random numbers."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5))


def one_module_twice() -> nn.Module:
    """Return a network that has a module under two names."""
    shared = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(shared, nn.Tanh(), shared, nn.Linear(WIDTH, CLASSES))


def statistics_twice() -> nn.Module:
    """Return a network that goes through one BatchNorm at two places."""
    norm = nn.BatchNorm1d(WIDTH)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Tanh(), norm, head())


def head() -> nn.Linear:
    """Return the last layer."""
    return nn.Linear(WIDTH, CLASSES)


class Tied(nn.Module):
    """An embedding whose weight is also that of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of tokens."""
        out: Tensor = self.head(self.mix(self.embed(x)).mean(1))
        return out


class Assigned(nn.Module):
    """A mean over time that is a buffer, and assigned anew."""

    mean: Tensor

    def __init__(self, change: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.layer, self._change = head(), change
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        self._change(self, x)
        out: Tensor = self.layer(x - self.mean[:WIDTH])
        return out


def running(module: Any, x: Tensor) -> None:
    """Assign the mean, and count in place."""
    module.mean = 0.9 * module.mean + 0.1 * module.layer.weight.mean(0) + x.mean(0)
    module.count += 1


def wider(module: Any, x: Tensor) -> None:
    """Assign a mean of another shape."""
    module.mean = torch.cat([module.mean, module.mean])


def lazily(module: Any, x: Tensor) -> None:
    """Make a buffer at the first call."""
    if not hasattr(module, "late"):
        module.register_buffer("late", x.mean(0))


def from_nothing(module: Any, x: Tensor) -> None:
    """Give a value to a buffer that had none."""
    module.nothing = x.mean(0)


def to_nothing(module: Any, x: Tensor) -> None:
    """Take a buffer's value away."""
    module.count = None


def another_child(module: Any, x: Tensor) -> None:
    """Put another layer in place of one."""
    module.layer = head().to(x)


class InPlace(nn.Module):
    """Normalises its inputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = head()

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        out: Tensor = self.layer(x.sub_(0.5).div_(0.25))
        return out


def remapping(model: nn.Module) -> Criterion:
    """Return a criterion that changes targets in place."""

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        targets[targets == 2] = 0
        return F.cross_entropy(outputs, targets.add_(1).clamp_(max=2))

    return criterion


def penalty(model: nn.Module) -> Criterion:
    """Return a criterion that reads the model's weights."""

    def criterion(outputs: Tensor, targets: Tensor) -> Tensor:
        squares = torch.stack([p.square().sum() for p in model.parameters()])
        return F.cross_entropy(outputs, targets) + 0.1 * squares.sum()

    return criterion


def hooked_forward() -> nn.Module:
    """Return a network with hooks around its forward pass."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), head())
    model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    model[0].register_forward_hook(lambda module, args, out: out + module.weight.sum())
    return model


def hooked_backward() -> nn.Module:
    """Return a network with a hook that changes gradients, and reads weights for it."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), head())

    def change(module: Any, inward: Any, outward: Any) -> Any:
        return tuple(g * module.weight.abs().mean() for g in inward)

    model[2].register_full_backward_hook(change)
    return model


def masked() -> nn.Module:
    """Return a network with a hook on a parameter that masks its gradient."""
    first = nn.Linear(WIDTH, WIDTH)
    mask = (torch.arange(WIDTH) % 2).double()
    hook: Any = first.weight.register_hook
    hook(lambda gradient: gradient * mask)
    return nn.Sequential(first, nn.Tanh(), head())


def accumulating() -> nn.Module:
    """Return a network with a hook that takes the gradient from `.grad`."""
    model = nn.Sequential(head())
    hook: Any = model[0].weight.register_post_accumulate_grad_hook
    hook(lambda parameter: None)
    return model


def layers(change: Callable[[Any], Any]) -> nn.Module:
    """Return two layers, the first of which was changed."""
    first = change(nn.Linear(WIDTH, WIDTH))
    return nn.Sequential(first, nn.Tanh(), head())


def weight_norm_of_old(layer: nn.Module) -> nn.Module:
    """Normalise a weight by hooks, as PyTorch did first."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        changed: nn.Module = nn.utils.weight_norm(layer)
    return changed


class Recurrent(nn.Module):
    """A recurrent layer and a last one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = layer, head()

    def forward(self, x: Any) -> Tensor:
        """Return scores."""
        hidden = self.layer(x)[1]
        out: Tensor = self.head((hidden[0] if isinstance(hidden, tuple) else hidden)[-1])
        return out


def packed() -> rnn.PackedSequence:
    """Return sequences of several lengths."""
    lengths = torch.tensor([5, 4, 4, 3, 3, 2, 1, 1])
    return rnn.pack_padded_sequence(sequences(), lengths, batch_first=True)


class Attention(nn.Module):
    """Attention among the tokens of a sequence."""

    def __init__(self, *, causal: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(WIDTH, 2, dropout=dropout, batch_first=True)
        self.head, self._causal = head(), causal

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        mask = None
        if self._causal:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        seen, _ = self.attend(x, x, x, attn_mask=mask, need_weights=False)
        out: Tensor = self.head(seen.mean(1))
        return out


class Encoder(nn.Module):
    """A transformer's encoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        out: Tensor = self.head(self.encoder(x).mean(1))
        return out


class LayerDrop(nn.Module):
    """Leaves layers out at random, which only values can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        for layer in self.layers:
            if torch.rand(()).item() > 0.4:
                x = x + torch.tanh(layer(x))
        out: Tensor = self.head(x)
        return out


class Slope(nn.Module):
    """Its outputs hold a derivative by its inputs, as for differential equations."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))
        self.head = head()

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.body(x).sum(), x, create_graph=True)
        out: Tensor = self.head(slope)
        return out


class _OwnMatmul(torch.autograd.Function):
    """A product with the weight of a module that is read again on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, module: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *outward: Any) -> Any:
        (x,) = ctx.saved_tensors
        return outward[0] @ ctx.module.weight, outward[0].T @ x, None


class KeepsItself(nn.Linear):
    """A layer whose autograd function keeps the module."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        out: Tensor = _OwnMatmul.apply(x, self.weight, self)
        return out + self.bias


class Mixed(nn.Module):
    """Parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(WIDTH, WIDTH).float()
        self.wide = head().double()

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        out: Tensor = self.wide(torch.tanh(self.narrow(x.float())).double())
        return out


class Complex(nn.Module):
    """A parameter of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, CLASSES, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        return (x.to(self.weight.dtype) @ self.weight).abs()


class ComplexBuffer(nn.Module):
    """A filter of complex numbers that is not trained."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = head()
        self.register_buffer("filter", torch.randn(WIDTH, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        out: Tensor = self.layer((x * self.filter).abs())
        return out


class Adapter(nn.Module):
    """A frozen layer beside a trained one of low rank."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(WIDTH, CLASSES).requires_grad_(False)
        self.down = nn.Linear(WIDTH, 2, bias=False)
        self.up = nn.Linear(2, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        out: Tensor = self.frozen(x) + self.up(self.down(x))
        return out


class Bag(nn.Module):
    """An embedding and a last layer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, WIDTH, **options), head()

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        out: Tensor = self.head(self.embed(x).mean(1))
        return out


class Constrained(nn.Linear):
    """Gives its weight a largest norm whenever it is used."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.1)
        return super().forward(x)


class Clipped(nn.Linear):
    """Clips its weight in place whenever it is used."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        self.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class Momentum(nn.Module):
    """A copy that follows, kept as frozen parameters and written in forward."""

    def __init__(self, *, assigned: bool) -> None:
        super().__init__()
        self.query, self._assigned = head(), assigned
        self.key = head().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        for key, query in zip(self.key.parameters(), self.query.parameters(), strict=True):
            mean = 0.9 * key.data + 0.1 * query.data
            if self._assigned:
                key.data = mean
            else:
                key.data.copy_(mean)
        out: Tensor = self.query(x) + self.key(x)
        return out


class Structured(nn.Module):
    """Takes several inputs, and returns more than scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = head(), head()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Return scores, and what led to them."""
        hidden = self.first(x), self.second(y)
        return {"scores": hidden[0] + hidden[1], "hidden": hidden, "name": "structured"}


def of_scores(model: nn.Module) -> Criterion:
    """Return a criterion on one of several outputs."""
    return lambda outputs, targets: F.cross_entropy(outputs["scores"], targets)


def averaging(momentum: float | None = None, *, track: bool = True) -> nn.Module:
    """Return a network with statistics that are averages over all batches, or none."""
    norm = nn.BatchNorm1d(WIDTH, momentum=momentum, track_running_stats=track)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Tanh(), head())


def convolutional() -> nn.Module:
    """Return a network for images, with the normalisations of images."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.Hardswish(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        nn.Dropout2d(0.2),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def drawn(network: Any = None) -> nn.Module:
    """Return a network that draws random numbers."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Tanh(), head())


def sharing_memory() -> nn.Module:
    """Return a network of which two weights are one in memory only."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), head()).double()
    model[1].weight.data = model[0].weight.data
    return model


def compiled_inside() -> nn.Module:
    """Return a network of which a part is compiled by its author."""
    inner: Any = torch.compile(nn.Linear(WIDTH, WIDTH), backend="eager")
    return nn.Sequential(inner, nn.Tanh(), head())


def scripted() -> nn.Module:
    """Return a network that is a script."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script: nn.Module = torch.jit.trace(head().double(), vectors())  # type: ignore[no-untyped-call]
    return script


def _case(name: str, make: Callable[[], nn.Module], **options: Any) -> Case:
    return Case(name, make, **{"inputs": vectors, "targets": classes, **options})


CASES = [
    _case("checkpoint", partial(Around, partial(checkpointed, reentrant=False))),
    _case("checkpoint, reentrant", partial(Around, partial(checkpointed, reentrant=True))),
    _case("checkpoint, selective", partial(Around, selectively)),
    _case("checkpoint, in pieces", partial(Around, in_pieces)),
    _case(
        "checkpoint of dropout",
        partial(Around, partial(checkpointed, reentrant=False), with_dropout),
    ),
    _case(
        "checkpoint of dropout, reentrant",
        partial(Around, partial(checkpointed, reentrant=True), with_dropout),
    ),
    _case("no checkpoint", partial(Around, plainly)),
    _case("a module twice", one_module_twice),
    _case("statistics twice", statistics_twice),
    _case("tied weights", Tied, inputs=tokens),
    _case("assigned buffer", partial(Assigned, running)),
    _case("buffer of another shape", partial(Assigned, wider), refused="same shapes"),
    _case("buffer made late", partial(Assigned, lazily), refused="makes or replaces late"),
    _case("buffer from None", partial(Assigned, from_nothing), refused="replaces nothing"),
    _case("buffer to None", partial(Assigned, to_nothing), refused="replaces count"),
    _case("child replaced", partial(Assigned, another_child), refused="replaces layer"),
    _case("inputs in place", InPlace),
    _case("targets in place", head, criterion=remapping),
    _case("criterion that reads the model", head, criterion=penalty),
    _case("hooks forward", hooked_forward),
    _case("hooks backward", hooked_backward),
    _case("hook on a parameter", masked),
    _case("hook after accumulation", accumulating, refused="has a hook"),
    _case("weight_norm", partial(layers, parametrizations.weight_norm)),
    _case("weight_norm, old", partial(layers, weight_norm_of_old)),
    _case("spectral_norm", partial(layers, parametrizations.spectral_norm)),
    _case("spectral_norm, old", partial(layers, nn.utils.spectral_norm)),
    _case("orthogonal", partial(layers, parametrizations.orthogonal)),
    _case(
        "LSTM",
        lambda: Recurrent(nn.LSTM(WIDTH, WIDTH, 2, batch_first=True)),
        inputs=sequences,
    ),
    _case("GRU, packed", lambda: Recurrent(nn.GRU(WIDTH, WIDTH)), inputs=packed),
    _case("attention", partial(Attention, causal=False), inputs=sequences),
    _case("attention, masked", partial(Attention, causal=True), inputs=sequences),
    _case("transformer encoder", Encoder, inputs=sequences),
    _case("dropout", drawn),
    _case("layer drop", LayerDrop),
    _case("derivative in forward", Slope),
    _case(
        "autograd function",
        lambda: nn.Sequential(KeepsItself(WIDTH, WIDTH), nn.Tanh(), head()),
    ),
    _case("mixed dtypes", Mixed, dtype=None),
    _case("complex parameter", Complex, refused="floating point"),
    _case("complex buffer", ComplexBuffer),
    _case("adapter", Adapter),
    _case(
        "sparse gradient",
        partial(Bag, sparse=True),
        inputs=tokens,
        momentum={"momentum": 0.9},
    ),
    _case(
        "embedding with max_norm",
        partial(Bag, max_norm=0.5),
        inputs=tokens,
        refused="writes",
    ),
    _case("weight assigned", lambda: Constrained(WIDTH, CLASSES), refused="writes to"),
    _case("weight in place", lambda: Clipped(WIDTH, CLASSES), refused="writes to"),
    _case("follower assigned", partial(Momentum, assigned=True), refused="writes to"),
    _case("follower in place", partial(Momentum, assigned=False), refused="writes to"),
    _case(
        "several inputs",
        Structured,
        inputs=lambda: (vectors(), vectors()),
        criterion=of_scores,
    ),
    _case("BatchNorm, cumulative", averaging),
    _case("BatchNorm without statistics", partial(averaging, 0.1, track=False)),
    _case("convolutions", convolutional, inputs=images),
    _case("memory shared", sharing_memory, refused="share memory", dtype=None),
    _case("compiled inside", compiled_inside),
    _case("script", scripted, refused="script", dtype=None),
]
