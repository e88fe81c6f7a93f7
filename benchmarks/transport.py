"""Time and memory of rho-OT against other ways: dense, in chunks, with POT, with GeomLoss.

    # the whole grid, below 25 minutes with --threads 1; writes transport.json and .png here
    python benchmarks/transport.py
    # N = 256 and 1024, d = 64, P = 100, about a minute; writes transport_<digits>.json and .png
    python benchmarks/transport.py --quick
    # our kernels alone, on an NVIDIA GPU; writes transport_cuda.json here
    python benchmarks/transport.py --device cuda

With --install the whole grid goes into figures/.

Every method gets the same inputs and is timed from scores to transported tokens, or further to the
gradients of both scores and of the values. Each measurement has a process of its own, forked from a
server that has imported everything and computed nothing; peak memory is that process's largest
resident set, as a whole and above what lay there when the inputs were ready. At every point of the
grid ours is measured again between the rivals, and a ratio is one of medians over that point's
repeats. A rival too large for the memory, or too slow, gets fewer projections and its time is
scaled up: such numbers say from how many (`extrapolated_from`), and are hollow in the plot: the
product of plan and values, which is made once whatever P is, is timed by itself in the same
process, and only the rest is scaled. A call longer than three times the seconds its repeats may
take is measured once (n = 1): after a first call to warm up where that took less than 8 s, else it
is that first call, of so many seconds that what only first calls do is nothing to it. Ours is
repeated warm. Not measured is GeomLoss's "online" backend (KeOps: linear memory, the same number of
operations), because pykeops is not installed; the record names it below `missing`, with every part
of the grid that is left out. Interrupted, a run goes on where it stopped."""
import argparse
import gc
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import resource
import sys
import time
import warnings
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import NamedTuple

TAU, ROUNDS = .1, 5 # absolute tau, k rounds
TOKENS, WIDTHS, PROJECTIONS, MODES = (256, 1024, 4096, 16384), (64, 1024, 3584), (50, 100, 400), (
    "forward", "forward + backward",
)
# width and projections at which methods are compared, and where most of the time goes
MAIN = (64, 100)
# at 16384 one projection alone takes a rival up to a minute and 20 GB (measured)
LARGEST_FOR_RIVALS = 4096
WARM = 8 # seconds above which a first call is not made again (chosen)
NOT_INSTALLED = {
    "method": "GeomLoss online (KeOps)",
    "left_out": "pykeops is not installed: the softmin of linear memory was not measured",
}
BUSY = .1 # share of our cores taken by others above which a measurement is made again
# seconds a rival gets away from MAIN: without the product its time is proportional to P there as
# well
ELSEWHERE = .5


# ---- what is computed

class Problem(NamedTuple):
    "Inputs of every method"
    source_scores: "torch.Tensor" # [1 projections tokens]
    target_scores: "torch.Tensor" # [1 projections tokens]
    values: "torch.Tensor" # [1 tokens width], the source tokens
    tau: float = TAU
    rounds: int = ROUNDS


def make_problem(
    tokens: int, width: int, projections: int, device: str = "cpu", seed: int = 0,
) -> tuple[Problem, "torch.Tensor"]:
    """Normal tokens, a noisy copy of them in another order, their scores along random directions of
    unit norm; and a cotangent"""
    import torch
    draws = torch.Generator().manual_seed(seed)
    source = torch.randn(1, tokens, width, generator=draws)
    target = source[:, torch.randperm(tokens, generator=draws)] + .3 * torch.randn(
        1, tokens, width, generator=draws,
    )
    directions = torch.nn.functional.normalize(
        torch.randn(projections, width, generator=draws), dim=-1,
    )
    problem = Problem(
        *((directions @ side.mT).to(device) for side in (source, target)), source.to(device),
    )
    return problem, torch.randn(1, tokens, width, generator=draws).to(device)


def ours(problem: Problem, backend: str = "auto"):
    "The public function, without the plan"
    from transporter_nb.coupling.transport import projected_transport
    source, target, values, tau, rounds = problem
    return projected_transport(values, source, target, tau, rounds, backend=backend).transported


def ours_torch(problem: Problem):
    "Ours without kernels of our own"
    return ours(problem, "torch")


def distances(problem: Problem):
    "Cost of every pair on every line, [projections targets sources]"
    return (problem.target_scores[0, :, :, None] - problem.source_scores[0, :, None, :]).abs()


def normalised(log_kernel, rounds: int):
    "Rounds of two log-softmaxes, sources first: how this project computed it before"
    for _ in range(rounds): log_kernel = log_kernel.log_softmax(-2).log_softmax(-1)
    return log_kernel.exp()


def naive(problem: Problem):
    "All projections at once, dense"
    return normalised(distances(problem) / -problem.tau, problem.rounds).mean(0) @ problem.values


