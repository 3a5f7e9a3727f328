"""The README and the guides: links lead somewhere, commands parse, configurations and examples hold.

In a guide, a block that begins with ```` ```bash run ```` is run as it stands, with tiny networks for large ones.
"""

import argparse
import ast
import importlib
import json
import re
import runpy
import shlex
import sys
from functools import partial

import pytest
import yaml
from omegaconf import OmegaConf

import rae
from rae.__main__ import main
from rae.config import registry
from rae.config.loading import load_config
from rae.config.sections import Config
from rae.training.checks import check
from tests.conftest import LITE0, ROOT, metrics_of, run, tiny_settings, train_here, write_images
from tests.test_convert import convert
from tests.test_yamls import backbones, overrides  # noqa: F401

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)? ?(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MODULES = {"rae": "rae.__main__", "rae.plan.bench": "rae.plan.bench.__main__"}


def blocks(page, language: str) -> list[tuple[str, str]]:
    """(mark, text) of a page's blocks in a language."""
    return [(mark, text) for found, mark, text in BLOCK.findall(page.read_text()) if found == language]


def anchors(page) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text()))
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


class Parsed(BaseException):  # so that nothing catches it
    """Carries the arguments of a command that would now begin its work."""


def parsed(words: list[str], monkeypatch) -> argparse.Namespace:
    """What a command's parser makes of its words, by running the command up to there."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        raise Parsed(parse(self, args, namespace))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", words)
    if words[0] in MODULES:
        start = importlib.import_module(MODULES[words[0]]).main
    else:
        start = partial(runpy.run_path, words[0], run_name="__main__")
    with pytest.raises(Parsed) as stopped:
        start()
    monkeypatch.undo()
    return stopped.value.args[0]


def ours(line: str) -> list[str]:
    """A shell line's words from our own script or module on, or nothing."""
    words = shlex.split(re.sub(r"\$(\(\(.*?\)\)|SLURM_ARRAY_TASK_COUNT)", "1", line), comments=True)
    if words[:1] == ["srun"]:  # which hands a shell the command
        words = shlex.split(words[-1])
    if "-m" in words and words[words.index("-m") + 1] in MODULES:
        return words[words.index("-m") + 1 :]
    scripts = [i for i, word in enumerate(words) if word == "train.py" or word.startswith("convert/")]
    return words[scripts[0] :] if scripts else []


