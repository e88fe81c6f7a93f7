"""The cost of an explanation at mini scale: certificate, shaped concept, answer asked for.

    # under a minute of two free cores; writes explanation_cost.json here
    python benchmarks/explanation.py
    python benchmarks/explanation.py --install    # the same, into figures/

For each VLM and each of three captions: seconds of `explain`, of its certificate (two threads), of
shaping a concept, and generator evaluations of the last beside those of attribute-control (1,000
steps of 10 batches, three velocities each: 30,000). Nothing is cached between captions but what the
package itself keeps."""
import argparse, os, statistics, time, warnings

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.evaluate.results import figure_stem, save_record
from transporter_nb.explain.transporter import Transporter
from transporter_nb.models.registry import shipped_vlm_names
from transporter_nb.concepts.shaping import measure_answers

ASKED = (
    ("one large red ball slides left slowly over a stone floor", "red -> blue"),
    ("two small green cones climb right slowly over a snowy floor", "slowly -> quickly"),
    ("one small yellow ball bounces left quickly over a sandy floor", "ball -> ring"),
)
ATTRIBUTE_CONTROL = 30_000


def timed(call):
    "Seconds, and what came back"
    began = time.perf_counter()
    result = call()
    return time.perf_counter() - began, result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--install", action="store_true", help="put the record in the place of the shipped one",
    )
    stem = figure_stem("explanation_cost", {}, {}, parser.parse_args().install)
    torch.set_num_threads(2)
    # the clips are counted below
    warnings.filterwarnings("ignore", message=".*evaluations did not settle")
    rows, runs = [], []
    for name in shipped_vlm_names():
        l2v = Transporter.load(name, device="cpu")
        for caption, change in ASKED:
            explaining, e = timed(lambda: l2v.explain(caption, change, strengths=5))
            certifying, card = timed(lambda: e.certificate)
            shaping, model = timed(
                lambda: measure_answers(
                    l2v.models, parse_contrast(change), [caption],
                )
            )
            asking, answer = timed(
                lambda: l2v.explain(caption, change, target_probability=.5, through="phi")
            )
            found = answer.settings["calibration"]["found"][0]
            runs.append(
                {
                    "vlm": name, "caption": caption, "change": change, "explain": explaining,
                    "certificate": certifying, "shaping": shaping,
                    "evaluations": model.cost.generator_evaluations, "answer of .5": asking,
                    "clips": found["evaluations"], "verdict": card.verdict,
                }
            )
            print(
                f"{name:12s} {change:18s} explain {explaining:5.1f} s   certificate "
                f"{certifying:5.1f} s   shaping {shaping:5.1f} s, "
                f"{model.cost.generator_evaluations} evaluations   answer {asking:5.1f} s, "
                f"{found['evaluations']} clips   {card.verdict}",
                flush=True,
            )
        own = [run for run in runs if run["vlm"] == name]
        rows += [
            {
                "what": "certificate, seconds, longest of 3 captions", "vlm": name,
                "value": max(run["certificate"] for run in own), "target": 20, "better": "lower",
                "n": len(own), "low": None, "high": None,
            },
            {
                "what": "shaped concept, evaluations of the generator", "vlm": name,
                "value": max(run["evaluations"] for run in own), "target": ATTRIBUTE_CONTROL / 50,
                "better": "lower", "n": len(own), "low": None, "high": None,
            },
            {
                "what": "shaped concept, seconds", "vlm": name,
                "value": statistics.median(run["shaping"] for run in own), "target": None,
                "better": "lower", "n": len(own), "low": None, "high": None,
            },
        ]
    print(save_record(stem, {"rows": rows, "runs": runs, "threads": torch.get_num_threads()}))


if __name__ == "__main__": main()
