"""Connections of clients: HTTP/1.1 on asyncio protocols, up to a whole request. Not here: answering it (exchange)."""
