"""Systems of one seed start from the same LoRA weights and see the same rows in the same order: `aspo compare` pairs
them by seed, so that their differences hold nothing of the start or the order."""

import aspo  # isort: skip  # noqa: F401  (first: it makes torchvision importable on a CPU torch)
import pytest
import torch
from tiny import tiny_image, tiny_llava, tiny_rows

from aspo.config import AspoConfig
from aspo.model import load_model
from aspo.trainer import AspoTrainer

ROWS, BATCH, EPOCHS = 10, 4, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llava(tmp_path_factory.mktemp("same_start") / "llava")


@pytest.fixture
def trained(folder, tmp_path):
    """trained(loss_type, seed) -> (LoRA's start, the ids of every step's rows) of a run of two epochs."""

    def run(loss_type, seed=3):
        rows = tiny_rows(ROWS)
        if loss_type == "misp":  # the same rows, and what this system alone reads
            rows = [{**row, "negative_images": [tiny_image("blue"), tiny_image("green")]} for row in rows]
        model, processor = load_model(folder)
        args = AspoConfig(
            output_dir=str(tmp_path / f"{loss_type}-{seed}"), loss_type=loss_type, seed=seed, learning_rate=1e-2,
            num_train_epochs=EPOCHS, per_device_train_batch_size=BATCH, lora_r=4, save_strategy="no",
            logging_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = AspoTrainer(model, args, rows, None, processor)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        seen = []
        step = trainer.training_step

        def noted(model, inputs, *more):
            seen.append(inputs["ids"])
            return step(model, inputs, *more)

        trainer.training_step = noted
        trainer.train()
        moved = [name for name, p in trainer.model.named_parameters() if p.requires_grad and (p != start[name]).any()]
        assert len(moved) == len(start)  # the systems do go their own ways between the epochs
        return start, seen

    return run


def test_systems_of_one_seed_share_their_start_and_their_rows(trained):
    start, seen = trained("dpo")
    assert {name.rpartition("lora_")[2][0] for name in start} == {"A", "B"}
    per_epoch = len(seen) // EPOCHS
    epochs = [[row for ids in seen[k * per_epoch : (k + 1) * per_epoch] for row in ids] for k in range(EPOCHS)]
    every = sorted(row["id"] for row in tiny_rows(ROWS))
    assert [sorted(ids) for ids in epochs] == [every] * EPOCHS and epochs[0] != epochs[1] != every
    for other in ("aspo", "misp"):
        other_start, other_seen = trained(other)
        assert other_start.keys() == start.keys()
        assert all(torch.equal(other_start[name], start[name]) for name in start), other
        assert other_seen == seen, other
    other_start, other_seen = trained("aspo", seed=4)
    assert not any(torch.equal(other_start[name], start[name]) for name in start if "lora_A" in name)
    assert other_seen != seen
