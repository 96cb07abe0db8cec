"""Compiled operators: their C++ source, and once the package is installed their library."""
