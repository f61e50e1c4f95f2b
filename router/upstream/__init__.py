"""Connections to engines: HTTP/1.1 on asyncio protocols, pooled; nothing of requests or routing."""
