"""`outbox doctor`: what is wrong at both servers and in the outbox, and what settles it.

Knows every requirement, and how each looks when it does not hold. Must not know a relay's memory, and must not change
anything, on either server.
"""
