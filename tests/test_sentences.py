"""Sentences: the golden cases, exact coverage of any text, and one sentence for every token."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer

from aspo.sentences import WINDOW, check_spans, sentences_without_tokens, split_sentences, token_sentences


def cut(text: str) -> list[str]:
    return [text[a:b] for a, b in split_sentences(text)]


@pytest.mark.parametrize(
    "sentences",
    [
        ["Dr. Smith went to Washington. ", "He met Mr. Jones at 5 p.m. ", "They left."],
        ["It costs $3.50 and weighs 2.5 kg. ", "Really? ", "Yes!"],
        ["Wait... what? ", "I see a dog... ", "It runs. ", "And … then it stops."],
        ['He said "Stop. Go away." ', "Then he left. ", '"Really?" she asked.'],
        ["The sign reads 'STOP.' ", "A man walks. ", "J. R. R. Tolkien wrote it."],
        ["1. A red ball\n", "2. A blue cube\n", "3. A cat"],
        ["- a dog.\n", "- a cat\n\n", "The end."],
        ["A title\n", "The ball is red. ", "It is small."],
        ["  Leading space. ", "Trailing.  \n\n"],
        ["这是一只猫。", "它在桌子上！", "很可爱吗？", "是的"],
        ["猫です。", "犬もいます！"],
        ["A dog 🐶. ", "A cat 😺! ", "A person 👩‍💻 works. ", "Nice 🙂"],
        ["Nice dog. 🐶🐶"],  # nothing to score in the emoji alone
        ["Yes.\n---\n", "No."],
        ["**Bold.** ", "Next one. ", "The end."],
        ["e.g. this one, i.e. that. ", "The U.S. is big. ", "Fig. 3 shows it."],
        ["See www.example.com. ", "It is v1.2.3."],
        ["No full stop"],
        ["..."],
        [" \n"],
    ],
)
def test_golden(sentences):
    assert cut("".join(sentences)) == sentences


def test_empty_text_has_no_sentence():
    assert split_sentences("") == []


def test_unknown_language():
    with pytest.raises(ValueError, match="xx"):
        split_sentences("A.", language="xx")


TEXT = st.text(alphabet=st.sampled_from("aB1 .!?\n\t\r\"'“”()[]-*…。！猫🐶\u200b\u2028é&"), max_size=80) | st.text(
    max_size=60
)


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_spans_cover_any_text(text):
    spans = split_sentences(text)
    assert check_spans(text, spans) == spans
    if any(c.isalnum() for c in text):
        assert all(any(c.isalnum() for c in text[a:b]) for a, b in spans)


@pytest.mark.parametrize("unit", ["“a. ", "[a. b", "a", "A. ", '"', "1. ", "&ᓴ&", "(", " ", "猫。"])
def test_long_pathological_texts_stay_quick(unit):
    text = unit * (40_000 // len(unit))
    start = time.process_time()
    spans = split_sentences(text)
    assert time.process_time() - start < 8  # sentencesplit alone: minutes for the first two
    assert check_spans(text, spans) == spans


def test_windows_do_not_change_prose():
    sentences = [f"The ball number {i} costs $3.50 at Dr. Smith's shop. " for i in range(400)]
    assert sum(map(len, sentences)) > 4 * WINDOW
    assert cut("".join(sentences)) == sentences


@pytest.mark.parametrize(("before", "length"), [(1500, 3000), (10, 4068), (2500, 3000)])
def test_a_sentence_that_fits_a_window_is_whole_wherever_it_stands(before, length):
    first, long = ("The ball " + "is very, " * (size // 9) + "red. " for size in (before, length))
    sentences = [first, long, "It is small."]
    assert cut("".join(sentences)) == sentences


def test_a_sentence_longer_than_a_window_is_cut_between_words():
    parts = cut("Yes. " + "A red ball, " * 1000 + "and that is all. It is small.")
    assert parts[0] == "Yes. " and parts[-1] == "It is small."
    assert all(part[-1].isspace() and WINDOW - 20 <= len(part) <= WINDOW for part in parts[1:-2])


TOKENIZER = tiny_tokenizer()


@settings(max_examples=300, deadline=None)
@given(TEXT)
def test_every_token_has_one_sentence(text):
    encoded = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = split_sentences(text)
    ids = token_sentences(encoded["offset_mapping"], spans, text)
    assert len(ids) == len(encoded["input_ids"])
    assert ids == sorted(ids)
    for i, (a, b) in zip(ids, encoded["offset_mapping"], strict=True):
        first = next((k for k in range(a, b) if not text[k].isspace()), None)
        if first is not None:
            assert spans[i][0] <= first < spans[i][1]
    assert sentences_without_tokens(ids, len(spans)) == []  # the tiny vocabulary never spans two sentences


def test_token_offsets_of_every_kind():
    text = "A🐶. B c. D"
    spans = split_sentences(text)
    assert [text[a:b] for a, b in spans] == ["A🐶. ", "B c. ", "D"]
    # four tokens of one character; a token that starts with the space before its sentence; a space alone; an empty one
    offsets = [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2), (2, 3), (3, 5), (5, 6), (6, 6), (6, 8), (8, 10)]
    assert token_sentences(offsets, spans, text) == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert sentences_without_tokens([0, 0, 2], 4) == [1, 3]


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 3], [4, 6]], "starts at character 4"),
        ([[0, 3], [2, 6]], "starts at character 2"),
        ([[0, 3]], "end at character 3"),
        ([[0, 3], [3, 7]], r"\[3, 7\]"),
        ([[0, 0], [0, 6]], r"\[0, 0\]"),
        ([[0, 3, 6]], "two integers"),
        ([[0, 6.0]], "two integers"),
    ],
)
def test_check_spans_rejects(spans, message):
    with pytest.raises(ValueError, match=message):
        check_spans("A. B c", spans)
