"""How many parameters each network has: the sum over its blocks. The tests compare the counts with the models'."""

from stages.anatomy import architectures
from stages.anatomy.blocks import Block, summed
from stages.settings.models import TextConfig


def _parameters(block: Block) -> int:
    return block.parameters


stage_a = summed(architectures.stage_a, _parameters)
stage_b = summed(architectures.stage_b, _parameters)
stage_c = summed(architectures.stage_c, _parameters)
compressor = summed(architectures.compressor, _parameters)  # gamma and beta of a `fixed` BatchNorm among them
warm_up_decoder = summed(architectures.warm_up_decoder, _parameters)
previewer = summed(architectures.previewer, _parameters)
baseline = summed(architectures.baseline, _parameters)
discriminator = summed(architectures.discriminator, _parameters)
vgg16 = summed(architectures.vgg16, _parameters)


def text(config: TextConfig) -> int:
    """Parameters of `TextTower`."""
    return summed(architectures.text, _parameters)(config.layers, config.width, config.context_length)
