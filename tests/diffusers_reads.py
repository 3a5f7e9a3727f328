"""What diffusers' AutoencoderRAE makes of exported folders, in a process of its own.

Beside each folder FOLDER that it is given, FOLDER.safetensors receives the latents and reconstructions of the images in
the file it is given first, and FOLDER-saved the model as diffusers itself saves it. ``native`` beside the images is a
folder that no export made.
"""

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderRAE
from diffusers.models.autoencoders import autoencoder_rae
from safetensors.torch import load_file, save_file
from transformers import SiglipVisionModel


class SiglipBefore(torch.nn.Module):
    """SigLIP as transformers built it before 5.4, which is what diffusers 0.42 still asks it for."""

    def __init__(self, config):
        super().__init__()
        self.vision_model = SiglipVisionModel(config)

    def forward(self, *args, **kwargs):
        return self.vision_model(*args, **kwargs)


autoencoder_rae.SiglipVisionModel = SiglipBefore
torch.set_num_threads(1)
images, *folders = sys.argv[1:]
image = load_file(images)["image"]


def write(model: AutoencoderRAE, folder: str) -> None:
    with torch.no_grad():
        latent = model.encode(image).latent
        recon = model.decode(latent).sample
    save_file({"latent": latent.contiguous(), "recon": recon.contiguous()}, f"{folder}.safetensors")


for folder in folders:
    loaded = AutoencoderRAE.from_pretrained(folder).eval()
    write(loaded, folder)
    loaded.save_pretrained(f"{folder}-saved")

torch.manual_seed(0)
sizes = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 56}
sizes |= {"decoder_hidden_size": 48, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 4}
statistics = {"latents_mean": torch.randn(64, 4, 4), "latents_std": torch.rand(64, 4, 4) + 0.1}
native = AutoencoderRAE("dinov2", **sizes, decoder_intermediate_size=96, **statistics, scaling_factor=0.5).eval()
for parameter in native.decoder.parameters():
    parameter.data += 0.1 * torch.randn_like(parameter)
native.save_pretrained(Path(images).with_name("native"))
write(native, str(Path(images).with_name("native")))
