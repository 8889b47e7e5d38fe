"""Models that return log-probabilities or losses of entries, against those that return scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from optim_cases import objective_of, weights
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.func import functional_call, jacrev
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from einconv_kfac import KFAC
from einconv_kfac.optim.recording.recorder import Recorder
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.fits.quadratic_model import quadratic_model

EXACT = {"rtol": 1e-9, "atol": 1e-11}
GENERATOR = torch.Generator().manual_seed(0)
N, T, V = 4, 3, 5
IDS = torch.randint(V, (N, T), generator=GENERATOR)
MASK = (torch.rand(N, T, generator=GENERATOR) > 0.3).double()
TARGETS = functional.one_hot(IDS, V).double()
End = Callable[[Tensor], Any]
"""What the model makes of scores ``[n, t, v]``."""
Loss = Callable[[Any], Tensor]
"""What the script makes of that."""


class Net(nn.Module):
    """A network for tokens ``[n, t]``.

    Args:
        end: What it makes of its scores.
    """

    def __init__(self, end: End) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.end = nn.Embedding(V, 3), nn.Linear(3, V), end
        self.double()

    def forward(self, ids: Tensor) -> Any:
        return self.end(self.last(self.first(ids.roll(1, 1)).tanh()))


def trained(end: End, loss: Loss, *, inside: bool, steps: int = 3) -> tuple[Tensor, list[float]]:
    """Return the parameters and the losses of some steps, the end inside of the model or not."""
    model = Net(end if inside else lambda scores: scores)
    opt, losses = KFAC(model), []
    for _ in range(steps):
        opt.zero_grad()
        out = model(IDS)
        value = opt.observe(loss(out if inside else end(out)))
        value.backward()
        opt.step()
        losses.append(value.item())
    return weights(model), losses


def chosen(log_probabilities: Tensor) -> Tensor:
    """Return the entries of the tokens, ``[n, t]``."""
    return log_probabilities.gather(-1, IDS.unsqueeze(-1)).squeeze(-1)


def selective(scores: Tensor) -> Tensor:
    sums = torch.stack([torch.logsumexp(own, -1) for own in scores])
    return chosen(scores) - sums


def masked(sign: float, out: Tensor) -> Tensor:
    own = out.reshape(N, T, -1)
    return sign * (own * MASK.unsqueeze(-1)).sum() / MASK.sum()


def cross_entropies(scores: Tensor, **options: Any) -> Tensor:
    return functional.cross_entropy(scores.mT, IDS, **{"reduction": "none", **options})


LIKELIHOOD, MEAN = partial(masked, -1.0), partial(masked, 1.0)
FORMS: dict[str, tuple[End, Loss]] = {
    "tokens": (lambda z: chosen(z.log_softmax(-1)), LIKELIHOOD),
    "negative": (lambda z: -chosen(z.log_softmax(-1)), MEAN),
    "cross entropies": (cross_entropies, MEAN),
    "smooth labels": (partial(cross_entropies, label_smoothing=0.1), MEAN),
    "flat": (lambda z: functional.cross_entropy(z.flatten(0, 1), IDS.flatten(), reduction="none"),
             MEAN),
    "all classes": (lambda z: z.log_softmax(-1).mT,
                    lambda o: MEAN(functional.nll_loss(o, IDS, reduction="none"))),
    "a logsumexp": (lambda z: z - z.logsumexp(-1, keepdim=True), lambda o: LIKELIHOOD(chosen(o))),
    "a logarithm": (lambda z: z.softmax(-1).log(), lambda o: LIKELIHOOD(chosen(o))),
    "a distribution": (lambda z: Categorical(logits=z).log_prob(IDS), LIKELIHOOD),
    "row by row": (selective, LIKELIHOOD),
    "classes apart": (partial(functional.binary_cross_entropy_with_logits, target=TARGETS,
                              reduction="none"), MEAN),
    "squares": (partial(functional.mse_loss, target=TARGETS, reduction="none"), MEAN),
    "sequences": (lambda z: chosen(z.log_softmax(-1)).sum(1), lambda o: -o.mean()),
    "a list": (lambda z: [*chosen(z.log_softmax(-1))], lambda o: LIKELIHOOD(torch.stack(o))),
    "a bound of scores": (lambda z: chosen((2 * (z / 2).tanh()).log_softmax(-1)), LIKELIHOOD),
    "probabilities by hand": (lambda z: (z.exp() / z.exp().sum(-1, keepdim=True)).log(),
                              lambda o: LIKELIHOOD(chosen(o))),
    "magnitudes": (partial(functional.l1_loss, target=TARGETS, reduction="none"), MEAN),
    "ignored labels": (lambda z: functional.cross_entropy(
        z.mT, IDS.where(MASK > 0, -100), reduction="none"), lambda o: o.sum() / MASK.sum()),
    "beside scores": (lambda z: {"tokens": chosen(z.log_softmax(-1)), "scores": z},
                      lambda o: LIKELIHOOD(o["tokens"]) + 0.1 * o["scores"].square().mean()),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_steps_are_those_of_a_model_that_returns_scores(name: str) -> None:
    found, wanted = (trained(*FORMS[name], inside=inside) for inside in (True, False))
    torch.testing.assert_close(found[0], wanted[0], **EXACT)
    assert found[1] == pytest.approx(wanted[1], rel=1e-9)


def dense_ggn(model: Net) -> Tensor:
    """Return the Gauss-Newton matrix of the likelihood, split at the scores."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def scores(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (IDS,)).flatten()

    rows = torch.cat([j.flatten(1) for j in jacrev(scores)(parameters).values()], 1)

    def loss(own: Tensor) -> Tensor:
        return LIKELIHOOD(chosen(own.reshape(N, T, V).log_softmax(-1)))

    return rows.T @ torch.autograd.functional.hessian(loss, scores(parameters)) @ rows


