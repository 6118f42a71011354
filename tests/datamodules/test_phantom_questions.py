"""What a colonoscopy phantom can be asked agrees between its truth and its prompts."""

from collections import Counter

import numpy as np
import pytest

from datamodules.phantoms.colonoscopy_questions import QUESTIONS, answers, asked
from datamodules.phantoms.colonoscopy_scene import EVEN, draw_scene, even_prompts, prompts


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(np.random.default_rng((7, index))) for index in range(300)]


def test_all_prompts_of_a_scene_say_what_its_truth_answers_and_each_question_is_met_with_both_answers(scenes):
    met = set()
    for index, scene in enumerate(scenes):
        true = answers(scene.truth())
        assert tuple(true) == QUESTIONS
        for prompt in prompts(scene, np.random.default_rng(index)):
            said = asked(prompt)
            assert said, prompt
            assert said.items() <= true.items(), (prompt, scene.truth())
            met |= said.items()
    assert met == {(question, answer) for question in QUESTIONS for answer in (True, False)}


def test_an_even_scene_has_one_prompt_of_each_question_and_each_answer_is_about_as_frequent_as_the_other():
    scenes = [draw_scene(np.random.default_rng((7, index)), EVEN) for index in range(400)]
    met: Counter[tuple[str, bool]] = Counter()
    for index, scene in enumerate(scenes):
        true, said = answers(scene.truth()), even_prompts(scene, np.random.default_rng(index))
        assert len(set(said)) == 5
        assert all(asked(prompt).items() <= true.items() for prompt in said), (said, true)
        assert {question for prompt in said[:4] for question in asked(prompt)} == set(QUESTIONS)
        met.update(true.items())
    for question in set(QUESTIONS) - {"several polyps"}:
        assert 0.4 <= met[question, True] / 400 <= 0.66, question


@pytest.mark.parametrize(
    "prompt, said",
    [
        ("with 1 polyp.", {"a polyp": True, "several polyps": False}),
        ("with 3 findings.", {"a polyp": True, "several polyps": True}),
        ("with no findings.", {"a polyp": False, "several polyps": False}),
        ("with polyps of size <5mm and >20mm.", {"a polyp": True}),
        ("not containing text.", {"text": False}),
        ("with no instruments.", {"an instrument": False}),
    ],
)
def test_a_prompt_says_so_much_and_no_more(prompt, said):
    assert asked(f"Generate an image {prompt}") == said


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="no phantom has this prompt: Draw a cat"):
        asked("Draw a cat")
