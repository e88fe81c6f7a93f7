"""Rivals without training, on shapes the notebooks do not use: what they promise to leave alone,
what they cost, and what they refuse"""
import pytest
import torch

from transporter_nb.concepts.concept import Concept, ConceptConfig, Direction
from transporter_nb.world.contrasts import parse_contrast
from transporter_nb.concepts.directions import (
    CodecPass, Cost, InterpolatedText, NoChange, Replacement, RetrievedClip, TargetCaption,
    VelocityPush, VelocitySlider, all_rivals, count_evaluations, perceptual_range, rivals,
    rms_distance, through_codec,
)
from transporter_nb.models.testing import LinearGenerator
from transporter_nb.explain.steering import PushTerm, steer, steered_velocity

RED, TWO = "one large red ball", "two small red rings over sand"
TO_BLUE, TO_SMALL = parse_contrast("red -> blue"), parse_contrast("large -> small")


class Toy(LinearGenerator):
    """Each latent frame depends on its own prompt sum and state alone, and not linearly if `bend`;
    frames are latent frames"""
    def __init__(self, bend: float = 0.0):
        sizes = dict(text_dim=5, shape=(3, 7, 2, 4), prompt_tokens=8, steps=4, clip_size=None)
        super().__init__(**sizes, scale=1 / 4)
        self.bend = bend

    def velocity(self, latents, condition, t):
        # row by row, so that a batch of another size changes no bit
        embeds = condition.expand_to(len(latents)).embeds.sum(1)
        push = (embeds[:, None] * self.weight).sum(-1)[:, :, None, None, None]
        return push + self.bend * torch.sin(latents * push)

    def encode(self, video): return (video.transpose(1, 2) - .5) * 40
    def decode(self, latents): return latents.transpose(1, 2) / 40 + .5
    def times(self, steps): return torch.linspace(0, 1, steps + 1) ** 1.5  # unequal steps


def blue_concept(toy):
    return Concept(
        TO_BLUE, (toy.encode_prompt(["blue"]).embeds - toy.encode_prompt(["red"]).embeds)[0, :1],
        ConceptConfig(placement="word", steps=4),
    )


@pytest.mark.parametrize("bend", [0.0, 0.7])
@pytest.mark.parametrize("dials", [{}, {"guidance": 1.0}, {"steps": 5, "start_step": 3}])
def test_slider_ends_are_source_and_target(bend, dials):
    toy, noise = Toy(bend), Toy().noise([3, 4])
    run = steer(toy, [RED, TWO], noise, VelocitySlider(TO_BLUE, start=0.0), [0, 1], **dials).latents
    by_prompt = steer(toy, [RED, TWO], noise, TargetCaption(TO_BLUE), [0, 1], **dials).latents
    source = toy.sample(
        toy.encode_prompt([RED, TWO]), noise=noise, steps=dials.get("steps"),
        guidance=dials.get("guidance"),
    )
    assert torch.equal(run[:, 0], source)
    torch.testing.assert_close(run, by_prompt, atol=1e-5, rtol=1e-5)
    assert (run[:, 1] - run[:, 0]).abs().max() > 0.05


def test_between_its_ends_a_slider_is_no_interpolation_unless_the_generator_is_linear():
    for bend, same in ((0.0, True), (0.7, False)):
        toy, noise = Toy(bend), Toy().noise([3])
        runs = [
            steer(toy, RED, noise, rival, [0.25, 0.5]).latents
            for rival in (VelocitySlider(TO_BLUE, start=0.0), TargetCaption(TO_BLUE))
        ]
        assert torch.allclose(*runs, atol=1e-5) == same


def test_the_papers_scale():
    toy, noise, s = Toy(0.7), Toy().noise([3]), 1.3
    source, target = (toy.encode_prompt([text]) for text in (RED, RED.replace("red", "blue")))
    made = steer(
        toy, RED, noise, VelocitySlider(TO_BLUE, start=0.0, slider_scale=1.0), s, steps=1,
    ).latents[0]
    wanted = noise + toy.guided_velocity(noise, source, 0.0) + s * (
        toy.velocity(noise, target, 0.0) - toy.velocity(noise, source, 0.0)
    )
    torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize(
    "rival",
    [
        VelocitySlider(TO_BLUE, start=0.0), TargetCaption(TO_BLUE),
        VelocitySlider(TO_BLUE, start=0.0, minus=TWO),
    ],
)
def test_a_window_leaves_other_frames_alone(rival):
    toy, noise = Toy(0.7), Toy().noise([3, 4])
    run = steer(toy, [RED, TWO], noise, rival, [0, 1], frame_window=(2, 5)).latents
    # frames of this generator do not see each other
    assert torch.allclose(run[:, 1, :, [0, 1, 5, 6]], run[:, 0, :, [0, 1, 5, 6]], atol=1e-6)
    assert (run[:, 1, :, 2:5] - run[:, 0, :, 2:5]).abs().amax((0, 1, 3, 4)).min() > 0.01


