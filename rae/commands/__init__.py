"""The commands of ``python -m rae``, one file each: a docstring that teaches, ``add_arguments`` and ``run``.

They parse and print; the work is done by the modules that they import when they run.
"""
