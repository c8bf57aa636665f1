"""The one part of the build that needs code: the compiled replay. Where no C++ compiler is, everything works without it, slower."""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

# No fused multiply-add: the compiled replay takes the same bits as the Python one.
flags = ["-O3", "-ffp-contract=off"]
sources = ["sim/native/module.cpp"]
headers = [str(file) for file in sorted(Path("sim/native").glob("*.hpp"))]
native = Pybind11Extension("sim._native", sources, depends=headers, cxx_std=17, extra_compile_args=flags, optional=True)
setup(ext_modules=[native])
