"""Where two responses differ: exact spans, and what holds for any two texts."""

from hypothesis import given
from hypothesis import strategies as st

from aspo.rewards.changes import changed_spans, score_changes

WORDS = st.lists(st.sampled_from(["a", "red", "cube", "is", "small", "."]), max_size=12).map(" ".join)


def texts(text, spans):
    return [text[a:b] for a, b, _ in spans]


def test_a_corrected_word_is_the_change():
    chosen, rejected = "There is a red cube on the table.", "There is a blue cube on the table."
    mine, other = changed_spans(chosen, rejected)
    assert texts(chosen, mine) == ["red"] and texts(rejected, other) == ["blue"]
    assert mine == [(11, 14, 1.0)]


def test_added_words_are_a_change_of_one_side():
    chosen, rejected = "The cube is red.", "The cube is red. There is also a dog."
    mine, other = changed_spans(chosen, rejected)
    assert mine == [] and texts(rejected, other) == ["There is also a dog."]


def test_a_short_match_between_two_changes_belongs_to_them():
    """Two common words ("is a") alone are no common segment; with least_match 2 they are."""
    chosen, rejected = "Here is a cat", "There is a dog"
    assert texts(chosen, changed_spans(chosen, rejected)[0]) == ["Here is a cat"]
    assert texts(chosen, changed_spans(chosen, rejected, 2)[0]) == ["Here", "cat"]


def test_rows():
    row = {"chosen": [{"role": "assistant", "content": "It is a red cube."}], "rejected": "It is a blue cube."}
    (found,) = score_changes([row])
    assert found["chosen"] == [(8, 17, 1.0)]  # "red cube.": what follows is shorter than a segment
    assert found["rejected"] == [(8, 18, 1.0)]


@given(WORDS, WORDS)
def test_what_is_left_is_the_same_in_both(a, b):
    assert changed_spans(a, a, 1) == ([], [])
    left = []
    for text, spans in zip((a, b), changed_spans(a, b), strict=True):
        before = 0
        for start, end, _ in spans:
            assert before <= start < end <= len(text)
            before = end
        for start, end, _ in reversed(spans):
            text = text[:start] + text[end:]
        left.append(text.split())
    assert left[0] == left[1]
