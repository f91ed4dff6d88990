"""Stands before the installed torchvision, whose operators are built for CUDA and cannot be loaded beside a CPU torch.

Only its Python is needed, and that asks for the operators by name. So this declares the names and then becomes the
installed package.
"""

import os
import sys
from importlib.machinery import PathFinder

from torch.library import Library

operators = Library("torchvision", "DEF")
for operator in ("nms", "qnms"):
    operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

placeholders = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
installed = PathFinder.find_spec("torchvision", [p for p in sys.path if os.path.abspath(p or ".") != placeholders])
__path__ = list(installed.submodule_search_locations)
__file__ = installed.origin
exec(compile(installed.loader.get_source("torchvision"), __file__, "exec"), globals())