def chunked(problem: Problem):
    "Eight projections at once, dense; with gradients a chunk is computed again on the way back"
    from torch.utils.checkpoint import checkpoint
    def chunk_sum(source, target):
        return normalised(
            distances(problem._replace(source_scores=source[None], target_scores=target[None])) /
            -problem.tau,
            problem.rounds,
        ).sum(0)
    chunks = zip(problem.source_scores[0].split(8), problem.target_scores[0].split(8))
    return (
        sum(
            checkpoint(chunk_sum, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ) / problem.source_scores.shape[1]
    ) @ problem.values


def pot_loop(problem: Problem, method: str = "sinkhorn"):
    """`ot.sinkhorn` for one projection after the other. Its rows are normalised last, so rows are
    targets; stopThr=0 makes it do all rounds"""
    import ot
    import torch
    tokens, projections = problem.values.shape[1], problem.source_scores.shape[1]
    weights, total = torch.full((tokens,), 1 / tokens, dtype=problem.values.dtype), 0
    for source, target in zip(problem.source_scores[0], problem.target_scores[0]):
        total = total + ot.sinkhorn(
            weights, weights, (target[:, None] - source).abs(), problem.tau, method=method,
            numItermax=problem.rounds, stopThr=0, warn=False,
        )
    return total * (tokens / projections) @ problem.values


def pot_loop_log(problem: Problem):
    "The same in logarithms: slower, and right at every tau"
    return pot_loop(problem, "sinkhorn_log")


def pot_batch(problem: Problem, method: str = "sinkhorn"):
    """`ot.batch.solve_batch` on all projections. Its columns are normalised last, so columns are
    targets; tol=0 makes it do all rounds"""
    from ot.batch import solve_batch
    plan = solve_batch(
        distances(problem).mT, reg=problem.tau, max_iter=problem.rounds, tol=0, method=method,
        grad="autodiff",
    ).plan
    return plan.mean(0).mT * problem.values.shape[1] @ problem.values


def pot_batch_log(problem: Problem):
    "The same in logarithms"
    return pot_batch(problem, "log_sinkhorn")


def geomloss_product(problem: Problem, source_potentials, target_potentials, cost):
    "The plan of GeomLoss's potentials, averaged, times values"
    log_plan = (source_potentials[:, None, :] + target_potentials[:, :, None] - cost) / problem.tau
    return log_plan.exp().mean(0) / problem.values.shape[1] @ problem.values


def geomloss(problem: Problem):
    """GeomLoss's dense softmin, alternating, and the product.

    Its solvers update both sides at once (next function) and do not differentiate through their
    rounds. So its differentiable `softmin_tensorized`, two calls a round, is what of GeomLoss gives
    the partial plan and its gradients. Timed: both cost matrices (|x - y|, which is p=1, each
    contiguous as softmin wants it), 2 k softmins, the plan of the potentials, its mean and the
    product."""
    from geomloss._legacy.sinkhorn_samples import softmin_tensorized
    cost, log_weight, g = distances(problem), -math.log(
        problem.values.shape[1]
    ), problem.target_scores[0] * 0
    across = distances(
        problem._replace(source_scores=problem.target_scores, target_scores=problem.source_scores)
    )
    for _ in range(problem.rounds):
        f = softmin_tensorized(problem.tau, across, log_weight + g / problem.tau)
        g = softmin_tensorized(problem.tau, cost, log_weight + f / problem.tau)
    return geomloss_product(problem, f, g, cost)


def geomloss_loop(problem: Problem):
    """GeomLoss's own solver, `sinkhorn_loop` (what SamplesLoss runs), k rounds at fixed tau without
    debiasing, then the same product.

    Timed: as before, with 2 k + 4 softmins (it begins and ends with one of each side). Its partial
    iterates are others than ours, and its gradients are those at convergence, through the last step
    alone: a fact beside the comparison, checked where both have converged."""
    import torch
    from geomloss._legacy.sinkhorn_divergence import sinkhorn_loop
    from geomloss._legacy.sinkhorn_samples import softmin_tensorized
    cost, log_weights = distances(problem), torch.full_like(
        problem.source_scores[0], -math.log(problem.values.shape[1]),
    )
    across, wanted = distances(
        problem._replace(source_scores=problem.target_scores, target_scores=problem.source_scores)
    ), torch.is_grad_enabled()
    _, _, g, f = sinkhorn_loop(
        softmin_tensorized, log_weights, log_weights, None, None, across, cost,
        [problem.tau] * problem.rounds, None, debias=False,
    )
    torch.set_grad_enabled(wanted) # the loop leaves gradients switched on
    return geomloss_product(problem, f, g, cost)


@lru_cache(maxsize=1)
def square(tokens: int):
    "A matrix as large as a plan, made once so that making it is not timed"
    import torch
    return torch.rand(1, tokens, tokens, generator=torch.Generator().manual_seed(0)) / tokens


def product(problem: Problem):
    """One product of tokens x tokens with values in float32: the unit in which costs at large width
    are counted"""
    return square(problem.values.shape[1]) @ problem.values


class Method(NamedTuple):
    """How to run something, and the arrays of tokens x tokens it holds at its peak (measured at N =
    1024 and 4096, rounded up)"""
    call: Callable[[Problem], "torch.Tensor"]
    fixed: float = 0 # Whatever P is
    forward: float = 0 # And for each projection
    backward: float = 0 # The same where gradients are wanted
    chunk: int = 0 # Projections held at once, 0 is all
    rival: bool = True # May be given fewer projections and scaled up
    colour: int = 0 # Of the palette, in the plot


METHODS = {
    "ours": Method(ours, rival=False), "ours (torch)": Method(ours_torch, 10, colour=1),
    "naive": Method(naive, 2, 3, 15, colour=2),
    "chunked": Method(chunked, 4, 3, 16, chunk=8, colour=3),
    "POT loop": Method(pot_loop, 6, 0, 6.3, colour=4),
    "POT loop (log)": Method(pot_loop_log, 6, 0, 14, colour=4),
    "POT batch": Method(pot_batch, 2, 5.1, 8.1, colour=5),
    "POT batch (log)": Method(pot_batch_log, 2, 6.1, 18.1, colour=5),
    "GeomLoss": Method(geomloss, 2, 4.1, 16.6, colour=6),
    "GeomLoss loop": Method(geomloss_loop, 2, 4.1, 8.6, colour=6),
    "product": Method(product, rival=False),
}
# slower, or not the same thing: measured at MAIN alone
ONLY_MAIN = ("POT loop (log)", "POT batch (log)", "GeomLoss loop")


# ---- one measurement, in its own process

class Task(NamedTuple):
    "One measurement"
    method: str
    tokens: int
    width: int
    projections: int
    mode: str
    visit: int = 0 # Ours is measured again between the rivals
    seconds: float = 3. # Of repeats
    rival_seconds: float = 20. # That one call of a rival may take
    memory_gb: float = 16.
    threads: int = 1


def resident_bytes() -> int:
    "The largest resident set of this process since the last reset"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def reset_peak() -> None:
    "Let the largest resident set be the present one; only Linux can"
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass


def seconds_used() -> tuple[float, float, float]:
    """Clock, and processor seconds of this process and of the whole machine (0 where that cannot be
    read)"""
    own = resource.getrusage(resource.RUSAGE_SELF)
    try:
        user, nice, system, _, _, *interrupts = map(
            int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9],
        )
    except (OSError, ValueError): return time.perf_counter(), own.ru_utime + own.ru_stime, 0.
    return time.perf_counter(), own.ru_utime + own.ru_stime, (
        user + nice + system + sum(interrupts)
    ) / os.sysconf("SC_CLK_TCK")


