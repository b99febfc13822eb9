"""ASPO from Python on the embedded world: make pairs, score their sentences, train, and look at an answer.

python examples/train_from_python.py runs/example        (about a minute on a CPU)
"""

import sys

from aspo.config import AspoConfig
from aspo.generation import generate
from aspo.model import load_model
from aspo.pairs.command import MADE, answer_pairs, judge
from aspo.scorers import load_scorer
from aspo.scores import score_rows
from aspo.trainer import AspoTrainer
from aspo.world.data import rows


def main(output_dir: str) -> None:
    """Train on the pairs of 128 scenes and print one answer before and after."""
    model, processor = load_model("world", device="cpu")
    scenes, (unseen,) = rows("train", n=128), rows("validation", n=1)
    print("before:", generate(model, processor, [unseen])[0])

    answers = answer_pairs(model, processor, scenes, temperature=0.7, max_new_tokens=64)
    pairs = [
        {**scene, "chosen": clean.text, "rejected": noised.text}
        for scene, (clean, noised) in zip(scenes, answers, strict=True)
        if judge(clean, noised) == MADE
    ]
    pairs = list(score_rows(pairs, load_scorer("world")))  # adds chosen_sentences and chosen_similarity

    config = AspoConfig(
        output_dir=output_dir,
        alpha=0.5,
        learning_rate=3e-4,
        per_device_train_batch_size=8,
        logging_steps=2,
        use_cpu=True,
    )
    trainer = AspoTrainer(model, config, train_dataset=pairs, processing_class=processor)
    trainer.train()
    trainer.save_model()  # an adapter that peft's and aspo.model's loaders read
    print("after: ", generate(trainer.model, processor, [unseen])[0])


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/example")
