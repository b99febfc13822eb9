"""Answers of a model, whole or sentence by sentence: in batches, the same for a model and its fine-tuned self."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from aspo.folder import load_images
from aspo.model import base_model, inference
from aspo.prompts import encode_prompt, end_of_turn, generation_inputs, named, run_processor, tokenizer_of
from aspo.sentences import Splitter, split_sentences

_SENTENCE_MARKS = frozenset(".!?\u2026\u3002\uff01\uff1f\n")  # without one of these before its end no text is cut
TAIL = 8  # tokens of a prompt that are decoded with what follows, for the whitespace between them


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, the number of tokens made (with EOS), and whether it ended by itself (EOS)."""

    text: str
    num_tokens: int
    finished: bool


@dataclass(frozen=True)
class NextSentence:
    """One more sentence of an answer.

    text: with the whitespace that stands before it; "" where the answer ends at once.
    complete: False where neither a sentence nor the answer ended within the tokens allowed: the text is cut off.
    ends: whether the answer ends with it (EOS).
    """

    text: str
    complete: bool
    ends: bool


def generate(model: nn.Module, processor: Any, rows: Sequence[Mapping[str, Any]], **options: Any) -> list[str]:
    """The texts of `generate_answers` (same options)."""
    return [answer.text for answer in generate_answers(model, processor, rows, **options)]


