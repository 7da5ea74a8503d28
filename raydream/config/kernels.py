"""The names of kernels that ``cluster.kernels`` takes; ``backend/`` has what they mean."""

KERNELS = ("auto", "ours", "reference", "numba", "cuda")
KERNEL_PACKAGES = ("tinycudann", "nerfacc", "nvdiffrast")  # which replace some of ours on an NVIDIA GPU
TINYCUDANN_WIDTHS = (16, 32, 64, 128)  # of hidden layers that its fused network has kernels for


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
