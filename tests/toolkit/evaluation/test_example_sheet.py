"""The sheet of retrieved examples."""

import pytest
from PIL import Image

from toolkit.evaluation import example_sheet

GREEN, RED = (22, 148, 72), (200, 30, 30)


def picture():
    return Image.new("RGB", (112, 112), RED)


def figures(first):
    return {"R@1": first, "R@5": 50.0, "R@10": 66.6}


def report(reranked=None):
    coarse = {"speech_to_image": figures(12.3), "image_to_speech": figures(45.6), "mean_R@1": 28.95}
    return {"split": "test", "captions": 1000, "pictures": 500, "coarse": coarse, "reranked": reranked}


def pixels(page, colour):
    return sum(count for count, value in page.getcolors(1 << 24) if value == colour)


def test_page_shows_all_examples_and_frames_the_correct_picture():
    text = "a rather long caption that goes on and on about a red circle above a blue star " * 3
    speech_queries = [example_sheet.SpeechQuery(text, 2, [picture()] * 5, [False, True, False, False, False])] * 3
    image_queries = [example_sheet.ImageQuery(picture(), 1, ["one", "two", "three"], [True, False, False])] * 2
    page = example_sheet.draw_example_sheet(["title", "up", "down"], speech_queries, image_queries)
    assert pixels(page, RED) == (3 * 5 + 2) * 112 * 112, "a picture is missing or covered"
    frames = 3 * (122 * 122 - 112 * 112)
    assert frames <= pixels(page, GREEN) <= frames + 2 * 400, "a frame is missing, or more is green than two words"
    unframed = example_sheet.draw_example_sheet(
        ["", "", ""], [example_sheet.SpeechQuery("", 9, [picture()] * 5, [False] * 5)], []
    )
    assert pixels(unframed, GREEN) == 0


def test_titles_contain_the_recall_of_the_last_stage():
    lines = example_sheet.titles(report(), "scenes")
    assert lines[0] == "scenes, test: 1,000 spoken captions, 500 pictures, coarse"
    assert lines[1] == "Speech to image:   R@1 12.3 %   R@5 50.0 %   R@10 66.6 %"
    fine = {"speech_to_image": figures(20.0), "image_to_speech": figures(60.0), "mean_R@1": 40.0, "k": 16}
    lines = example_sheet.titles(report(fine), "scenes")
    assert lines[0].endswith("best 16 re-ranked")
    assert "R@1 20.0 %" in lines[1]


@pytest.mark.parametrize(("total", "count", "expected"), [(100, 4, [12, 37, 62, 87]), (3, 8, [0, 1, 2]), (1, 1, [0])])
def test_examples_are_equally_spaced(total, count, expected):
    assert example_sheet.equally_spaced(total, count) == expected
