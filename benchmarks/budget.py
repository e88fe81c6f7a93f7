"""Memory of whole explanations, as `plan` predicts it and as the allocator hands it out.

    python benchmarks/budget.py               # some minutes; writes explanation_memory.json
    python benchmarks/budget.py --install     # the same, into figures/
    python benchmarks/budget.py --sizes 3x1,10x4   # some sizes: clips x rows at once

Each size runs `Transporter.explain` of the shipped miniature in a process of its own, on the CPU.
Measured are the bytes that torch's allocator had handed out at the worst moment (its profiler's
account, independent of ours), and beside them the growth of the process's resident memory."""
import argparse, json, os, subprocess, sys

SIZES = [(clips, rows) for clips in (3, 10) for rows in (1, 4, 20)]


def child(vlm, clips, rows):
    """Run one explanation and print its numbers"""
    import resource
    import torch
    from transporter_nb.explain.budget import explanation_cost
    from transporter_nb.explain.stages import measured_workspace
    from transporter_nb.explain.transporter import Transporter
    torch.set_num_threads(1)
    l2v = Transporter.load(vlm, device="cpu")
    caption = "one large red ball slides left slowly over a stone floor"
    amounts = [k / max(clips - 2, 1) for k in range(clips - 1)]
    def explain(): return l2v.explain(
        caption, "red -> blue", strengths=amounts, steps=2, batch_size=rows,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    explain()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    measured, seconds = measured_workspace(explain)
    cost = explanation_cost(clips, rows, vlm, target="cpu")
    print(json.dumps({
        "vlm": vlm, "clips": clips, "batch_size": rows, "predicted": cost.workspace,
        "measured": measured, "weights": cost.weights, "resident growth": grown,
        "ratio": (cost.workspace + cost.weights) / (measured + cost.weights),
        "ratio of workspace": cost.workspace / measured, "seconds": seconds,
    }))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--install", action="store_true", help="replace the shipped record")
    parser.add_argument("--vlm", default="phi4", help="one of the shipped VLMs")
    parser.add_argument("--sizes", default="", help="of these alone: clips x rows, with commas")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child: return child(asked.vlm, *asked.child)
    from transporter_nb.evaluate.results import figure_stem, save_record
    sizes = [tuple(map(int, size.split("x"))) for size in asked.sizes.split(",") if size] or SIZES
    given, usual = {"sizes": asked.sizes, "vlm": asked.vlm}, {"sizes": "", "vlm": "phi4"}
    stem, rows = figure_stem("explanation_memory", given, usual, asked.install), []
    for clips, size in sizes:
        command = [sys.executable, __file__, "--vlm", asked.vlm, "--child", str(clips), str(size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(
            f"{clips:2d} clips, {size:2d} rows at once: "
            f"predicted {row['predicted'] / 1e6:6.1f} MB, "
            f"measured {row['measured'] / 1e6:6.1f} MB, "
            f"ratio {row['ratio of workspace']:.3f}, with weights {row['ratio']:.3f}; "
            f"resident memory grew by {row['resident growth'] / 1e6:.0f} MB",
            flush=True,
        )
    worst = max(rows, key=lambda row: abs(row["ratio of workspace"] - 1))
    card = {
        "what": "explanation: predicted against measured peak, farthest of all sizes",
        "vlm": asked.vlm, "value": abs(worst["ratio of workspace"] - 1), "target": .1,
        "better": "lower", "n": len(rows),
    }
    print(save_record(stem, {"rows": [card], "sizes": rows}))


if __name__ == "__main__": main()