def share_of_others(before: tuple, after: tuple, threads: int) -> float:
    """Share of the machine that other processes used in between beyond what our threads leave free:
    above a few hundredths, times are not to be trusted"""
    clock, own, whole = (b - a for a, b in zip(before, after))
    if clock < .2: return 0. # clock ticks are hundredths
    return max(
        0., max(0., whole - own) / (clock * os.cpu_count()) - max(0., 1 - threads / os.cpu_count()),
    )


def run_once(call: Callable, problem: Problem, cotangent, mode: str):
    "One call; with gradients also back to scores and values. The result, and the gradients or none"
    import torch
    if mode == "forward":
        with torch.no_grad(): return call(problem), ()
    leaves = [array.detach().requires_grad_() for array in problem[:3]]
    out = call(problem._replace(source_scores=leaves[0], target_scores=leaves[1], values=leaves[2]))
    # a matrix product alone does not depend on scores
    return out.detach(), torch.autograd.grad(
        out, leaves, cotangent.to(out.dtype), materialize_grads=True,
    )


def timed(*given) -> float:
    "Seconds of one call"
    started = time.perf_counter()
    run_once(*given)
    return time.perf_counter() - started


def product_seconds(problem: Problem, cotangent, mode: str) -> float:
    """Seconds of a plan times values, and of its gradients where they are wanted: what a rival pays
    once, however many its projections. Median of three, or fewer where they are slow"""
    with_plan = problem._replace(
        source_scores=square(problem.values.shape[1])[0],
        target_scores=problem.target_scores[:, :0],
    )
    times = [timed(lambda given: given.source_scores @ given.values, with_plan, cotangent, mode)]
    while len(times) < 4 and sum(times) < 4:
        times.append(
            timed(lambda given: given.source_scores @ given.values, with_plan, cotangent, mode)
        )
    return median(times[1:] or times)


def scaled_up(seconds: float, alone: float, scale: float) -> float:
    "Seconds of all projections from those of some: all but the product grows with their number"
    return max(seconds, alone + (seconds - alone) * scale)


def bytes_needed(method: Method, task: Task, projections: int) -> float:
    "Estimate, above the inputs"
    square, per = 4 * task.tokens**2, method.forward if task.mode == "forward" else method.backward
    return square * (
        method.fixed + per * min(projections, method.chunk or projections)
    ) + 24 * task.tokens * task.width


def fitting_projections(method: Method, task: Task) -> int:
    "As many as the memory holds, 0 if not even one"
    fits = [
        count
        for count in range(1, task.projections + 1)
        if bytes_needed(method, task, count) <= task.memory_gb * 1e9
    ]
    return fits[-1] if fits else 0


def affordable_projections(
    method: Method, task: Task, problem: Problem, cotangent,
) -> tuple[int, float | None]:
    """How many of a rival's projections fit into memory and time, judged by a trial with one, and
    the trial's seconds if one is all there is"""
    fit = fitting_projections(method, task)
    if not method.rival or not fit: return (fit and task.projections), None
    one = problem._replace(
        source_scores=problem.source_scores[:, :1], target_scores=problem.target_scores[:, :1],
    )
    trial = timed(method.call, one, cotangent, task.mode)
    for _ in range(2): # the first call warms up, and a disturbed one would cost it projections
        if trial * task.projections > task.rival_seconds / 4 and trial < task.rival_seconds / 4:
            trial = min(trial, timed(method.call, one, cotangent, task.mode))
    count = max(1, min(fit, int(task.rival_seconds / trial)))
    # whole chunks stand for the rest
    if method.chunk and method.chunk <= count < task.projections: count -= count % method.chunk
    return count, trial if count == 1 < task.projections and trial > task.seconds else None


def repeat(task: Task, first: float, again: Callable[[], float]) -> list[float]:
    """Times of calls that are already warm: as many as fit into the task's seconds and at least 3;
    one where a call is slow, and the first alone where it took `WARM` seconds"""
    if first > 3 * task.seconds: return [again() if first < WARM else first]
    return [again() for _ in range(max(3, min(50, int(task.seconds / max(first, 1e-6)))))]


def measure(task: Task) -> dict:
    "One measurement in this process"
    import torch
    torch.set_num_threads(task.threads)
    warnings.filterwarnings("ignore", module="geomloss|ot")
    method = METHODS[task.method]
    # the same proportions take the same way through the code
    small, started = make_problem(
        128, max(1, round(128 * task.width / task.tokens)), 2,
    ), time.perf_counter()
    run_once(method.call, *small, task.mode)
    facts = {
        "method": task.method, "tokens": task.tokens, "width": task.width,
        "projections": task.projections, "mode": task.mode,
        "compile_seconds": time.perf_counter() - started,
    }
    problem, cotangent = make_problem(task.tokens, task.width, task.projections)
    gc.collect()
    reset_peak()
    before, used = resident_bytes(), seconds_used()
    count, trial = affordable_projections(method, task, problem, cotangent)
    if not count:
        return {
            **facts,
            "left_out": f"one projection needs {bytes_needed(method, task, 1) / 1e9:.1f} GB, more "
                f"than {task.memory_gb:g}",
        }
    part = problem._replace(
        source_scores=problem.source_scores[:, :count],
        target_scores=problem.target_scores[:, :count],
    )
    def again(): return timed(method.call, part, cotangent, task.mode)
    samples = repeat(task, trial or again(), again)
    facts |= {
        "others": share_of_others(used, seconds_used(), task.threads),
        "peak_bytes": resident_bytes(), "peak_bytes_above_inputs": resident_bytes() - before,
    }
    if count == task.projections: return {**facts, "samples": samples}
    alone = product_seconds(problem, cotangent, task.mode) # after the peak was read
    return {
        **facts,
        "samples": [scaled_up(second, alone, task.projections / count) for second in samples],
        "extrapolated_from": count, "product_seconds": alone,
    }


