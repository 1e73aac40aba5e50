"""Lists model types that can't be quantized, and why; the suite checks that each still fails in this way.

`error` is a regular expression that the error's text matches: once it no longer does, the entry has to go.
"""

from __future__ import annotations

from typing import NamedTuple


class Unsupported(NamedTuple):
    stage: str
    """Who fails and when: transformers makes no model of it here ("build"), its model does not run on token ids
    ("run"), or it does not load what it saves of it ("reload"); or this package refuses ("quantize")."""
    error: str
    reason: str  # for the reader of docs/architectures.md


_CONV1D = "all its projections are `Conv1D`, and stock transformers' AWQ loader replaces `nn.Linear` only"
_ASSISTANT = "a draft model: it computes on the hidden states and keys of the model that it assists, not on token ids"
_COMPOSITE = "the auto class maps the type to a decoder that does not take the type's own (composite) config"

CAUSAL_LM: dict[str, Unsupported] = {
    "gemma3n": Unsupported("build", "timm", "its vision tower needs timm; the text decoder is `gemma3n_text`"),
    "gemma4_assistant": Unsupported("build", "hidden_size_per_layer_input must be 0", _ASSISTANT),
    "gemma4_unified_assistant": Unsupported("run", "shared_kv_states cannot be None", _ASSISTANT),
    "gpt-sw3": Unsupported("quantize", "Conv1D", _CONV1D),
    "gpt2": Unsupported("quantize", "Conv1D", _CONV1D),
    "musicgen": Unsupported("build", "has no attribute 'dropout'", _COMPOSITE),
    "musicgen_melody": Unsupported("build", "has no attribute 'dropout'", _COMPOSITE),
    "openai-gpt": Unsupported("quantize", "Conv1D", _CONV1D),
    "rwkv": Unsupported(
        "quantize",
        "changes its own weights in place",
        "its first forward pass divides weights in place, again after each loading; `rescale_every=0` in its config "
        "switches this off",
    ),
}

_ENCODER_DECODER = "an encoder-decoder model"
_TIMM = "its vision tower is a timm model (tests run without timm)"

IMAGE_TEXT: dict[str, Unsupported] = {
    "diffusion_gemma": Unsupported(
        "quantize", "shares its experts with other layers", "its encoder and its decoder share their layers' weights"
    ),
    "evolla": Unsupported("build", "Unrecognized configuration class", "transformers maps its config to no class"),
    "fast_vlm": Unsupported("build", "timm", _TIMM),
    "florence2": Unsupported("quantize", "encoder-decoder", _ENCODER_DECODER),
    "gemma3n": Unsupported("build", "timm", _TIMM),
    "llama4": Unsupported(
        "run", "has no attribute 'image_outputs'", "transformers 5.24's forward pass of it fails; that of 5.23 works"
    ),
    "perception_lm": Unsupported("build", "timm", _TIMM),
    "pi0": Unsupported(
        "quantize", "does not run on text alone", "an action model: it wants a robot's state and its actions, too"
    ),
    "pix2struct": Unsupported("quantize", "encoder-decoder", _ENCODER_DECODER),
    "pp_formulanet": Unsupported("quantize", "encoder-decoder", _ENCODER_DECODER),
    "shieldgemma2": Unsupported(
        "reload", "", "transformers does not load what it saves of this type, without quantization either"
    ),
    "t5gemma2": Unsupported("quantize", "encoder-decoder", _ENCODER_DECODER),
    "udop": Unsupported("quantize", "encoder-decoder", _ENCODER_DECODER),
    "vision-encoder-decoder": Unsupported("quantize", "encoder-decoder", _ENCODER_DECODER),
}
