"""Every backend of rho-OT against one dense oracle, what must not matter to a plan, and what bad
input is told"""
import importlib
import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from math import inf, nan

import ot
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from jaxtyping import config as jaxtyping_config

from transporter_nb.coupling import backends
from transporter_nb.coupling.transport import ProjectedTransport, projected_transport

# Triton reads it when it is imported: one process either interprets or does not
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Backend:
    name: str
    device: str = "cpu"
    most_tokens: int = 40
    most_lines: int = 5
    examples: int = 25

    def __call__(
        self, values, source_scores, target_scores, entropy_reg=0.1, n_iterations=3, **options,
    ):
        def move(x): return x.to(self.device) if isinstance(x, torch.Tensor) else x
        result = projected_transport(
            move(values), move(source_scores), move(target_scores), move(entropy_reg), n_iterations,
            **{name: move(option) for name, option in options.items()}, backend=self.name,
        )
        return Outcome(
            *(
                None if part is None else part.cpu()
                for part
                in (
                    result.transported, result.plan, result.source_potentials,
                    result.target_potentials,
                )
            )
        )


@dataclass
class Outcome:
    transported: torch.Tensor
    plan: torch.Tensor | None
    source_potentials: torch.Tensor
    target_potentials: torch.Tensor


@pytest.fixture(params=["reference", "torch", "scan", "triton"])
def backend(request):
    if request.param == "scan": pytest.importorskip("numba")
    if request.param != "triton": return Backend(request.param)
    pytest.importorskip("triton")
    # a tenth of a second for every line
    if INTERPRETED: return Backend("triton", most_tokens=6, most_lines=2, examples=4)
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU here; test_triton_in_its_interpreter runs it without one")
    return Backend("triton", "cuda")


@pytest.fixture
def unchecked():
    "The package as its users call it: shapes are checked by its own messages, not by ours"
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


# The oracle: dense, float64, one clip at a time; what has no weight is cut out before anything is
# computed.

def oracle(
    values, source_scores, target_scores, entropy_reg=0.1, n_iterations=3, source_weights=None,
    target_weights=None, source_mask=None, target_mask=None, normalise_last="targets", sums=None,
):
    """Transported values and plan; `sums` gets the source's plus the target's potential of every
    pair of every line, clip by clip"""
    plans = []
    for clip in range(len(values)):
        log_weights, kept = [], []
        for scores, weights, mask in (
            (source_scores, source_weights, source_mask),
            (target_scores, target_weights, target_mask),
        ):
            weight = torch.ones(
                scores.shape[-1], dtype=torch.float64,
            ) if weights is None else weights[clip].double()
            kept.append(((weight > 0) & (True if mask is None else mask[clip])).nonzero()[:, 0])
            log_weights.append(weight[kept[-1]].log())
        sources, targets = kept
        reg = torch.as_tensor(entropy_reg, dtype=torch.float64)
        reg = reg.expand(source_scores.shape[:2])[clip][:, None, None]
        cost = (
            target_scores[clip][:, targets, None].double()
            - source_scores[clip][:, None, sources].double()
        ).abs() / reg
        # of sources and of targets
        f, g = torch.zeros_like(cost[:, :1]), torch.zeros_like(cost[..., :1])
        for _ in range(n_iterations):
            if normalise_last == "targets":
                f = log_weights[0] - (log_weights[1][:, None] + g - cost).logsumexp(1, keepdim=True)
                g = -(f - cost).logsumexp(2, keepdim=True)
            else:
                g = log_weights[1][:, None] - (log_weights[0] + f - cost).logsumexp(2, keepdim=True)
                f = -(g - cost).logsumexp(1, keepdim=True)
        plan = torch.zeros(target_scores.shape[-1], source_scores.shape[-1], dtype=torch.float64)
        if sums is not None: sums.append(f + g)
        plans.append(
            plan.index_put((targets[:, None], sources[None]), (f + g - cost).exp().mean(0))
        )
    plan = torch.stack(plans)
    used = torch.ones(values.shape[:2], dtype=torch.bool) if source_mask is None else source_mask
    return plan @ torch.where(used[..., None], values.double(), 0.), plan


@dataclass
class Case:
    "One draw of everything that a plan depends on"
    values: torch.Tensor
    source_scores: torch.Tensor
    target_scores: torch.Tensor
    entropy_reg: float | torch.Tensor
    n_iterations: int
    options: dict

    def arguments(self, dtype=torch.float64):
        return *(
            x.to(dtype) for x in (self.values, self.source_scores, self.target_scores)
        ), self.entropy_reg, self.n_iterations


def uniform(draws, *shape): return 2 * torch.rand(shape, generator=draws, dtype=torch.float64) - 1


