"""What importing and installing the packages brings along."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import aspo_kernels

ROOT = Path(__file__).parent.parent


def test_aspo_kernels_imports_torch_and_nothing_else() -> None:
    code = (
        "import sys, torch; before = {m.split('.')[0] for m in sys.modules}; import aspo_kernels; "
        "print(*sorted({m.split('.')[0] for m in sys.modules} - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["aspo_kernels"]


def test_installing_asks_for_torch_alone() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [re.split(r"\W", requirement)[0] for requirement in project["dependencies"]] == ["torch"]
    assert set(project["optional-dependencies"]) == {"train", "trl", "ray", "bench", "dev"}


def test_versions_agree() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == aspo_kernels.__version__


def test_constraints_pin_every_direct_requirement() -> None:
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.M))
    names = {name.lower().replace("_", "-") for name in pinned}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in [project["dependencies"], *project["optional-dependencies"].values()]:
        for requirement in group:
            name = re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
            assert name in names, f"{name} is not pinned in constraints.txt"


def test_public_names_exist() -> None:
    missing = [name for name in aspo_kernels.__all__ if not hasattr(aspo_kernels, name)]
    assert not missing


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys, aspo.cli; print('torch' in sys.modules, 'torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_torchvision_and_what_needs_it_import_after_aspo() -> None:
    code = (
        "import aspo, torch, torchvision, open_clip; from transformers import LlavaForConditionalGeneration; "
        "print(torch.ops.torchvision.nms)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "nms" in done.stdout
