"""Train Representation Autoencoders on MosaicML Composer."""

__version__ = "0.1.0"
