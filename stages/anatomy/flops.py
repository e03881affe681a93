"""Floating-point operations of the models' forward passes, in closed form: matrix products and convolutions.

A multiply-add counts as two, as in PaLM's appendix B (arXiv 2204.02311); normalisations, activations and
resizing count nothing. These are the FLOPs of the architecture, one image each, whatever an implementation saves
or computes twice: Stage B's weights, merged as `ResBlock` does, and checkpointing leave them alone.
"""

from itertools import pairwise

from stages.anatomy.parameters import blocks_of_baseline, compressor_products, layers_of_previewer, widths_a
from stages.settings.models import (
    BaselineConfig,
    CompressorConfig,
    PreviewerConfig,
    StageAConfig,
    StageBConfig,
    StageCConfig,
)

PEAKS = {  # dense bf16 FLOP/s by the makers' data sheets, by torch's name of the card
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def encode_a(config: StageAConfig, height: int, width: int) -> int:
    """Stage A's encoder on an image of height x width px."""
    positions = _positions_a(config, height, width)
    widths = widths_a(config)
    flops = _linear(positions[0], 3 * 4, widths[0])
    flops += sum(_mixing(n, channels) for n, channels in zip(positions, widths, strict=True))
    for n, (outer, inner) in zip(positions[1:], pairwise(widths), strict=True):
        flops += _linear(n, 16 * outer, inner)  # 4x4 convolution, stride 2
    return flops + _linear(positions[-1], widths[-1], config.latent_channels)


def decode_a(config: StageAConfig, height: int, width: int) -> int:
    """Stage A's decoder to an image of height x width px."""
    positions = _positions_a(config, height, width)
    widths = widths_a(config)
    flops = _linear(positions[-1], config.latent_channels, widths[-1])
    flops += config.bottleneck_blocks * _mixing(positions[-1], widths[-1])
    for n, channels in zip(positions[:-1], widths[:-1], strict=True):
        flops += _mixing(n, channels)
    for n, (outer, inner) in zip(positions[1:], pairwise(widths), strict=True):
        flops += _linear(n, inner, 16 * outer)  # its transpose
    return flops + _linear(positions[0], widths[0], 3 * 4)


def encode_c(config: CompressorConfig, side: int) -> int:
    """The compressor on an image whose resized form, which the backbone sees, has `side` px."""
    return 2 * compressor_products(config, side)


def encode_text(layers: int, width: int, tokens: int) -> int:
    """A CLIP text tower's hidden states of `tokens` positions."""
    layer = _linear(tokens, width, 12 * width) + 2 * _linear(tokens, width, tokens)  # projections and MLP; attention
    return layers * layer


def stage_b(config: StageBConfig, height: int, width: int, tokens: int) -> int:
    """Stage B on latents of height x width with `tokens` text positions, 0 for none."""
    cond, widths, levels = config.cond_width, config.widths, len(config.widths)
    positions = [(height // config.patch >> level) * (width // config.patch >> level) for level in range(levels)]
    patch = config.latent_channels * config.patch**2
    flops = _linear(tokens, config.text_width, cond)
    flops += _linear(positions[0], patch, widths[0]) + _linear(positions[0], widths[0], 2 * patch)
    for level, (n, channels, pattern, repeats) in enumerate(
        zip(positions, widths, config.patterns, config.blocks, strict=True)
    ):
        mapped = cond if config.inject_code[level] else 0
        repeat = pattern.count("C") * _residual(n, channels, mapped)
        repeat += pattern.count("T") * _linear(1, config.timestep_channels, 2 * channels)
        repeat += pattern.count("A") * _attention(n, channels, tokens, cond)
        flops += 2 * (repeats * repeat + _linear(n, config.code_channels, mapped))  # down and up
        if level < levels - 1:
            flops += _linear(n, channels, 4 * channels)  # the skip, into one block on the way up
            flops += 2 * _linear(positions[level + 1], 4 * channels, widths[level + 1])  # to the next level and back
    return flops


def stage_c(config: StageCConfig, height: int, width: int, tokens: int) -> int:
    """Stage C on codes of height x width with `tokens` text positions."""
    n, channels = height * width, config.width
    repeat = _residual(n, channels) + _linear(1, config.timestep_channels, 2 * channels)
    repeat += _attention(n, channels, tokens, channels)
    text = _linear(tokens, config.text_width, channels) + _linear(tokens, channels, channels)
    ends = _linear(n, config.latent_channels, channels) + _linear(n, channels, 2 * config.latent_channels)
    return text + ends + config.depth * repeat


def previewer(config: PreviewerConfig, height: int, width: int) -> int:
    """The previewer on codes of height x width; a transposed convolution works on the positions of its input."""
    flops = 0
    for layer in layers_of_previewer(config):
        positions = height * width * layer.scale**2
        kernel = 1 if layer.kernel == 2 else layer.kernel  # 2x2 with stride 2: one product a position of the output
        flops += _linear(positions, kernel**2 * layer.inputs, layer.outputs)
    return flops


def baseline(config: BaselineConfig, height: int, width: int, tokens: int) -> int:
    """The baseline on latents of height x width with `tokens` text positions."""
    first, channels = config.widths[0], config.latent_channels * config.patch**2
    positions = [
        (height // config.patch >> level) * (width // config.patch >> level) for level in range(len(config.widths))
    ]
    embedded = 4 * first
    flops = _linear(1, first, embedded) + _linear(1, embedded, embedded)
    flops += 2 * _linear(positions[0], 9 * channels, first)  # both ends
    for block in blocks_of_baseline(config):
        n, wide = positions[block.level], block.width
        if block.depth:
            flops += 2 * _linear(n, wide, wide) + block.depth * _transformer(n, wide, tokens, config.text_width)
        else:
            flops += _linear(n, 9 * block.inputs, wide) + _linear(n, 9 * wide, wide) + _linear(1, embedded, wide)
            flops += _linear(n, block.inputs, wide) if block.inputs != wide else 0
    for level, wide in enumerate(config.widths):
        flops += (
            _linear(positions[level + 1], 9 * wide, wide) if level < len(config.widths) - 1 else 0
        )  # down to the next
        flops += _linear(positions[level - 1], 9 * wide, wide) if level else 0  # up from here
    return flops


def utilisation(forward: int, images_per_second: float, peak: float) -> float:
    """Share of a device's `peak` FLOP/s that a training uses (MFU); the backward pass counts twice the forward."""
    return 3 * forward * images_per_second / peak


def _positions_a(config: StageAConfig, height: int, width: int) -> list[int]:
    return [(height >> level) * (width >> level) for level in range(1, config.levels + 1)]


def _linear(positions: int, inputs: int, outputs: int) -> int:
    return 2 * positions * inputs * outputs


def _depthwise(positions: int, channels: int) -> int:
    return 2 * positions * channels * 9


def _mixing(positions: int, channels: int) -> int:
    return _depthwise(positions, channels) + 2 * _linear(positions, channels, 4 * channels)


def _residual(positions: int, channels: int, mapped: int = 0) -> int:
    """Block C, whose MLP sees `mapped` further channels."""
    return _mixing(positions, channels) + _linear(positions, mapped, 4 * channels)


def _transformer(positions: int, channels: int, tokens: int, text_width: int) -> int:
    """A block of the baseline: attention to the positions and to the text, and a gated MLP."""
    own = _linear(positions, channels, 4 * channels) + 2 * _linear(positions, channels, positions)
    text = _linear(positions, channels, 2 * channels) + _linear(tokens, text_width, 2 * channels)
    return own + text + 2 * _linear(positions, channels, tokens) + _linear(positions, channels, 12 * channels)


def _attention(positions: int, channels: int, tokens: int, cond: int) -> int:
    """Block A: the text's map, keys and values; the positions' projections; scores and sums over all."""
    text = _linear(tokens, cond, channels) + _linear(tokens, channels, 2 * channels)
    return text + _linear(positions, channels, 4 * channels) + 2 * _linear(positions, channels, positions + tokens)
