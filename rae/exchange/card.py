"""The model card, README.md, of an exported autoencoder."""

from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from rae.autoencoder.rae import RAE
from rae.config.arguments import check_plugin
from rae.config.sections import Config
from rae.exchange.exports import Exported, figure_text, includes_encoder
from rae.exchange.places import OPENING, may_be_on_hub

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
}
_UNITS = {"epoch": "epochs", "batch": "steps"}
_TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

OPENING, and a ViT
decoder trained to turn its features back into pixels.

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
The evaluation of the training run with these weights, on images rounded to 8 bits:

| data | {{ metrics | join(" | ") }} |
| --- |{{ " --- |" * metrics | length }}
{% for label, values in figures.items() -%}
| {{ label }} |{% for metric in metrics %} {{ values[metric] if metric in values else "–" }} |{% endfor %}
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

No licence is stated for the decoder: whoever publishes it adds one. The encoder was not trained here, and its weights
({{ encoder_name }}) have a licence of their own{{ ", which also holds for the copy in this folder" if included }}.
"""


def model_card(
    rae: RAE, about: Exported, layout: str, config: Config | None = None, includes: bool | None = None
) -> str:
    """The card of an autoencoder that is exported as ``layout``: ``rae``, ``published`` or ``diffusers``.

    Args:
        config: of the run that made it, if that is known.
        includes: whether the encoder's weights are in the folder; by default what ``about`` says.
    """
    ((kind, arguments),) = check_plugin("encoder", about.model.encoder, "model.encoder").items()
    encoder_name = str(arguments.get("pretrained") or arguments.get("model") or kind)
    included = includes_encoder(about.model) if includes is None else includes
    figures = {
        label: {metric: figure_text(value) for metric, value in values.items()}
        for label, values in about.figures.items()
        if isinstance(values, dict)
    }
    card = ModelCard.from_template(
        ModelCardData(
            library_name="diffusers" if layout == "diffusers" else "rae",
            tags=["representation-autoencoder", "image-reconstruction"],
            base_model=encoder_name if may_be_on_hub(encoder_name) else None,
        ),
        template_str=_TEMPLATE.replace("LOADING", _LOADING[layout]).replace("OPENING", OPENING),
        name=about.name,
        shape=f"(B, {', '.join(map(str, rae.latent_shape))})",
        facts=_facts(rae, about, included),
        figures=figures,
        metrics=sorted({metric for values in figures.values() for metric in values}),
        training=_training(config) if config else "",
        encoder_name=kind if included and not may_be_on_hub(encoder_name) else encoder_name,
        encoder=flow({kind: arguments}),
        included=included,
        stats=rae.latent_mean is not None,
    )
    return f"{str(card).strip()}\n"


def _facts(rae: RAE, about: Exported, included: bool) -> dict[str, str]:
    decoder, network = rae.decoder, rae.encoder.network
    ((kind, arguments),) = check_plugin("encoder", about.model.encoder, "model.encoder").items()
    told = ", ".join(f"{key} {value}" for key, value in arguments.items())
    first: Any = decoder.blocks[0]
    parameters = sum(p.numel() for p in decoder.parameters())
    moment = ", ".join(f"{value:,} {_UNITS.get(key, key)}" for key, value in about.trained.items())
    stated = {"ema": "the moving average of the trained weights", "live": "the trained weights, not their average"}
    return {
        "encoder": f"{kind} ({told}); it sees {network.input_size} px",
        "its weights": "in this folder" if included else "not in this folder",
        "latent": f"{' × '.join(map(str, rae.latent_shape))}, "
        + ("not normalised" if rae.latent_mean is None else "normalised by the statistics of a data set"),
        "decoder": f"{decoder.embed.out_features} wide, {len(decoder.blocks)} layers, {first.attn.num_heads} heads, "
        f"patches of {decoder.patch_size} px; {parameters:,} parameters",
        "image": f"{about.image_size} × {about.image_size}",
        "decoder's weights": stated.get(about.weights, "as they were given"),
        "trained for": moment or "unknown",
    }


def _training(config: Config) -> str:
    """The parts of a run's configuration that decided what was learnt, as YAML."""
    whole = config.model_dump()
    train = {key: value for key, value in whole["data"]["train"].items() if value not in (None, {}, False)}
    told: dict[str, Any] = {"max_duration": config.trainer.get("max_duration"), "noise_tau": config.model.noise_tau}
    told["data"] = {key: whole["data"][key] for key in ("image_size", "batch_size")} | {"train": train}
    told |= {key: whole[key] for key in ("optimizer", "schedule") if whole[key]}
    lines = [f"{key}: {flow(value)}" for key, value in told.items()]
    return "\n".join([*lines, "algorithms:", *(f"  {k}: {flow(v or {})}" for k, v in config.algorithms.items())])


def flow(value: Any) -> str:
    """A value as one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("...\n").strip()
