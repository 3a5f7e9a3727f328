"""Files import only from their own group and from groups to the left, and the method knows no Composer."""

import ast

from tests.conftest import ROOT

GROUPS = [
    {"registry", "config", "processes"},
    {"storage"},
    {"layers", "backbones", "optimizers", "operations", "winograd"},
    {"encoders", "decoder", "discriminator", "losses", "data", "metrics"},
    {"shards", "checkpoints", "images"},
    {"parts"},
    {"latents", "conversion", "verification"},
    {"model", "exports", "published", "diffusers_format", "card"},
    {"algorithms", "callbacks", "evaluation"},
    {"parallelism", "resume", "compilation"},
    {"run", "curves", "reconstruction"},
    {"gallery", "plan"},
    {"sources", "handover", "inspection", "comparison"},
    {"commands"},
    {"demo", "bench", "__main__"},
]
KNOWS_COMPOSER = {"model", "algorithms", "callbacks", "parallelism", "resume", "run", "plan", "bench"}


def modules():
    for path in sorted((ROOT / "rae").rglob("*.py")):
        part = path.relative_to(ROOT / "rae").parts[0].removesuffix(".py")
        if part != "__init__":
            yield path, part


def imported(path, top_level_only=False):
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_dependencies_point_left():
    order = {name: i for i, group in enumerate(GROUPS) for name in group}
    for path, part in modules():
        for name in imported(path):
            if name.startswith("rae."):
                assert order[name.split(".")[1]] <= order[part], f"{path} imports {name}"


def test_only_some_modules_know_composer():
    for path, part in modules():
        if part not in KNOWS_COMPOSER:
            assert not [n for n in imported(path, top_level_only=True) if n.split(".")[0] == "composer"], path
