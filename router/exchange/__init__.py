"""One request, from its last byte read to the end of its answer, as a state machine.

Nothing waits in the common case: a request is authenticated, routed and written to an engine in the
call that read it, and the answer's bytes go on in the calls that read them. Only what must wait (a
new connection, a body to inflate) is a task. Its stages build on one another, one file each:

    stage     what all of them share
    asked     who asks for what, and the body as its engines get it
    admitted  limits, queues, functions that sleep
    chosen    which replica, and the record of why
    attempts  sent, and sent again
    exchange  delivered, metered, ended

The decisions are core's; the bytes go by relay. Not here: listening (downstream).
"""

from router.exchange.exchange import Exchange

__all__ = ["Exchange"]