def check(task: Task) -> dict:
    "Largest difference of one method to the dense float64 reference on the same numbers"
    import torch
    torch.set_num_threads(task.threads)
    warnings.filterwarnings("ignore", module="geomloss|ot")
    problem, cotangent = make_problem(task.tokens, task.width, task.projections)
    # where its iterates and ours have both converged
    if task.method == "GeomLoss loop": problem = problem._replace(tau=2., rounds=300)
    exact = Problem(*(array.double() for array in problem[:3]), *problem[3:])
    def reference(p): return ours(p, "reference")
    (is_, grads), (should, exact_grads) = run_once(
        METHODS[task.method].call, problem, cotangent, MODES[1],
    ), run_once(reference, exact, cotangent, MODES[1])
    relative = max(((g - e).abs().max() / e.abs().max()).item() for g, e in zip(grads, exact_grads))
    return {
        "method": task.method, "forward": (is_ - should).abs().max().item(),
        "backward": None if task.method == "GeomLoss loop" else relative,
    }


# ---- processes and what they leave behind

def answer(pipe, work: Callable, task: Task) -> None:
    "Send what was measured, or why there is nothing"
    try: pipe.send(work(task))
    except Exception as error:
        pipe.send({**task._asdict(), "failed": f"{type(error).__name__}: {str(error)[:300]}"})


def in_a_process(work: Callable, task: Task) -> dict:
    "Run one task where nothing else was ever computed"
    # forked before any thread was started: imports are there, and clean
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "torch", "numba", "ot", "ot.batch", "geomloss",
            *(
                f"transporter_nb.coupling.{name}"
                for name in ("transport", "sinkhorn_scan", "sinkhorn_torch")
            ),
        ]
    )
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(there, work, task))
    process.start()
    there.close()
    limit = 60 + 12 * task.rival_seconds if METHODS[task.method].rival else 1800
    row = {**task._asdict(), "failed": f"took longer than {limit:.0f} s"}
    if here.poll(limit):
        try: row = here.recv()
        except EOFError:
            row["failed"] = (
                "its process ended without a word (exit code "
                f"{process.join(5) or process.exitcode}); killed for memory?"
            )
    process.kill()
    process.join()
    return row


@lru_cache
def sources_digest() -> str:
    """Changes when what is measured does: then nothing kept is used, for a ratio is of times of one
    run"""
    from transporter_nb.core.base import repo_path
    parts = [
        inspect.getsource(part)
        for part
        in (
            *(method.call for method in METHODS.values()), measure, repeat, product_seconds,
            scaled_up, square, affordable_projections, run_once, make_problem, normalised,
            geomloss_product,
        )
    ]
    parts += [
        path.read_text(encoding="utf-8")
        for path in sorted(repo_path("transporter_nb", "coupling").glob("*.py"))
        if path.stem in ("transport", "compiled_loops")
        or path.stem.startswith(("line_", "sinkhorn"))
    ]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]


class Kept:
    "Measurements on disk, one a line, so that an interrupted run goes on"
    def __init__(self, path: Path, fresh: bool = False, retries: int = 0):
        self.path, self.rows, self.retries = path, {}, retries
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh: path.unlink(missing_ok=True)
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try: self.rows.update([json.loads(line)])
            except ValueError: pass # half a line, of the measurement that was interrupted

    def __call__(self, work: Callable, task: Task) -> dict:
        "What was measured before, or now"
        key = json.dumps([work.__name__, *task, sources_digest()])
        if key not in self.rows:
            row = in_a_process(work, task)
            # threads of torch wait for each other: one busy neighbour slows a rival down many times
            for _ in range(self.retries):
                if row.get("others", 0) > BUSY:
                    row = min(row, in_a_process(work, task), key=lambda one: one.get("others", 1))
            row["at"] = time.time()
            if "failed" not in row:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, row]) + "\n")
            self.rows[key] = row
        return self.rows[key]


# ---- the grid

def visits(methods: list[str]) -> list[tuple[str, int]]:
    "Ours, two rivals, ours, two rivals: each method with its how-manieth visit"
    rivals, ours_too = [name for name in methods if name != "ours"], "ours" in methods
    pairs = [rivals[start:start + 2] for start in range(0, len(rivals), 2)] or [[]]
    return [
        (name, visit if name == "ours" else 0)
        for visit, pair in enumerate(pairs)
        for name in ["ours"] * ours_too + pair
    ]


def points(given) -> list[tuple[int, int, int, str]]:
    "The grid, the compared points first"
    if given.quick: return [(tokens, *MAIN, mode) for tokens in TOKENS[:2] for mode in MODES]
    grid = [
        (tokens, width, projections, mode)
        for width in WIDTHS
        for projections in PROJECTIONS
        for tokens in TOKENS
        for mode in MODES
    ]
    return sorted(grid, key=lambda point: point[1:3] != MAIN)


