"""ASPO inside TRL on the embedded world: TRL's trainer, rows and options, our loss.

python examples/train_with_trl.py runs/trl        (about a minute on a CPU; needs trl >= 1.14)
"""

import sys

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
from datasets import Dataset
from peft import LoraConfig

from aspo.generation import generate
from aspo.integrations.trl import AspoDPOConfig, AspoDPOTrainer
from aspo.model import load_model
from aspo.pairs.command import MADE, answer_pairs, judge
from aspo.policy import lora_targets
from aspo.scorers import load_scorer
from aspo.scores import score_rows
from aspo.world.data import rows


def main(output_dir: str) -> None:
    """Train on the pairs of 128 scenes and print one answer before and after."""
    model, processor = load_model("world", device="cpu")
    scenes, (unseen,) = rows("train", n=128), rows("validation", n=1)
    print("before:", generate(model, processor, [unseen])[0])

    answers = answer_pairs(model, processor, scenes, temperature=0.7, max_new_tokens=64)
    pairs = [
        {"prompt": s["prompt"], "images": s["images"], "chosen": clean.text, "rejected": noised.text}
        for s, (clean, noised) in zip(scenes, answers, strict=True)
        if judge(clean, noised) == MADE
    ]
    scored = score_rows(pairs, load_scorer("world"))  # adds chosen_sentences and chosen_similarity

    trainer = AspoDPOTrainer(
        model,
        args=AspoDPOConfig(
            output_dir=output_dir,
            loss_type=["aspo"],
            alpha=0.5,
            learning_rate=3e-4,
            per_device_train_batch_size=8,
            num_train_epochs=1,
            logging_steps=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(list(scored)),
        processing_class=processor,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=lora_targets(model)),
    )
    trainer.train()
    trainer.save_model()
    print("after: ", generate(trainer.model, processor, [unseen])[0])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/trl")
