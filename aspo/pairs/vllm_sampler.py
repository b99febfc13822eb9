"""Next sentences from vLLM's offline engine (`vllm.LLM`), for `--engine vllm`.

Written from vLLM's documented interface and tested against a stand-in for it only, never against vLLM itself:
`LLM(model=, dtype=, seed=, limit_mm_per_prompt=)`, `generate(prompts, sampling_params, use_tqdm=)` with prompts of
`prompt_token_ids` (one placeholder for each image; vLLM expands them) and `multi_modal_data`, and of each output
`token_ids`, `logprobs` (a dict of token id -> `.logprob` for each token) and `finish_reason`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from aspo import trust
from aspo.data import load_images
from aspo.generation import TAIL, NextSentence, cut_sentence, decode_behind
from aspo.model import ADAPTER_CONFIG, resolve_model
from aspo.pairs import Options, Row
from aspo.pairs.next_sentences import Candidate, distinct, splitter_of
from aspo.prompts import encode_prompt, end_of_turn, named, tokenizer_of

MISSING = "--engine vllm needs the package vllm, which is not installed: pip install vllm, or leave --engine out"


class VllmSampler:
    """A `Sampler`. Sentences are cut out of `max_new_tokens` tokens each; vLLM cannot be told where a sentence ends."""

    def __init__(self, options: Options, with_logps: bool) -> None:
        path = resolve_model(options["model"])
        if (Path(path) / ADAPTER_CONFIG).is_file():
            raise ValueError(f"--engine vllm loads whole models, and {path} is an adapter: merge it first")
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise ValueError(MISSING) from error
        self.options, self.with_logps = options, with_logps
        self.processor: Any = trust.pretrained(AutoProcessor, path)
        self._parameters = vllm.SamplingParams
        one_image = {"image": 1}  # more are refused: sentences are scored against one image
        self._llm = vllm.LLM(model=path, dtype=options["dtype"], seed=options["seed"], limit_mm_per_prompt=one_image)

    def candidates(
        self, rows: Sequence[Row], beginnings: Sequence[str], count: int, seed: int
    ) -> list[list[Candidate]]:
        """See `aspo.pairs.next_sentences.Sampler`."""
        asked = [named(row, self._prompt, row, text) for row, text in zip(rows, beginnings, strict=True)]
        parameters = [
            self._parameters(
                n=count,
                temperature=self.options["temperature"],
                max_tokens=self.options["max_new_tokens"],
                seed=(seed + place) % 2**31,
                logprobs=1 if self.with_logps else None,
                stop_token_ids=[end],
            )
            for place, (_, end) in enumerate(asked)
        ]
        outputs = self._llm.generate([prompt for prompt, _ in asked], parameters, use_tqdm=False)
        found = []
        for (prompt, _), beginning, output in zip(asked, beginnings, outputs, strict=True):
            tail = prompt["prompt_token_ids"][-TAIL:]
            sentences = [self._sentence(tail, bool(beginning), completion) for completion in output.outputs]
            logp = {sentence.text: value for sentence, value in reversed(sentences)}  # of equal texts the first one's
            found.append([Candidate(s.text, s.ends, logp[s.text]) for s in distinct([s for s, _ in sentences])])
        return found

    def _prompt(self, row: Row, beginning: str) -> tuple[dict[str, Any], int]:
        """vLLM's prompt, and the end-of-turn token behind it."""
        images = load_images(row)
        prompt = encode_prompt(self.processor, row["prompt"], images)
        text = prompt.text + prompt.lead + beginning if beginning else prompt.text
        tokenizer = tokenizer_of(self.processor)
        ids = tokenizer(text, add_special_tokens=prompt.add_special_tokens)["input_ids"]
        made = {"prompt_token_ids": ids, "multi_modal_data": {"image": images}}
        return made, end_of_turn(self.processor, prompt)[-1]

    def _sentence(self, tail: list[int], begun: bool, completion: Any) -> tuple[NextSentence, float | None]:
        """The first sentence of a completion, and its mean log-probability per token."""
        tokenizer, tokens = tokenizer_of(self.processor), list(completion.token_ids)
        text = decode_behind(tokenizer, tail, tokens)
        sentence = cut_sentence(text if begun else text.lstrip(), completion.finish_reason == "stop", self._splitter)
        if not self.with_logps:
            return sentence, None
        length = 0  # the tokens that hold the sentence: the fewest whose text does
        while length < len(tokens) and not decode_behind(tokenizer, tail, tokens[:length]).lstrip().startswith(
            sentence.text.lstrip()
        ):
            length += 1
        logps = [of_token[token].logprob for of_token, token in zip(completion.logprobs, tokens[:length], strict=False)]
        return sentence, sum(logps) / len(logps) if logps else 0.0

    @property
    def _splitter(self) -> Any:
        return splitter_of(self.options)
