"""TLDR's token rewards (arXiv 2410.04734): a model learns which words of a caption are wrong.

    p_t = sigmoid(w . [logp_t, h_{t-1}, h_t] + b)       loss = mean_t BCE(p_t, token t is right)

logp_t is the model's log-probability of the token, h_{t-1} the hidden state that predicts it, h_t the one that has read
it; LoRA layers on the language model train with w and b. Wrong tokens are made: object words of true captions are
swapped for wrong ones (`perturbed`). What the head reads and how p becomes a reward are ours: docs/tldr.md.
Axes: N tokens of a batch's captions, H hidden size.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from aspo import shards
from aspo.data import Collator
from aspo.generation import generate_answers
from aspo.lazy import Lazy
from aspo.model import inference, load_model, output_head, trunk_hidden
from aspo.policy import LoraOptions, add_lora, disable_dropout
from aspo.prompts import named
from aspo.resume import write_json
from aspo.rewards.object_words import IRREGULAR_PLURALS, ObjectVocabulary, ObjectWord, judge_words, load_vocabulary
from aspo.rewards.token_scores import (
    COLUMNS,
    Score,
    begin,
    check_apart,
    load_preferences,
    read_with,
    scored_summary,
    write_scored,
)
from aspo.rewards.verifier import auc
from aspo.rows import load_rows
from aspo.scores import progress_bar
from aspo.shared_prefix.forward import batch_to
from aspo.training_state import ADAPTER_FILE, checkpoints, load_checkpoint, save_checkpoint
from aspo.validate import response_text, validate_rows
from aspo.world.language import describe
from aspo.world.scenes import COLOURS, SHAPES, Scene

SWAP_CHANCE = 0.2  # of each object word of a caption
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 200  # rows that are kept from training, to measure the head on
START_BIAS, START_LOGP = 3.0, 0.5  # the head's start: nearly all tokens are right, less so where they are unlikely
HEAD_FILE, FIGURES_FILE = "head.safetensors", "tldr.json"
Row = Mapping[str, Any]
Spans = list[tuple[int, int, float]]


def true_caption(row: Row, rng: random.Random) -> str:
    """A row's true caption: its `caption`, else `chosen`; of a `scene` a description in an order drawn by rng."""
    for column in ("caption", "chosen"):
        if row.get(column) is not None:
            return response_text(row[column])
    if row.get("scene") is not None:
        return describe(Scene.from_json(row["scene"]), rng)
    raise ValueError("no true caption: it needs 'caption', 'chosen' or 'scene'")


def perturbed(row: Row, vocabulary: ObjectVocabulary, rng: random.Random) -> dict[str, Any]:
    """The row with a caption as `chosen`, object words swapped, and `chosen_token_scores`: 1 = right, -1 = swapped.

    A word is swapped for a vocabulary entry whose object is neither in the row's `objects` nor named in the caption; in
    a `scene` a shape for a shape that is not there, a colour for another colour. Capitals and plurals are kept.

    Raises ValueError naming a row without a caption, or with an object that the vocabulary lacks.
    """
    text = named(row, true_caption, row, rng)
    words = vocabulary.words(text)
    there = {word.name for word in words} | {named(row, vocabulary.name, name) for name in row.get("objects") or ()}
    scene = Scene.from_json(row["scene"]) if row.get("scene") is not None else None
    pieces: list[str] = []
    spans: Spans = []
    at = length = 0
    for word in words:
        wrong = rng.random() < SWAP_CHANCE
        candidates = _wrong_entries(word, vocabulary, there, scene) if wrong else []
        said = text[word.start : word.end]
        new = _like(said, word.entry, rng.choice(candidates)) if candidates else said
        pieces += [text[at : word.start], new]
        start = length + word.start - at
        length, at = start + len(new), word.end
        spans.append((start, length, -1.0 if candidates else 1.0))
    return {**with_text(row, "".join([*pieces, text[at:]])), "chosen_token_scores": spans}


