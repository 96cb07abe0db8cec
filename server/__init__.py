"""MHR Server: one backbone, a learned inventory of adapters, and tasks that are small routings over it."""

__version__ = "0.1.0"
