"""What pyproject.toml cannot say: the compiled operator.

It is optional: without a C++ compiler the rest is installed all the same, and torch computes what it would.
"""

from setuptools import Extension, setup

slot_operator = Extension(
    "server.adapters.native._slot_operator",
    sources=["server/adapters/native/slot_operator.cpp"],
    depends=["server/adapters/native/slot_kernels.h"],
    language="c++",
    # Vectors that are wider than the least processor's registers warn of a calling convention that nothing here uses.
    extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(ext_modules=[slot_operator])
