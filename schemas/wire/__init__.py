"""What crosses process boundaries through Redis: msgpack of msgspec structs, each with a version.

A reader ignores fields it does not know and refuses a version it does not know.
msgspec rather than pydantic, because routers decode tables of thousands of replicas while they serve.
"""