def left_out(name: str, point: tuple, long: bool) -> str | None:
    "Why a method is not measured at a point"
    tokens, width, projections, mode = point
    main, rival = (width, projections) == MAIN, METHODS[name].rival
    if rival and tokens > LARGEST_FOR_RIVALS and not (name == "ours (torch)" and main):
        return f"N = {tokens}: one projection alone takes a rival up to a minute and 20 GB"
    if name in ONLY_MAIN and not main:
        return (
            f"slower than its neighbour or not the same thing: measured at d = {MAIN[0]}, P = "
            f"{MAIN[1]} alone"
        )
    if long: return None
    if name in ONLY_MAIN and tokens == LARGEST_FOR_RIVALS and mode == MODES[1]:
        return (
            f"N = {tokens} with gradients: takes long and is the slower of two ways; --long "
            "measures it"
        )
    if rival and projections != MAIN[1] and (tokens == LARGEST_FOR_RIVALS or width > MAIN[0]):
        return (
            f"P = 50 or 400 at N = {LARGEST_FOR_RIVALS} or d > {MAIN[0]}: but for the product its "
            f"time is proportional to P = {MAIN[1]}'s; --long measures it"
        )
    if not rival and tokens > LARGEST_FOR_RIVALS and width > MAIN[0] and not (
        width == 1024 and projections <= 100 and mode == MODES[0]
    ):
        return f"N = {tokens}, d > {MAIN[0]}: takes minutes; --long measures it"
    return None


def tasks(given, point: tuple) -> list[Task]:
    "What is measured at one point"
    tokens, width, projections, mode = point
    main = (width, projections) == MAIN
    names = [
        name for name in METHODS if name != "product" and not left_out(name, point, given.long)
    ]
    names += ["product"] * (tokens == 4096 and projections == MAIN[1] and mode == MODES[0])
    # away from MAIN ours comes before and after the rivals
    plan = visits(names) if main else [(name, 0) for name in names] + [("ours", 1)] * (
        len(names) > 1 and "ours" in names
    )
    seconds, rival_seconds = (.6, 2.) if given.quick else (1.5, given.rival_seconds) if main else (
        ELSEWHERE, ELSEWHERE,
    )
    found = [
        Task(name, *point, visit, seconds, rival_seconds, given.memory_gb, given.threads)
        for name, visit in plan
    ]
    # what P = 400 is compared with
    if main and tokens <= LARGEST_FOR_RIVALS:
        found.append(
            Task(
                "naive", tokens, width, 5, mode, 0, seconds, rival_seconds, given.memory_gb,
                given.threads,
            )
        )
    return [task for task in found if wanted(given.only, task)]


def wanted(only: str | None, task: Task) -> bool:
    "Whether every key=value of --only holds; values are separated by slashes"
    names = {
        "method": task.method, "N": task.tokens, "d": task.width, "P": task.projections,
        "mode": task.mode,
    }
    pairs = [part.split("=") for part in only.split(",")] if only else []
    return all(str(names[key]) in values.split("/") for key, values in pairs)


def pooled(rows: list[dict]) -> dict:
    "Visits of one method at one point as one measurement"
    samples = [second for row in rows for second in row["samples"]]
    return {
        **rows[0], "seconds": median(samples), "low": min(samples), "high": max(samples),
        "n": len(samples), "samples": samples,
        "compile_seconds": max(row["compile_seconds"] for row in rows),
        **{
            key: max(row[key] for row in rows)
            for key in ("peak_bytes", "peak_bytes_above_inputs", "others")
        },
    }


def spoken(row: dict) -> str:
    "One line about one measurement"
    head = (
        f"{row['method']:22} N {row['tokens']:5} d {row['width']:4} P {row['projections']:3} "
        f"{row['mode']:18}"
    )
    if "samples" not in row: return f"{head} {row.get('left_out') or row.get('failed')}"
    return (
        f"{head} {median(row['samples']):9.4f} s, n {len(row['samples']):2}, "
        f"{row['peak_bytes_above_inputs'] / 1e9:6.3f} GB above inputs"
        + (f", from {row['extrapolated_from']} projections" if "extrapolated_from" in row else "")
        + (
            f", others took {100 * row['others']:.0f} % of our cores" if row["others"] > BUSY
            else ""
        )
    )


def grouped(missing: list[dict]) -> list[dict]:
    """What was left out as one row for each method and reason, with its number of points; what
    failed as it is"""
    why = [(row["method"], row["left_out"]) for row in missing if "left_out" in row]
    return [
        {"method": name, "left_out": reason, "points": why.count((name, reason))}
        for name, reason in dict.fromkeys(why)
    ] + [row for row in missing if "left_out" not in row]


def run_grid(given, kept: Kept) -> tuple[dict, list[dict]]:
    """Everything that was asked for: measurements by (method, tokens, width, projections, mode),
    and what could not be measured"""
    found, missing = {}, []
    for point in points(given):
        without = [
            (Task(name, *point), why)
            for name in METHODS
            if name != "product" and (why := left_out(name, point, given.long))
        ]
        missing += [
            task._asdict() | {"left_out": why} for task, why in without if wanted(given.only, task)
        ]
        for task in tasks(given, point):
            row = kept(measure, task)
            print(spoken(row), flush=True)
            if "samples" in row: found.setdefault((task.method, *task[1:5]), []).append(row)
            else: missing.append(row)
    return {key: pooled(rows) for key, rows in found.items()}, missing


# ---- what it shows

# asked for at N = 256, 1024 and 4096
TARGETS = {
    ("naive", MODES[0]): (15, 60, 140), ("naive", MODES[1]): (25, 120, 350),
    ("POT loop", MODES[0]): (12, 30, 300), ("POT loop", MODES[1]): (20, 45, 350),
    ("GeomLoss", MODES[0]): (25, 85, 500), ("GeomLoss", MODES[1]): (14, 45, 400),
}
# float32 against float64; a method farther away computes something else
LIMITS = {"forward": 5e-6, "backward": 2e-5}


