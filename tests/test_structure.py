"""The house: folders import only what their first lines say, files go round in no circle, and none is too large."""

import ast
import re
import subprocess
import sys
import textwrap
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rae
from tests.conftest import ROOT

HOUSE = ROOT / "rae"
FILES = sorted(HOUSE.rglob("*.py"))
FOLDERS = sorted(path.parent for path in HOUSE.glob("*/__init__.py"))
KNOW_COMPOSER = {"autoencoder/model.py", "diffusion/model.py", "algorithms", "callbacks", "training", "plan"}
"""Who imports Composer when it is imported; others do where they need it, if ever."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, at_once: bool = False) -> set[str]:
    """Modules that a file imports; with ``at_once`` those that importing it imports."""
    tree, found = ast.parse(path.read_text()), set()
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def allowed(folder: Path) -> set[str]:
    """The folders that a folder says it may import."""
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    named = re.search(r"^May import: (.*?)\.", said, re.MULTILINE | re.DOTALL)
    assert named, f"{folder.name}/__init__.py does not say what it may import"
    assert len(said.splitlines()) <= 6, f"{folder.name}/__init__.py says more than a line or two"
    return set(re.findall(r"\w+", named[1])) & {each.name for each in FOLDERS}


def test_a_listing_reads_like_a_table_of_contents():
    listed = {path.name for path in HOUSE.iterdir() if path.name != "__pycache__"}
    assert len(listed) <= 16, sorted(listed)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folders_import_what_they_say(folder):
    found = {name.split(".")[1] for path in folder.rglob("*.py") for name in imports(path) if name.startswith("rae.")}
    assert found & {each.name for each in FOLDERS} - {folder.name} == allowed(folder) - {folder.name}


def test_folders_and_files_go_round_in_no_circle():
    TopologicalSorter({folder.name: allowed(folder) for folder in FOLDERS}).prepare()
    known = {module_of(path) for path in FILES}
    # A folder's __init__ gathers what its files register: that they import each other is what it is for.
    graph = {module_of(path): imports(path) & known for path in FILES if path.name != "__init__.py"}
    TopologicalSorter(graph).prepare()


def test_only_some_know_composer_from_the_start():
    for path in FILES:
        inside = path.relative_to(HOUSE)
        if not {str(inside), inside.parts[0]} & KNOW_COMPOSER:
            roots = {name.split(".")[0] for name in imports(path, at_once=True)}
            assert "composer" not in roots, inside


def test_the_method_needs_torch_and_timm_alone(tmp_path):
    """In a process where nothing else that the project depends on can be imported."""
    listed = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    apart = re.search(r"^composer = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    named = re.findall(r'"(.*?)"', listed[1] + apart[1])
    packages = {re.match(r"[\w.-]+", each)[0].lower() for each in named}
    needed = {"torch", "torchvision", "timm", "pyyaml", "safetensors", "huggingface_hub", "pillow"}  # timm's own,
    needed |= {"numpy", "tqdm", "requests", "packaging"}  # and theirs
    modules = {"mosaicml": "composer", "mosaicml-streaming": "streaming", "torch-fidelity": "torch_fidelity"}
    hidden = sorted(modules.get(name, name) for name in packages - needed)
    assert {"composer", "streaming", "pydantic", "omegaconf", "transformers", "torchmetrics"} <= set(hidden)
    script = f"""
import sys
for name in {hidden}:
    sys.modules[name] = None  # its import fails
import torch
from rae.autoencoder import backbones, decoder, discriminator, encoders, layers, losses, winograd
from rae.autoencoder.rae import RAE
encoder = encoders.timm.Timm("tf_efficientnet_lite0", weights="random", input_size=64)
made = RAE(encoder, decoder.Decoder(encoder.embed_dim, 32, embed_dim=48, depth=1, num_heads=4, mlp_dim=96), 0.8)
image = torch.rand(2, 3, 32, 32)
recon = made(image)
judge = discriminator.timm_discriminator("tf_efficientnet_lite0", [1], "random", input_size=64)
(losses.l1()(recon, image) + losses.linear_g_loss(judge(recon))).backward()
assert made.decoder.head.weight.grad.abs().sum() > 0
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def head(path: Path) -> str:
    """What a file says first."""
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0].rstrip(".")


def house_map() -> str:
    """Every folder with what it says first and its files; the doors at the top, the ground at the bottom."""
    depths: dict[str, int] = {}
    for name in TopologicalSorter({folder.name: allowed(folder) for folder in FOLDERS}).static_order():
        depths[name] = 1 + max((depths[other] for other in allowed(HOUSE / name)), default=0)
    lines = ["rae/"]
    for name in sorted(depths, key=lambda name: (-depths[name], name)):
        inside = [path for path in (HOUSE / name).iterdir() if not path.name.startswith("__")]
        names = {f"{path.name}/" if path.is_dir() else path.stem for path in inside}
        lines.append(f"  {name + '/':14}{head(HOUSE / name / '__init__.py')}")
        wrapped = textwrap.wrap(" ".join(sorted(names)), 96)
        lines += [f"{'':16}{line}" for line in wrapped]
    files = [path for path in HOUSE.glob("*.py") if not path.name.startswith("__")]
    return "\n".join([*lines, *(f"  {path.stem:14}{head(path)}" for path in files)])


def test_the_readmes_map_is_the_house():
    assert house_map() in (ROOT / "README.md").read_text(), f"the README's map is to be\n{house_map()}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(HOUSE)))
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{path.name}:{node.lineno} {node.name}"


def test_what_is_installed_apart_is_named_once():
    """pyproject.toml, requirements.txt, README, and what is said when it is not there."""
    group = re.search(r"^composer = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert re.findall(r'"(.*?)"', group) == list(rae.APART)
    locked = (ROOT / "requirements.txt").read_text()
    assert set(rae.APART) <= set(locked.splitlines())
    assert "://" not in locked
    assert f"pip install --no-deps {' '.join(rae.APART)}" in (ROOT / "README.md").read_text()
    hide = "import sys; sys.path_importer_cache.clear(); sys.path = [p for p in sys.path if 'site-packages' not in p]"
    script = f"{hide}; import rae\ntry:\n    import streaming\nexcept rae.config.errors.UserError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"streaming is not installed: pip install --no-deps {' '.join(rae.APART)}"
