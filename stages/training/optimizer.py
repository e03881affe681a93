"""The optimiser: AdamW, and beside it Muon for the matrices of blocks, where a training asks for it."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from stages.models.layers import Block
from stages.settings.training import MuonConfig, TrainingConfig

ADAMW, MUON = ("exp_avg", "exp_avg_sq"), ("momentum",)  # what each keeps of a parameter, of its shape
# Of the polynomials a x + b x^3 + c x^5 that Muon takes singular values through, one after the other. Each is the one
# that comes nearest to 1, at its worst, on what those before have made of [0.004, 1], and on 3 % above, where roundings
# lead: beyond that they grow steeply. In the end it is [0.84, 1.16].
COEFFICIENTS = (
    (8.1028, -22.5280, 15.7328),
    (3.8783, -2.7272, 0.4889),
    (3.2927, -2.3356, 0.4489),
    (2.3268, -1.6223, 0.3792),
)
EPS = 1e-8  # AdamW's, beside the root of the second moment
RMS = 0.2  # of the elements of a step, in units of the learning rate: as AdamW's
JOINED = {"in_proj_weight": 3, "net.0.proj.weight": 2}  # by its name's end: matrices that lie above each other in one


class Optimizer:
    """Fused AdamW, the flag that makes it skip an update, and on GPUs what it divides gradients by on the way.

    With `config.muon`, those of the parameters `trained` (by name) of `module` that are matrices of blocks take
    Muon's steps. `state` is what is kept of each parameter, by the tensor's name there.

    torch's own class does the same by the same function, but goes through all parameters thrice a step, and loads
    torch's compiler, which takes two seconds of each training's start.
    """

    def __init__(
        self, module: nn.Module, trained: Mapping[str, nn.Parameter], config: TrainingConfig, device: torch.device
    ) -> None:
        hidden = matrices(module, trained) if config.muon else {}
        self.state: dict[nn.Parameter, dict[str, Tensor]] = {}
        self.found_inf = torch.zeros((), device=device)
        self.grad_scale = torch.ones((), device=device) if device.type == "cuda" else None
        self._rest = [parameter for name, parameter in trained.items() if name not in hidden]
        self._hidden = set(hidden.values())
        self._config = config
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self._muon = Muon(hidden, config.muon, config.weight_decay, dtype) if config.muon and hidden else None

    def advance(self, rate: float) -> None:
        """Do a step of this learning rate by the gradients; none, and without a trace, where `found_inf` is 1."""
        self._by_adamw(rate)
        if self._muon:
            momenta = [kept["momentum"] for kept in self._kept(self._muon.trained)]
            self._muon.step(momenta, rate / self._config.learning_rate, self.found_inf, self.grad_scale)

    @torch.no_grad()
    def _by_adamw(self, rate: float) -> None:
        stepping = [(parameter, grad) for parameter in self._rest if (grad := parameter.grad) is not None]
        kept = self._kept(parameter for parameter, _ in stepping)
        adamw(
            [parameter for parameter, _ in stepping],
            [grad for _, grad in stepping],
            [state["exp_avg"] for state in kept],
            [state["exp_avg_sq"] for state in kept],
            [],  # no largest second moments, which are AMSGrad's
            [state["step"] for state in kept],
            fused=True,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            amsgrad=False,
            beta1=self._config.betas[0],
            beta2=self._config.betas[1],
            lr=rate,
            weight_decay=self._config.weight_decay,
            eps=EPS,
            maximize=False,
        )

    def _kept(self, parameters: Iterable[nn.Parameter]) -> list[dict[str, Tensor]]:
        return [self.state.get(parameter) or self.begin(parameter) for parameter in parameters]

    def begin(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Keep of a parameter what is kept before its first step."""
        by_muon = parameter in self._hidden
        kept = {name: torch.zeros_like(parameter) for name in (MUON if by_muon else ADAMW)}
        self.state[parameter] = kept if by_muon else kept | {"step": torch.zeros((), device=parameter.device)}
        return self.state[parameter]


def matrices(module: nn.Module, trained: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """The trained parameters that are matrices of blocks, by name: neither convolutions, nor what lies outside of
    blocks, as a model's first and last layers do."""
    blocks = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, Block))
    return {name: value for name, value in trained.items() if value.ndim == 2 and name.startswith(blocks)}


class Muon:
    """Steps of matrices along their momentum, made orthogonal: all its directions count alike.

    After Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024), with Nesterov's momentum,
    and steps of AdamW's size after arXiv 2502.16982, section 2.2. Matrices of one shape are made orthogonal together,
    in numbers of `dtype`.
    """

    def __init__(
        self, trained: Mapping[str, nn.Parameter], config: MuonConfig, decay: float, dtype: torch.dtype
    ) -> None:
        self.trained = list(trained.values())
        self._parts = [next((many for end, many in JOINED.items() if name.endswith(end)), 1) for name in trained]
        self._config, self._decay, self._dtype = config, decay, dtype

    @torch.no_grad()
    def step(self, momenta: list[Tensor], factor: float, skip: Tensor, divisor: Tensor | None) -> None:
        """One step, of `factor` times the peak of the learning rate; where `skip`, (), is 1, none.

        momenta: of each matrix, which are moved along; divisor: (), what gradients are to be divided by first, if
        anything.
        """
        rate = factor * self._config.learning_rate * (1 - skip)
        ahead = self._matrices(self._moved(momenta, skip, divisor))
        targets = self._matrices(self.trained)
        torch._foreach_mul_(targets, 1 - rate * self._decay)
        for shape in dict.fromkeys(target.shape for target in targets):
            alike = [number for number, target in enumerate(targets) if target.shape == shape]
            directions = orthogonal(torch.stack([ahead[number] for number in alike]), self._dtype)
            steps = directions * (rate * RMS * max(shape) ** 0.5)
            torch._foreach_sub_([targets[number] for number in alike], list(steps))

    def _moved(self, momenta: list[Tensor], skip: Tensor, divisor: Tensor | None) -> tuple[Tensor, ...]:
        """Move the momenta towards the gradients; returns the gradients moved towards them, which is Nesterov's."""
        gradients = []
        for parameter, momentum in zip(self.trained, momenta, strict=True):
            assert parameter.grad is not None
            gradient = parameter.grad if divisor is None else parameter.grad / divisor
            gradients.append(
                torch.where(skip.bool(), momentum, gradient)
            )  # a momentum stays what it is, towards itself
        torch._foreach_lerp_(momenta, gradients, 1 - self._config.momentum)
        return torch._foreach_lerp(gradients, momenta, self._config.momentum)

    def _matrices(self, tensors: Iterable[Tensor]) -> list[Tensor]:
        """The single matrices of such tensors as the parameters are; views."""
        return [part for tensor, parts in zip(tensors, self._parts, strict=True) for part in tensor.chunk(parts)]


def orthogonal(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices (N, rows, columns) with their singular vectors, and all singular values near 1 but those of 0; fp32.

    By products alone, in numbers of `dtype`. Four polynomials that are chosen for each other, as in arXiv 2505.16932,
    come nearer to 1 than five times Keller Jordan's.
    """
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    wide = (wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)).to(dtype)  # no singular value is above 1
    for a, b, c in COEFFICIENTS:
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide if matrices.shape[1] <= matrices.shape[2] else wide.mT).float()
