"""``reconstruct``: pictures and figures of images, and the page that shows them, as a user gets them."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.models import vgg16

from rae.__main__ import main
from rae.autoencoder.layers import fixed_latent_noise
from rae.config.errors import UserError
from rae.data.images import open_images
from rae.evaluation.filenames import FileNames
from rae.evaluation.gallery import choose, write_gallery
from rae.evaluation.pictures import SCALE, colours, comparison, difference_map
from rae.evaluation.reconstruction import Reconstruction, Record, build_figures, summarize, write_figures
from rae.exchange.sources import open_source
from tests.conftest import PATIENCE, write_images

METRICS = "metrics={psnr: {}, ssim: {}, feature_distance: {model: tf_efficientnet_lite0, weights: random, levels: [0]}}"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def reconstruct(*words) -> None:
    main(["reconstruct", "--workers=0", "--device=cpu", "--set", METRICS, *map(str, words)])


def pixels(path: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def figures_of(out: Path) -> dict:
    return json.loads((out / "figures.json").read_text())


@pytest.fixture(scope="module")
def out(undisturbed, shards, tmp_path_factory) -> Path:
    """The twelve evaluation images of the tiny run, with one noise level."""
    path = tmp_path_factory.mktemp("reconstruct") / "out"
    reconstruct(undisturbed, shards / "images-eval", "--tau=0.5", "--batch-size=5", "--out", path)
    return path


@pytest.fixture(scope="module")
def source(undisturbed):
    return open_source(str(undisturbed))


def test_pictures_are_the_models(out, source, shards):
    names = sorted(path.name for path in out.iterdir())
    kept = ["comparisons", "figures.csv", "figures.json", "index.html"]
    assert names == [*kept, "originals", "reconstructions", "reconstructions_tau0.5"]
    images = open_images(str(shards / "images-eval"), 64)
    files = sorted(str(path.relative_to(out / "originals")) for path in (out / "originals").rglob("*.png"))
    assert files == [images[i]["name"] for i in range(12)]
    for i in (0, 7):
        sample = images[i]
        assert torch.equal(pixels(out / "originals" / sample["name"]), sample["image"])
        with torch.no_grad():
            tokens = source.rae.clean_tokens(sample["image"][None] / 255)
            noised = fixed_latent_noise(tokens, torch.tensor([0.5]), torch.tensor([i]))
            for folder, used in (("reconstructions", tokens), ("reconstructions_tau0.5", noised)):
                recon = (source.rae.decode(source.rae.latent_of(used)).clamp(0, 1) * 255).round()[0]
                stored = pixels(out / folder / sample["name"]).float()
                assert (stored - recon).abs().max() <= 1 and (stored != recon).float().mean() < 0.01


def test_figures_are_those_of_the_pictures(out):
    figures = figures_of(out)
    with open(out / "figures.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [image["name"] for image in figures["images"]] and len(rows) == 12
    for image, row in zip(figures["images"], rows, strict=True):
        original = pixels(out / "originals" / image["file"])[None] / 255
        for tau in ("", "_tau0.5"):
            recon = pixels(out / f"reconstructions{tau}" / image["file"])[None] / 255
            psnr = peak_signal_noise_ratio(recon, original, data_range=1.0)
            ssim = structural_similarity_index_measure(recon, original, data_range=1.0)
            assert float(row[f"psnr{tau}"]) == image[f"psnr{tau}"] == pytest.approx(float(psnr), rel=1e-5)
            assert image[f"ssim{tau}"] == pytest.approx(float(ssim), rel=1e-4)
    for name, worst in (("psnr", min), ("ssim_tau0.5", min), ("feature_distance", max)):
        values, total = [image[name] for image in figures["images"]], figures["summary"][name]
        assert total["mean"] == pytest.approx(np.mean(values)) and total["median"] == pytest.approx(np.median(values))
        assert total["worst"] == worst(values)
        assert total["worst_image"] == figures["images"][values.index(worst(values))]["name"]
    assert figures["about"]["weights"] == "average (EMA)" and figures["left_out"] == []


def test_side_by_side_shows_what_is_in_the_files(out):
    picture = pixels(out / "comparisons/a/003.png")
    panels = [picture[:, 20:212, 8 + 200 * i : 200 + 200 * i : 3][:, ::3] for i in range(4)]  # enlarged three times
    original, recon, noised = (
        pixels(out / folder / "a/003.png") for folder in ("originals", "reconstructions", "reconstructions_tau0.5")
    )
    assert all(torch.equal(a, b) for a, b in zip(panels[:3], (original, recon, noised), strict=True))
    assert torch.equal(panels[3], torch.from_numpy(np.array(difference_map(original, recon))).permute(2, 0, 1))


def test_the_difference_maps_scale_is_fixed():
    image = torch.full((3, 1, 4), 100, dtype=torch.uint8)
    recon = image.clone()
    recon[:, 0, 1] += 32
    recon[0, 0, 2] -= 96  # a third of it, over the channels
    recon[:, 0, 3] += 80
    expected = colours()[[0, round(32 / SCALE * 255), round(32 / SCALE * 255), 255]]
    assert np.array_equal(np.array(difference_map(image, recon))[0], expected)
    brightness = colours().astype(int).sum(1)
    assert (np.diff(brightness) >= -3).all() and brightness[-1] > 500 and brightness[0] < 10


def test_large_images_are_not_enlarged():
    image = torch.zeros(3, 200, 200, dtype=torch.uint8)
    assert comparison(image, {0.0: image}, {"psnr": float("inf")}).width == 8 + 3 * 208 + 40


def test_names_are_kept_apart_and_inside():
    names = FileNames()
    assert names.of("a/b.jpg") == "a/b.png"
    assert names.of("a/b.png") == "a/b-2.png"
    assert names.of("a/B.webp") == "a/B-3.png"  # the same file on Windows and macOS
    assert names.of("a/b-2.jpg") == "a/b-2-2.png"
    assert names.of("caf\u00e9.jpg") != names.of("cafe\u0301.jpg")
    assert names.of("写真/كلب ñ.tar.jpg") == "写真/كلب ñ.tar.png"
    assert names.of("../../etc/x\n.png") == "etc/x_.png"
    assert names.of("/top/x.png") == "top/x.png"
    assert names.of("..") == "image.png"
    assert [names.of(name) for name in ("d.jpg", "d.png/e.jpg", "f.png/e.jpg", "f.jpg")] == [
        "d.png",
        "d.png-2/e.png",  # d.png is a file
        "f.png/e.png",
        "f-2.png",
    ]
    assert len(names.of("é" * 200 + ".jpg").encode()) <= 255


def test_figures_without_a_number(tmp_path):
    records = [Record("a", "a.png", {"psnr": float("inf")}), Record("b", "b.png", {"psnr": 20.0})]
    write_figures(tmp_path, records, {})
    assert [image["psnr"] for image in figures_of(tmp_path)["images"]] == [None, 20.0]
    assert "inf" in (tmp_path / "figures.csv").read_text()
    assert summarize(records)["psnr"].worst == 1 and summarize(records)["psnr"].best == 0


def test_batches_and_sizes(undisturbed, shards, out, tmp_path):
    # From shards, in other batches, and of two places at once; then at a size that is not the model's.
    again = tmp_path / "again"
    reconstruct(undisturbed, shards / "eval", shards / "images-eval/a/000.png", "--batch-size=8", "--out", again)
    ours, theirs = ({i["name"]: i for i in figures_of(each)["images"]} for each in (again, out))
    assert len(ours) == 13 and ours.keys() - theirs.keys() == {"000.png"}
    assert all(ours[name]["psnr"] == pytest.approx(theirs[name]["psnr"], abs=0.01) for name in theirs)
    reconstruct(undisturbed, shards / "images-eval", "--size=96", "--limit=2", "--out", again, "--overwrite")
    assert len(figures_of(again)["images"]) == 2
    assert all(pixels(path).shape == (3, 96, 96) for path in (again / "reconstructions").rglob("*.png"))


def test_damaged_images_are_named_and_left_out(undisturbed, tmp_path, capsys):
    folder = write_images(tmp_path / "images", 3)
    (folder / "001.png").write_bytes(b"no image")
    (folder / "empty.jpg").touch()
    Image.new("RGB", (60000, 1)).save(folder / "strip.png")  # enlarged, it would take 11 GB
    reconstruct(undisturbed, folder, "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert "left out: strip.png" in said and "60000 × 1 is too narrow" in said
    assert "left out: 001.png" in said and "left out: empty.jpg" in said and "the file is empty" in said
    assert [image["name"] for image in figures_of(tmp_path / "out")["images"]] == ["000.png", "002.png"]
    assert len(figures_of(tmp_path / "out")["left_out"]) == 3
    for name in ("000.png", "002.png"):
        (folder / name).unlink()
    with pytest.raises(SystemExit):
        reconstruct(undisturbed, folder, "--out", tmp_path / "none")
    assert "error: none of the images could be read: 001.png" in capsys.readouterr().err
    assert not (tmp_path / "none").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{run}", "absent", "--out={new}"], "there is no folder 'absent'"),
        (["absent", "{images}", "--out={new}"], "there is no folder 'absent'"),
        (["{run}", "{images}", "--out={old}"], "already exists; give another place, or --overwrite to replace it"),
        (["{run}", "{images}", "--out={images}", "--overwrite"], "exists and holds no reconstructions"),
        (["{run}", "{images}", "--out={images}/a/000.png"], "is a file; give a folder"),
        (["{run}", "{images}", "--out={images}/a/000.png/new"], "cannot be written: Not a directory"),
        (["{run}", "{images}", "--out=s3://bucket/out"], "pictures go to a local folder"),
        (["{run}", "{images}", "--out={new}", "--tau", "0"], "--tau 0: a noise level is above 0"),
        (["{run}", "{images}", "--out={new}", "--limit=0"], "--limit must be at least 1, not 0"),
        (["{run}", "{images}", "--out={new}", "--size=8"], "--size must be from 16 to 8192 pixels, not 8"),
        (["{run}", "{images}", "--out={new}", "--workers=-1"], "--workers must be 0 or more, not -1"),
        (["{run}", "{images}", "--out={new}", "--device=tpu"], "--device 'tpu' is no device"),
        (["{run}", "{images}", "--out={new}", "--lpips-weights=absent.pth"], "there is no file 'absent.pth'"),
    ],
)
def test_mistakes(undisturbed, shards, out, tmp_path, capsys, words, told):
    places = {"run": undisturbed, "images": shards / "images-eval", "new": tmp_path / "new", "old": out}
    with pytest.raises(SystemExit) as end:
        reconstruct(*(word.format(**places) for word in words))
    said = capsys.readouterr().err
    assert end.value.code == 2 and told in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir()) and (shards / "images-eval/a/000.png").is_file()


@pytest.mark.parametrize(("out", "told"), [(".", "is the folder that you are in"), ("../place", "holds thesis.txt")])
def test_only_reconstructions_are_replaced(undisturbed, shards, tmp_path, capsys, monkeypatch, out, told):
    (tmp_path / "place").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "place/figures.json").write_text("{}")  # evaluate's, in a folder with other things
    (tmp_path / "place/thesis.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / ("place" if out == "." else "elsewhere"))
    with pytest.raises(SystemExit):
        reconstruct(undisturbed, shards / "images-eval/a/000.png", f"--out={out}", "--overwrite")
    assert told in capsys.readouterr().err
    assert (tmp_path / "place/thesis.txt").read_text() == "mine"


def test_weights_that_give_no_numbers(source, shards, tmp_path):
    work = Reconstruction(source.rae, {}, tmp_path)
    bias = source.rae.decoder.head.bias
    kept = bias.detach().clone()
    try:
        bias.data.fill_(float("nan"))
        with pytest.raises(UserError, match="the reconstruction is not finite"):
            work.run(open_images(str(shards / "eval"), 64), 64, 4, 0)
    finally:
        bias.data.copy_(kept)


def test_lpips_or_what_takes_its_place(monkeypatch, tmp_path):
    cpu = torch.device("cpu")
    torch.save(vgg16().features.state_dict(prefix="features."), tmp_path / "vgg.pth")
    figures, said = build_figures({"psnr": {}, "feature_distance": {}}, str(tmp_path / "vgg.pth"), cpu)
    image = torch.rand(2, 3, 32, 32)
    assert list(figures) == ["psnr", "ssim", "lpips"] and said is None
    assert (figures["lpips"](image.flip(0), image) > 0).all() and figures["lpips"](image, image).max() < 1e-6

    def offline(network):
        raise UserError("lpips: cannot download")

    monkeypatch.setattr("rae.autoencoder.losses._torchvision_weights", offline)
    figures, said = build_figures({}, None, cpu)
    assert list(figures) == ["psnr", "ssim", "feature_distance"]
    assert said == "lpips: cannot download; feature_distance, on features of tf_efficientnet_lite1, takes its place"


# The page


class Page(HTMLParser):
    """Elements by tag, each a dictionary of its attributes."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag: str, **having) -> list[dict]:
        found = [attributes for name, attributes in self.tags if name == tag]
        return [each for each in found if all(having[key] in (each.get(key) or "").split() for key in having)]


