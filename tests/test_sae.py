"""The sparse autoencoder of deviations: its formulas against the explicit d * d ones, memory, training, files."""

import json
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aspo.negatives.sae import (
    BilinearSae,
    Deviations,
    SaeConfig,
    latent_examples,
    load_sae,
    save_sae,
    train_sae,
)

SMALL = SaeConfig(image_dim=7, text_dim=5, latents=6, rank=3, gamma=0.7, rho=0.1)


def unit(*shape, seed=0):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1)


def small_batch(n=11):
    return unit(n, 7, seed=1) - unit(n, 7, seed=2), unit(n, 5, seed=3)


def explicit(sae, dv, text):
    """Codes, error and loss with d = vec(dv h^T), every W_j and D_j as full matrices."""
    d = torch.einsum("bi,bj->bij", dv, text)
    w = torch.einsum("jri,jrk->jik", sae.encoder_image, sae.encoder_text)
    decoder = torch.einsum("jri,jrk->jik", sae.decoder_image, sae.decoder_text)
    z = torch.sigmoid(torch.einsum("bik,jik->bj", d, w) + sae.encoder_bias)
    reconstruction = torch.einsum("bj,jik->bik", z, decoder[:-1]) + decoder[-1]
    error = (d - reconstruction).square().sum((1, 2))
    rho, mean = sae.config.rho, z.mean(0)
    kl = (rho * torch.log(rho / mean) + (1 - rho) * torch.log((1 - rho) / (1 - mean))).sum()
    return z, error, error.mean() + sae.config.gamma * kl


def test_codes_error_and_loss_are_the_explicit_ones_and_so_are_the_gradients():
    sae = BilinearSae(SMALL).double()
    torch.nn.init.normal_(sae.decoder_image[-1], std=0.3)  # the bias begins at 0; here it is to count
    dv, text = small_batch()
    z, error, loss = explicit(sae, dv, text)
    torch.testing.assert_close(sae.codes(dv, text), z)
    torch.testing.assert_close(sae.error(dv, text, sae.codes(dv, text)), error)
    torch.testing.assert_close(sae.loss(dv, text), loss)
    ours = torch.autograd.grad(sae.loss(dv, text), list(sae.parameters()))
    for name, mine, theirs in zip(
        dict(sae.named_parameters()), ours, torch.autograd.grad(loss, list(sae.parameters())), strict=True
    ):
        torch.testing.assert_close(mine, theirs, msg=name)
        assert mine.abs().max() > 0, name


def test_a_prompt_is_shared_by_all_candidates_of_a_row():
    sae = BilinearSae(SMALL).double()
    dv, text = small_batch(12)
    dv, text = dv.view(3, 4, 7), text[:3]
    z = sae.codes(dv, text.unsqueeze(1))
    repeated = text.unsqueeze(1).expand(3, 4, 5)
    torch.testing.assert_close(z, explicit(sae, dv.flatten(0, 1), repeated.flatten(0, 1))[0].view(3, 4, 6))
    torch.testing.assert_close(sae.error(dv, text.unsqueeze(1), z), sae.error(dv, repeated, z))


def test_fp32_error_is_right_where_the_reconstruction_is_nearly_exact():
    """The formula subtracts large numbers; what is left of a small error must still be its size."""
    sae = BilinearSae(SMALL).double()
    dv, text = small_batch()
    z = sae.codes(dv, text)
    true = sae.error(dv, text, z)
    rounded = sae.float().error(dv.float(), text.float(), z.float())
    torch.testing.assert_close(rounded.double(), true, rtol=0, atol=2e-6 * true.max().item())


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.numel())
        return out


def test_nothing_of_size_d_times_d_is_made():
    """At d = 768 a d * d vector of each of 64 deviations would be 38 million numbers."""
    dim, batch = 768, 64
    sae = BilinearSae(SaeConfig(dim, dim))
    dv, text = torch.randn(batch, dim) / dim**0.5, torch.randn(batch, dim) / dim**0.5
    with Largest() as seen:
        sae.loss(dv, text).backward()
    units = (sae.config.latents + 1) * sae.config.rank
    assert seen.numel <= units * max(dim, units)
    assert seen.numel < dim * dim  # not even one d * d matrix


