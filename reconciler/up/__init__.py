"""`detoserve up`: everything on this machine, from one config repo, and nothing left when it ends.

Starts an embedded Valkey, a router and an agent beside the reconciler's own loop. Not here: the loop itself
(loop), or how engines run (backends.local).
"""
