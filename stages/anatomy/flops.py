"""Floating-point operations of the models' forward passes: matrix products and convolutions, summed over their blocks.

A multiply-add counts as two, as in PaLM's appendix B (arXiv 2204.02311); normalisations, activations and
resizing count nothing. These are the FLOPs of the architecture, one image each, whatever an implementation saves
or computes twice: Stage B's weights, merged as `ResBlock` does, and checkpointing leave them alone. So of Stage B's,
21 % are counted in its MFU and never computed.
"""

from stages.anatomy import architectures
from stages.anatomy.blocks import Block, summed

# Dense bf16 FLOP/s with sums in fp32, by torch's name of the card: NVIDIA's data sheets, whose figures are twice as
# large where they count sparsity, and for GeForce the white papers of Ada and Blackwell. Others are not known here.
PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 5090": 209.5e12,
}


def _flops(block: Block) -> int:
    return 2 * block.products


encode_a = summed(architectures.encoder_a, _flops)
decode_a = summed(architectures.decoder_a, _flops)
encode_c = summed(architectures.compressor, _flops)
encode_text = summed(architectures.text, _flops)
stage_b = summed(architectures.stage_b, _flops)
stage_c = summed(architectures.stage_c, _flops)
previewer = summed(architectures.previewer, _flops)
baseline = summed(architectures.baseline, _flops)


def utilisation(forward: int, images_per_second: float, peak: float) -> float:
    """Share of a device's `peak` FLOP/s that a training uses (MFU); the backward pass counts twice the forward."""
    return 3 * forward * images_per_second / peak
