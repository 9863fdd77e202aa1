"""`outbox bench`: how fast the relay is on given servers or embedded ones, next to what the two servers allow.

Knows how to make a load and what to measure it against; what is compared is measured in the same round. Must not know
anything that a user of the relay could not do, and must not be loaded by the relay or by an application.
"""