def card(
    what: str, value: float | None, target: float | None = None, better: str = "higher",
    n: int | None = None, low: float | None = None, high: float | None = None, **more,
) -> dict:
    "One row of the house's scorecard"
    return {
        "what": f"transport, {what}", "vlm": None, "value": value, "target": target,
        "better": better, "n": n, "low": low, "high": high, **more,
    }


def ratio_interval(
    above: list[float], below: list[float], draws: int = 2000,
) -> tuple[float | None, float | None]:
    "95 % of a ratio of medians, by resampling both; none where one was measured too rarely"
    import numpy as np
    if min(len(above), len(below)) < 3: return None, None
    generator = np.random.default_rng(0)
    tops, bottoms = (
        np.median(generator.choice(times, (draws, len(times))), axis=1) for times in (above, below)
    )
    return tuple(float(edge) for edge in np.quantile(tops / bottoms, (.025, .975)))


def ratio(
    what: str, above: dict | None, below: dict | None, target: float | None = None,
    better: str = "higher",
) -> list[dict]:
    "A row: how often one measurement's time holds another's; none where either is missing"
    if not above or not below: return []
    low, high = ratio_interval(above["samples"], below["samples"])
    return [
        card(
            what, above["seconds"] / below["seconds"], target, better, min(above["n"], below["n"]),
            low, high, others=max(above["others"], below["others"]),
            **{
                key: row[key]
                for row in (above, below)
                for key in ("extrapolated_from",)
                if key in row
            },
        )
    ]


def speed_rows(found: dict) -> list[dict]:
    "How many times faster ours is than everything else, point by point"
    rows = []
    for (name, tokens, width, projections, mode), rival in found.items():
        if name in ("ours", "product") or projections == 5: continue
        of = dict(zip(TOKENS, TARGETS.get((name, mode), ()))) if (
            width, projections,
        ) == MAIN else {}
        where = f"N = {tokens}" + (
            "" if (width, projections) == MAIN else f", d = {width}, P = {projections}"
        )
        rows += ratio(
            f"speed-up over {name}, {mode}: {where}", rival,
            found.get(("ours", tokens, width, projections, mode)), of.get(tokens),
        )
    return rows


def exponent(found: dict, method: str, mode: str, smallest: int = 1024) -> tuple[float | None, int]:
    "Slope of log time over log N at MAIN, and over how many N"
    import numpy as np
    at = [
        (tokens, found[key]["seconds"])
        for tokens in TOKENS
        if (key := (method, tokens, *MAIN, mode)) in found and tokens >= smallest
    ]
    return (float(np.polyfit(*np.log(np.array(at).T), 1)[0]) if len(at) > 1 else None), len(at)


def scaling_rows(found: dict) -> list[dict]:
    "Exponents in N of every method"
    rows = []
    for method in dict.fromkeys(name for name, *_ in found if name != "product"):
        for mode, target in zip(MODES, (1.15, 1.25)):
            slope, n = exponent(found, method, mode)
            if slope is not None:
                rows.append(
                    card(
                        f"exponent in N of {method}, {mode}: N = 1024 to "
                        f"{16384 if n == 3 else 4096}",
                        slope, target if method == "ours" else None, "lower", n,
                    )
                )
    return rows


def memory_rows(found: dict) -> list[dict]:
    "Peak memory, and cost in matrix products where tokens are wide"
    rows = []
    for width, target in ((64, .35), (3584, .7)):
        if not (ours_ := found.get(("ours", 4096, width, MAIN[1], MODES[1]))): continue
        rows.append(
            card(
                f"peak memory in GB above the inputs, forward + backward: N = 4096, d = {width}",
                ours_["peak_bytes_above_inputs"] / 1e9, target, "lower", ours_["n"],
            )
        )
        rows.append(
            card(
                "peak memory in GB of the process with torch and inputs, forward + backward: N = "
                f"4096, d = {width}",
                ours_["peak_bytes"] / 1e9, None, "lower", ours_["n"],
            )
        )
    for mode in MODES:
        rows += ratio(
            f"matrix products that ours costs as much as, {mode}: N = 4096, d = 3584",
            found.get(("ours", 4096, 3584, 100, mode)),
            found.get(("product", 4096, 3584, 100, MODES[0])), 8 if mode == MODES[1] else None,
            "lower",
        )
    return rows


def other_rows(found: dict) -> list[dict]:
    "Without kernels; many projections against few; seconds everywhere"
    rows = []
    for mode in MODES:
        for tokens in TOKENS[:3]:
            at = f"{mode}: N = {tokens}"
            rows += ratio(
                f"speed-up of the pure-torch fallback over naive, {at}",
                found.get(("naive", tokens, *MAIN, mode)),
                found.get(("ours (torch)", tokens, *MAIN, mode)), 2,
            )
            rows += ratio(
                f"time of naive at P = 5 over ours at P = 400, {at}",
                found.get(("naive", tokens, 64, 5, mode)),
                found.get(("ours", tokens, 64, 400, mode)), 1,
            )
    for (name, tokens, width, projections, mode), row in found.items():
        if name == "ours":
            rows.append(
                card(
                    f"seconds of ours, {mode}: N = {tokens}, d = {width}, P = {projections}",
                    row["seconds"], None, "lower", row["n"],
                )
            )
    return rows


def accuracy_rows(given, kept: Kept, methods: list[str]) -> list[dict]:
    "Every method against the float64 reference; one that is wrong stops the run"
    rows = []
    for name in methods:
        row = kept(check, Task(name, 256, 24, 6, MODES[1], threads=given.threads))
        if "failed" in row: raise RuntimeError(f"{name} could not be checked: {row['failed']}")
        print(
            f"{name:22} differs from the float64 reference by {row['forward']:.1e}"
            + (
                f", in gradients by {row['backward']:.1e} of the largest"
                if row["backward"] is not None else " where both have converged"
            ),
            flush=True,
        )
        wrong = [
            part
            for part, limit in LIMITS.items()
            if row[part] is not None and not row[part] <= limit
        ]
        if wrong:
            raise RuntimeError(
                f"a method must agree with the float64 reference to {LIMITS}, and {name} is off by "
                f"{row}. Do not compare with it: correct its call first."
            )
        rows += [
            card(
                f"largest difference to the float64 reference, {part}: {name}", row[part], None,
                "lower", 1,
            )
            for part in LIMITS
            if row[part] is not None
        ]
    return rows