def with_text(row: Row, text: str) -> dict[str, Any]:
    """The row's prompt and images with another response."""
    return {**{name: row[name] for name in ("id", "prompt", "images") if row.get(name) is not None}, "chosen": text}


def _wrong_entries(word: ObjectWord, vocabulary: ObjectVocabulary, there: set[str], scene: Scene | None) -> list[str]:
    if scene is not None and word.name in COLOURS:
        return [entry for entry in vocabulary.entries if entry in COLOURS and entry != word.entry]
    if scene is not None and word.name in SHAPES:
        return [entry for entry in vocabulary.entries if entry in SHAPES and entry not in scene.by_shape]
    return [entry for entry in vocabulary.entries if vocabulary.canonical[entry] not in there]


def _like(said: str, entry: str, new: str) -> str:
    """`new` with the capital and the plural of what was said of an entry."""
    folded = said.casefold()
    plural = folded != entry and (folded.endswith("s") or folded.split()[-1] in IRREGULAR_PLURALS)
    new = new + "s" if plural and not new.endswith("s") else new
    return new[:1].upper() + new[1:] if said[:1].isupper() else new


class TokenJudge:
    """A model with LoRA layers and a head that says of each token how likely it is right.

    base: share of right ones among object words in training; `reward` takes it out.
    """

    def __init__(self, model: Any, processor: Any, learning_rate: float, seed: int) -> None:
        if isinstance(model, PeftModel):
            raise ValueError("the model is an adapter: merge it into its base first (merge_and_unload)")
        torch.manual_seed(seed)
        self.policy = add_lora(model, LoraOptions())
        disable_dropout(self.policy)
        self.policy.eval()
        self.processor = processor
        self.head_params, self.collator = output_head(self.policy), Collator(processor, responses=("chosen",))
        self.device = self.head_params.weight.device
        self.head = nn.Linear(1 + 2 * self.head_params.weight.shape[1], 1, device=self.device)
        with torch.no_grad():
            self.head.weight.zero_()[0, 0] = START_LOGP
            self.head.bias.fill_(START_BIAS)
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad] + list(self.head.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.01)
        self.base = math.nan

    def logits(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) logits of "token t is right", (N,) the rows' `chosen_token_scores`, (R + 1,) where responses begin."""
        batch = batch_to(self.collator(rows), self.device)
        hidden = trunk_hidden(self.policy, batch["model_inputs"]).flatten(0, 1)
        layout = batch["layout"]
        before, own = hidden[layout.hidden_index], hidden[layout.hidden_index + 1]
        logps = self.head_params.logps(before, layout.targets)
        features = torch.cat([logps.unsqueeze(1), before.float(), own.float()], dim=1)
        return self.head(features).squeeze(1), batch["token_scores"].to(self.device), layout.response_token_offsets

    def step(self, rows: Sequence[Row]) -> float:
        """One optimiser step; returns the loss."""
        logits, scores, _ = self.logits(rows)
        loss = F.binary_cross_entropy_with_logits(logits, (scores >= 0).float())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return float(loss.detach())

    def word_logits(self, rows: Sequence[Row], words: Sequence[Sequence[ObjectWord]]) -> list[list[float]]:
        """Of each object word in the rows' `chosen`: the mean logit of its tokens (NaN where it has none)."""
        numbered = [
            {**row, "chosen_token_scores": [(w.start, w.end, float(n + 1)) for n, w in enumerate(found)]}
            for row, found in zip(rows, words, strict=True)
        ]
        with inference(self.policy):
            logits, number, offsets = self.logits(numbered)
        values = []
        for k, found in enumerate(words):
            part = slice(int(offsets[k]), int(offsets[k + 1]))
            of_row, place = logits[part], number[part]
            values.append([float(of_row[place == n + 1].mean()) for n in range(len(found))])
        return values

    def reward(self, logit: float) -> float:
        """r = 2 p' - 1 in [-1, 1], p' the probability if right and swapped words were equally common."""
        return math.tanh((logit - math.log(self.base / (1 - self.base))) / 2)


