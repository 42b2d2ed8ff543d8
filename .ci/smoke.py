"""What a user has who installed the wheel: run in that environment, outside of the repository."""

import importlib.metadata
import sys
from pathlib import Path

import timm
import torch

import autogate
import rewriters

for package in (autogate, rewriters):
    folder = Path(package.__file__).parent
    assert folder.is_relative_to(sys.prefix), f"{package.__name__} is not the wheel's: {folder}"
    assert (folder / "py.typed").is_file(), f"{package.__name__} has lost its py.typed"

found = importlib.metadata.distribution("autogate")
assert found.version == autogate.__version__, f"{found.version} is not {autogate.__version__}"
files = {str(file) for file in found.files or ()}
others = {file.split("/")[0] for file in files} - {"autogate", "rewriters", f"autogate-{found.version}.dist-info"}
assert others <= {"..", "__pycache__"}, f"the wheel also holds {others}"
assert any(file.endswith("licenses/LICENSE") for file in files), "the licence is missing"

model = autogate.prepare(timm.create_model("test_resnet", num_classes=10))
with torch.no_grad():
    autogate.gates(model).alpha[::2] = 0
slim = autogate.finalize(model, warn=False).eval()
autogate.save(slim, "slim.safetensors")
example = torch.randn(2, 3, 64, 64)
assert torch.equal(autogate.load("slim.safetensors")(example), slim(example))
print(f"autogate {found.version}: the wheel works")
