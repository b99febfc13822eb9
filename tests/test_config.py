"""Options of transformers' Trainer that an `AspoConfig` refuses, since nothing would come of them."""

import aspo  # noqa: F401  first: it makes torchvision importable on a CPU torch

# isort: split
import pytest

from aspo.config import AspoConfig


@pytest.mark.parametrize("option", [{"include_for_metrics": ["inputs"]}, {"batch_eval_metrics": True}])
def test_what_compute_metrics_would_read_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* is not supported: evaluation takes no compute_metr"):
        AspoConfig(output_dir=str(tmp_path), use_cpu=True, **option)