def held_out(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and the last tenth of them (200 at most) to measure on."""
    count = min(MOST_HELD_OUT, max(1, round(HELD_OUT_SHARE * len(rows))))
    if len(rows) <= count:
        raise ValueError(f"--train has {len(rows)} rows; it needs two at least, one of them to measure on")
    every: list[Row] = [dict(rows[i]) for i in range(len(rows))]
    return every[:-count], every[-count:]


def train(judge: TokenJudge, rows: Sequence[Row], vocabulary: ObjectVocabulary, args: argparse.Namespace) -> None:
    """Epochs with new perturbations each, a checkpoint behind each; goes on behind the last one that is there."""
    epoch = 0
    if found := checkpoints(args.out):
        state, tensors = load_checkpoint(found[-1], judge.policy, judge.optimizer)
        judge.head.load_state_dict(tensors)
        epoch, judge.base = state["epoch"], state["base"]
    with progress_bar() as bar:
        task = bar.add_task("training", total=args.epochs, completed=epoch)
        while epoch < args.epochs:
            rng = random.Random(f"{args.seed}:{epoch}")
            made = [perturbed(row, vocabulary, rng) for row in rng.sample(list(rows), len(rows))]
            labels = [value for row in made for _, _, value in row["chosen_token_scores"]]
            if not labels or -1.0 not in labels:
                raise ValueError(
                    f"{len(labels)} object words in {len(made)} captions and none could be swapped: check the object "
                    "vocabulary against the captions"
                )
            judge.base = sum(value > 0 for value in labels) / len(labels)
            size = args.batch_size
            losses = [judge.step(made[i : i + size]) for i in range(0, len(made), size)]
            epoch += 1
            state = {"epoch": epoch, "base": judge.base}
            save_checkpoint(args.out, epoch, judge.policy, judge.optimizer, state, judge.head.state_dict())
            bar.console.print(f"epoch {epoch}: loss {sum(losses) / len(losses):.4f}")
            bar.advance(task)


def measure(
    judge: TokenJudge, rows: Sequence[Row], vocabulary: ObjectVocabulary, seed: int, size: int
) -> dict[str, Any]:
    """Accuracy and AUC on perturbed captions of rows that were not trained on, over all tokens and object words'."""
    rng = random.Random(f"held out:{seed}")
    made = [perturbed(row, vocabulary, rng) for row in rows]
    found = []
    with inference(judge.policy):
        for i in range(0, len(made), size):
            logits, scores, _ = judge.logits(made[i : i + size])
            found += list(zip(logits.tolist(), scores.tolist(), strict=True))
    right, wrong = [x for x, s in found if s >= 0], [x for x, s in found if s < 0]
    right_words = [x for x, s in found if s > 0]
    hits = sum(judge.reward(x) > 0 for x in right_words) / max(len(right_words), 1)
    misses = sum(judge.reward(x) < 0 for x in wrong) / max(len(wrong), 1)
    return {
        "tokens": len(found),
        "accuracy": sum((x > 0) == (s >= 0) for x, s in found) / len(found),
        "always_right_accuracy": len(right) / len(found),
        "auc": auc(right, wrong),
        "object_word_tokens": len(right_words) + len(wrong),
        "object_word_auc": auc(right_words, wrong),
        "object_word_balanced_accuracy": (hits + misses) / 2,
    }


def measure_answers(
    judge: TokenJudge, processor: Any, rows: Sequence[Row], vocabulary: ObjectVocabulary, args: argparse.Namespace
) -> dict[str, Any]:
    """AUC on the start model's own sampled answers to rows whose truth tells right from wrong object words."""
    with judge.policy.disable_adapter():
        answers = generate_answers(
            judge.policy, processor, rows, max_new_tokens=args.max_new_tokens, temperature=1.0, seed=args.seed,
            batch_size=args.batch_size,
        )  # fmt: skip
    asked = [(row, with_text(row, answer.text)) for row, answer in zip(rows, answers, strict=True) if answer.text]
    found = [vocabulary.words(made["chosen"]) for _, made in asked]
    verdicts = [
        judge_words(made["chosen"], words, row, vocabulary) for (row, made), words in zip(asked, found, strict=True)
    ]
    values: list[list[float]] = []
    for i in range(0, len(asked), args.batch_size):
        part = slice(i, i + args.batch_size)
        values += judge.word_logits([made for _, made in asked[part]], found[part])
    pairs = [(x, v) for xs, vs in zip(values, verdicts, strict=True) for x, v in zip(xs, vs, strict=True)]
    flat = [(x, v) for x, v in pairs if math.isfinite(x)]  # of a word without a token of its own the judge says nothing
    right, wrong = [x for x, v in flat if v is True], [x for x, v in flat if v is False]
    return {"own_answers_right": len(right), "own_answers_wrong": len(wrong), "own_answers_auc": auc(right, wrong)}


def run_tldr(args: argparse.Namespace) -> int:
    """Train the judge, or take the one in --out; then score --data.

    The first process trains and measures, while the others wait; each reads the last checkpoint then.
    """
    engine = shards.Engine.of(args)
    device = engine.processes.device_for(args.device)
    rows = load_preferences(args)
    captions = load_rows(args.train, kind="prompt", limit=args.train_limit, image_root=args.image_root)
    validate_rows(captions, "prompt")
    check_apart(captions, rows, "--train")
    vocabulary = load_vocabulary(args.objects, captions)
    for row in captions:
        perturbed(row, vocabulary, random.Random(0))  # what is measured on is reached behind the training only
    names = ("method", "model", "objects", "train", "train_limit", "epochs", "learning_rate", "seed", "batch_size",
             "max_new_tokens", "dtype", "image_root", "data")  # fmt: skip
    begin(args.out, {name: getattr(args, name) for name in names}, engine.processes)
    to_train, to_measure = held_out(captions)

    def trained() -> TokenJudge:
        model, processor = load_model(args.model, args.dtype, device=device)
        judge = TokenJudge(model, processor, args.learning_rate, args.seed)
        train(judge, to_train, vocabulary, args)
        return judge

    judge = Lazy(trained)

    def settle() -> None:
        if (args.out / FIGURES_FILE).exists() and checkpoints(args.out):
            return
        figures = {"base": judge().base, **measure(judge(), to_measure, vocabulary, args.seed, args.batch_size)}
        if told := [row for row in to_measure if row.get("objects") is not None or row.get("scene") is not None]:
            figures |= measure_answers(judge(), judge().processor, told, vocabulary, args)
        save_file(judge().head.state_dict(), args.out / HEAD_FILE, {"base": repr(judge().base)})
        judge().policy.save_pretrained(str(args.out))
        write_json(args.out / FIGURES_FILE, figures)

    engine.processes.once("it trains the head", settle)
    if engine.processes.main:
        print((args.out / FIGURES_FILE).read_text(encoding="utf-8"), end="")
    weights = [(args.out / name).read_bytes() for name in (HEAD_FILE, ADAPTER_FILE)]
    decides = {"weights": hashlib.sha256(b"".join(weights)).hexdigest(), "vocabulary": vocabulary.lines}
    write_scored(rows, lambda: scoring(judge(), vocabulary), args.out, args.batch_size, decides, engine)
    if engine.processes.main:
        print(scored_summary(args.out))
    return 0


def scoring(judge: TokenJudge, vocabulary: ObjectVocabulary) -> Score:
    """The judge's rewards of the object words of a batch."""

    def score(batch: Sequence[Row]) -> list[dict[str, Spans]]:
        scored: list[dict[str, Spans]] = [{} for _ in batch]
        for column in COLUMNS:
            texts = [with_text(read_with(row, column), response_text(row[column])) for row in batch]
            words = [vocabulary.words(row["chosen"], fuzzy=True) for row in texts]
            for of_row, found, values in zip(scored, words, judge.word_logits(texts, words), strict=True):
                pairs = zip(found, values, strict=True)
                of_row[column] = [(w.start, w.end, judge.reward(x)) for w, x in pairs if math.isfinite(x)]
        return scored

    return score
