"""The model card, README.md, of an export."""

from typing import Any, cast

import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import nn

from rae.autoencoder.rae import RAE
from rae.config.arguments import check_plugin, plugin_text
from rae.config.sections import Config, Model
from rae.diffusion.generator import Generator
from rae.exchange.exports import Exported, figure_text, includes_encoder
from rae.exchange.places import AUTOENCODER, OPENING, may_be_on_hub

_LOADING = {  # format -> code
    "rae": """import rae

autoencoder = rae.load("FOLDER")  # this folder, s3://…, or its name on the hub
latent = autoencoder.encode(image)  # image (B, 3, H, W) in [0, 1] -> {{ shape }}
recon = autoencoder.decode(latent)  # around [0, 1]""",
    "diffusers": """from diffusers import AutoencoderRAE  # tested with diffusers 0.42

autoencoder = AutoencoderRAE.from_pretrained("FOLDER").eval()
latent = autoencoder.encode(image).latent  # image (B, 3, H, W) in [0, 1] -> {{ shape }}
recon = autoencoder.decode(latent).sample""",
    "published": """# model.pt is the decoder's state dict under the names of the published RAE code, config.json its
# configuration{{ ", stat.pt the latents' statistics" if stats }}. To use it with rae:
#   python -m rae import FOLDER OUT --encoder '{{ encoder }}'
import rae

autoencoder = rae.load("OUT")""",
    "generator": """import rae

generator = rae.load("FOLDER")  # this folder, s3://…, or its name on the hub
images = generator.sample([{{ labels }}], seed=0)  # (B, 3, H, W) in [0, 1]; python -m rae sample FOLDER OUT""",
    "other": """import rae

model = rae.load("FOLDER", imports=True)  # which runs the code of the plugin that it needs; see config.json""",
}
_UNITS = {"epoch": "epochs", "batch": "steps"}
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{% if encoder -%}
OPENING, and a ViT
decoder trained to turn its features back into pixels.
{%- elif generator -%}
A diffusion transformer trained by flow matching on the latents of a frozen Representation Autoencoder (arXiv
2510.11690): it generates images.
{%- else -%}
A model trained with rae.
{%- endif %}

| | |
| --- | --- |
{% for key, value in facts.items() -%}
| {{ key }} | {{ value }} |
{% endfor %}
```python
LOADING
```

## Figures

{% if figures -%}
{% if generator -%}
The evaluation of the training run with these weights: an image was generated for the label of each image of the data,
as is said above, rounded to 8 bits, and all were compared with the data's.
{%- else -%}
The evaluation of the training run with these weights, on images rounded to 8 bits:
{%- endif %}

| data | {{ metrics | join(" | ") }} |
| --- |{{ " --- |" * metrics | length }}
{% for label, values in figures.items() -%}
| {{ label }} |{% for metric in metrics %} {{ values[metric] if metric in values else "–" }} |{% endfor %}
{% endfor %}
{% for line in measured -%}
- {{ line }}
{% endfor %}
{%- else -%}
None are known of these weights. `python -m rae evaluate` measures them.
{%- endif %}

## Training

{% if training -%}
```yaml
{{ training }}
```

`config.yaml` is the run's whole configuration.
{%- else -%}
These weights came without their run's configuration.
{%- endif %}

## Licence