def test_curvature_is_that_of_the_dense_matrix() -> None:
    model = Net(FORMS["tokens"][0])
    recorder = Recorder(model, None, lambda *_: None)
    recorder.keeps_outputs = True
    recorder.observed(LIKELIHOOD(model(IDS))).backward()
    replay, batches = Replay(model, recorder.paused), recorder.take()
    gradient = {name: p.grad for name, p in model.named_parameters()}
    point = objective_of(dict(model.named_parameters()), gradient=gradient, batches=batches)
    generator = torch.Generator().manual_seed(3)
    directions = [
        {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in gradient.items()}
        for _ in range(3)
    ]
    columns = torch.stack([torch.cat([d.flatten() for d in own.values()]) for own in directions])
    wanted = columns @ dense_ggn(Net(lambda scores: scores)) @ columns.T
    found = quadratic_model(replay, point, directions).curvature
    torch.testing.assert_close(found, wanted, **EXACT)


class Selected(torch.autograd.Function):
    """Entries of a log-softmax, with a backward pass that a replay can differentiate."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        ctx.save_for_backward(scores)
        return chosen(scores.log_softmax(-1))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (scores,) = ctx.saved_tensors
        return gradients[0].unsqueeze(-1) * (TARGETS - scores.softmax(-1))


def selected(scores: Tensor) -> Any:
    return Selected.apply(scores)  # type: ignore[no-untyped-call]


UNCHANGED: dict[str, tuple[End, Loss]] = {
    "rewards of both signs": (FORMS["tokens"][0], lambda o: (o * (MASK - 0.5)).mean()),
    "rewards of samples": (lambda z: Normal(z, 1.0).log_prob(TARGETS).sum(-1),
                           lambda o: (o * (MASK - 0.5)).mean()),
    "ratios": (FORMS["tokens"][0], lambda o: -((o - o.detach()).exp() * (MASK - 0.5)).mean()),
    "preferences": (FORMS["sequences"][0],
                    lambda o: -functional.logsigmoid(0.1 * (o[::2] - o[1::2])).mean()),
    "a linear layer": (lambda z: z.transpose(0, 1) * 2, lambda o: o.mean()),
    "a concave function": (functional.logsigmoid, lambda o: o.mean()),
    "a selection": (lambda z: chosen(z.sort(-1).values.log_softmax(-1)), LIKELIHOOD),
    "a checkpoint": (lambda z: checkpoint(FORMS["tokens"][0], z, use_reentrant=False), LIKELIHOOD),
    "a function of a user": (selected, LIKELIHOOD),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCHANGED)
def test_other_losses_are_read_down_to_what_the_model_returns(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained(*UNCHANGED[name], inside=True)
    returned = "einconv_kfac.optim.recording.read_observation.terms_of"
    monkeypatch.setattr(returned, lambda *_: [])
    wanted = trained(*UNCHANGED[name], inside=True)
    assert torch.equal(found[0], wanted[0])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_hook_may_change_the_output_of_the_last_layer(reduction: str) -> None:
    results = []
    for end in (partial(cross_entropies, reduction=reduction), lambda scores: scores):
        model = Net(end)
        model.last.register_forward_hook(lambda _, __, scores: 0.5 * scores)
        opt = KFAC(model)
        for _ in range(2):
            opt.zero_grad()
            out = model(IDS)
            loss = cross_entropies(out) if out.shape == (N, T, V) else out
            opt.observe(loss.mean()).backward()
            opt.step()
        results.append(weights(model))
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.filterwarnings("ignore:The loss has no curvature")
def test_a_hook_that_comes_first_hides_the_output_of_the_last_layer() -> None:
    model = Net(cross_entropies)
    opt = KFAC(model, exclude=["last"])
    model.last.register_forward_hook(lambda _, __, scores: 0.5 * scores, prepend=True)
    opt.observe(model(IDS).mean()).backward()
    opt.step()
    assert opt.coverage().losses == ("linear: the empirical Fisher",)


class Parts(Net):
    """Computes its scores and their log-probabilities from parts of all tokens, ``[m, v]``."""

    def forward(self, ids: Tensor) -> Any:
        hidden = self.first(ids.roll(1, 1)).tanh().flatten(0, 1)
        pairs = zip(hidden.split(5), ids.flatten().split(5))
        found = [self.last(h).log_softmax(-1).gather(1, own[:, None]) for h, own in pairs]
        return torch.cat(found).reshape(ids.shape)


def own_tokens(scores: Tensor, ids: Tensor) -> Tensor:
    return scores.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


WEIGHTS = torch.ones(3, T, dtype=torch.float64)
WEIGHTS.flatten()[5:] = 0.0  # a whole part of the first batch


@pytest.mark.parametrize("adaptive", [True, False])
def test_parts_of_a_batch_have_the_factors_of_the_whole(adaptive: bool) -> None:
    results = []
    for inside in (True, False):
        model = (Parts if inside else Net)(lambda scores: scores)
        options: dict[str, Any] = {} if adaptive else {"adaptive": False, "lr": 0.1}
        opt = KFAC(model, fisher="exact", **options)
        for _ in range(2):
            opt.zero_grad()
            for ids in (IDS[:3], IDS[2:]):
                tokens = model(ids) if inside else own_tokens(model(ids), ids)
                opt.observe(-(tokens * WEIGHTS[: len(ids)]).sum() / N).backward()
            opt.step()
        results.append(weights(model))
    torch.testing.assert_close(*results, **EXACT)


@pytest.mark.filterwarnings("ignore:The loss has no curvature")
@pytest.mark.parametrize("options", [{"curvature_fraction": 0.5}, {"inverse": "ekfac"}])
def test_examples_are_those_of_what_the_model_returns(options: dict[str, Any]) -> None:
    """Where something is computed for examples, parts of other sizes are no outputs."""
    model = Parts(lambda scores: scores)
    opt = KFAC(model, exclude=["last"], **options)
    opt.observe(LIKELIHOOD(model(IDS))).backward()
    opt.step()
    assert opt.coverage().losses == ("linear: the empirical Fisher",)


class Scaled(Net):
    """Has a temperature of its own."""

    def __init__(self, end: End) -> None:
        super().__init__(end)
        self.scale = nn.Parameter(torch.full((), 1.5, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Any:
        return self.end(self.last(self.first(ids).tanh()) * self.scale)


def test_parameters_beside_layers_may_enter_log_probabilities() -> None:
    results = []
    for model in (Scaled(FORMS["tokens"][0]), Scaled(lambda scores: scores)):
        opt = KFAC(model)
        for _ in range(3):
            opt.zero_grad()
            out = model(IDS)
            opt.observe(LIKELIHOOD(out if out.ndim == 2 else own_tokens(out, IDS))).backward()
            opt.step()
        results.append(weights(model))
    torch.testing.assert_close(*results, **EXACT)


class Tied(Net):
    """Multiplies by the weight of its embedding past the layer."""

    def forward(self, ids: Tensor) -> Any:
        return own_tokens(self.first(ids).tanh() @ self.first.weight.mT, ids)


class Overwriting(Net):
    """Overwrites its scores in place."""

    def forward(self, ids: Tensor) -> Any:
        scores = self.last(self.first(ids.flatten()).tanh())
        scores *= 2.0
        return own_tokens(scores, ids.flatten())


@pytest.mark.filterwarnings("ignore:The loss has no curvature")
@pytest.mark.parametrize("kind", [Overwriting, Tied])
def test_scores_that_are_no_outputs(kind: type[Net]) -> None:
    """They are overwritten, or of a layer's weight without its call."""
    model = kind(lambda scores: scores)
    opt = KFAC(model)
    opt.observe(LIKELIHOOD(model(IDS))).backward()
    opt.step()
    assert opt.coverage().losses == ("linear: the empirical Fisher",)
