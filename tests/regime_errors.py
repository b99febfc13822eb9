"""What is wrong in a regime's pairs: `python -m tests.regime_errors FOLDER...`, folders of scored rows of the world.

Prints for each the share of wrong sentences among those that can be checked, of the chosen and of the rejected answers;
how well the similarity tells a true from a false sentence of one answer (AUC); how many of the chosen answers' wrong
sentences state the usual colour. docs/evidence.md has the figures, and the commands that make the rows.
"""

import sys

from aspo.rows import load_rows
from aspo.sentences import split_sentences
from aspo.world.controls import sentence_truth, similarity_auc
from aspo.world.language import judge
from aspo.world.scenes import Scene


def wrong(rows, column):
    truths = [sentence_truth(r[column], split_sentences(r[column]), Scene.from_json(r["scene"])) for r in rows]
    known = [truth for of_row in truths for truth in of_row if truth is not None]
    return known.count(False) / len(known)


def usual(rows):
    false = [c for r in rows for c in judge(r["chosen"], Scene.from_json(r["scene"])) if c.verdict == "false"]
    return sum(claim.states_prior for claim in false) / len(false)


def main(folders):
    for folder in folders:
        rows = [dict(row) for row in load_rows(folder)]
        auc = similarity_auc(rows, [row["chosen_similarity"] for row in rows])
        print(
            f"{folder}: {len(rows)} pairs, chosen wrong {wrong(rows, 'chosen'):.3f}, rejected wrong "
            f"{wrong(rows, 'rejected'):.3f}, AUC {auc:.3f}, wrong is usual {usual(rows):.3f}"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
