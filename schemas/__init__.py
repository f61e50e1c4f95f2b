"""The YAML kinds (pydantic) and the wire formats (msgspec) that every part shares.

No I/O happens here, and nothing here imports reconciler, router or agent.
"""
