"""A sequence cut over processes: each holds a part of every row, and all get the same loss. A few seconds on a CPU.

    torchrun --nproc_per_node 2 examples/sequence_parallel.py

A toy transformer layer whose queries see the keys and values of all processes stands for context parallelism (on GPUs:
accelerate's ParallelismConfig with cp_size or sp_size). It is trained beside the same model on whole rows in one
process, and both end with the same weights, within rounding.
"""

import copy

import torch
import torch.distributed as dist

from aspo_kernels import SentenceLayout, SequenceShard, sentence_dpo_loss

VOCABULARY, WIDTH, PROMPT, LENGTH, PAIRS = 50, 32, 6, 30, 4


class Gather(torch.autograd.Function):
    """(R, T_local, ...) of all processes as (R, T, ...); the gradients that come back are summed over them."""

    @staticmethod
    def forward(ctx, part: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


class ToyModel(torch.nn.Module):
    """Embedding -> causal attention -> hidden states, with an output head (V, H) beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.place = torch.nn.Embedding(LENGTH, WIDTH)
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor, columns: torch.Tensor, cut: bool) -> torch.Tensor:
        """(R, T_local) tokens at these columns -> (R, T_local, H). cut: other processes have the other columns."""
        x = self.embed(tokens) + self.place(columns)
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        at = columns
        if cut:
            key, value, at = Gather.apply(key), Gather.apply(value), Gather.apply(columns[None])[0]
        seen = at <= columns[:, None]
        return x + torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)


def loss_of(model: ToyModel, reference: ToyModel, tokens: torch.Tensor, columns: torch.Tensor, cut: bool):
    # Made of whole rows in every process: which token each position predicts, and in which sentence it is.
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=-100)
    labels[:, : PROMPT - 1] = -100
    layout = SentenceLayout.from_labels(labels, (torch.arange(LENGTH) // 8).expand_as(labels) - (PROMPT - 1) // 8)
    similarity = torch.linspace(0.1, 0.4, layout.chosen_sentences.numel())
    sequence = None
    if cut:
        sequence = SequenceShard.of_columns(layout.hidden_index, layout.padded_shape, columns)  # who has which token
    with torch.no_grad():
        ref_hidden = reference(tokens[:, columns], columns, cut)
    hidden = model(tokens[:, columns], columns, cut)
    return sentence_dpo_loss(
        hidden, model.head.weight, layout, ref_hidden=ref_hidden, ref_head=reference.head.weight,
        similarity=similarity, sequence=sequence,
    ).loss  # fmt: skip


dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)  # in every process the same model and the same batches
policy = ToyModel()
reference = copy.deepcopy(policy).requires_grad_(False)
alone = copy.deepcopy(policy)
optimizers = [torch.optim.SGD(model.parameters(), lr=0.5) for model in (policy, alone)]
mine = torch.arange(LENGTH).tensor_split(size)[rank]
assert LENGTH % size == 0, "this toy's gathering takes equal parts"

for step in range(10):
    tokens = torch.randint(VOCABULARY, (2 * PAIRS, LENGTH))  # chosen rows, then rejected rows
    loss = loss_of(policy, reference, tokens, mine, cut=True)
    loss.backward()
    for parameter in policy.parameters():  # each process has its tokens' share: grad="sum" of SequenceShard
        dist.all_reduce(parameter.grad)
    whole = loss_of(alone, reference, tokens, torch.arange(LENGTH), cut=False)
    whole.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    if rank == 0 and step % 3 == 0:
        print(f"step {step}  loss {loss.item():.6f} cut over {size} processes, {whole.item():.6f} in one")

apart = max((a - b).abs().max().item() for a, b in zip(policy.parameters(), alone.parameters(), strict=True))
moved = max((a - b).abs().max().item() for a, b in zip(policy.parameters(), reference.parameters(), strict=True))
assert apart < 1e-5 * max(moved, 1.0), f"the weights differ by {apart}"
if rank == 0:
    print(f"the weights moved by up to {moved:.3f} and differ by up to {apart:.1e}")
dist.destroy_process_group()