def draw(found: dict):
    "Time over N, one panel a mode, one curve a method"
    import matplotlib.pyplot as plt
    from transporter_nb.evaluate.figures import PALETTE, use_house_style
    use_house_style()
    figure, axes = plt.subplots(
        1, 2, figsize=(9.2, 5.2), sharex=True, sharey=True, layout="constrained",
    )
    for ax, mode in zip(axes, MODES):
        for name, method in METHODS.items():
            at = {
                tokens: row for tokens in TOKENS if (row := found.get((name, tokens, *MAIN, mode)))
            }
            if not at or name == "product": continue
            slope = exponent(found, name, mode)[0]
            colour = PALETTE[method.colour % len(PALETTE)]
            dashed = name in ONLY_MAIN
            ax.plot(
                list(at), [row["seconds"] for row in at.values()], color=colour,
                linestyle="--" if dashed else "-", linewidth=2.4 if name == "ours" else 1.2,
                label=name + (f"  $N^{{{slope:.2f}}}$" if slope is not None else ""),
                zorder=3 if name == "ours" else 2,
            )
            for tokens, row in at.items():
                ax.plot(
                    tokens, row["seconds"], "o", color=colour, markersize=4.5,
                    markerfacecolor="white" if "extrapolated_from" in row else colour, zorder=4,
                )
        ax.set(xscale="log", yscale="log", title=mode, xlabel="tokens $N$ on each side")
        ax.set_xticks(TOKENS, TOKENS)
        ax.minorticks_off()
        if ax.lines: ax.legend(loc="upper center", bbox_to_anchor=(.5, -.14), ncols=3)
    axes[0].set_ylabel("seconds a call")
    figure.suptitle(
        f"rho-OT on a CPU: P = {MAIN[1]} projections, k = {ROUNDS} rounds, $\\tau$ = {TAU}, d = "
        f"{MAIN[0]}, float32 (hollow: scaled up from fewer projections)",
        fontsize=9,
    )
    return figure


def stem_of(given, name: str):
    "Where the record goes; options other than the usual ones make a name of their own"
    from transporter_nb.evaluate.results import figure_stem
    chosen = ("quick", "only") if given.install else (
        "quick", "only", "threads", "memory_gb", "rival_seconds", "retries", "long",
    )
    return figure_stem(name, vars(given), {key: given.usual[key] for key in chosen}, given.install)


def save(
    given, stem, rows: list[dict], measured: list[dict], missing: list[dict], figure=None, **more,
) -> None:
    "The record, and the picture beside it"
    from transporter_nb.evaluate.results import save_figure, save_record
    from importlib.metadata import version
    versions = {
        name: version(package)
        for name, package in (("numba", "numba"), ("pot", "pot"), ("geomloss", "geomloss"))
    }
    setting = {
        "tau": TAU, "rounds": ROUNDS, "dtype": "float32", "machine": platform.machine(),
        "cores": os.cpu_count(), "threads": given.threads, "memory_gb": given.memory_gb,
        "rival_seconds": given.rival_seconds, "complete": not (given.quick or given.only),
    }
    hours = (
        max(row["at"] for row in measured) - min(row["at"] for row in measured)
    ) / 3600 if measured and "at" in measured[0] else None
    record = {
        "what": "seconds from scores to transported tokens, or to gradients of scores and values; "
            "times with `extrapolated_from` are scaled up from that many projections",
        **setting, **more, "hours_from_first_to_last": hours,
        "busiest_share_of_others": max((row.get("others", 0) for row in measured), default=None),
        "rows": rows,
        "measurements": [
            {key: value for key, value in row.items() if key != "samples"} for row in measured
        ],
        "missing": missing, "versions": versions,
    }
    saved = save_figure(figure, stem, record) if figure else [save_record(stem, record)]
    print(*saved, f"{len(measured)} measurements, {len(missing)} kinds left out", sep="\n")


def shortfalls(rows: list[dict]) -> None:
    "Say which targets are met"
    for row in rows:
        if row["target"] is None: continue
        value, target = row["value"], row["target"]
        met = value <= target if row["better"] == "lower" else value >= target
        print(
            f"{'met  ' if met else 'SHORT'} {row['what']}: {value:.3g} "
            f"({'at most' if row['better'] == 'lower' else 'at least'} {target:g})"
            + (
                f", from {row['extrapolated_from']} projections" if "extrapolated_from" in row
                else ""
            )
        )


# ---- a GPU

# bytes/s and float32 flop/s without tensor cores, NVIDIA's data sheets (SXM; A100 80GB)
CUDA_PEAKS = {"H100": (3.35e12, 67e12), "H200": (4.8e12, 67e12), "A100": (2.04e12, 19.5e12)}


def least_work(tokens: int, width: int, projections: int, mode: str) -> tuple[float, float, float]:
    "Bytes that must move, flops of products, flops of the plan's entries, from the shapes"
    back = mode == MODES[1]
    # in and out, float64 potentials, the plan written and read
    moved = 4 * (2 * tokens * width + 2 * projections * tokens) * (
        1 + back
    ) + 16 * projections * tokens * ROUNDS * (1 + back) + 8 * tokens**2 * (1 + back)
    # products: T V; back: T'G and G V'. Entries: two products, a minimum, a sum
    return moved, 2 * tokens**2 * width * (1 + 2 * back), 4 * tokens**2 * projections * (
        1 + 2 * back
    )