def data(rows=20, images=40, dim=8):
    return Deviations(unit(rows, dim, seed=4).float(), unit(rows, 5, seed=5).float(), unit(images, dim, seed=6).float())


def test_training_explains_deviations_keeps_rho_and_repeats_itself():
    config = SaeConfig(8, 5, latents=64)
    before = BilinearSae(config, seed=3)
    seen = []
    sae, figures = train_sae(data(), config, steps=300, batch_size=128, seed=3, progress=seen.append)
    dv, text, _, _ = data().sample(1000, torch.Generator().manual_seed(9))
    with torch.no_grad():
        first = before.error(dv, text, before.codes(dv, text)).mean()
        last = sae.error(dv, text, sae.codes(dv, text)).mean()
    assert last < 0.5 * first and figures["explained"] > 0.7
    assert figures["explained"] == pytest.approx(1 - float(last / (dv.square().sum(-1)).mean()), abs=0.03)
    assert figures["mean_code"] == pytest.approx(config.rho, abs=0.02) and sum(seen) == 300
    torch.testing.assert_close(sae.code_mean, sae.codes(dv, text).mean(0), atol=0.02, rtol=0)
    again, same = train_sae(data(), config, steps=300, batch_size=128, seed=3)
    assert same == figures
    torch.testing.assert_close(again.state_dict(), sae.state_dict(), rtol=0, atol=0)


def test_sparsity_pulls_the_mean_code_to_rho():
    """Without the penalty the mean code leaves rho; with it, it stays."""
    strayed, kept = (
        train_sae(data(), SaeConfig(8, 5, latents=16, gamma=gamma), steps=200, batch_size=128)[1]["sparsity"]
        for gamma in (0.0, 1.0)
    )
    assert kept < 0.05 < strayed


def test_saved_and_loaded_it_is_the_same(tmp_path):
    sae, figures = train_sae(data(), SaeConfig(8, 5, latents=4), steps=3)
    save_sae(sae, tmp_path / "sae.safetensors", {"figures": figures})
    loaded, about = load_sae(tmp_path / "sae.safetensors")
    assert about == {"figures": figures} and loaded.config == sae.config
    torch.testing.assert_close(loaded.state_dict(), sae.state_dict(), rtol=0, atol=0)
    (tmp_path / "broken.safetensors").write_bytes(b"no such file")
    with pytest.raises(ValueError, match=r"broken.safetensors is no autoencoder.*delete it"):
        load_sae(tmp_path / "broken.safetensors")


def test_latents_are_listed_by_what_activates_them():
    sae, _ = train_sae(data(), SaeConfig(8, 5, latents=4), steps=50)
    listed = latent_examples(sae, data(), top=3, sample=500)
    assert sorted(latent["latent"] for latent in listed) == [0, 1, 2, 3]
    deviations = [latent["std"] for latent in listed]
    assert deviations == sorted(deviations, reverse=True)
    for latent in listed:
        assert len({example["row"] for example in latent["top"]}) == len(latent["top"]) == 3
        for example in latent["top"]:
            dv = data().right[example["row"]] - data().pool[example["image"]]
            code = sae.codes(dv, data().text[example["row"]])[latent["latent"]]
            assert example["code"] == pytest.approx(float(code), abs=1e-4)
            assert example["code"] >= latent["mean"]
    json.dumps(listed)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SaeConfig(8, 5, latents=0), "latents is 0"),
        (lambda: SaeConfig(8, 5, rho=1.0), r"rho is 1\.0"),
        (lambda: SaeConfig(8, 5, gamma=math.nan), "gamma is nan"),
        (lambda: train_sae(data(images=1), SaeConfig(8, 5)), "the pool has 1 images"),
        (
            lambda: train_sae(data()._replace(text=torch.full((20, 5), math.nan)), SaeConfig(8, 5)),
            "text holds features",
        ),
    ],
)
def test_bad_settings_and_data(make, message):
    with pytest.raises(ValueError, match=message):
        make()
