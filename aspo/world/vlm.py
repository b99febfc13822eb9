"""The world's vision-language model: a small Llama that reads CLIP's frozen patch features, and its base training."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import (
    CLIPModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from aspo.world.clip import BOS, EOS, IMAGE, PAD, SPECIAL_TOKENS, image_processor
from aspo.world.data import base_training
from aspo.world.gates import prompt_ids, tower_features
from aspo.world.pixels import pixels
from aspo.world.scenes import CELL, IMAGE_TOKENS
from aspo.world.tokenizer import CHAT_TEMPLATE


@dataclass(frozen=True)
class BaseTraining:
    """How the base model is trained: `scenes` distinct scenes, gone through again and again until `steps` are done."""

    scenes: int = 12000
    steps: int = 600
    batch_size: int = 64
    lr: float = 2e-3
    question_share: float = 0.25


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Image processor, tokenizer and chat template in one."""
    return LlavaProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer,
        patch_size=CELL,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,  # CLIP's class token, which the "default" strategy then drops
    )


def build_vlm(clip: CLIPModel, vocab_size: int) -> LlavaForConditionalGeneration:
    """A LLaVA with CLIP's tower copied in, the rest untrained."""
    ids = {name: SPECIAL_TOKENS.index(token) for name, token in (("pad", PAD), ("bos", BOS), ("eos", EOS))}
    text_config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=512,
        pad_token_id=ids["pad"],
        bos_token_id=ids["bos"],
        eos_token_id=ids["eos"],
    )
    config = LlavaConfig(
        vision_config=clip.config.vision_config,
        text_config=text_config,
        image_token_index=SPECIAL_TOKENS.index(IMAGE),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(clip.vision_model.state_dict())
    model.model.vision_tower.requires_grad_(False)
    model.generation_config = GenerationConfig(
        pad_token_id=ids["pad"], bos_token_id=ids["bos"], eos_token_id=ids["eos"], max_new_tokens=64
    )
    return model


def _batches(
    processor: LlavaProcessor, model: LlavaForConditionalGeneration, training: BaseTraining
) -> Iterator[tuple]:
    """(features, ids, labels) for ever; the rows padded on the right, labels -100 but on the answer's tokens."""
    eos = processor.tokenizer.eos_token
    examples = list(islice(base_training(question_share=training.question_share), training.scenes))
    chunks = [examples[i : i + 512] for i in range(0, len(examples), 512)]
    features = torch.cat([tower_features(model, pixels([scene for scene, _, _ in chunk])) for chunk in chunks])
    rows = [
        (prompt_ids(processor, prompt), processor.tokenizer(answer + eos).input_ids) for _, prompt, answer in examples
    ]
    generator = torch.Generator().manual_seed(0)
    while True:
        for index in torch.randperm(len(rows), generator=generator).split(training.batch_size):
            batch = [rows[i] for i in index]
            longest = max(len(prompt) + len(answer) for prompt, answer in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            labels = torch.full_like(ids, -100)
            for r, (prompt, answer) in enumerate(batch):
                ids[r, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
                labels[r, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
            yield features[index], ids, labels


def base_loss(model: LlavaForConditionalGeneration, features: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens, from the tower's features rather than the images."""
    embeds = model.get_input_embeddings()(ids)
    projected = model.model.multi_modal_projector(features)
    embeds = embeds.masked_scatter((ids == model.config.image_token_index)[..., None], projected)
    hidden = model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state[:, :-1]
    counted = labels[:, 1:] != -100
    return nn.functional.cross_entropy(model.lm_head(hidden[counted]), labels[:, 1:][counted])


def train_vlm(
    clip: CLIPModel,
    processor: LlavaProcessor,
    training: BaseTraining,
    log: Callable[[str], None] = print,
    watch: Callable[[int, LlavaForConditionalGeneration], None] | None = None,
) -> LlavaForConditionalGeneration:
    """Train projector and Llama on base scenes' true answers. `watch(step, model)` is called before each step."""
    torch.manual_seed(0)
    model = build_vlm(clip, len(processor.tokenizer)).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, betas=(0.9, 0.98), weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, training.lr, total_steps=training.steps + 1, pct_start=0.06, cycle_momentum=False
    )
    start = time.time()
    for step, batch in enumerate(islice(_batches(processor, model, training), training.steps)):
        if watch:
            watch(step, model)
        loss = base_loss(model, *batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == training.steps - 1:
            log(f"vlm step {step} loss {loss.item():.3f} {time.time() - start:.0f} s")
    return model.eval()
