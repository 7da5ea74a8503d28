"""The methods of score distillation: from what the models said of a noisy render to the gradient by its latent.

A method is one pure function and one row of ``METHODS``; its name stands in ``config/names.py``. Legend as in
``guidance.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from raydream.config.names import MethodName
from raydream.diffusion import guidance
from raydream.types import Latents, PerView


@dataclass(frozen=True)
class Eps:
    """What is known of a batch of views, noise by noise: the frozen prior's answers, the reference's, the drawn noise.

    ``negative`` is None where nobody asked for it (guidance at scale 1), ``reference`` where nothing is learned.
    ``guided`` is the prior under classifier-free guidance.
    """

    guided: Latents
    negative: Latents | None
    reference: Latents | None
    noise: Latents
    z_0: Latents
    abar_t: Float[Tensor, " view"]


@dataclass(frozen=True)
class Method:
    """``gradient`` takes what the models said and w(t). ``needs_negative``: also where guidance does not ask for it."""

    gradient: Callable[[Eps, PerView], Latents]
    needs_negative: bool = False


def sds(eps: Eps, w_t: PerView) -> Latents:
    """Score distillation sampling: the reference is the drawn noise (DreamFusion eq. 3)."""
    return guidance.distillation_gradient(eps.guided, eps.noise, w_t)


def vsd(eps: Eps, w_t: PerView) -> Latents:
    """Variational score distillation: the reference has learned what the renders look like (ProlificDreamer eq. 9)."""
    assert eps.reference is not None
    return guidance.distillation_gradient(eps.guided, eps.reference, w_t)


def sjc(eps: Eps, w_t: PerView) -> Latents:
    """Score Jacobian chaining with variance reduction; its weight is its own (arXiv 2212.00774)."""
    return guidance.sjc_gradient(eps.guided, eps.z_0, eps.noise, eps.abar_t)


def csd(eps: Eps, w_t: PerView) -> Latents:
    """Classifier score distillation: what the text adds, alone, times the guidance scale (arXiv 2310.19415, eq. 7)."""
    assert eps.negative is not None
    return guidance.distillation_gradient(eps.guided, eps.negative, w_t)


METHODS: dict[MethodName, Method] = {
    "vsd": Method(vsd),
    "sds": Method(sds),
    "sjc": Method(sjc),
    "csd": Method(csd, needs_negative=True),
}