@pytest.mark.parametrize("start_step, own", [(2, 0.0), (0, 0.5), (2, 0.25), (1, 0.5)])
def test_the_later_of_both_starts_counts(start_step, own):
    toy, noise = Toy(0.7), Toy().noise([3])
    first = max(start_step, round(own * 4))
    made = steer(
        toy, RED, noise, VelocitySlider(TO_BLUE, start=own), 1, start_step=start_step,
    ).latents[0]
    early = toy.sample(toy.encode_prompt([RED]), noise=noise, stop_step=first)
    torch.testing.assert_close(
        made,
        toy.sample(toy.encode_prompt([RED.replace("red", "blue")]), noise=early, start_step=first),
        atol=1e-5, rtol=1e-5,
    )


def test_several_at_once():
    toy, noise = Toy(), Toy().noise([3])
    three = [
        VelocitySlider(TO_BLUE, start=0.0), VelocitySlider(TO_SMALL, start=0.5),
        Concept(TO_BLUE, torch.ones(1, 5), ConceptConfig(placement="word")),
    ]
    run = steer(
        toy, RED, noise, three, [[0, 0, 0], [1, 0, 0], [0, 0.5, 0], [0, 0, 1.5], [1, 0.5, 1.5]],
    ).latents[0]
    torch.testing.assert_close(run[4] - run[0], run[1:4].sum(0) - 3 * run[0], atol=1e-5, rtol=1e-5)
    assert (run[1:4] - run[0]).flatten(1).norm(dim=1).min() > 0.1