def make_case(
    seed=0, batch=2, projections=3, sources=7, targets=5, tau=0.1, grid=None, duplicated=False,
    weighted=False, masked=False, per_projection=False, n_iterations=3, last="targets", channels=4,
):
    draws = torch.Generator().manual_seed(seed)
    # float32 numbers, so that both dtypes see the same
    a, b = (2 * uniform(draws, batch, projections, n).float().double() for n in (sources, targets))
    if grid is not None: a, b = (x.div(grid).round() * grid for x in (a, b))
    # twice the same token, and two exact ties
    if duplicated: a[..., -1], b[..., -1], b[..., 0] = a[..., 0], a[..., 0], a[..., sources // 2]
    reg = tau * (
        1 + torch.rand(batch, projections, generator=draws, dtype=torch.float64)
    ) if per_projection else tau
    options = {"normalise_last": last}
    for side, n in (("source", sources), ("target", targets)):
        if weighted:
            options[f"{side}_weights"] = 0.1 + torch.rand(
                batch, n, generator=draws, dtype=torch.float64,
            )
        if masked:
            options[f"{side}_mask"] = torch.rand(batch, n, generator=draws) < 0.6
            options[f"{side}_mask"][:, int(torch.randint(n, (), generator=draws))] = True
    return Case(
        uniform(draws, batch, sources, channels).float().double(), a, b, reg, n_iterations, options,
    )


def cases(most_tokens, most_lines):
    return st.builds(
        make_case, seed=st.integers(0, 2**31), batch=st.integers(1, min(3, most_lines)),
        projections=st.integers(1, most_lines), sources=st.integers(1, most_tokens),
        targets=st.integers(1, most_tokens), tau=st.floats(-4, 4).map(lambda x: 10**x),
        grid=st.sampled_from([None, None, 0.25, 1e9]), duplicated=st.booleans(),
        weighted=st.booleans(), masked=st.booleans(), per_projection=st.booleans(),
        n_iterations=st.integers(1, 5), last=st.sampled_from(["targets", "sources"]),
    )


def for_all(backend, check, examples=None):
    "Run `check` on many cases, the same ones in every run"
    # shrinking a failure would take minutes
    options = {"phases": [Phase.generate]} if INTERPRETED else {}
    profile = settings(
        max_examples=min(examples or backend.examples, backend.examples), deadline=None,
        derandomize=True, database=None, suppress_health_check=list(HealthCheck), **options,
    )
    profile(given(cases(backend.most_tokens, backend.most_lines))(check))()


def close(ours, exact, atol):
    assert ours.isfinite().all()
    off = (ours.double() - exact).abs().max().item()
    assert off <= atol, f"off by {off:.3g}, {atol:g} allowed"


def slopes(transport, case, dtype=torch.float64, seed=1):
    "Values and gradients by values and both scores, of one fixed sum over the result"
    leaves = [x.clone().requires_grad_() for x in case.arguments(dtype)[:3]]
    transported = transport(*leaves, case.entropy_reg, case.n_iterations, **case.options)
    transported = transported[0] if isinstance(transported, tuple) else transported.transported
    present = case.options.get("target_mask")
    cotangent = uniform(torch.Generator().manual_seed(seed), *transported.shape).float() * (
        1. if present is None else present[..., None]
    )
    return transported.detach(), torch.autograd.grad(
        (transported * cotangent.to(transported.dtype)).sum(), leaves,
    )


# Numbers

def test_float64_equals_the_oracle(backend):
    def check(case):
        result, (transported, plan) = backend(
            *case.arguments(), **case.options, with_plan=True,
        ), oracle(*case.arguments(), **case.options)
        close(result.transported, transported, 1e-12)
        close(result.plan, plan, 1e-12)
    for_all(backend, check)


def test_float32_equals_the_oracle(backend):
    def check(case):
        result, (transported, plan) = backend(
            *case.arguments(torch.float32), **case.options, with_plan=True,
        ), oracle(*case.arguments(), **case.options)
        assert result.transported.dtype == result.plan.dtype == torch.float32
        close(result.transported, transported, 5e-7 * max(1, plan.sum(-1).max().item()))
        close(result.plan, plan, 5e-7)
    for_all(backend, check)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_equal_the_oracle(backend, dtype):
    def check(case):
        (_, ours), (_, exact) = slopes(backend, case, dtype), slopes(oracle, case)
        smallest = float(torch.as_tensor(case.entropy_reg).min())
        # one entry moves by up to 1 / tau per unit of score, even where all of them cancel
        for slope, right, unit in zip(ours, exact, (1., 1 / smallest, 1 / smallest)):
            tolerance = 1e-12 if dtype is torch.float64 else 2e-5 if smallest < 1e-3 else 5e-6
            close(slope, right, tolerance * max(unit, right.abs().max().item()))
    for_all(backend, check, 15)


@pytest.mark.parametrize("tau", [1e-4, 1e-2, 0.1, 1., 1e4])
def test_float32_gradients_in_units_of_the_largest(backend, tau):
    n = min(backend.most_tokens, 40)
    case = make_case(2, sources=n, targets=n - 1, tau=tau, n_iterations=5)
    (transported, ours), (exact_transported, exact) = slopes(backend, case, torch.float32), slopes(
        oracle, case,
    )
    close(transported, exact_transported, 5e-7)
    for slope, right in zip(ours, exact):
        close(slope, right, (2e-5 if tau < 1e-3 else 5e-6) * right.abs().max().item())


def test_gradients_by_regularisation_and_weights(backend):
    for tau in (0.01, 0.3):
        case = make_case(3, tau=tau, weighted=True, per_projection=True, grid=0.25, masked=True)
        leaves = [
            case.entropy_reg.clone().requires_grad_(),
            *(
                case.options[name].clone().requires_grad_()
                for name in ("source_weights", "target_weights")
            ),
        ]
        options = case.options | {"source_weights": leaves[1], "target_weights": leaves[2]}
        def slope(transported):
            return torch.autograd.grad(
                (transported[:, :, 0] * case.options["target_mask"]).sum(), leaves,
            )
        ours = slope(
            backend(*case.arguments()[:3], leaves[0], case.n_iterations, **options).transported
        )
        for one, right in zip(
            ours, slope(oracle(*case.arguments()[:3], leaves[0], case.n_iterations, **options)[0]),
        ):
            close(one, right, 1e-10 * max(1, right.abs().max().item()))


def test_gradients_equal_finite_differences(backend):
    if backend.name == "triton" and INTERPRETED:
        pytest.skip("hundreds of evaluations; the oracle's gradients are checked above")
    for tau in (0.3, 0.01):
        case = make_case(
            4, batch=1, projections=2, sources=3, targets=2, tau=tau, weighted=True,
            per_projection=True, channels=2,
        )
        def call(values, a, b, reg, u, v):
            result = backend(
                values, a, b, reg, 3, source_weights=u, target_weights=v, with_plan=True,
            )
            return (
                result.transported, result.plan, result.source_potentials, result.target_potentials
            )
        leaves = (
            *case.arguments()[:3], case.entropy_reg, case.options["source_weights"],
            case.options["target_weights"],
        )
        assert torch.autograd.gradcheck(
            call, [x.clone().requires_grad_() for x in leaves], eps=1e-7, atol=1e-4, rtol=1e-4,
        )


def test_partial_plan_equals_that_of_pot(backend):
    case = make_case(5, sources=7, targets=5, projections=1, n_iterations=3, tau=0.1)
    cost = (case.target_scores[:, 0, :, None] - case.source_scores[:, 0, None, :]).abs()
    pot = ot.batch.solve_batch(cost.mT.contiguous(), 0.1, max_iter=3, tol=0).plan.mT
    close(backend(*case.arguments(), with_plan=True).plan, 5 * pot, 1e-12)
    other_way = ot.batch.solve_batch(cost.contiguous(), 0.1, max_iter=3, tol=0).plan
    close(
        backend(*case.arguments(), normalise_last="sources", with_plan=True).plan, 7 * other_way,
        1e-12,
    )


# Laws

def test_what_was_normalised_last_holds(backend):
    def check(case):
        plan = backend(*case.arguments(), **case.options, with_plan=True).plan
        side, axis = ("target", -1) if case.options["normalise_last"] == "targets" else (
            "source", -2,
        )
        present = case.options.get(
            f"{side}_mask",
            torch.ones(len(plan), plan.shape[-2 if axis == -1 else -1], dtype=torch.bool),
        )
        close(plan.sum(axis), present.double(), 1e-11)
        assert (plan >= 0).all()
    for_all(backend, check, 10)


def test_order_of_sides_matters_and_swapping_roles_is_the_other_orientation(backend):
    case = make_case(6, sources=6, targets=5, weighted=True, masked=True)
    values, a, b, *rest = case.arguments()
    rows = backend(values, a, b, *rest, **case.options, with_plan=True).plan
    columns = backend(
        values, a, b, *rest, **case.options | {"normalise_last": "sources"}, with_plan=True,
    ).plan
    swapped = {
        "source_weights": "target_weights", "target_weights": "source_weights",
        "source_mask": "target_mask", "target_mask": "source_mask",
    }
    options = {name: case.options[other] for name, other in swapped.items()}
    close(
        backend(
            uniform(torch.Generator().manual_seed(0), 2, 5, 1), b, a, *rest, **options,
            normalise_last="sources", with_plan=True,
        ).plan.mT,
        rows, 1e-12,
    )
    assert (rows - columns).abs().max() > 1e-2 and (
        rows.sum(-2) - columns.sum(-2)
    ).abs().max() > 1e-2


def test_shuffled_tokens_and_projections(backend):
    case = make_case(
        7, sources=6, targets=5, projections=4, weighted=True, masked=True, per_projection=True,
        grid=0.25,
    )
    values, a, b, reg, n = case.arguments()
    result = backend(values, a, b, reg, n, **case.options, with_plan=True)
    draws = torch.Generator().manual_seed(0)
    s, t, p = (torch.randperm(size, generator=draws) for size in (6, 5, 4))
    options = {
        "source_weights": case.options["source_weights"][:, s],
        "source_mask": case.options["source_mask"][:, s],
        "target_weights": case.options["target_weights"][:, t],
        "target_mask": case.options["target_mask"][:, t],
    }
    shuffled = backend(
        values[:, s], a[:, p][..., s], b[:, p][..., t], reg[:, p], n, **options, with_plan=True,
    )
    close(shuffled.plan, result.plan[:, t][..., s], 1e-12)
    close(shuffled.transported, result.transported[:, t], 1e-12)


def test_shift_of_both_sides_and_scale_of_scores_with_tau(backend):
    case = make_case(8, sources=6, targets=5)
    values, a, b, reg, n = case.arguments()
    result = backend(values, a, b, reg, n).transported
    close(backend(values, a + 4, b + 4, reg, n).transported, result, 1e-12)
    close(backend(values, 8 * a, 8 * b, 8 * reg, n).transported, result, 1e-12)
    close(backend(values, -a, -b, reg, n).transported, result, 1e-12)
    assert (backend(values, a + 4, b, reg, n).transported - result).abs().max() > 1e-3


@pytest.mark.parametrize("last", ["targets", "sources"])
@pytest.mark.parametrize("garbage", [0., 1e30, nan, inf])
def test_padding_changes_nothing(backend, garbage, last):
    case = make_case(9, sources=4, targets=3, weighted=True, last=last)
    result = slopes(backend, case)
    def pad(x, axis): return torch.cat([x, torch.full_like(x.narrow(axis, 0, 2), garbage)], axis)
    def mask(n): return (torch.arange(n + 2) < n).expand(2, -1)
    options = {"source_mask": mask(4), "target_mask": mask(3), "normalise_last": last} | {
        name: pad(case.options[name], 1).nan_to_num(0., 0.)
        for name in ("source_weights", "target_weights")
    }
    padded = Case(
        pad(case.values, 1), pad(case.source_scores, 2), pad(case.target_scores, 2),
        case.entropy_reg, case.n_iterations, options,
    )
    leaves = [x.clone().requires_grad_() for x in padded.arguments()[:3]]
    transported = backend(*leaves, case.entropy_reg, case.n_iterations, **options).transported
    cotangent = uniform(torch.Generator().manual_seed(1), *result[0].shape).float()
    gradients = torch.autograd.grad((transported[:, :3] * cotangent).sum(), leaves)
    close(transported[:, :3], result[0], 1e-12)
    for gradient, right, size in zip(gradients, result[1], (4, 4, 3)):
        axis = 1 if gradient is gradients[0] else 2
        close(gradient.narrow(axis, 0, size), right, 1e-11)
        assert (gradient.narrow(axis, size, 2) == 0).all()


def test_no_weight_is_no_token(backend):
    case = make_case(10, sources=5, targets=4)
    weights, mask = torch.ones(2, 5).double(), torch.ones(2, 5, dtype=torch.bool)
    weights[0, 2], mask[0, 2] = 0, False
    close(
        backend(*case.arguments(), source_weights=weights).transported,
        backend(*case.arguments(), source_mask=mask).transported, 1e-13,
    )


def test_a_doubled_weight_is_a_token_twice(backend):
    values, a, b, reg, n = make_case(11, sources=5, targets=4).arguments()
    twice, once = torch.ones(2, 5).double(), torch.cat([torch.arange(5), torch.tensor([1])])
    twice[:, 1] = 2
    close(
        backend(values[:, once], a[..., once], b, reg, n).transported,
        backend(values, a, b, reg, n, source_weights=twice).transported, 1e-12,
    )
    twice, once = torch.ones(2, 4).double(), torch.cat([torch.arange(4), torch.tensor([2])])
    twice[:, 2] = 2
    close(
        backend(values, a, b[..., once], reg, n).transported[:, :4],
        backend(values, a, b, reg, n, target_weights=twice).transported, 1e-12,
    )


def test_a_common_factor_of_weights_is_nothing(backend):
    case = make_case(12, sources=5, targets=4, weighted=True)
    scaled = {
        name: 7. * weights if torch.is_tensor(weights) else weights
        for name, weights in case.options.items()
    }
    close(
        backend(*case.arguments(), **scaled).transported,
        backend(*case.arguments(), **case.options).transported, 1e-12,
    )


def test_clips_do_not_see_each_other(backend):
    case = make_case(
        13, batch=3, sources=5, targets=4, weighted=True, masked=True, per_projection=True,
    )
    together = backend(*case.arguments(), **case.options).transported
    for clip in range(3):
        options = {
            name: option[clip:clip + 1] if torch.is_tensor(option) else option
            for name, option in case.options.items()
        }
        values, a, b = (x[clip:clip + 1] for x in case.arguments()[:3])
        close(
            backend(
                values, a, b, case.entropy_reg[clip:clip + 1], case.n_iterations, **options,
            ).transported,
            together[clip:clip + 1], 1e-13,
        )


def test_potentials_rebuild_the_plan(backend):
    for last in ("targets", "sources"):
        case = make_case(14, sources=6, targets=5, weighted=True, last=last)
        result = backend(*case.arguments(), **case.options, with_plan=True)
        assert result.source_potentials.shape == (2, 3, 6) and result.target_potentials.shape == (
            2, 3, 5,
        )
        cost = (
            case.target_scores[..., :, None] - case.source_scores[..., None, :]
        ).abs() / case.entropy_reg
        close(
            (
                result.target_potentials[..., :, None] + result.source_potentials[..., None, :]
                - cost
            ).exp().mean(1),
            result.plan, 1e-12,
        )
        close(result.transported, result.plan @ case.values, 1e-12)
    assert backend(*case.arguments()).plan is None


def test_gradients_through_plan_and_potentials(backend):
    """Not only through the transported values. Of potentials only sums mean something: a constant
    may be moved from one side to the other"""
    case = make_case(15, sources=5, targets=4, weighted=True)
    cotangent = uniform(torch.Generator().manual_seed(2), 2, 3, 4, 5)
    def slope(plan, pairs):
        return torch.autograd.grad(plan.square().sum() + (pairs * cotangent).sum(), leaves)
    for exact in (False, True):
        leaves = [x.clone().requires_grad_() for x in case.arguments()[1:3]]
        if exact:
            right = slope(
                oracle(
                    case.values, *leaves, *case.arguments()[3:], **case.options, sums=(sums := []),
                )[1],
                torch.stack(sums),
            )
        else:
            result = backend(
                case.values, *leaves, *case.arguments()[3:], **case.options, with_plan=True,
            )
            ours = slope(
                result.plan,
                result.target_potentials[..., :, None] + result.source_potentials[..., None, :],
            )
    potentials = result.target_potentials[..., :, None] + result.source_potentials[..., None, :]
    constant = potentials - torch.stack(sums)
    close(constant, constant.mean((-1, -2), keepdim=True).expand(constant.shape), 1e-12)
    for one, other in zip(ours, right): close(one, other, 1e-11 * max(1, other.abs().max().item()))


def all_slopes(transport, case, dtype=torch.float64, around=nullcontext()):
    """As `slopes`, also by the regularisation of every line and by both weights; `around` the call,
    not around its way back"""
    names = ("source_weights", "target_weights")
    leaves = [
        x.clone().requires_grad_()
        for x
        in (*case.arguments(dtype)[:3], case.entropy_reg, *(case.options[name] for name in names))
    ]
    with around:
        transported = transport(
            *leaves[:4], case.n_iterations, **case.options | dict(zip(names, leaves[4:])),
        )
    transported = transported[0] if isinstance(transported, tuple) else transported.transported
    cotangent = uniform(torch.Generator().manual_seed(3), *transported.shape)
    cotangent = cotangent * case.options["target_mask"][..., None]
    return transported.detach(), torch.autograd.grad(
        (transported * cotangent.to(transported.dtype)).sum(), leaves,
    )


def large_case(targets, tau):
    """Ties, twins, masks, weights, eleven lines with a tau each, and more sources than one tile has
    columns"""
    case = make_case(
        40, projections=11, sources=600, targets=targets, tau=tau, grid=2**-6, duplicated=True,
        weighted=True, per_projection=True, channels=3,
    )
    draws = torch.Generator().manual_seed(41)
    case.options |= {
        f"{side}_mask": torch.rand(2, n, generator=draws) < 0.93
        for side, n in (("source", 600), ("target", targets))
    }
    return case


@pytest.fixture(scope="module")
def large_slopes():
    "What the oracle says of the large cases"
    found = {}
    def of(*which):
        if which not in found: found[which] = all_slopes(oracle, large_case(*which))
        return found[which]
    return of


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("way", ["walks", "bands", "plan"])
@pytest.mark.parametrize("targets, tau", [(20, 0.05), (70, 0.05), (70, 1e-3)])
def test_every_way_of_the_scan_equals_the_oracle(
    way, targets, tau, threads, monkeypatch, large_slopes,
):
    pytest.importorskip("numba")
    from transporter_nb.coupling import line_potentials, sinkhorn_scan
    # free walks, or a free plan
    monkeypatch.setattr(
        sinkhorn_scan, "COST",
        dict.fromkeys(sinkhorn_scan.COST, (1., 1., 0., 0.) if way == "walks" else (0., 0., 1., 1.)),
    )
    if way != "plan":
        # three bands of at most 32 rows, each of two tiles
        monkeypatch.setattr(sinkhorn_scan, "BAND_ENTRIES", 32 * 600)
        monkeypatch.setattr(line_potentials, "KEPT_BYTES", 0)
        assert len(sinkhorn_scan.bands(70, 600)) == 3
    case, before = large_case(targets, tau), torch.get_num_threads()
    exact, right = large_slopes(targets, tau)
    torch.set_num_threads(threads)
    try:
        results = [
            (dtype, all_slopes(Backend("scan"), case, dtype))
            for dtype in (torch.float64, torch.float32)
        ]
    finally: torch.set_num_threads(before)
    for dtype, (transported, gradients) in results:
        narrow = dtype is torch.float32
        close(transported, exact, 5e-7 if narrow else 1e-12)
        for slope, other in zip(gradients, right):
            assert other.abs().max() > 1e-3
            # by tau, 670 terms cancel: of the largest, walks in float32 are off by 5e-5 where tau
            # is 1e-3
            tolerance, unit = (1e-11, 1.) if not narrow else (2e-5, 1 / tau) if tau < 1e-2 else (
                5e-6, 1.,
            )
            close(slope, other, tolerance * max(unit, other.abs().max().item()))


def test_uniform_weights_and_many_rounds_equal_the_oracle(backend):
    "Given as numbers, N1 != N2: nothing may drift from round to round"
    small = backend.name == "triton" and INTERPRETED
    case = make_case(
        42, batch=1, projections=1 if small else 3, sources=5 if small else 13,
        targets=4 if small else 6, per_projection=True, n_iterations=300,
    )
    for unit in (1., 1 / 6):
        case.options |= {
            "source_weights": torch.full(case.values.shape[:2], unit).double(),
            "target_weights": torch.full((1, case.target_scores.shape[-1]), unit).double(),
            "target_mask": torch.ones(1, case.target_scores.shape[-1], dtype=torch.bool),
        }
        (transported, ours), (exact, right) = all_slopes(backend, case), all_slopes(oracle, case)
        close(transported, exact, 1e-12)
        for slope, other in zip(ours, right):
            close(slope, other, 1e-10 * max(1, other.abs().max().item()))
        if small: break


@pytest.mark.parametrize("offset", [1e5, -1e5])
def test_a_common_offset_of_scores_equals_the_oracle_without(backend, offset):
    """Scores are multiples of 2^-10, so the offset costs no digit of theirs; padding is zero, far
    away from the others"""
    case = make_case(
        43, sources=min(9, backend.most_tokens), targets=5, grid=2**-10, weighted=True, masked=True,
        per_projection=True,
    )
    for side in ("source", "target"): case.options[f"{side}_mask"][:, 0] = False
    for side in ("source", "target"): case.options[f"{side}_mask"][:, 1] = True
    exact, right = all_slopes(oracle, case)
    def moved(values, a, b, *rest, **options):
        a, b = (
            torch.where(options[f"{side}_mask"][:, None], scores + offset, 0.)
            for side, scores in (("source", a), ("target", b))
        )
        return backend(values, a, b, *rest, **options)
    transported, ours = all_slopes(moved, case)
    close(transported, exact, 1e-12)
    for slope, other in zip(ours, right):
        close(slope, other, 1e-11 * max(1, other.abs().max().item()))


def test_many_rounds_hold_both_marginals(backend):
    case = make_case(16, sources=5, targets=4, tau=1., n_iterations=300)
    plan = backend(*case.arguments(), with_plan=True).plan
    close(plan.sum(-2), torch.full((2, 5), 4 / 5, dtype=torch.float64), 1e-9)


def test_limits_of_tau(backend):
    case = make_case(17, sources=5, targets=4)
    close(
        backend(*case.arguments()[:3], 1e8).transported,
        case.values.mean(1, keepdim=True).expand(2, 4, 4), 1e-6,
    )
    line = torch.arange(5.).double()[None, None]
    shuffle = torch.tensor([3, 1, 4, 0, 2])
    plan = backend(case.values[:1], line, line[..., shuffle] + 0.3, 1e-3, 200, with_plan=True).plan
    close(plan, torch.eye(5).double()[shuffle][None], 1e-6)


# Runs

def test_two_runs_are_equal_bit_for_bit(backend):
    if backend.device == "cuda": torch.use_deterministic_algorithms(True)
    try:
        case = make_case(
            18, sources=min(33, backend.most_tokens), targets=min(29, backend.most_tokens),
            grid=0.25, weighted=True, masked=True,
        )
        (first, gradients), (second, again) = (
            slopes(backend, case, torch.float32) for _ in range(2)
        )
        assert torch.equal(first, second) and all(
            torch.equal(*pair) for pair in zip(gradients, again)
        )
    finally: torch.use_deterministic_algorithms(False)


# torch's own, where a graph is broken
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_is_the_same(backend, unchecked):
    case = make_case(19, sources=6, targets=5)
    def call(values, a, b):
        return projected_transport(
            values * 2, a, b, 0.1, 3, backend=backend.name,
        ).transported.square()
    torch._dynamo.reset()
    results = []
    for function in (torch.compile(call, backend="aot_eager"), call):
        leaves = [x.to(backend.device).requires_grad_() for x in case.arguments()[:3]]
        out = function(*leaves)
        results.append(
            (out.detach().cpu(), *(x.cpu() for x in torch.autograd.grad(out.sum(), leaves)))
        )
    for one, other in zip(*results): close(one, other, 1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_transposed_scores_compile(backend, unchecked):
    "Scores as [tokens, projections] in memory: not contiguous, nor are their gradients"
    case = make_case(44, sources=6, targets=5)
    def call(values, a, b):
        return projected_transport(values, a.mT, b.mT, 0.1, 3, backend=backend.name).transported
    torch._dynamo.reset()
    right = slopes(oracle, case)[1]
    leaves = [
        x.to(backend.device).requires_grad_()
        for x
        in (case.values, case.source_scores.mT.contiguous(), case.target_scores.mT.contiguous())
    ]
    cotangent = uniform(torch.Generator().manual_seed(1), 2, 5, 4).float().double().to(
        backend.device
    )
    for function in (torch.compile(call, backend="aot_eager"), call):
        results = torch.autograd.grad((function(*leaves) * cotangent).sum(), leaves)
        for one, other in zip(results, (right[0], right[1].mT, right[2].mT)):
            close(one.cpu(), other, 1e-11)


def test_autocast_changes_nothing(backend):
    case = make_case(
        45, sources=min(9, backend.most_tokens), targets=5, weighted=True, masked=True,
        per_projection=True,
    )
    plain, plan = all_slopes(backend, case, torch.float32), backend(
        *case.arguments(torch.float32), **case.options, with_plan=True,
    ).plan
    autocast = torch.autocast(backend.device, dtype=torch.bfloat16)
    cast = all_slopes(backend, case, torch.float32, autocast)
    with autocast:
        # it is on
        assert (
            torch.eye(2, device=backend.device) @ torch.eye(2, device=backend.device)
        ).dtype is torch.bfloat16
        cast_plan = backend(*case.arguments(torch.float32), **case.options, with_plan=True).plan
    assert torch.equal(cast[0], plain[0]) and torch.equal(cast_plan, plan)
    for one, other in zip(cast[1], plain[1]):
        assert one.dtype is other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("average", ["plans", "costs"])
def test_nan_in_padding_reaches_no_gradient_of_the_module(backend, average):
    if average == "costs" and backend.name != "reference": pytest.skip("has no backends")
    torch.manual_seed(0)
    transport, draws = ProjectedTransport(
        6, n_projections=3, average=average, backend=backend.name,
    ).to(backend.device), torch.Generator().manual_seed(46)
    tokens, places = torch.randn(2, 5, 6, generator=draws), torch.randn(2, 4, 6, generator=draws)
    gradients = []
    for garbage in (0., nan):
        tokens[1, 3:], places[0, 3:] = garbage, garbage
        masks = {
            "projected_mask": tokens.new_ones(2, 5, dtype=torch.bool),
            "structured_mask": places.new_ones(2, 4, dtype=torch.bool),
        }
        masks["projected_mask"][1, 3:], masks["structured_mask"][0, 3:] = False, False
        out = transport(
            tokens.to(backend.device), places.to(backend.device),
            **{name: mask.to(backend.device) for name, mask in masks.items()},
        )[0]
        gradients.append(
            torch.autograd.grad(
                (
                    out.cpu() * torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
                ).sum(),
                list(transport.parameters()),
            )
        )
    for clean, ours in zip(*gradients): close(ours.cpu(), clean.cpu().double(), 0.)
    assert all(clean.abs().max() > 1e-4 for clean in gradients[0])


@pytest.mark.parametrize("average", ["plans", "costs"])
def test_module_in_bfloat16_runs(backend, average):
    if average == "costs" and backend.name != "reference": pytest.skip("has no backends")
    torch.manual_seed(0)
    transport, draws = ProjectedTransport(
        6, n_projections=3, average=average, backend=backend.name,
    ).bfloat16().to(backend.device), torch.Generator().manual_seed(47)
    tokens, places = (
        torch.randn(2, n, 6, generator=draws).bfloat16().to(backend.device) for n in (5, 4)
    )
    out, plan = transport(tokens, places)
    assert out.dtype is torch.bfloat16
    close(plan.sum(-1).cpu(), torch.ones(2, 4).double(), 2e-2)  # eight bits
    wide = ProjectedTransport(6, n_projections=3, average=average).to(backend.device)
    wide.load_state_dict(transport.state_dict())
    close(out.cpu(), wide(tokens.float(), places.float())[0].detach().cpu().double(), 5e-2)
    out.float().square().sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.dtype is torch.bfloat16
        and parameter.grad.isfinite().all()
        for parameter in transport.parameters()
    )


def test_auto_is_one_of_the_others():
    case = make_case(21)
    close(
        projected_transport(*case.arguments(), backend="auto").transported,
        oracle(*case.arguments())[0], 1e-12,
    )


def test_module_trains_alike_with_every_backend(backend):
    if backend.name in ("reference", "triton"):
        pytest.skip("compared with the reference; the interpreter is too slow for a hundred steps")
    losses = {}
    for name in ("reference", backend.name):
        torch.manual_seed(0)
        transport, draws = ProjectedTransport(
            6, n_projections=8, average="plans", entropy_reg=0.1, backend=name,
        ), torch.Generator().manual_seed(1)
        optimizer, curve = torch.optim.Adam(transport.parameters(), lr=1e-2), []
        for _ in range(100):
            tokens = torch.randn(3, 12, 6, generator=draws)
            copies = tokens * torch.linspace(0.2, 3, 6) + 0.3 * torch.randn(
                tokens.shape, generator=draws,
            )
            loss = (transport(tokens, copies)[0] - tokens).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses[name] = torch.tensor(curve)
    assert (losses["reference"] - losses[backend.name]).abs().max() <= 1e-5
    assert losses["reference"][-10:].mean() < losses["reference"][:10].mean() - 1e-2  # it learns


# Bad input: one entry is changed, and the message must hold what was received

def spoiled(**changes):
    case = make_case(22)
    arguments = dict(
        zip(
            ("values", "source_scores", "target_scores", "entropy_reg", "n_iterations"),
            case.arguments(),
        )
    )
    return arguments | changes


def with_entry(name, value):
    tensor = spoiled()[name].clone()
    tensor.view(-1)[-1] = value
    return {name: tensor}


def all_masked(name, n):
    mask = torch.ones(2, n, dtype=torch.bool)
    mask[1] = False
    return {name: mask}


def with_weight(name, n, value):
    weights = torch.ones(2, n).double()
    weights[1, 2] = value
    return {name: weights}


BAD = {
    "NaN in source scores": (
        with_entry("source_scores", nan), ["source scores", "1 NaN", "(1, 6)"],
    ),
    "infinite target scores": (
        with_entry("target_scores", inf), ["target scores", "infinite", "(1, 4)"],
    ),
    "NaN in values": (with_entry("values", nan), ["values", "1 NaN", "(1, 6)"]),
    "tau zero": ({"entropy_reg": 0.}, ["entropy_reg", "0.0"]),
    "tau negative": ({"entropy_reg": -0.3}, ["entropy_reg", "-0.3"]),
    "tau NaN": ({"entropy_reg": nan}, ["entropy_reg", "nan"]),
    "tau infinite": ({"entropy_reg": inf}, ["entropy_reg", "inf"]),
    "one tau of many negative": (
        {"entropy_reg": torch.tensor([[.1, .1, .1], [.1, -.25, .1]]).double()},
        ["entropy_reg", "-0.25"],
    ),
    "tau of another shape": ({"entropy_reg": torch.ones(2, 4).double()}, ["entropy_reg", "(2, 4)"]),
    "no source tokens": (
        {"values": torch.zeros(2, 0, 4).double(), "source_scores": torch.zeros(2, 3, 0).double()},
        ["source", "(2, 3, 0)"],
    ),
    "no target tokens": ({"target_scores": torch.zeros(2, 3, 0).double()}, ["target", "(2, 3, 0)"]),
    "no projections": (
        {
            "source_scores": torch.zeros(2, 0, 7).double(),
            "target_scores": torch.zeros(2, 0, 5).double(),
        },
        ["projection", "(2, 0, 7)"],
    ),
    "sources all masked": (all_masked("source_mask", 7), ["source_mask", "[7, 0]"]),
    "targets all masked": (all_masked("target_mask", 5), ["target_mask", "[5, 0]"]),
    "weights all zero": ({"source_weights": torch.zeros(2, 7).double()}, ["source_weights", "0"]),
    "a negative weight": (with_weight("target_weights", 5, -0.125), ["target_weights", "-0.125"]),
    "a NaN weight": (with_weight("source_weights", 7, nan), ["source_weights", "nan"]),
    "an infinite weight": (with_weight("source_weights", 7, inf), ["source_weights", "inf"]),
    "weights of another shape": (
        {"source_weights": torch.ones(2, 5).double()}, ["source_weights", "(2, 5)"],
    ),
    "a mask of another shape": (
        {"target_mask": torch.ones(2, 7, dtype=torch.bool)}, ["target_mask", "(2, 7)"],
    ),
    "a mask of numbers": ({"target_mask": torch.ones(2, 5)}, ["target_mask", "float32"]),
    "scores of two batches": (
        {"target_scores": torch.zeros(3, 3, 5).double()}, ["(3, 3, 5)", "(2, 3, 7)"],
    ),
    "scores of two numbers of projections": (
        {"target_scores": torch.zeros(2, 4, 5).double()}, ["(2, 4, 5)", "(2, 3, 7)"],
    ),
    "values of other tokens": ({"values": torch.zeros(2, 5, 4).double()}, ["values", "(2, 5, 4)"]),
    "scores without batch": (
        {"source_scores": torch.zeros(3, 7).double()}, ["source scores (3, 7)"],
    ),
    "two devices": (
        {"target_scores": torch.zeros(2, 3, 5, dtype=torch.float64, device="meta")},
        ["meta", "cpu"],
    ),
    "two dtypes": ({"target_scores": torch.zeros(2, 3, 5)}, ["float32", "float64"]),
    "integer scores": (
        {
            "source_scores": torch.zeros(2, 3, 7, dtype=torch.long),
            "target_scores": torch.zeros(2, 3, 5, dtype=torch.long),
        },
        ["int64"],
    ),
    "no rounds": ({"n_iterations": 0}, ["n_iterations", "0"]),
    "an unknown backend": (
        {"backend": "cuda"}, ["cuda", "reference", "torch", "scan", "triton", "auto"],
    ),
    "an unknown side": ({"normalise_last": "rows"}, ["rows", "targets", "sources"]),
}


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("name", ["reference", "torch"])
def test_bad_input_gets_rule_value_and_fix(fault, name, unchecked):
    changes, expected = BAD[fault]
    with pytest.raises(ValueError) as error:
        projected_transport(**({"backend": name} | spoiled(**changes)))
    message = str(error.value)
    assert all(part in message for part in expected), message
    # a sentence, not a code
    assert len(message.split()) >= 7 and message.rstrip().endswith("."), message


def test_a_backend_that_is_not_there_says_what_to_do(unchecked, monkeypatch):
    if torch.cuda.is_available() or INTERPRETED: pytest.skip("Triton is there")
    with pytest.raises((ValueError, ImportError), match="triton") as error:
        projected_transport(**spoiled(), backend="triton")
    assert any(other in str(error.value) for other in ("scan", "torch", "auto"))


def test_nothing_is_imported_before_it_is_asked_for():
    "The package works without numba and triton, and loads neither for the fallback"
    code = (
        "import sys; sys.modules.update(numba=None, triton=None); import torch; "
        "from transporter_nb.coupling.transport import projected_transport\n"
        "out = projected_transport("
        "torch.ones(1, 3, 2), torch.zeros(1, 4, 3), torch.zeros(1, 4, 2), "
        "backend='auto').transported; assert torch.allclose(out, torch.ones(1, 2, 2))"
    )
    if importlib.util.find_spec("transporter_nb") is None: pytest.skip("not installed")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]


