"""The world's vision-language model: a small Llama that reads CLIP's frozen patch features, and its base training."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

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
from aspo.world.data import Turn, base_training
from aspo.world.gates import prompt_ids, tower_features
from aspo.world.pixels import pixels
from aspo.world.scenes import CELL, IMAGE_TOKENS
from aspo.world.tokenizer import CHAT_TEMPLATE


@dataclass(frozen=True)
class BaseTraining:
    """How the base model is trained: `scenes` distinct scenes, gone through again and again until `steps` are done."""

    scenes: int = 14000
    steps: int = 900
    batch_size: int = 64
    lr: float = 2e-3


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


def encode(processor: LlavaProcessor, turns: list[Turn]) -> tuple[list[int], list[int]]:
    """(ids, labels) of a conversation about one image; labels are -100 but on the answers' tokens and their </s>."""
    tokenizer = processor.tokenizer
    ids: list[int] = []
    labels: list[int] = []
    for i, (prompt, answer) in enumerate(turns):
        before = prompt_ids(processor, prompt) if i == 0 else tokenizer(f"USER:\n{prompt}\nASSISTANT:\n").input_ids
        said = tokenizer(answer + tokenizer.eos_token).input_ids
        ids += before + said
        labels += [-100] * len(before) + said
    return ids, labels


def _batches(
    processor: LlavaProcessor, model: LlavaForConditionalGeneration, training: BaseTraining
) -> Iterator[tuple]:
    """(features, ids, labels) for ever, padded on the right: two batches of descriptions, then one of questions, which
    are longer and so half as many."""
    examples = list(islice(base_training(), training.scenes))
    chunks = [examples[i : i + 512] for i in range(0, len(examples), 512)]
    features = torch.cat([tower_features(model, pixels([scene for scene, _ in chunk])) for chunk in chunks])
    rows = [encode(processor, turns) for _, turns in examples]
    generator = torch.Generator().manual_seed(0)

    def endless(asks: bool, size: int) -> Iterator[Tensor]:
        index = torch.tensor([i for i, (_, turns) in enumerate(examples) if (len(turns) > 1) == asks])
        while True:
            yield from index[torch.randperm(len(index), generator=generator)].split(size)

    describing, asking = endless(False, training.batch_size), endless(True, training.batch_size // 2)
    for step in count():
        index = next(asking if step % 3 == 2 else describing)
        longest = max(len(rows[i][0]) for i in index)
        ids = torch.zeros(len(index), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for r, i in enumerate(index):
            ids[r, : len(rows[i][0])] = torch.tensor(rows[i][0])
            labels[r, : len(rows[i][1])] = torch.tensor(rows[i][1])
        yield features[index], ids, labels


def base_loss(model: LlavaForConditionalGeneration, features: Tensor, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the answers' tokens, from the tower's features (B, 9, W) rather than the images."""
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
        if step % 100 in (0, 2) or step == training.steps - 1:
            log(f"vlm step {step} loss {loss.item():.3f} {time.time() - start:.0f} s")
    return model.eval()
