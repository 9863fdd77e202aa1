"""The relay: stand by, lead, and the leader's loop with its duties: read, route, send, settle, mark, purge.

Knows when things are done and in which order; one coroutine decides. Must not know SQL or nats-py's names, and leaves
to the core what an answer means and what a stream holds.
"""
