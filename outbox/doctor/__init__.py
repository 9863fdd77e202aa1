"""`outbox doctor`: what is wrong at both servers and in the outbox, and what settles it.

Knows every requirement, and how each looks when it does not hold. Must not change anything, on either server.
"""