def generate_answers(
    model: nn.Module,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    pixel_transform: Callable[[Tensor], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answer each row's prompt about its images, in batches padded on the left.

    Args:
        rows: `prompt` and `images` | `image` are read; rows with and without images may be mixed.
        temperature: 0 = greedy; otherwise samples from softmax(logits / temperature), no top-k or top-p.
        seed: the batch that starts at row k samples with seed + k, so that a run which goes on at a batch's first row
            gives what an uninterrupted one would. The caller's random state is left as it was.
        pixel_transform: applied to the processor's pixel_values of each batch (under the batch's seed), e.g. noise.
        progress: called with the number of answers after each batch.
    """
    if temperature < 0 or max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"temperature={temperature} must be >= 0, max_new_tokens={max_new_tokens} and batch_size={batch_size} >= 1"
        )
    if not rows:
        return []
    outer = base_model(model)
    config = _generation_config(outer, processor, rows[0], max_new_tokens, temperature)
    answers: list[Answer] = []
    with inference(model), _own_random_numbers():
        for start in range(0, len(rows), batch_size):
            torch.manual_seed(seed + start)
            batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            answers += _answer_batch(outer, processor, batch, config, pixel_transform)
            if progress is not None:
                progress(len(batch))
    return answers


def generate_sentences(
    model: nn.Module,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    beginnings: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    splitter: Splitter = split_sentences,
) -> list[NextSentence]:
    """The next sentence of each row's answer behind the beginning that it is given; give a row n times for n of them.

    Args:
        rows, temperature, seed, batch_size: as in `generate_answers`.
        beginnings: whole sentences, one text a row; "" = the answer's first sentence is wanted.
        max_new_tokens: of a sentence.
        splitter: says where the sentence ends: at its second sentence's first token generation stops.
    """
    if len(beginnings) != len(rows):
        raise ValueError(f"{len(beginnings)} beginnings for {len(rows)} rows; give one for each")
    if not rows:
        return []
    outer, tokenizer = base_model(model), tokenizer_of(processor)
    config = _generation_config(outer, processor, rows[0], max_new_tokens, temperature)
    made: list[NextSentence] = []
    with inference(model), _own_random_numbers():
        for start in range(0, len(rows), batch_size):
            torch.manual_seed(seed + start)
            part = slice(start, start + batch_size)
            inputs = _continued_inputs(processor, rows[part], beginnings[part])
            ids = inputs["input_ids"]
            tokens = _generate_tokens(outer, inputs, config, [SentenceEnd(tokenizer, ids, splitter)])
            for before, new, beginning in zip(ids, tokens, beginnings[part], strict=True):
                end = next((k for k, token in enumerate(new) if token in config.eos_token_id), None)
                text = decode_behind(tokenizer, before[-TAIL:].tolist(), new if end is None else new[:end])
                made.append(cut_sentence(text if beginning else text.lstrip(), end is not None, splitter))
    return made


def cut_sentence(text: str, ended: bool, splitter: Splitter = split_sentences) -> NextSentence:
    """The first sentence of what was generated; `ended`: whether an end-of-turn token followed the text.

    Behind a second sentence's beginning that token is padding (which it is for many models): the answer goes on.
    """
    if not text.strip():
        return NextSentence("", ended, ended)
    spans = splitter(text)
    return NextSentence(text[: spans[0][1]].rstrip(), ended or len(spans) > 1, ended and len(spans) == 1)


def decode_behind(tokenizer: Any, before: list[int], tokens: list[int]) -> str:
    """The text of tokens that follow others; decoded alone they can lose the space in front (SentencePiece)."""
    lead = tokenizer.decode(before, skip_special_tokens=True)
    whole = tokenizer.decode(before + tokens, skip_special_tokens=True)
    return whole[len(lead) :] if whole.startswith(lead) else tokenizer.decode(tokens, skip_special_tokens=True)


class SentenceEnd(StoppingCriteria):
    """Ends a row as soon as its answer has begun a second sentence.  prompts: (R, T), what the rows begin with."""

    def __init__(self, tokenizer: Any, prompts: Tensor, splitter: Splitter) -> None:
        self.tokenizer, self.splitter = tokenizer, splitter
        self.start, self.ended = prompts.shape[1], [False] * len(prompts)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # type: ignore[override]
        for n, row in enumerate(input_ids[:, self.start :].tolist()):
            if not self.ended[n]:
                text = self.tokenizer.decode(row, skip_special_tokens=True)
                self.ended[n] = not _SENTENCE_MARKS.isdisjoint(text[:-1]) and len(self.splitter(text)) > 1
        return torch.tensor(self.ended, device=input_ids.device)


def _own_random_numbers() -> AbstractContextManager[None]:
    """Seeds set within leave the random state behind it as it was, that of every accelerator too.

    They are named because `fork_rng` alone warns where there are several.
    """
    kind = torch.accelerator.current_accelerator()
    devices = range(torch.accelerator.device_count())
    return torch.random.fork_rng(devices, device_type="cuda" if kind is None else kind.type)


def _continued_inputs(
    processor: Any, rows: Sequence[Mapping[str, Any]], beginnings: Sequence[str]
) -> dict[str, Tensor]:
    """`generation_inputs` with the beginning of an answer behind each prompt."""
    images = [named(row, load_images, row) for row in rows]
    prompts = []
    for row, pictures, beginning in zip(rows, images, beginnings, strict=True):
        prompt = named(row, encode_prompt, processor, row["prompt"], pictures)
        prompts.append(prompt._replace(text=prompt.text + prompt.lead + beginning) if beginning else prompt)
    return run_processor(processor, prompts, images, padding_side="left")


def _answer_batch(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    config: GenerationConfig,
    pixel_transform: Callable[[Tensor], Tensor] | None,
) -> list[Answer]:
    inputs = generation_inputs(processor, rows)
    if pixel_transform is not None:
        if "pixel_values" not in inputs:
            raise ValueError("pixel_transform was given, but the batch has no pixel_values: its rows have no images")
        inputs["pixel_values"] = pixel_transform(inputs["pixel_values"])
    return [_finish(row, processor, config.eos_token_id) for row in _generate_tokens(model, inputs, config)]


def _generate_tokens(
    model: Any, inputs: Mapping[str, Tensor], config: GenerationConfig, stops: Sequence[StoppingCriteria] = ()
) -> list[list[int]]:
    """The new tokens of each row."""
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    # `generate` takes from the model's own config whatever ours leaves open (no_repeat_ngram_size, min_p, ...): what a
    # checkpoint's author liked would then decide the answers, and differ between a model and its fine-tuned self.
    own, model.generation_config = model.generation_config, config
    try:
        tokens = model.generate(**inputs, generation_config=config, stopping_criteria=StoppingCriteriaList(stops))
    finally:
        model.generation_config = own
    return tokens[:, inputs["input_ids"].shape[1] :].tolist()


def _finish(tokens: list[int], processor: Any, ends: list[int]) -> Answer:
    stop = next((k for k, token in enumerate(tokens) if token in ends), None)
    length = len(tokens) if stop is None else stop + 1
    text = tokenizer_of(processor).decode(tokens[:length], skip_special_tokens=True)
    return Answer(text.strip(), length, stop is not None)


def _generation_config(
    model: PreTrainedModel, processor: Any, row: Mapping[str, Any], max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Greedy or plain sampling; of the model's own generation_config only the ends are kept."""
    tokenizer = tokenizer_of(processor)
    own = getattr(model.generation_config, "eos_token_id", None)
    ends = {own} if isinstance(own, int) else set(own or ())
    prompt = named(row, encode_prompt, processor, row["prompt"], named(row, load_images, row))
    ends.add(end_of_turn(processor, prompt)[-1])  # as trained
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        **sampling,
    )