HOSTILE = "<script>alert(1)</script> \"'&.png"


@pytest.fixture(scope="module")
def page_folder(tmp_path_factory) -> Path:
    """Forty images with figures by number, and names of all kinds."""
    folder = tmp_path_factory.mktemp("page")
    originals, recons = (write_images(folder / name, 40, 24) for name in ("originals", "reconstructions"))
    for i in range(40):  # brighter, so that their difference shows
        Image.open(originals / f"{i:03d}.png").point(lambda value: min(255, value + 40)).save(recons / f"{i:03d}.png")
    return folder


def records_of(count: int) -> list[Record]:
    names = {0: HOSTILE, 1: "写真/كلب.jpg"}
    return [
        Record(
            names.get(i, f"dir/{i}.jpg"), f"{i:03d}.png", {"psnr": (i * 7) % 40 + 0.5, "lpips": ((i * 11) % 40) / 40}
        )
        for i in range(count)
    ]


ABOUT = {"weights": "live", "trained": "not known", "date": "2026-01-02 03:04", "encoder": "dinov2 (input_size 224)"}


def write_page(folder: Path, count: int = 40, most: int = 500) -> tuple[Page, str]:
    write_gallery(folder / "index.html", records_of(count), "Reconstructions by A & B", ABOUT, (), most)
    text = (folder / "index.html").read_text(encoding="utf-8")
    return Page(text), text


