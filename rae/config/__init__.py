"""What a YAML says: plugins by name, arguments checked against signatures, every key with its type.

May import: nothing of the package.
"""
