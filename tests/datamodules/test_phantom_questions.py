"""What a colonoscopy phantom can be asked agrees between its truth and its prompts."""

import numpy as np
import pytest

from datamodules.phantoms.colonoscopy_questions import QUESTIONS, answers, asked
from datamodules.phantoms.colonoscopy_scene import draw_scene, prompts


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
