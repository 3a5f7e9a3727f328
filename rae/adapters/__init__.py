"""What a library needs to run on newer releases of others, a file for each such library.

Each entry names the release that needs it; a test fails once it no longer does.

May import: nothing of the package.
"""
