"""What pyproject.toml cannot say: the compiled operators.

They are optional: without a C++ compiler the rest is installed all the same, and torch computes what they would.
"""

from glob import glob

from setuptools import Extension, setup

operators = Extension(
    "server.native._operators",
    sources=["server/native/operators.cpp"],
    depends=sorted(glob("server/native/*.h")),
    language="c++",
    # Vectors that are wider than the least processor's registers warn of a calling convention that nothing here uses.
    extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-Wno-psabi"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(ext_modules=[operators])