def test_one_velocity_at_a_time_or_all_in_one_batch():
    toy = Toy(0.7)
    z, source, target, null = toy.noise([3, 4]), toy.encode_prompt([RED, TWO]), toy.encode_prompt(
        [RED.replace("red", "blue")] * 2
    ), toy.null_condition(1)
    amounts, weights = torch.tensor([0.0, 0.4, 1.0] * 2), torch.tensor([0.0, 1, 1, 0.5, 0, 0, 0])
    made = steered_velocity(
        toy, z, None, source, null, 0.3, 2.5, weights,
        [PushTerm(target, None, amounts), PushTerm(source, target, amounts, 0.7)],
    )
    gap, guided = toy.velocity(z, target, 0.3) - toy.velocity(z, source, 0.3), toy.guided_velocity(
        z, source, 0.3, 2.5,
    )
    for row, amount in enumerate(amounts.tolist()):
        torch.testing.assert_close(
            made[row],
            guided[row // 3] + (2.5 - 0.7) * amount * weights[:, None, None] * gap[row // 3],
            atol=1e-5, rtol=1e-5,
        )


def test_evaluations_by_hand():
    toy, noise = Toy(), Toy().noise([3, 4])

    def asked(*directions, **dials):
        with count_evaluations(toy) as cost:
            steer(toy, [RED, TWO], noise, list(directions), [0, 0.5, 1], **dials)
        return cost.generator_evaluations
    # the first run measures the memory of a row too, which is no evaluation
    # null and shifted: the null of a clip is shared in the first step
    assert asked(NoChange(TO_BLUE)) == (2 + 6) + 3 * (6 + 6)
    assert asked(VelocitySlider(TO_BLUE, start=0.0)) == 3 * 2 + 3 * 3 * 6  # null, source and plus
    assert asked(VelocitySlider(TO_BLUE, start=0.0), guidance=1.0) == 2 * 2 + 3 * 2 * 6
    assert asked(
        VelocitySlider(TO_BLUE, start=0.0),
        VelocitySlider(TO_SMALL, start=0.0, minus=TWO, plus=RED),
    ) == 5 * 2 + 3 * 5 * 6
    assert asked(CodecPass(TO_BLUE)) == 4 * 2 * 2
    with pytest.raises(RuntimeError), count_evaluations(toy):
        raise RuntimeError("a run that fails")
    assert "velocity" not in vars(toy)


def test_range_search_finds_a_known_range():
    toy = Toy()
    text = InterpolatedText.between(toy, TO_BLUE, [RED])
    # guidance 2, decoder 1 / 40
    per_length = 2 * (toy.weight @ text.vector).square().mean().sqrt().item() / 40
    wanted = (0.4 * text.length, 1.5 * text.length)
    found = text.search(
        toy, [RED, RED], [3, 4, 5], limits=tuple(per_length * length for length in wanted),
        tolerance=0.01,
    )
    assert abs(found.low - wanted[0]) < 0.03 * text.length and abs(
        found.high - wanted[1]
    ) < 0.03 * text.length
    assert found.found.cost.generator_evaluations == (1 + len(found.found.amounts)) * 3 * 4 * 2
    moved = steer(toy, RED, toy.noise([9]), found, [0, 1]).latents[0]
    distance = rms_distance(toy.decode(moved[1:]), toy.decode(moved[:1])).item()
    assert abs(distance - per_length * found.high) < 1e-4


@pytest.mark.parametrize(
    "distance, wanted",
    [
        (lambda a: 0.0, "there is no range"), (lambda a: float(a > 0), "there is no range"),
        (lambda a: float("nan"), "there is no range"),
    ],
)
def test_no_range(distance, wanted):
    with pytest.raises(ValueError, match=wanted): perceptual_range(distance, 1.0, (0.1, 0.5))


def test_an_interrupted_range_ends_where_it_is_interrupted():
    # noqa: E731 - beyond 2.1 it would fit again
    bumpy = lambda a: 0.9 if 1.9 < a < 2.1 else 0.1 * a
    low, high = perceptual_range(bumpy, 1.0, (0.05, 0.5))
    assert 0.3 < low <= 0.5 and 1.7 < high <= 1.9


def test_retrieval_and_codec():
    toy, words = Toy(), [RED, RED.replace("red", "blue"), "one large blue ball", TWO]
    library = torch.rand(4, 7, 3, 2, 4, generator=torch.Generator().manual_seed(2))
    for space in ("latents", "pixels"):
        retrieved = RetrievedClip(TO_BLUE, library, words, space)
        assert [retrieved.choose(toy, toy.encode(library[k:k + 1]), RED) for k in (1, 2)] == [1, 2]
        made = steer(
            toy, [RED, RED], toy.encode(library[[1, 2]]) * 0 + toy.noise([3, 4]), retrieved,
            [0, 0.49, 0.5, 1.5],
        ).latents
        assert torch.equal(made[:, 0], made[:, 1]) and torch.equal(made[:, 2], made[:, 3])
        assert all(
            any(torch.allclose(toy.decode(row[2:3])[0], library[k], atol=1e-6) for k in (1, 2))
            for row in made
        )
    # what changes comes before how much is shared
    assert RetrievedClip(TO_BLUE, library[:2], [RED, "two blue rings"]).candidates(RED) == [1]
    torch.testing.assert_close(through_codec(toy, library), library)


def test_kinds_do_not_overlap():
    library = torch.rand(1, 7, 3, 2, 4, generator=torch.Generator().manual_seed(2))
    text = InterpolatedText(TO_BLUE, torch.ones(5) / 5**0.5, 1.0, 0.1, 1.0)
    kinds = {
        VelocitySlider(TO_BLUE): VelocityPush, TargetCaption(TO_BLUE): Direction,
        NoChange(TO_BLUE): Direction, text: Direction,
        RetrievedClip(TO_BLUE, library, [RED]): Replacement, CodecPass(TO_BLUE): Replacement,
    }
    for rival, kind in kinds.items():
        assert [k for k in (Direction, VelocityPush, Replacement) if isinstance(rival, k)] == [kind]


@pytest.mark.parametrize("strengths", [-0.1, 1.6, float("nan"), [[0, 1]]])
def test_bad_strengths(strengths):
    for rival in (
        VelocitySlider(TO_BLUE), CodecPass(TO_BLUE),
        InterpolatedText(TO_BLUE, torch.ones(5) / 5**0.5, 1.0, 0.1, 1.0),
    ):
        with pytest.raises(ValueError, match="strengths must be"):
            steer(Toy(), RED, Toy().noise([3]), rival, strengths)


def test_a_caption_without_the_word():
    for rival in (
        VelocitySlider(TO_BLUE), InterpolatedText(TO_BLUE, torch.ones(5) / 5**0.5, 1.0, 0.1, 1.0),
    ):
        with pytest.raises(ValueError, match="does not hold 'red'"):
            steer(Toy(), "one large blue ball", Toy().noise([3]), rival, 1)


def test_every_rival_is_driven_alike():
    toy = Toy(0.3)
    library = torch.rand(2, 7, 3, 2, 4, generator=torch.Generator().manual_seed(2)), [
        RED.replace("red", "blue"), TWO,
    ]
    table = all_rivals(toy, blue_concept(toy), [RED], search_seeds=(3,), library=library)
    assert list(table)[:5] == list(rivals(toy, blue_concept(toy), [RED])) and len(table) == 10
    for name, rival in table.items():
        run = steer(toy, RED, toy.noise([7 + rival.seed_step]), rival.direction, [0, 0.4, 1.0])
        assert run.latents.shape == (1, 3, 3, 7, 2, 4) and len(
            run.condition
        ) == 3 and run.latents.isfinite().all()
        changed = (run.latents[0, 2] - run.latents[0, 0]).abs().max().item()
        # this autoencoder loses nothing
        assert (changed < 1e-4) == (name in ("other seed", "decode and re-encode")), name
        assert isinstance(rival.cost, Cost)
