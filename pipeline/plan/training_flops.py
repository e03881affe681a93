"""What a training computes for one picture: FLOPs of the models in it, forward and backward. Imports no torch."""

from collections.abc import Callable

from pipeline.settings.config import Config
from stages.anatomy import flops

BACKWARD = 2  # times the forward pass's


def per_picture(step: str, config: Config) -> dict[str, dict[int, int]]:
    """FLOPs by the name of the training and the side of its pictures, px.

    They are the architecture's: neither judges of Stage A, nor encoders online, nor what checkpointing computes again,
    as for MFU (PaLM, arXiv 2204.02311, appendix B). Buckets count as the square of their area.
    """
    a, b, c, compressor = config.stage_a, config.stage_b, config.stage_c, config.compressor
    trained = 1 + BACKWARD

    def compress(size: int) -> int:
        return flops.encode_c(compressor.model, compressor.model.seen_side(size))

    def code(size: int) -> int:
        return compressor.model.code_side(size)

    def latents(size: int) -> int:
        return size >> a.model.levels

    def tokens(tower: str) -> int:
        return config.text[tower].context_length

    def stage_a(size: int) -> int:
        side = a.loss.crop or size
        return trained * (flops.encode_a(a.model, side, side) + flops.decode_a(a.model, side, side))

    def stage_b(size: int) -> int:
        diffusion = flops.stage_b(b.model, latents(size), latents(size), tokens(b.text))
        return trained * diffusion + (trained if compressor.joint else 1) * compress(size)

    def stage_c(size: int) -> int:
        passes = trained + bool(c.loss.consistency)
        return passes * flops.stage_c(c.model, code(size), code(size), tokens(c.text))

    def previewer(size: int) -> int:
        return trained * flops.previewer(config.previewer.model, code(size), code(size))

    def baseline(size: int) -> int:
        model = config.baseline.model
        return trained * flops.baseline(model, latents(size), latents(size), tokens(config.baseline.text))

    of: dict[str, dict[str, Callable[[int], int]]] = {
        "train_a": {"stage_a": stage_a},
        "train_b": {"compressor": lambda size: trained * compress(size), "stage_b": stage_b},
        "train_c": {"stage_c": stage_c},
        "train_previewer": {"previewer": previewer},
        "train_baseline": {"baseline": baseline},
    }
    sizes = {phase.size for training in config.trainings_of(step).values() for phase in training.phases}
    return {name: {size: count(size) for size in sorted(sizes)} for name, count in of[step].items()}
