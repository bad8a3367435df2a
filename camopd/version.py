"""The version of the package, on its own so that what writes it into files need not import the package."""

__version__ = "0.1.0"
