"""Decisions about transactions, as values: what to plan, what to send, what an answer means, what a stream holds.

Knows the rules of the promises, ADR-50's included. Must not know a clock, a socket, a database or an event loop: values
in, values out, so that every rule is proven by property tests.
"""
