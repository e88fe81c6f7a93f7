"""Time and memory of every stage at the paper's real sizes, with random weights, beside what `plan` predicts.

    python benchmarks/paper_scale.py --scale paper --device cuda      # an NVIDIA GPU; writes paper_scale_paper_<device>.json here
    python benchmarks/paper_scale.py --scale mini --device cpu        # the same code, small; writes paper_scale_mini_cpu.json here

With --install the record goes into figures/.

Each stage runs in a process of its own under a cap on memory. Measured on a GPU: `torch.cuda.max_memory_allocated` above what was there before the call; on a CPU: what torch's allocator hands out during the call, by
`torch.profiler`. Weights and inputs are added to both sides of the comparison. Random weights are drawn on the device in the type they are used in and never pass through main memory.
"""
import argparse, multiprocessing, os, platform, sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

VARIANTS = [(stage, {}) for stage in ("text", "velocity", "decode", "encode", "look", "answer", "coupling", "concept", "coupling_step")]
VARIANTS += [("decode", {"vae_tiling": True}), ("encode", {"vae_tiling": True}), ("concept", {"checkpointing": True})]


def measure(stage: str, changes: dict, vlm: str, scale: str, device: str, cap: float | None) -> dict:
    "One stage in this process"
    import torch
    from transporter_nb.core.hub import LoadOptions
    from transporter_nb.explain.plan import DEVICES, measured_workspace, nbytes, prepare, stage_cost

    options = LoadOptions(dtype="float32" if scale == "mini" else "bfloat16", **changes)
    cost = stage_cost(stage, vlm, scale, options, device)
    row = {"stage": stage, "options": changes, "vlm": vlm, "predicted": {**cost._asdict(), "peak": cost.peak}}
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        limit = cap * 2**30 if cap else .97 * total
        if cost.peak > limit: return {**row, "failed": f"does not fit: {cost.peak / 2**30:.1f} GiB are predicted and the cap is {limit / 2**30:.1f} GiB. Use a larger GPU, or VAE tiling and checkpointing."}
        torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.))
    try:
        ready = prepare(stage, vlm, scale, device, options)
        fill(ready.networks)
        workspace, seconds = measured_workspace(ready.call, device)
    except torch.OutOfMemoryError as error:
        return {**row, "failed": f"does not fit under the cap: {str(error).splitlines()[0]}"}
    weights = nbytes(t for network in ready.networks for t in (*network.parameters(), *network.buffers()))
    peak = weights + nbytes(ready.inputs) + workspace
    row["measured"] = {"weights": weights, "workspace": workspace, "peak": peak, "seconds": seconds, "flop_per_second": cost.flops / seconds}
    row["ratio_peak"], row["ratio_workspace"] = cost.peak / peak, cost.workspace / workspace
    if device == "cuda":
        name = torch.cuda.get_device_name(0)
        known = next((d for d in DEVICES.values() if d.name.split("-")[0] in name), None)
        slow = stage in ("decode", "encode", "coupling", "coupling_step")
        row["share_of_peak"] = known and cost.flops / seconds / 1e12 / (known.tf32 if slow else known.bf16)
    return row


def fill(networks: list) -> None:
    "Small random numbers in every weight that is not set, drawn where the weight lies"
    import torch
    with torch.no_grad():
        for network in networks:
            for value in network.parameters():
                if value.is_floating_point() and not value.isfinite().all(): value.normal_(std=.02)


def report(pipe, *given) -> None:
    "Send a stage's row, or why there is none"
    stage, changes, vlm = given[:3]
    try: pipe.send(measure(*given))
    except Exception as error: pipe.send({"stage": stage, "options": changes, "vlm": vlm, "failed": f"{type(error).__name__}: {error}"})


def in_a_process(timeout: float, device: str, *given) -> dict:
    "Measure one stage where nothing else was ever loaded"
    context = multiprocessing.get_context("fork" if device == "cpu" else "spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=report, args=(theirs, *given))
    process.start(); theirs.close()
    stage, changes, vlm = given[:3]
    row = {"stage": stage, "options": changes, "vlm": vlm, "failed": f"took longer than {timeout:.0f} s"}
    if ours.poll(timeout):
        try: row = ours.recv()
        except EOFError: row["failed"] = f"its process ended without a word (exit code {process.join(5) or process.exitcode}); killed for memory?"
    process.kill(); process.join()
    return row


def device_name(device: str) -> str:
    "What the numbers were measured on"
    if device == "cuda": # asked by a process of its own: ours would hold memory of the GPU from then on
        import torch
        with multiprocessing.get_context("spawn").Pool(1) as pool: return pool.apply(torch.cuda.get_device_name, (0,))
    return f"CPU {platform.machine()}, one thread"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", choices=("mini", "paper"), default="mini")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--vlm", default="gemma3,videollama3,phi4", help="names, separated by commas")
    parser.add_argument("--cap-gib", type=float, help="memory a stage may use; default 97 %% of the GPU")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a stage may take")
    parser.add_argument("--out", default="", help="file name without ending; default paper_scale_<device>, with six digits if options differ")
    parser.add_argument("--install", action="store_true", help="put the record in the place of the shipped one")
    given = parser.parse_args()

    import torch
    if given.device == "cpu": torch.set_num_threads(1)
    if given.device == "cuda":
        if not torch.cuda.is_available(): parser.error("--device cuda was asked for and torch sees no CUDA device. Use --device cpu --scale mini.")
    elif given.scale == "paper": parser.error("the paper's sizes on a CPU would take days. Use --device cuda, or --scale mini.")
    if given.device == "cpu": import transporter_nb.explain.plan  # once, for all processes
    from transporter_nb.evaluate.figures import figure_stem, save_record
    device = device_name(given.device)
    label = "mini_cpu" if (given.scale, given.device) == ("mini", "cpu") else f"{given.scale}_{device.replace(' ', '_')}"
    usual = {key: parser.get_default(key) for key in ("vlm", "cap_gib", "timeout")}
    stem = figure_stem(f"paper_scale_{label}", vars(given), usual, given.install, given.out.removesuffix(".json"))
    names, rows = given.vlm.split(","), []
    for stage, changes in VARIANTS:
        for vlm in names if stage in ("look", "answer", "coupling", "coupling_step") else names[:1]:
            row = in_a_process(given.timeout, given.device, stage, changes, vlm, given.scale, given.device, given.cap_gib)
            # the house's scorecard: how far the plan is off, as a share of what was measured
            card = {"what": f"plan, peak memory at scale {given.scale}, predicted against measured: {stage}" + f" with {', '.join(changes)}" * bool(changes), "value": abs(row["ratio_peak"] - 1) if "ratio_peak" in row else None,
                    "target": 0.1, "better": "lower", "n": 1}
            rows.append(card | row)
            print(row["stage"], row["options"] or "", row["vlm"], row.get("failed") or f"{row['measured']['seconds']:.3f} s, peak {row['measured']['peak'] / 2**30:.3f} GiB, predicted / measured {row['ratio_peak']:.3f}", flush=True)
    record = {"what": "predicted: computed on the meta device; measured: on the device named", "device": device, "scale": given.scale, "weights": "random", "rows": rows}
    print(f"wrote {save_record(stem, record)}: {sum('measured' in row for row in rows)} of {len(rows)} stages measured")
    return 0 if any("measured" in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
