"""The one list of names that settings, command line, service and page share; no torch.

What a name means stands beside it: methods in ``diffusion/methods.py``, kinds of priors in ``priors/kinds.py``.
"""

from typing import Literal, get_args

MethodName = Literal["vsd", "sds", "sjc", "csd"]
METHOD_NAMES: tuple[MethodName, ...] = get_args(MethodName)
LEARNING_METHODS: tuple[MethodName, ...] = ("vsd",)  # those whose reference is a model that learns from the renders

METHOD_WORDS: dict[MethodName, str] = {  # for a person who has to choose
    "vsd": "Variational: different and detailed",
    "sds": "Distillation: fast and smooth",
    "sjc": "Chaining: plain gradient of the score",
    "csd": "Classifier: what the words add, alone; not for exhibits",
}

RenderKind = Literal["rgb", "ccm"]
PriorKindName = Literal["diffusers", "exhibit"]

KERNELS = ("auto", "ours", "reference", "numba", "cuda")
KERNEL_PACKAGES = ("tinycudann", "nerfacc", "nvdiffrast")  # which replace some of ours on an NVIDIA GPU


def kernel_packages(kernels: str) -> tuple[str, ...]:
    """The packages that a choice of kernels names, joined by "+"; none for those of our own. ``ValueError`` for a name
    that there is not.
    """
    packages = tuple(kernels.split("+"))
    if kernels in KERNELS:
        return ()
    if set(packages) <= set(KERNEL_PACKAGES) and len(set(packages)) == len(packages):
        return packages
    raise ValueError(
        f"kernels: unknown name {kernels!r}; choose one of {', '.join(KERNELS)}, or of {', '.join(KERNEL_PACKAGES)}, "
        "of which several are joined by +"
    )


def need_cuda(kernels: str) -> bool:
    """Whether a choice of kernels can be had on an NVIDIA GPU alone."""
    return kernels == "cuda" or bool(kernel_packages(kernels))