def lines(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


COMMANDS = [
    pytest.param(words, id=f"{page.stem}: {' '.join(words)[:50]}")
    for page in PAGES
    for _, text in blocks(page, "bash")
    for line in lines(text)
    if (words := ours(line))
]


def written_here() -> dict[str, str]:
    """Configurations that a guide tells its reader to write: blocks that begin with their name."""
    texts = [text for page in PAGES for _, text in blocks(page, "yaml")]
    return {match[1]: text for text in texts if (match := re.match(r"# (\S+\.yaml)\b", text))}


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_parse(words, monkeypatch, tmp_path):
    arguments = parsed(words, monkeypatch)
    if words[0] != "train.py":
        return
    monkeypatch.setenv("RAE_BUCKET", "s3://bucket")
    monkeypatch.setenv("RAE_AUTOENCODER", "exports/mine")
    path = ROOT / arguments.config
    if arguments.config in written_here():
        path = tmp_path / "written.yaml"
        path.write_text(written_here()[arguments.config])
    load_config(str(path), arguments.overrides)


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ([a-z][\w-]+)", page.read_text(), re.MULTILINE)
        assert set(named) <= targets, page


def whole(fragment: dict) -> dict:
    """The demo's configuration with a fragment's keys put in."""
    base = OmegaConf.to_container(OmegaConf.load(ROOT / "yamls/rae_demo.yaml"), resolve=False)
    for key, value in fragment.items():
        other_kind = key == "model" and not value.keys() & base["model"].keys()
        if key in ("data", "model", "trainer") and not other_kind:
            base[key] |= value
        else:
            base[key] = value
    return OmegaConf.to_container(OmegaConf.create(base), resolve=True)


FRAGMENTS = [
    pytest.param(page, text, id=f"{page.stem}: {text[:30]!r}")
    for page in PAGES
    for mark, text in blocks(page, "yaml")
    if mark != "manifest"
]


@pytest.fixture
def registered_for_now(monkeypatch):
    """What a test registers is gone after it: examples bear names that other tests use too."""
    for kind, known in registry._plugins.items():
        registry.plugins(kind)  # the package's own are to stay
        ours = {name: target for name, target in known.items() if target.__module__.startswith("rae.")}
        monkeypatch.setitem(registry._plugins, kind, ours)


@pytest.mark.parametrize(("page", "text"), FRAGMENTS)
def test_configurations_hold(page, text, monkeypatch, tmp_path, registered_for_now):
    monkeypatch.setattr("rae.training.checks._check_path", lambda key, path: None)  # data that a reader has
    monkeypatch.chdir(tmp_path)
    write_examples(page, tmp_path)
    check(Config.model_validate(whole(yaml.safe_load(text))))


def test_manifests_are_yaml():
    manifests = [text for page in PAGES for mark, text in blocks(page, "yaml") if mark == "manifest"]
    assert manifests
    for text in manifests:
        assert all(document["kind"] for document in yaml.safe_load_all(text))


def write_examples(page, folder) -> list[str]:
    """Write the page's Python examples that begin with a file's name; returns the names."""
    named = [(re.match(r"# (\w+\.py)\n", text), text) for _, text in blocks(page, "python")]
    for match, text in named:
        if match:
            (folder / match[1]).write_text(text)
    return [match[1] for match, _ in named if match]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_examples_compile(page):
    for _, text in blocks(page, "python"):
        ast.parse(text)


def texts_in_source():
    """Every text in the source, with anything in the place of what it puts in."""
    for path in [ROOT / "train.py", *sorted((ROOT / "rae").rglob("*.py")), *sorted((ROOT / "convert").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield [part.value if isinstance(part, ast.Constant) else None for part in node.values]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield [part for text in node.value.split("{}") for part in (text, None)][:-1]


@pytest.fixture(scope="module")
def messages() -> list[re.Pattern]:
    """What the source can say, as patterns; those with little text of their own would match anything."""
    return [
        re.compile("".join(".*?" if part is None else re.escape(part) for part in parts))
        for parts in texts_in_source()
        if sum(len(part) for part in parts if part) >= 12
    ]


ERROR_LINES = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", ERROR_LINES)
def test_error_lines_are_the_programs_own(line, messages):
    assert any(pattern.search(line) for pattern in messages)


def test_error_lines_are_found():
    assert len(ERROR_LINES) > 20


def follow(page, tiny: dict[str, list[str]], folder, monkeypatch) -> None:
    """Run a guide's commands: training by its real launcher; what Python alone runs in this process, without imports.

    Args:
        tiny: by YAML, what makes its networks tiny.
    """
    script = "".join(text for mark, text in blocks(ROOT / f"docs/{page}.md", "bash") if mark == "run")
    for line in lines(script):
        words = ["6" if word == "50000" else word for word in shlex.split(line)]
        words += [more for name, overriding in tiny.items() if f"yamls/{name}.yaml" in words for more in overriding]
        match words:
            case ["export", *variables]:
                for name, value in (each.split("=") for each in variables):
                    monkeypatch.setenv(name, value.replace("s3:/", str(folder)))
            case ["python", "-m", "rae", *rest]:
                main(rest)
            case ["python", script, *rest] if script.startswith("convert/"):
                convert(script, *rest)
            case _:
                run(*words, cwd=folder, env={"PYTHONPATH": str(ROOT)})


def test_the_guides_from_zero_to_a_generator_run_as_written(tmp_path, monkeypatch, backbones):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for name in ("convert", "yamls", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_images(tmp_path / "photos/hills", 12)
    write_images(tmp_path / "photos/sea", 12, seed=1)
    tiny = [
        word
        for word in overrides("rae_dino_b", tmp_path, tmp_path / "runs/photos", backbones)
        if not word.startswith(("data.train.path", "data.eval.path", "metrics."))
    ]
    tiny.append("metrics={psnr: {}, ssim: {}}")  # Inception's 2048 features take a minute each time on a CPU
    follow("own-images", {"rae_dino_b": tiny}, tmp_path, monkeypatch)
    made = ["look/index.html", "figures.json", "exports/photos/model.safetensors", "runs/photos/curves.png"]
    made += ["exports/stat.pt"]
    assert [name for name in made if not (tmp_path / name).is_file()] == []
    tiny = [
        word
        for word in overrides("ditdh_s_dino", tmp_path, tmp_path / "runs/generator", backbones)
        if not word.startswith(("data.train.path", "data.eval.path", "model.diffusion.autoencoder"))
    ]
    tiny.append(f"metrics={{frechet: {json.dumps(LITE0)}}}")
    follow("generating", {"ditdh_s_dino": tiny}, tmp_path, monkeypatch)
    made = ["samples/index.html", "samples/labels.csv", "figures.json", "exports/generator/autoencoder/config.json"]
    assert [name for name in made if not (tmp_path / name).is_file()] == []
    assert rae.load("exports/generator").classes == ["hills", "sea"]


def test_the_plugins_of_the_guide_train(shards, tmp_path, monkeypatch, registered_for_now):
    page = ROOT / "docs/plugins.md"
    monkeypatch.chdir(tmp_path)
    settings = tiny_settings(shards, tmp_path / "run")
    settings |= {"imports": write_examples(page, tmp_path), "algorithms": {"edges": {"weight": 0.5}}}
    settings["model"] = {
        "encoder": {"patch_means": {"input_size": 64, "patch_size": 8}},
        "decoder": {"patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 4, "mlp_dim": 96},
    }
    settings["metrics"] = {"worst_pixel": {}}
    settings["trainer"]["max_duration"] = "2ba"
    train_here(settings)
    logged = {name for record in metrics_of(tmp_path / "run") for name in record}
    assert {"loss/train/edges", "metrics/eval/worst_pixel"} <= logged
