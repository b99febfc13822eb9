"""MMVP: a question with two options about each of two images that CLIP confuses (Tong et al., CVPR 2024)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from aspo.evaluation.metrics import Counts
from aspo.suite.benchmark import Benchmark, Item, Row, Source, read_rows

OPTION = re.compile(r"\(([ab])\)\s*([^(]*)", flags=re.IGNORECASE)
LETTER = re.compile(
    r"^\W*([ab])\s*(?:[).:,]|$)|\(([ab])\)|\b(?:answer|option)(?: is)?:?\s+([ab])(?:[).:,]|\s*$)", re.IGNORECASE
)
VERDICT = re.compile(r"\b(yes|no)\b", flags=re.IGNORECASE)
RUBRIC = """\
Is the answer below a correct answer to the question? Say only yes or no.

Question: {question}
Correct answer: {reference}
Answer to judge: {answer}
"""


def load(source: Source) -> list[Row]:
    """A row per image; rows 1 and 2, 3 and 4, ... are pairs."""
    path = source.file("Questions.csv")
    listed = read_rows(path, "Index", "Question", "Options", "Correct Answer")
    if len(listed) % 2:
        raise ValueError(f"{path} holds {len(listed)} rows; they come in pairs")
    rows: list[Row] = []
    for number, row in enumerate(listed):
        options = {letter.casefold(): text.strip().casefold() for letter, text in OPTION.findall(row["Options"])}
        correct = row["Correct Answer"].strip().strip("()").casefold()
        if set(options) != {"a", "b"} or correct not in options:
            raise ValueError(
                f"{path}, row {number + 1}: options {row['Options']!r} with answer {row['Correct Answer']!r}; they "
                "look like '(a) Open (b) Closed' and '(a)'"
            )
        rows.append(
            {
                "id": str(row["Index"]),
                "prompt": f"{row['Question']} {row['Options']}",
                "images": [source.image(f"{row['Index']}.jpg", "MMVP Images", "images", "")],
                "cluster": f"pair {number // 2 + 1}",
                "max_new_tokens": 64,
                "options": options,
                "correct": correct,
            }
        )
    return rows


def chosen(text: str, options: dict[str, str]) -> str | None:
    """The option that an answer chooses: by its letter, else as the only one whose words it has; None if neither."""
    found = LETTER.search(text)
    if found:
        return next(letter for letter in found.groups() if letter).casefold()
    named = [k for k, words in options.items() if re.search(rf"\b{re.escape(words)}\b", text.casefold())]
    return named[0] if len(named) == 1 else None


def questions(row: Row, text: str) -> list[str]:
    """One prompt an answer."""
    reference = f"({row['correct']}) {row['options'][row['correct']]}"
    return [RUBRIC.format(question=row["prompt"], reference=reference, answer=text)]


def score(row: Row, text: str, replies: Sequence[str] | None) -> Item:
    """Whether an answer is right: by the judge's verdict where there is one, else by the option that it chooses."""
    said = chosen(text, row["options"])
    right, judged = said == row["correct"], Counts()
    if replies is not None:
        verdict = VERDICT.search("\n".join(replies))
        right = verdict is not None and verdict[1].casefold() == "yes"
        judged = {"judge_asked": 1, "judge_unread": int(verdict is None)}
    counts: Counts = {"mmvp_asked": 1, "mmvp_right": int(right), "mmvp_unanswered": int(said is None)}
    return {"said": said, "counts": counts | judged}


def group(rows: Sequence[Row], items: Sequence[Item]) -> None:
    """A pair is right where both its answers are."""
    for first, second in zip(items[::2], items[1::2], strict=True):
        right = first["counts"]["mmvp_right"] and second["counts"]["mmvp_right"]
        first["counts"] |= {"mmvp_pairs": 1, "mmvp_pairs_right": int(right)}


def answers(rows: Sequence[Row], items: Sequence[Item]) -> Any:
    """The lines of the original's answer file."""
    return [
        {"question_id": row["id"], "prompt": row["prompt"], "answer": f"({row['correct']})", "response": item["text"]}
        for row, item in zip(rows, items, strict=True)
    ]


MMVP = Benchmark("mmvp", "MMVP", "https://github.com/tsb0601/MMVP", load, score, answers, questions, group=group)
