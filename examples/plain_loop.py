"""ASPO in a plain training loop: a toy model of torch modules, text only, a few seconds on a CPU.

    python examples/plain_loop.py

Any model fits that gives the hidden states before its output head; the logits are never built.
"""

import copy

import torch

from aspo_kernels import SentenceLayout, sentence_dpo_loss

VOCABULARY, WIDTH, EOS, PERIOD, IGNORE = 50, 32, 1, 2, -100


class ToyModel(torch.nn.Module):
    """Embedding -> GRU -> hidden states (R, T, H), with an output head (V, H) beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.trunk = torch.nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.trunk(self.embed(tokens))[0]


def answers(low: int, high: int) -> torch.Tensor:
    """(B, T) answers of three sentences of five tokens and EOS, their words drawn from [low, high)."""
    tokens = torch.randint(low, high, (8, 16))
    tokens[:, 4::5] = PERIOD
    tokens[:, -1] = EOS
    return tokens


torch.manual_seed(0)
policy = ToyModel()
reference = copy.deepcopy(policy).requires_grad_(False)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)

for step in range(30):
    prompt = torch.randint(3, VOCABULARY, (8, 4)).repeat(2, 1)  # chosen rows 0..7, rejected rows 8..15
    tokens = torch.cat([prompt, torch.cat([answers(3, 25), answers(25, VOCABULARY)])], dim=1)

    # labels[r, t] is the token that position (r, t) predicts; the prompt is not counted
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE)
    labels[:, :3] = IGNORE
    # a sentence is what came after the last period; EOS belongs to the sentence before it
    ended = torch.nn.functional.pad((labels == PERIOD).cumsum(1)[:, :-1], (1, 0))
    layout = SentenceLayout.from_labels(labels, ended.clamp(max=2), eos_token_id=EOS)
    similarity = torch.rand(layout.chosen_sentences.numel())  # here your sentence-image cosines

    with torch.no_grad():
        ref_hidden = reference(tokens)
    out = sentence_dpo_loss(
        policy(tokens), policy.head.weight, layout, ref_hidden=ref_hidden, ref_head=reference.head.weight,
        similarity=similarity,
    )  # fmt: skip
    out.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0 or step == 29:
        margin, weight = out.margins.mean().item(), out.sentence_weights.mean().item()
        print(f"step {step:2d}  loss {out.loss.item():.4f}  margin {margin:6.3f}  mean sentence weight {weight:.2f}")
