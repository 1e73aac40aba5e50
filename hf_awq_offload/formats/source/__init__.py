"""Recognizes how a quantized checkpoint stores its weights, and dequantizes them one by one.

    quant_method in config.json     tensors of a weight                                         module
    fp8, mxfp8                      weight, weight_scale_inv; packed fp4 in int8                float8.py
    fbgemm_fp8, modelopt, none      weight, weight_scale; weight (uint8), weight_scale_2        float8.py, float4.py
    mxfp4, none                     *_blocks, *_scales                                          mxfp4.py
    compressed-tensors              weight, weight_scale; weight_packed, weight_scale, …        compressed_tensors.py
    awq                             qweight, qzeros, scales                                     awq.py
    gptq                            qweight, qzeros, scales, g_idx                              gptq.py
    bitsandbytes, none              weight (uint8), weight.absmax, …; weight (int8), SCB        bitsandbytes.py

"none" means that such tensors describe themselves: they are read without a quantization_config, too. Every
`dequantize` returns what transformers computes when it loads the checkpoint dequantized; casting the result to the
model's dtype gives the same bits.
"""

from __future__ import annotations

from .recognition import source_format
from .records import SourceFormat, StoredHeader, StoredWeight

__all__ = ["SourceFormat", "StoredHeader", "StoredWeight", "source_format"]
