"""HallusionBench: the same yes/no question about a figure and its edited twin (Guan et al., CVPR 2024)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from aspo.evaluation.metrics import Counts, yes_no
from aspo.suite.benchmark import Benchmark, Item, Row, Source, read_rows

COLUMNS = ("category", "subcategory", "visual_input", "set_id", "figure_id", "question_id", "question", "gt_answer")
VERDICT = re.compile(r"\b(incorrect|correct|unclear)\b", flags=re.IGNORECASE)
RUBRIC = """\
Compare an answer to a yes/no question with the reference answer. Say only one word:
correct - the answer agrees with the reference;
incorrect - the answer contradicts the reference;
unclear - the answer does not commit itself.

Question: {question}
Reference answer: {reference}
Answer to judge: {answer}
"""


def load(source: Source) -> list[Row]:
    """A row per question; `visual_input` 0 has no image. All questions of a set form a cluster."""
    path = source.file("HallusionBench.json")
    rows: list[Row] = []
    for number, row in enumerate(read_rows(path, *COLUMNS), 1):
        if row["category"] not in ("VD", "VS") or str(row["gt_answer"]) not in ("0", "1"):
            raise ValueError(
                f"{path}, row {number}: category {row['category']!r} with gt_answer {row['gt_answer']!r}; they are VD "
                "or VS, and 0 or 1"
            )
        parts = [str(row[name]) for name in ("category", "subcategory", "set_id", "figure_id", "question_id")]
        rows.append(
            {
                "id": "/".join(parts),
                "prompt": row["question"],
                "images": [] if str(row["visual_input"]) == "0" else [_image(source, row)],
                "cluster": "/".join(parts[:3]),
                "max_new_tokens": 128,
                "question": "/".join([*parts[:3], parts[4]]),
                "figure": "/".join(parts[:4]),
                "original": parts[3] == "0",
                "own": row,
            }
        )
    if len({row["id"] for row in rows}) != len(rows):
        raise ValueError(f"{path} asks a question twice about the same figure: take HallusionBench's own file")
    return rows


def _image(source: Source, row: Row) -> str:
    name = row.get("filename") or f"{row['category']}/{row['subcategory']}/{row['set_id']}_{row['figure_id']}.png"
    parts = [part for part in PurePosixPath(name).parts if part not in (".", "hallusion_bench")]
    return source.image("/".join(parts), "hallusion_bench", "images", "")


def questions(row: Row, text: str) -> list[str]:
    """One prompt an answer."""
    own = row["own"]
    reference = own.get("gt_answer_details") or ("Yes." if str(own["gt_answer"]) == "1" else "No.")
    return [RUBRIC.format(question=own["question"], reference=reference, answer=text)]


def score(row: Row, text: str, replies: Sequence[str] | None) -> Item:
    """Whether an answer is right: by the judge's verdict where there is one, else by its first "yes" or "no".

    As in the original, an unclear answer to a question of VS without a figure is right: nobody can know.
    """
    if replies is None:
        said = yes_no(text)
        truth = "yes" if str(row["own"]["gt_answer"]) == "1" else "no"
        verdict = "unclear" if said is None else "correct" if said == truth else "incorrect"
        judged: Counts = {}
    else:
        found = VERDICT.search("\n".join(replies))
        verdict = found[1].casefold() if found else "unread"
        judged = {"judge_asked": 1, "judge_unread": int(verdict == "unread")}
    lenient = row["own"]["category"] == "VS" and row["original"]
    right = int(verdict == "correct" or (verdict == "unclear" and lenient))
    counts: Counts = {
        "hallusion_asked": 1,
        "hallusion_right": right,
        "hallusion_unclear": int(verdict == "unclear"),
    }
    return {"verdict": verdict, "counts": counts | judged}


def group(rows: Sequence[Row], items: Sequence[Item]) -> None:
    """Counts of what is right as a whole: a question on all its figures, on those of `easy` or of `hard`; a figure.

    easy: the original figure, or none (VS); hard: all the edited ones. VS without a figure counts among no figures.
    """
    together: dict[tuple[str, str], list[Item]] = {}
    for row, item in zip(rows, items, strict=True):
        marks = {"hallusion_q": "question", "hallusion_easy" if row["original"] else "hallusion_hard": "question"}
        if not (row["own"]["category"] == "VS" and row["original"]):
            marks["hallusion_f"] = "figure"
        for mark, column in marks.items():
            together.setdefault((mark, row[column]), []).append(item)
    for (mark, _), members in together.items():
        right = all(item["counts"]["hallusion_right"] for item in members)
        members[0]["counts"] |= {mark: 1, f"{mark}_right": int(right)}


def answers(rows: Sequence[Row], items: Sequence[Item]) -> Any:
    """The original's file with `model_prediction` filled in."""
    return [{**row["own"], "model_prediction": item["text"]} for row, item in zip(rows, items, strict=True)]


HALLUSION = Benchmark(
    "hallusionbench",
    "HallusionBench",
    "https://github.com/tianyi-lab/HallusionBench",
    load,
    score,
    answers,
    questions,
    group=group,
)
