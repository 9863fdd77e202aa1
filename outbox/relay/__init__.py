"""The relay: stand by, lead, and the leader's loop with its duties: read, route, send, settle, mark.

Knows when things are done and in which order; one coroutine decides. Must not know SQL, nats-py's names, or how a
decision is reached: that is core's.
"""