def test_without_numba_torch_computes(monkeypatch):
    monkeypatch.setattr(backends, "KNOWN", {})
    # as if a package it imports were missing
    monkeypatch.setitem(sys.modules, "transporter_nb.coupling.sinkhorn_scan", None)
    assert backends.choose_backend() == "torch" and backends.choose_backend(
        "auto", "meta",
    ) == "reference"
    with pytest.raises(ImportError, match='use backend="torch"'): backends.load_backend("scan")


def test_a_numba_that_does_not_work_is_passed_over_with_a_warning(monkeypatch):
    def unusable(name):
        if name.endswith("scan"): raise ImportError("Numba needs another NumPy")
        return importlib.import_module(name)
    monkeypatch.setattr(backends, "KNOWN", {})
    monkeypatch.setattr(backends, "import_module", unusable)
    with pytest.warns(UserWarning, match="passed over.*another NumPy"):
        assert backends.choose_backend() == "torch"
    assert backends.choose_backend() == "torch"  # said once


def test_nowhere_to_write_a_cache(monkeypatch):
    compiled_loops = pytest.importorskip("transporter_nb.coupling.compiled_loops")
    numba_njit = compiled_loops.njit
    def njit(cache=False, **settings):
        if cache: raise RuntimeError("cannot cache function: no locator available")
        return numba_njit(**settings)
    monkeypatch.setattr(compiled_loops, "njit", njit)
    def double(x): return 2 * x
    assert compiled_loops.compiled(double)(3.) == 6.
