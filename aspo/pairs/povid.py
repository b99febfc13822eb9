"""POVID's pairs (arXiv 2402.11411): beside each chosen token what the model would say there under a noised image.

A row's chosen and rejected responses are its own; where it has none they are made as SeVa's are, the chosen one on the
image and the rejected one on the noised image. Then the chosen response is read once more behind the noised image, and

    chosen_alternative_ids[t] = argmax_v  h_t W_v + b_v,    h_t: the state that predicts the chosen token t, under noise

one id for each token of the chosen response, its end-of-turn token included. POVID makes these anew in every training
step, with the weights of that step; here they are made once, with the model that training starts from: our choice.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aspo.data import Collator
from aspo.folder import image_entries
from aspo.generation import Answer, generate_answers
from aspo.model import HeadParams, inference, output_head, trunk_hidden
from aspo.pairs import MADE, Load, Made, Make, Options, Row, seva
from aspo.pairs.noise import add_noise, copies_of_a_still, image_seeds
from aspo.validate import bad_row, named_column, response_text
from aspo_kernels import gather_hidden

OPTIONS = dict(seva.OPTIONS)
NOUNS = ("pairs", "rows")
DROPPED = {**seva.DROPPED, "identical": "chosen and rejected are the same", "no image": "the row has no image"}
CHUNK_ELEMENTS = 2**25  # logits held at a time, 128 MiB of fp32


def check(rows: Sequence[Row], options: Options) -> None:
    """A rejected response needs the chosen one that it belongs to; other tokens and other images do not go together."""
    for index, row in enumerate(rows):
        if row.get("negative_images"):
            raise bad_row(index, row, "negative_images", "povid's tokens are not read beside them: drop the column")
        if row.get("rejected") is not None and row.get("chosen") is None:
            raise ValueError(f"row {index} (id {row['id']!r}) has a rejected response but no chosen one: give both")
        for column in ("chosen", "rejected"):
            if row.get(column) is not None and not named_column(column, index, row, response_text, row[column]).strip():
                raise ValueError(f"row {index} (id {row['id']!r}), column {column!r}: it is empty: drop the row")


def maker(options: Options, load: Load) -> Make:
    """See `aspo.pairs`."""
    model, processor = load()

    def make(rows: Sequence[Row], start: int) -> list[Made]:
        asked = [row for row in rows if image_entries(row)]
        pairs, status = {}, {row["id"]: "no image" for row in rows}
        for row, answers in zip(asked, _responses(model, processor, asked, start, options), strict=True):
            status[row["id"]] = seva.judge(*answers)
            if status[row["id"]] == MADE:
                chosen, rejected = (answer.text.strip() for answer in answers)
                own = {name: row[name] for name in ("chosen", "rejected") if row.get(name) is not None}
                pairs[row["id"]] = {**row, "chosen": chosen, "rejected": rejected, **own}
        alternatives = alternative_ids(model, processor, [*pairs.values()], options["noise_step"], options["seed"])
        made = dict(zip(pairs, alternatives, strict=True))
        return [_made(status[row["id"]], pairs.get(row["id"]), made.get(row["id"])) for row in rows]

    return make


def _responses(
    model: torch.nn.Module, processor: Any, rows: Sequence[Row], start: int, options: Options
) -> list[tuple[Answer, Answer]]:
    """(chosen, rejected) of each row: its own, else the model's answer to the clean and to the noised images."""
    settings = {name: options[name] for name in ("max_new_tokens", "temperature")}
    settings["batch_size"] = max(1, len(rows))
    unanswered = [row for row in rows if row.get("chosen") is None]
    unpaired = [row for row in rows if row.get("rejected") is None]
    clean = generate_answers(model, processor, unanswered, seed=options["seed"] + start, **settings)
    noise = options["noise_step"], options["seed"], start
    noised = seva.noised_answers(model, processor, unpaired, *noise, **settings)
    chosen = dict(zip((row["id"] for row in unanswered), clean, strict=True))
    rejected = dict(zip((row["id"] for row in unpaired), noised, strict=True))
    return [
        (chosen.get(row["id"]) or _own(row, "chosen"), rejected.get(row["id"]) or _own(row, "rejected")) for row in rows
    ]


def _own(row: Row, column: str) -> Answer:
    return Answer(response_text(row[column]), 0, True)


def _made(status: str, pair: Row | None, alternatives: tuple[list[int], int] | None) -> Made:
    if pair is None or alternatives is None:
        return Made(status)
    ids, changed = alternatives
    counts = Counter({"tokens of the chosen responses": len(ids), "of them another under noise": changed})
    return Made(status, [{**pair, "chosen_alternative_ids": ids}], counts)


def alternative_ids(
    model: torch.nn.Module, processor: Any, rows: Sequence[Row], noise_step: int, seed: int
) -> list[tuple[list[int], int]]:
    """(the model's argmax at each of the chosen tokens under noised images, how many differ from the chosen token).

    rows: `id`, `prompt`, `images`, `chosen` and `unfinished` are read, all rows in one batch. Raises ValueError where
    the processor gives no pixel_values to put noise on.
    """
    if not rows:
        return []
    read = ("id", "prompt", "images", "chosen", "unfinished")
    plain = [{name: row[name] for name in read if row.get(name) is not None} for row in rows]
    batch = Collator(processor, responses=("chosen",))(plain)
    inputs, layout = dict(batch["model_inputs"]), batch["layout"]
    if "pixel_values" not in inputs:
        raise ValueError(f"{type(processor).__name__} makes no pixel_values: noise cannot be put on its images")
    seeds = [s for row in plain for s in image_seeds(row, seed)]
    inputs["pixel_values"] = add_noise(inputs["pixel_values"], noise_step, seeds, copies_of_a_still(processor))
    head = output_head(model)
    device = head.weight.device
    with inference(model):
        states = trunk_hidden(model, {name: value.to(device) for name, value in inputs.items()})
        likeliest = argmax_tokens(gather_hidden(states, layout.to(device)), head).cpu()
    ends = layout.response_token_offsets.tolist()[1:]
    changed = likeliest != layout.targets
    starts = [0, *ends[:-1]]
    return [(likeliest[a:b].tolist(), int(changed[a:b].sum())) for a, b in zip(starts, ends, strict=True)]


def argmax_tokens(hidden: Tensor, head: HeadParams, elements: int = CHUNK_ELEMENTS) -> Tensor:
    """`(hidden @ weight.T + bias).argmax(-1)`: (N, H) -> (N,), a few tokens at a time: N x V logits are never held.

    A head's scale is positive and its soft-cap monotone: neither moves the largest logit.
    """
    size = max(1, elements // head.weight.shape[0])
    found = []
    for part in hidden.to(head.weight.dtype).split(size):
        logits = part @ head.weight.T
        found.append((logits if head.bias is None else logits + head.bias).argmax(-1))
    return torch.cat(found)
