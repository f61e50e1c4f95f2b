"""Edits of a config repo's own files, in its work tree: for commands that write what a person would.

Not here: reading a repo for what is desired (sources), or any command (cli).
"""
