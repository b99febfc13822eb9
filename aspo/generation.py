"""Answers of a model: generated in batches, the same for a model and its fine-tuned self."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from aspo.folder import load_images
from aspo.model import base_model, inference
from aspo.prompts import encode_prompt, end_of_turn, generation_inputs, tokenizer_of


@dataclass(frozen=True)
class Answer:
    """A generated answer: its text, the number of tokens made (with EOS), and whether it ended by itself (EOS)."""

    text: str
    num_tokens: int
    finished: bool


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
    with inference(model), torch.random.fork_rng():
        for start in range(0, len(rows), batch_size):
            torch.manual_seed(seed + start)
            batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            answers += _answer_batch(outer, processor, batch, config, pixel_transform)
            if progress is not None:
                progress(len(batch))
    return answers


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
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    # `generate` takes from the model's own config whatever ours leaves open (no_repeat_ngram_size, min_p, ...): what a
    # checkpoint's author liked would then decide the answers, and differ between a model and its fine-tuned self.
    own, model.generation_config = model.generation_config, config
    try:
        tokens = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    finally:
        model.generation_config = own
    return [_finish(row, processor, config.eos_token_id) for row in tokens.tolist()]


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
    ends.add(end_of_turn(processor, encode_prompt(processor, row["prompt"], load_images(row)))[-1])  # as trained
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