def measure_cuda(tokens: int, width: int, projections: int, mode: str, repeats: int = 20) -> dict:
    "Ours on the GPU: median of events, peak memory above the inputs, share of the roofline"
    import torch
    from transporter_nb.explain.plan import DEVICES
    problem, cotangent = make_problem(tokens, width, projections, "cuda")
    for _ in range(3): run_once(ours, problem, cotangent, mode)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run_once(ours, problem, cotangent, mode)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    name = torch.cuda.get_device_name(0)
    known = next((label for label in CUDA_PEAKS if label in name), None)
    row = {
        "method": "ours", "tokens": tokens, "width": width, "projections": projections,
        "mode": mode, "seconds": median(times), "low": min(times), "high": max(times), "n": repeats,
        "peak_bytes_above_inputs": torch.cuda.max_memory_allocated() - before,
    }
    if known:
        (bandwidth, scalar), (moved, products, entries) = CUDA_PEAKS[known], least_work(
            tokens, width, projections, mode,
        )
        row["roofline_seconds"] = max(
            moved / bandwidth, products / (DEVICES[known].tf32 * 1e12) + entries / scalar,
        )
        row["roofline_share"] = row["roofline_seconds"] / row["seconds"]
    return row


def main_cuda(given) -> int:
    "The grid on a GPU, and the largest size"
    import torch
    if not torch.cuda.is_available():
        raise SystemExit(
            "--device cuda was asked for and torch sees no CUDA device. Use --device cpu."
        )
    # 10816: tokens of the paper's longest clip
    grid = sorted({point[:4] for point in points(given)}) + [
        (10816, 3584, 100, mode) for mode in MODES
    ]
    measured = []
    for point in grid:
        if not wanted(given.only, Task("ours", *point)): continue
        measured.append(row := measure_cuda(*point))
        print(
            f"ours on {torch.cuda.get_device_name(0)}: N {point[0]}, d {point[1]}, P {point[2]}, "
            f"{point[3]}: {1e3 * row['seconds']:.3f} ms, "
            f"{row['peak_bytes_above_inputs'] / 1e9:.3f} GB, "
            f"{100 * row.get('roofline_share', math.nan):.0f} % of the roofline",
            flush=True,
        )
    targets = {(4096, 3584, 100, MODES[0]): 1.5, (4096, 3584, 100, MODES[1]): 5.}
    rows = [
        card(
            f"milliseconds on {torch.cuda.get_device_name(0)}, {row['mode']}: N = {row['tokens']}, "
            f"d = {row['width']}, P = {row['projections']}",
            1e3 * row["seconds"],
            targets.get((row["tokens"], row["width"], row["projections"], row["mode"])), "lower",
            row["n"],
        )
        for row in measured
    ]
    save(
        given, stem_of(given, "transport_cuda"), rows, measured, [],
        device=torch.cuda.get_device_name(0),
    )
    shortfalls(rows)
    return 0


def parse() -> argparse.Namespace:
    "Command line"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu",
        help="cuda measures ours (Triton) alone, with events; written on a machine without a GPU "
            "and never run there",
    )
    parser.add_argument("--quick", action="store_true", help="N = 256 and 1024 at d = 64, P = 100")
    parser.add_argument("--only", help="such as method=ours/naive,N=1024,d=64,P=100,mode=forward")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every method")
    parser.add_argument(
        "--memory-gb", type=float, default=16, help="that a rival may use, by estimate",
    )
    parser.add_argument(
        "--rival-seconds", type=float, default=10,
        help="that one call of a rival may take at d = 64, P = 100 before it gets fewer "
            "projections",
    )
    parser.add_argument(
        "--retries", type=int, default=1,
        help="of a measurement during which others took more than a tenth of our cores",
    )
    parser.add_argument(
        "--long", action="store_true",
        help="also what takes long and is left out else: ours at N = 16384 with large d, rivals at "
            "N = 4096 or large d with P = 50 or 400",
    )
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument(
        "--install", action="store_true", help="put the result in the place of the shipped one",
    )
    given = parser.parse_args()
    given.usual = {action.dest: action.default for action in parser._actions}
    return given


def main() -> int:
    "Check, measure, write, and say what falls short"
    given = parse()
    # before anything that reads them is imported
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        os.environ[name] = str(given.threads)
    if given.device == "cuda": return main_cuda(given)
    from transporter_nb.core.base import repo_path
    started = time.perf_counter()
    kept = Kept(repo_path("runs", "transport", "measurements.jsonl"), given.fresh, given.retries)
    named = {task.method for point in points(given) for task in tasks(given, point)}
    rows = accuracy_rows(
        given, kept, [name for name in METHODS if name in named and name != "product"],
    )
    found, missing = run_grid(given, kept)
    rows += speed_rows(found) + scaling_rows(found) + memory_rows(found) + other_rows(found)
    # not before: its imports would lie in the memory of every measurement, which is kept anyhow
    stem = stem_of(given, "transport")
    save(given, stem, rows, list(found.values()), grouped(missing) + [NOT_INSTALLED], draw(found))
    shortfalls(rows)
    failed = [row for row in missing if "failed" in row]
    busy = [row for row in found.values() if row["others"] > BUSY]
    if busy:
        print(
            f"During {len(busy)} of {len(found)} measurements others took more than "
            f"{100 * BUSY:.0f} % of our cores, at most "
            f"{100 * max(row['others'] for row in busy):.0f} %: torch's threads suffer more from "
            "that than ours. Run again on a quiet machine, or with fewer --threads."
        )
    print(
        f"{(time.perf_counter() - started) / 60:.1f} minutes"
        + "".join(f"\nfailed: {spoken(row)}" for row in failed)
    )
    return 1 if failed or not found else 0


if __name__ == "__main__":
    sys.exit(main())
