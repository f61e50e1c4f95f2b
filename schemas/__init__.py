"""The YAML kinds (pydantic) and the wire formats (msgspec) that every part shares.

No I/O happens here, save that `json_schema` and `reference` write their files when asked to, and
nothing here imports reconciler, router or agent.
"""