def test_the_page_is_one_file(page_folder):
    page, text = write_page(page_folder)
    markup = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]*", "", text)
    assert not re.search(r"https?:|src=\"(?!\")|@import|url\(", markup)
    assert not page.all("link", rel="stylesheet") and all("src" not in each for each in page.all("script"))
    assert {each["href"] for each in page.all("a") + page.all("link")} <= {"", "data:,"}
    (policy,) = (each["content"] for each in page.all("meta") if each.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'; img-src data:" in policy


def test_the_page_shows_every_image(page_folder):
    page, _ = write_page(page_folder)
    cards = page.all("li", **{"class": "card"})
    assert [card["data-name"] for card in cards] == [record.name for record in records_of(40)]
    assert [float(card["data-m0"]) for card in cards] == [record.figures["psnr"] for record in records_of(40)]
    shown = {kind: page.all("img", **{"class": kind}) for kind in ("original", "recon", "difference")}
    assert all(len(each) == 40 and all(i["loading"] == "lazy" and i["alt"] for i in each) for each in shown.values())
    for kind, folder in (("original", "originals"), ("recon", "reconstructions")):
        data = base64.b64decode(shown[kind][5]["src"].removeprefix("data:image/webp;base64,"))
        picture = Image.open(io.BytesIO(data))
        stored = Image.open(page_folder / folder / "005.png")
        assert picture.size == (24, 24) and np.abs(np.array(picture, float) - np.array(stored, float)).mean() < 12
    text = " ".join(page.text)
    assert HOSTILE in text and len(page.all("script")) == 2  # its own: a name that looks like one is text
    for words in ("20.00", "0.4875", "Reconstructions by A & B", "dinov2 (input_size 224)", "2026-01-02 03:04", "≥64"):
        assert words in text
    labelled = page.all("select") + page.all("input") + page.all("button")
    assert all(
        each.get("id") or each.get("aria-label") or each.get("name") or each.get("data-image") for each in labelled
    )


def test_a_page_of_many_images_is_kept_small_and_says_so(page_folder):
    page, _ = write_page(page_folder, most=10)
    names = [card["data-name"] for card in page.all("li", **{"class": "card"})]
    assert len(names) == 10 and "It shows 10 of 40 images" in " ".join(page.text)
    records = records_of(40)
    chosen = choose(records, 10)
    assert [records[i].name for i in chosen] == names and chosen == sorted(set(chosen))
    by_psnr, by_lpips = (sorted(range(40), key=lambda i: records[i].figures[name]) for name in ("psnr", "lpips"))
    assert {*by_psnr[:2], *by_lpips[-2:], by_psnr[-1]} <= set(chosen)
    assert all(len(choose(records, most)) == most for most in range(1, 41))
    assert "20.00" in " ".join(page.text)  # the mean of all


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_sorts_in_a_browser(page_folder, tmp_path):
    write_page(page_folder)

    def names_at(fragment: str) -> list[str]:
        page = Page(dumped(f"{(page_folder / 'index.html').as_uri()}#{fragment}", tmp_path))
        return [card["data-name"] for card in page.all("li", **{"class": "card"})]

    records = records_of(40)
    by_psnr = [r.name for r in sorted(records, key=lambda r: r.figures["psnr"])]
    assert names_at("sort=psnr&order=asc") == by_psnr
    assert names_at("sort=psnr&order=desc") == by_psnr[::-1]
    assert names_at("sort=lpips&order=desc")[0] == max(records, key=lambda r: r.figures["lpips"]).name
    assert names_at("sort=name&find=dir/1") == ["dir/10.jpg", *(f"dir/{i}.jpg" for i in range(11, 20))]


USE = """
addEventListener("load", () => {
  const one = selector => document.querySelector(selector), flip = one(".flip"), told = {};
  const shown = () => [...flip.querySelectorAll("img")].find(img => getComputedStyle(img).opacity === "1").className;
  told.shown = [shown()];
  for (const act of [() => flip.click(), () => flip.click(), () => one("[name=view][value=difference]").click()]) {
    act();
    told.shown.push(shown());
  }
  document.querySelectorAll(".open")[2].click();
  one("dialog").dispatchEvent(new KeyboardEvent("keydown", {key: "n"}));
  told.large = one("#large-name").textContent;
  told.focus = document.activeElement.id;
  told.overflow = document.documentElement.scrollWidth - innerWidth;
  document.body.dataset.told = JSON.stringify(told);
});
"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_the_page_turns_and_enlarges_pictures_in_a_browser(page_folder, tmp_path):
    _, text = write_page(page_folder)
    (tmp_path / "used.html").write_text(text.replace("</body>", f"<script>{USE}</script></body>"), encoding="utf-8")
    (body,) = Page(dumped((tmp_path / "used.html").as_uri(), tmp_path)).all("body")
    told = json.loads(body["data-told"])
    assert told["shown"] == ["recon", "original", "recon", "difference"]
    assert told["large"] == "dir/3.jpg" and told["focus"] == "cut" and told["overflow"] <= 0


def dumped(url: str, scratch: Path) -> str:
    """A page's DOM after its scripts have run."""
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    options += (
        f" --disable-component-update --disable-sync --user-data-dir={scratch}/profile --virtual-time-budget=2000"
    )
    command = [CHROMIUM, *options.split(), "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True).stdout
