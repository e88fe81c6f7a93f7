"""Faults that a rehearsal of the paper's scale found, each with the tests that ask for it today

`FAULTS` is the index of them. What no other file asks stands here.
"""
import ast
from configparser import ConfigParser
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FAULTS = {
    "generation in bfloat16 stops at the first call; the dry run has other types": [
        "low_precision: generation", "low_precision: the_dry_run_has_the_types_of_the_release",
        "low_precision: diffusers_keeps_some_weights_in_float32",
    ],
    "float32 slots times bfloat16 vectors; a bfloat16 prompt into the float32 coupling": [
        "low_precision: every_vlm_from_prompt_to_answer",
        "low_precision: phi_takes_tensors_of_any_float_type",
    ],
    "peft is in no requirement": [
        "faults_of_the_rehearsal: peft_is_required",
        "low_precision: the_vision_adapter_of_phi4_is_loaded",
    ],
    "Phi-4's parameters are read outside their module's forward": [
        "low_precision: offloading_changes_nothing",
    ],
    "scale='paper' always refuses": [
        "any_checkpoint: the_paper_scale_explains_without_a_coupling",
        "any_checkpoint: a_place_is_at_paper_scale",
    ],
    "nothing trains a coupling at paper scale": [
        "train_paper: the_coupling_names_its_models_and_is_refused_for_others",
        "train_paper: killed_while_caching_and_while_training_it_ends_with_the_same_weights",
        "papermill: a_passed_parameter_takes_effect_and_a_wrong_one_is_refused",
    ],
    "a plan counts one clip where explain runs the sweep": [
        "memory: a_plan_counts_the_sweep",
        "memory: the_predicted_memory_of_an_explanation_is_measured",
        "memory: the_network_sees_no_more_rows_than_asked",
    ],
    "figure notebooks pass no options": [
        "memory: every_notebook_that_explains_takes_scale_and_options",
        "memory: options_of_loading_reach_the_device_by_default",
    ],
    "concepts at paper scale are learned with the miniature's settings": [
        "memory: concepts_at_paper_scale_are_learned_with_the_paper_s_settings",
    ],
    "scale and unknown parameters are ignored": [
        "papermill: a_passed_parameter_takes_effect_and_a_wrong_one_is_refused",
        "memory: every_notebook_checks_the_names_of_its_parameters",
    ],
    "frames carry wrong dates, system sentences are absent": [
        "clock: videollama3_dates_its_frames_by_the_clip",
        "clock: smolvlm_says_how_long_the_clip_is",
        "clock: qwen_has_a_system_turn_and_the_clips_seconds",
        "clock: a_clip_of_another_length_is_dated_anew",
        "clock: frames_positions_and_ids_are_the_processor_s",
    ],
    "articles and numbers do not agree": [
        "words_of_pieces: articles_and_numbers_agree",
        "words_of_pieces: target_captions_of_the_paper_are_english",
    ],
    "a word is measured by its first piece": [
        "words_of_pieces: a_word_counts_with_all_its_pieces",
        "words_of_pieces: the_contrasts_of_the_paper_are_spelt_in_full",
    ],
    "words that share their first piece are refused after all generator calls": [
        "words_of_pieces: words_with_one_first_piece_are_explained",
        "words_of_pieces: words_with_the_same_tokens_are_refused_before_the_generator_runs",
    ],
    "sizes that Wan cannot hold are checked at encode only": [
        "memory: sizes_that_wan_cannot_hold_are_refused_when_they_are_named",
        "memory: latents_of_odd_size_are_refused",
    ],
    "a guidance of another number type is taken for a pair, and NaN blames the video": [
        "memory: one_number_of_any_kind_is_one_guidance",
        "memory: a_guidance_that_makes_no_velocity_is_named",
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_a_test(fault):
    for entry in FAULTS[fault]:
        file, name = entry.split(": ")
        tree = ast.parse((HERE / f"test_{file}.py").read_text())
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert f"test_{name}" in defined, f"test_{file}.py has no test_{name}"


def test_peft_is_required(root):
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(root / "settings.ini")
    assert "peft" in settings["DEFAULT"]["requirements"].split()
