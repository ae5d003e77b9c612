"""A float32 vision graph in a smaller weight type.

int8 is dynamic: weights of MatMul and Gemm in 8 bits with a scale for each output channel, activations rounded as they
come. float16 is for GPUs; on a CPU it saves space and no time. Whether the result is good enough is measured by
`compare`.

Static int8 (QDQ, per channel, calibrated on 16 radiographs by MinMax or by Percentile, of which the better is given)
was measured against it on 48 other radiographs and is worse: cosine of features with float32, mean and worst, 0.9997
and 0.9992 against 0.9999 and 0.9997 (small ViT + Q-Former), 0.9997 and 0.9996 against 0.9998 and 0.9998 (small Swin);
with briefly trained weights, and what all radiographs have in common taken off, 0.69 against 0.99 and 0.84 against
0.91 on average. It is slower too (two blocks of ViT-g's width on two cores with VNNI: 61 ms, 47 ms, float32 154 ms)
and would need radiographs, so there is no calibrated variant.

An int8 graph is stored as ONNX Runtime's optimizer leaves it, without what depends on the CPU, and above `APART` with
its weights beside it, which are then mapped: ViT-g's session took 3.2 s of CPU time to create instead of 5.8 s. Of
float32 graphs the optimizer leaves as much to do (9.5 s, 9.9 s); float16 ones it would fill with casts for the CPU.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.optimizer import optimize_by_onnxruntime

from xraygpt_lite.converters.onnx import LARGEST_GRAPH, SMALL, quiet
from xraygpt_lite.errors import ConversionError

VISION_TYPES = ("f32", "f16", "int8")
QUANTIZED = ("MatMul", "Gemm")
APART = 2**27
"""Bytes: the weights of a larger int8 graph lie beside it."""

EXTENDED = 2
"""Level of optimization: nodes are joined for any CPU; the next one arranges weights for this one."""


def shrink(source: Path, target: Path, kind: str) -> None:
    """Write a float32 graph with its weights as `kind`, "f16" or "int8"; where they are large, in a file beside it.

    Raises
    ------
    ConversionError
        int8 was asked for and the graph has no MatMul or Gemm whose weights it could make smaller.
    OSError
        The file cannot be written.
    """
    stored = sum(path.stat().st_size for path in source.parent.glob(source.name + "*"))
    if kind == "f16":
        half = convert_float_to_float16(
            onnx.load(source), keep_io_types=True, disable_shape_infer=stored > LARGEST_GRAPH
        )
        apart = stored > 2 * LARGEST_GRAPH
        onnx.save(half, target, save_as_external_data=apart, location=f"{target.name}_data")
        return
    graph = onnx.load(source, load_external_data=False).graph
    constant = {weight.name for weight in graph.initializer}
    if not any(node.op_type in QUANTIZED and constant & set(node.input) for node in graph.node):
        raise ConversionError(
            f"--vision-type int8 makes the weights of {' and '.join(QUANTIZED)} smaller, and this encoder has none; "
            "use f32"
        )
    draft = target.with_name(f".{target.name}.draft")
    try:
        with quiet():
            quantize_dynamic(
                source, draft, op_types_to_quantize=list(QUANTIZED), per_channel=True, weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
            )  # fmt: skip
            _optimize(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _optimize(source: Path, target: Path) -> None:
    size = source.stat().st_size
    if shutil.disk_usage(target.parent).free < size:  # the optimizer's own errors would not tell
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
    try:
        optimize_by_onnxruntime(
            str(source), optimized_model_path=str(target), opt_level=EXTENDED, save_as_external_data=size > APART,
            external_data_filename=f"{target.name}_data", external_data_file_threshold=SMALL,
        )  # fmt: skip
    except Exception as error:  # onnxruntime raises a dozen classes of its own, with no common base
        reason = (str(error).splitlines() or [""])[0][:300]
        raise ConversionError(f"the int8 encoder could not be optimized: {reason}; use --vision-type f32") from error
