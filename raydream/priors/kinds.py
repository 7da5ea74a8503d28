"""Kinds of priors, and the one place that chooses among them."""

from raydream.config.prior import PriorConfig
from raydream.priors.protocol import PriorKind


def prior_kind(config: PriorConfig) -> PriorKind:
    """The kind that a run asks for."""
    match config.kind:
        case "exhibit":
            from raydream.priors.exhibit import ExhibitPrior  # each kind brings libraries of its own

            return ExhibitPrior(config)
        case "diffusers":
            from raydream.priors.diffusers_folder import DiffusersPrior

            return DiffusersPrior(config)
