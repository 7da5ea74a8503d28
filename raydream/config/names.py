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

RenderKind = Literal["rgb", "normal", "ccm"]
PriorKindName = Literal["diffusers", "exhibit"]
