"""The figures of a run as one picture."""

import json
from pathlib import Path

from rae.config.errors import UserError
from rae.survival.storage import written

PANELS = {  # title -> names in metrics.jsonl
    "reconstruction losses": ["loss/train/total", "loss/train/l1", "loss/train/perceptual", "loss/train/lpips"],
    "flow matching loss": ["loss/train/flow"],
    "discriminator": ["discriminator/loss", "discriminator/accuracy"],
    "logits": ["discriminator/logits_real", "discriminator/logits_fake"],
    "GAN term": ["loss/train/gan", "gan/adaptive_weight"],
    "gradients at the reconstruction": [f"gradient/{n}" for n in ("l1", "mse", "perceptual", "lpips", "gan")],
    "the decoder's gradient": ["gradient/decoder"],
    "the network's gradient": ["gradient/network"],
    "the GAN's share in the update": ["gan/share"],
    "learning rates": ["lr/decoder", "lr/network", "lr/discriminator"],
    "PSNR (dB)": ["metrics/eval/psnr", "metrics/eval_live/psnr"],
    "SSIM": ["metrics/eval/ssim", "metrics/eval_live/ssim"],
    "feature distances": ["metrics/eval/lpips", "metrics/eval/feature_distance", "metrics/eval_live/feature_distance"],
    "Fréchet distances": [
        "metrics/eval/rfid",
        "metrics/eval/gfid",
        "metrics/eval/frechet",
        "metrics/eval_live/frechet",
    ],
}

LOGARITHMIC = (
    "reconstruction losses",
    "flow matching loss",
    "gradients at the reconstruction",
    "the decoder's gradient",
)


def plot(run_dir: str) -> Path:
    """Draw every panel that the run has figures for into ``<run_dir>/curves.png``.

    Raises:
        UserError: the folder holds no figures, or cannot be written, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("matplotlib is not installed: pip install matplotlib") from error
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir}: there is no metrics.jsonl; turn it on with loggers: {{jsonl: {{}}}}")
    records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    series = {
        name: [(r["batch"], r[name]) for r in records if r.get(name) is not None]
        for names in PANELS.values()
        for name in names
    }
    panels = {title: [n for n in names if series[n]] for title, names in PANELS.items()}
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        raise UserError(f"{path}: there are no figures yet")
    rows = (len(panels) + 2) // 3
    figure = Figure(figsize=(13, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 3, squeeze=False).flatten()
    for ax, (title, names) in zip(axes, panels.items(), strict=False):
        for name in names:
            ax.plot(*zip(*series[name], strict=True), label=_short(name), marker="." if "metrics" in name else None)
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.set_xlim(left=0)
        ax.grid(alpha=0.3)
        ax.legend()
        if title in LOGARITHMIC:
            ax.set_yscale("log")
    for ax in axes[len(panels) :]:
        ax.set_visible(False)
    out = Path(run_dir) / "curves.png"
    with written(str(out), run_dir) as path:
        figure.savefig(path, dpi=90)
    return out


def _short(name: str) -> str:
    return name.split("/")[1 if name.startswith("metrics/") else -1]
