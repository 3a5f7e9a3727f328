"""Sizes of published encoders, as their configurations on the hub have them: enough to build them without weights."""

from typing import Any

_B = dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
_L = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
_H = dict(hidden_size=1280, num_hidden_layers=32, num_attention_heads=16)
_SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "dinov2_with_registers": {
        f"facebook/dinov2-with-registers-{size}": dict(widths, image_size=518, patch_size=14, num_register_tokens=4)
        for size, widths in {
            "small": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
            "base": _B,
            "large": _L,
            "giant": dict(hidden_size=1536, num_hidden_layers=40, num_attention_heads=24, use_swiglu_ffn=True),
        }.items()
    },
    "dinov3_vit": {
        f"facebook/dinov3-vit{size}16-pretrain-lvd1689m": dict(
            widths, image_size=224, patch_size=16, num_register_tokens=4
        )
        for size, widths in {
            "s": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, intermediate_size=1536),
            "b": dict(_B, intermediate_size=3072),
            "l": dict(_L, intermediate_size=4096),
        }.items()
    },
    "vit_mae": {
        "facebook/vit-mae-base": dict(_B, intermediate_size=3072),
        "facebook/vit-mae-large": dict(_L, intermediate_size=4096),
        "facebook/vit-mae-huge": dict(_H, intermediate_size=5120, patch_size=14),
    },
    "siglip_vision_model": {
        f"google/siglip2-{size}-patch16-256": dict(widths, image_size=256, patch_size=16)
        for size, widths in {
            "base": dict(_B, intermediate_size=3072),
            "large": dict(_L, intermediate_size=4096),
            "so400m": dict(hidden_size=1152, num_hidden_layers=27, num_attention_heads=16, intermediate_size=4304),
        }.items()
    },
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    name: (family, sizes) for family, models in _SIZES.items() for name, sizes in models.items()
}
"""Hub name -> (transformers' model type, its configuration's arguments)."""