{% if encoder -%}
No licence is stated for the decoder: whoever publishes it adds one. The encoder was not trained here, and its weights
({{ encoder_name }}) have a licence of their own{{ ", which also holds for the copy in this folder" if included }}.
{%- else -%}
No licence is stated for these weights: whoever publishes them adds one.
{%- endif %}
"""


def model_card(
    network: nn.Module, about: Exported, layout: str, config: Config | None = None, includes: bool | None = None
) -> str:
    """The card of a model that is exported as ``layout``: ``rae``, ``published`` or ``diffusers``.

    Args:
        config: of the run that made it, if that is known.
        includes: whether the encoder's weights are in the folder; by default what ``about`` says.
    """
    figures = {
        label: {metric: figure_text(value) for metric, value in values.items()}
        for label, values in about.figures.items()
        if isinstance(values, dict)
    }
    included = includes_encoder(about.model) if includes is None else includes
    if isinstance(network, RAE) and isinstance(about.model, Model):
        loading, tags = layout, ["representation-autoencoder", "image-reconstruction"]
        told = _autoencoder(network, about.model, included)
    elif isinstance(network, Generator) and isinstance(about.model, dict):
        loading, tags = "generator", ["image-generation", "diffusion-transformer"]
        told = _generator(network, about.model["diffusion"])
    else:
        loading, tags = "other", None
        told = {"facts": {"model": plugin_text(about.model)}, "encoder_name": ""}
    told["facts"] |= _facts(network, about)
    card = ModelCard.from_template(
        ModelCardData(
            library_name="diffusers" if layout == "diffusers" else "rae",
            tags=tags,
            base_model=told["encoder_name"] if may_be_on_hub(told["encoder_name"]) else None,
        ),
        template_str=_TEMPLATE.replace("LOADING", _LOADING[loading]).replace("OPENING", OPENING),
        name=about.name,
        figures=figures,
        metrics=sorted({metric for values in figures.values() for metric in values}),
        measured=_measured(config) if config else [],
        training=_training(config) if config else "",
        included=included,
        **told,
    )
    return f"{str(card).strip()}\n"


def _autoencoder(rae: RAE, settings: Model, included: bool) -> dict[str, Any]:
    """What the card of an autoencoder says of it alone."""
    ((kind, arguments),) = check_plugin("encoder", settings.encoder, "model.encoder").items()
    name = str(arguments.get("pretrained") or arguments.get("model") or kind)
    told = ", ".join(f"{key} {value}" for key, value in arguments.items())
    decoder, first = rae.decoder, cast(Any, rae.decoder.blocks[0])
    return {
        "encoder_name": kind if included and not may_be_on_hub(name) else name,
        "encoder": flow({kind: arguments}),
        "shape": f"(B, {', '.join(map(str, rae.latent_shape))})",
        "stats": rae.latent_mean is not None,
        "facts": {
            "encoder": f"{kind} ({told}); it sees {rae.encoder.network.input_size} px",
            "its weights": "in this folder" if included else "not in this folder",
            "latent": f"{' × '.join(map(str, rae.latent_shape))}, "
            + ("not normalised" if rae.latent_mean is None else "normalised by the statistics of a data set"),
            "decoder": f"{decoder.embed.out_features} wide, {len(decoder.blocks)} layers, "
            f"{first.attn.num_heads} heads, patches of {decoder.patch_size} px",
        },
    }


def _generator(generator: Generator, settings: dict[str, Any]) -> dict[str, Any]:
    """What the card of a generator says of it alone."""
    autoencoder, classes = settings["autoencoder"], generator.num_classes
    named = autoencoder if isinstance(autoencoder, str) else "in this folder's config.json, by its encoder and decoder"
    inside = autoencoder == AUTOENCODER
    return {
        "generator": True,
        "encoder_name": "",
        "labels": "0, 1" if classes > 1 else "-1",
        "facts": {
            "network": plugin_text(settings["network"]),
            "classes": f"{classes:,}" if classes else "none",
            **({"their names": ", ".join(generator.classes)} if 0 < len(generator.classes) <= 20 else {}),
            "latent": " × ".join(map(str, generator.latent_shape)),
            "time shift": f"{generator.flow.shift:.4g}",
            "autoencoder": "in this folder" if inside else f"not in this folder: {named}",
            "sampler": plugin_text(settings.get("sampler", "euler")),
            "guidance": plugin_text(settings.get("guidance", "none")),
        },
    }


def _facts(network: nn.Module, about: Exported) -> dict[str, str]:
    moment = ", ".join(f"{value:,} {_UNITS.get(key, key)}" for key, value in about.trained.items())
    stated = {"ema": "the moving average of the trained weights", "live": "the trained weights, not their average"}
    parameters = f"{sum(p.numel() for p in network.parameters()):,}"
    return {
        "parameters": f"{parameters}, without the encoder's" if isinstance(network, RAE) else parameters,
        "image": f"{about.image_size} × {about.image_size}",
        "weights": stated.get(about.weights, "as they were given"),
        "trained for": moment or "unknown",
    }


def _measured(config: Config) -> list[str]:
    """What the evaluation data of a run are, and what its metrics are."""
    data = {where.rpartition(".")[2]: each for where, each in config.data.evaluation.items()}
    told = [
        f"`{name}` is {each.path}" + (f", {each.limit:,} images" if each.limit else "") for name, each in data.items()
    ]
    metrics = {name: given for name, given in config.metrics.items() if given}
    return [*told, *(f"`{name}`: {flow(given)}" for name, given in metrics.items())]


def _training(config: Config) -> str:
    """The parts of a run's configuration that decided what was learnt, as YAML."""
    whole = config.model_dump()
    train = {key: value for key, value in whole["data"]["train"].items() if value not in (None, {}, False)}
    told: dict[str, Any] = {"max_duration": config.trainer.get("max_duration")}
    if isinstance(config.model, Model):
        told["noise_tau"] = config.model.noise_tau
    told["data"] = {key: whole["data"][key] for key in ("image_size", "batch_size")} | {"train": train}
    told |= {key: whole[key] for key in ("optimizer", "schedule") if whole[key]}
    lines = [f"{key}: {flow(value)}" for key, value in told.items()]
    return "\n".join([*lines, "algorithms:", *(f"  {k}: {flow(v or {})}" for k, v in config.algorithms.items())])


def flow(value: Any) -> str:
    """A value as one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("...\n").strip()
